"""Swap against recompute: what one preemption costs by block size and prompt length, where they cross, end to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.lines import Line2D

from uvm_kv.report.drawing import Look, handle, line_look, log_scale, log_ticks
from uvm_kv.report.repeats import REPEATS
from uvm_kv.report.statistics import MIN_REPEATS, judge
from uvm_kv.report.style import PAGE_IN, SMALL, SPARE
from uvm_kv.report.verdict import MEASURED
from uvm_kv.study.base import Drawn, Study
from uvm_kv.study.kit import on_card, panel_title, percent, served, span
from uvm_kv.study.preemption_costs import (
    CALL_A_PIECE,
    COUNTS_WITHIN,
    RATIO,
    best_covered,
    by_block_size,
    costs,
    crossings,
    sound_points,
)

WITHIN = 1.2
"""vLLM (SOSP'23), section 7.3: recompute is never more than 20 % above swapping's latency."""
COLUMNS = ["model", "hardware", "prompt_tokens", "output_tokens", "block_size", "preemptions_swap",
           "preemptions_recompute", "is_comparable", "swap_ms", "recompute_ms", "swap_call_a_piece_ms", RATIO,
           CALL_A_PIECE, "cheaper", "crossings", "crossings_call_a_piece", "duration_swap_s", "duration_recompute_s",
           "duration_ratio", "num_runs_swap", "num_runs_recompute"]  # fmt: skip
COSTS = {
    "recompute_ms": ("recompute", line_look("#000000", "-", "s")),
    "swap_ms": ("swap, batched copies", line_look(SPARE[0], "-", "^")),
    "swap_call_a_piece_ms": ("swap, a copy call a piece (closed form)", line_look(SPARE[0], ":", "v")),
}
PROMPT_LOOKS = [line_look(colour, "-", marker) for colour, marker in zip(SPARE[1:7], "oPXD*h", strict=True)]
CROSSOVER = line_look("black", "", "o", markerfacecolor="none", markersize=6)
EVEN: Look = {"color": "black", "linewidth": 0.7, "zorder": 0}


def draw(runs: pd.DataFrame, _: Sequence[dict[str, Any]]) -> Drawn:
    """One preemption's cost at one prompt length; the ratio of the two at all; the whole run."""
    table = costs(runs)
    prompts = sorted(table["prompt_tokens"].unique())
    looks = {prompt: PROMPT_LOOKS[i % len(PROMPT_LOOKS)] for i, prompt in enumerate(prompts)}
    figure, axes = plt.subplots(1, 3, figsize=(PAGE_IN, 3.0))
    with_both = table.dropna(subset=[RATIO])
    middle = best_covered(sound_points(table))
    _draw_cost(axes[0], with_both[with_both["prompt_tokens"] == middle])
    _draw_ratio(axes[1], with_both, looks)
    _draw_whole(axes[2], table, looks)
    titles = (f"{panel_title(table)}\none preemption, prompt {middle}", "recompute over swap")
    for axis, title in zip(axes, (*titles, "recompute over swap, whole run"), strict=True):
        axis.set_title(title)
        log_ticks(axis.xaxis, sorted(table["block_size"].unique()))
        axis.set_xlabel("tokens per block")
    handles = _legend(looks, any_unsound=not with_both["is_comparable"].all())
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    return Drawn(figure, table[COLUMNS], _claims(table, served(runs, ["output"])))


def _draw_cost(axis: Any, part: pd.DataFrame) -> None:
    for column, (_, look) in COSTS.items():
        _points(axis, part, column, look)
    log_scale(axis.yaxis, minor="235")
    axis.set_ylabel("cost (ms)")


def _points(axis: Any, part: pd.DataFrame, column: str, look: Look) -> None:
    """A line through the comparable points; the others as open markers beside it."""
    sound = part["is_comparable"]
    axis.plot(part["block_size"][sound], part[column][sound], **look)
    if not sound.all():
        open_ = look | {"linestyle": "", "markerfacecolor": "white", "markersize": 4}
        axis.plot(part["block_size"][~sound], part[column][~sound], **open_)


def _draw_ratio(axis: Any, table: pd.DataFrame, looks: dict[int, Look]) -> None:
    """Above 1 swap is cheaper. Solid: as simulated; dotted: a call a piece; circled: where they cross."""
    for prompt, look in looks.items():
        part = table[table["prompt_tokens"] == prompt]
        for column, line in ((RATIO, "-"), (CALL_A_PIECE, ":")):
            _points(axis, part, column, look | {"linestyle": line})
            for x in crossings(*by_block_size(sound_points(part), column)):
                axis.plot(x, 1, zorder=4, **CROSSOVER)
    axis.axhline(1, **EVEN)
    log_scale(axis.yaxis, minor="235")
    axis.set_ylabel("cost ratio (> 1: swap is cheaper)")


def _draw_whole(axis: Any, table: pd.DataFrame, looks: dict[int, Look]) -> None:
    for prompt, look in looks.items():
        part = table[table["prompt_tokens"] == prompt]
        axis.plot(part["block_size"], part["duration_ratio"], **look)
    axis.axhline(1, **EVEN)
    axis.axhline(WITHIN, linestyle=(0, (4, 3)), **EVEN)
    axis.annotate("vLLM's bound, +20 %", (0.98, WITHIN), (0, 2), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", fontsize=SMALL)  # fmt: skip
    axis.set_ylabel("time to serve all, ratio")


def _legend(looks: dict[int, Look], *, any_unsound: bool) -> list[Line2D]:
    handles = [handle(name, **look) for name, look in COSTS.values()] + [handle("crossover", **CROSSOVER)]
    if any_unsound:
        open_ = line_look("black", "", "D", markerfacecolor="white", markersize=4)
        handles.append(handle("preempt unequally often", **open_))
    return handles + [handle(f"prompt {prompt}", **look) for prompt, look in looks.items()]


def _claims(table: pd.DataFrame, scope: str) -> list[str]:
    """`scope`: what was served."""
    both, sound = table.dropna(subset=[RATIO]), sound_points(table)
    unclear = int((sound["cheaper"] == "AMBIGUOUS").sum())
    doubt = f"; which is the cheaper one is AMBIGUOUS at {unclear} of {len(sound)} points" if unclear else ""
    claims = [
        f"{on_card(table)}: a preemption by recompute costs {sound[RATIO].min():.2g} to {sound[RATIO].max():.2g} times "
        f"one by swap with batched copies, over prompts of {span(sound['prompt_tokens'])} tokens and blocks of "
        f"{span(sound['block_size'])} ({scope}); one of {_example(sound)}{doubt}."
    ]
    if len(idle := table[table[RATIO].isna()]):
        claims.append(
            f"{len(idle)} of {len(table)} points preempted nothing in one of the two and say nothing of its cost."
        )
    if len(unequal := both[~both["is_comparable"]]):
        each = "; ".join(
            f"prompt {p['prompt_tokens']}, block {p['block_size']}: {p['preemptions_swap']:.0f} by swap, "
            f"{p['preemptions_recompute']:.0f} by recompute"
            for _, p in unequal.iterrows()
        )
        claims.append(
            f"At {len(unequal)} of {len(both)} points the two preempt unequally often, by more than "
            f"{COUNTS_WITHIN:.0%} ({each}): what one preemption costs is left out there (open markers)."
        )
    pieces = "with a copy call for the K and the V of each block and layer"
    claims += [_crossover(sound, RATIO, "with batched copies (as run)"), _crossover(sound, CALL_A_PIECE, pieces)]
    claims += [_small_blocks(sound), _whole_run(table)]
    above = sound[sound[CALL_A_PIECE] > WITHIN]
    claims.append(
        f"For the preemption alone, with a call a piece, recompute stays within 20 % of swapping at "
        f"{len(sound) - len(above)} of {len(sound)} points"
        + ("." if above.empty else f"; beyond it blocks are of {span(above['block_size'])} tokens.")
    )
    return claims


def _whole_run(table: pd.DataFrame) -> str:
    worst = table.sort_values("duration_ratio", kind="stable").iloc[-1]
    where = f"prompt {worst['prompt_tokens']}, block {worst['block_size']}"
    bound = [WITHIN * x for x in worst[f"duration_s{REPEATS}_swap"]]
    word = judge(worst[f"duration_s{REPEATS}_recompute"], bound, 0.0, measured=worst["origin"] == MEASURED).word
    holds = {"HIGHER": "does not hold", "AMBIGUOUS": "is AMBIGUOUS"}.get(word, "holds")
    few = min(worst["num_runs_swap"], worst["num_runs_recompute"]) < MIN_REPEATS
    why = f", for which it takes {MIN_REPEATS} repeats" if word == "AMBIGUOUS" and few else ""
    return (
        f"Over a whole run recompute takes at most {percent(worst['duration_ratio'] - 1)} more time than swap "
        f"({where}): vLLM's bound of 20 % {holds} here end to end{why}."
    )


def _example(both: pd.DataFrame) -> str:
    part = both[both["prompt_tokens"] == best_covered(both)]
    point = part.iloc[(len(part) - 1) // 2]
    return (
        f"prompt {point['prompt_tokens']} and block {point['block_size']} {point['recompute_ms']:.3g} ms against "
        f"{point['swap_ms']:.3g} ms"
    )


def _crossover(both: pd.DataFrame, column: str, how: str) -> str:
    found: list[str] = []
    always: dict[str, list[str]] = {}
    for prompt, part in both.groupby("prompt_tokens", sort=True):
        sizes, ratios = by_block_size(part, column)
        if at := crossings(sizes, ratios):
            cheaper = "recompute" if ratios[0] < 1 else "swap"
            places = " and ".join(f"{x:.3g}" for x in at)
            found.append(f"{places} tokens for prompt {prompt} (below the first {cheaper} is cheaper)")
        else:
            always.setdefault("swap" if min(ratios) >= 1 else "recompute", []).append(str(prompt))
    rest = [f"{who} is cheaper at all blocks for prompts {', '.join(prompts)}" for who, prompts in always.items()]
    return (
        f"Crossover over the block size, {how}: " + "; ".join([*(found or ["no crossover in the range"]), *rest]) + "."
    )


def _small_blocks(both: pd.DataFrame) -> str:
    """Whether swapping is bad at small blocks, as vLLM's paper has it."""
    sizes = sorted(both["block_size"].unique())
    part = both[both["prompt_tokens"] == best_covered(both)].sort_values("block_size")
    first, last = part.iloc[0], part.iloc[-1]
    if len(part) < 2:
        return f"Only blocks of {sizes[0]} tokens were run: nothing can be said of small blocks."
    batched, pieces = (first[name] > WITHIN * last[name] for name in ("swap_ms", "swap_call_a_piece_ms"))
    bad = f"is {'' if batched or pieces else 'not '}bad at small blocks"
    as_published = ", as in vLLM's paper" if batched or pieces else ""
    only = "" if batched or not pieces else ", only where each piece has a call of its own"
    return (
        f"Prompt {first['prompt_tokens']}, block {first['block_size']} against block {last['block_size']}: a swap "
        f"takes {first['swap_ms']:.3g} against {last['swap_ms']:.3g} ms with batched copies and "
        f"{first['swap_call_a_piece_ms']:.3g} against {last['swap_call_a_piece_ms']:.3g} ms with a call a piece: "
        f"swapping {bad}{as_published}{only}."
    )


STUDY = Study(
    name="preemption",
    title="Preemption: swap against recompute",
    question="What does a preemption cost by swapping the KV out, or by computing it again; where do they cross?",
    how_to_read=(
        "When the card is full, the latest sequence is preempted: its KV goes to host memory and comes back (swap), or "
        "is dropped and computed again (recompute). Left, the cost of one preemption. In the middle, how many times a "
        "swap recompute costs; below the black line recompute is the cheaper one, and a circle is where they cross. "
        "Open markers are no costs: there the two preempted unequally often, so that their runs differ in more. "
        "Solid lines are the simulated runs, whose copies go out in batches; dotted lines add the cost of one copy "
        "call for the K and the V of every block and layer, as engines did that copy piece by piece. On the right, "
        "what is left of it over a whole run, where most of the time goes into other work."
    ),
    factors=("model", "mechanism", "prompt_tokens", "block_size"),
    draw=draw,
)
