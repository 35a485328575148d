"""Swap against recompute: what one preemption costs by block size and prompt length, where they cross, end to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from uvm_kv.report.repeats import REPEATS, medians, one_of_each
from uvm_kv.report.statistics import MIN_REPEATS, judge
from uvm_kv.report.style import PAGE_IN, SPARE
from uvm_kv.report.verdict import INDIFFERENT, MEASURED
from uvm_kv.study.base import Drawn, Study
from uvm_kv.study.kit import percent, served

SWAP, RECOMPUTE = "pinned_swap", "device_recompute"
KEY = ["prompt_tokens", "block_size"]
CALL_A_PIECE = "recompute_over_swap_call_a_piece"
WITHIN = 1.2
"""vLLM (SOSP'23), section 7.3: recompute is never more than 20 % above swapping's latency."""
COUNTS_WITHIN = 0.05
"""Of the larger of the two numbers of preemptions: where they differ by more, the two runs did not do the same work,
and what their times differ by is not the cost of preempting in two ways."""
_NUMBERS = ("duration_s", "stall_s", "preemptions", "h2d_bytes", "d2h_bytes")
COLUMNS = (
    *("model", "hardware", "prompt_tokens", "output_tokens", "block_size", "preemptions_swap", "preemptions_recompute"),
    *("is_comparable", "swap_ms", "recompute_ms", "swap_call_a_piece_ms", "recompute_over_swap"),
    *("recompute_over_swap_call_a_piece", "cheaper", "crossings", "crossings_call_a_piece"),
    *("duration_swap_s", "duration_recompute_s", "duration_ratio", "num_runs_swap", "num_runs_recompute"),
)


def draw(runs: pd.DataFrame, failures: Sequence[dict[str, Any]]) -> Drawn:
    """One preemption's cost at one prompt length; the ratio of the two at all; the whole run."""
    del failures
    table = _table(runs)
    prompts = sorted(table["prompt_tokens"].unique())
    figure, (cost, ratio, whole) = plt.subplots(1, 3, figsize=(PAGE_IN, 3.0))
    with_both = table.dropna(subset=["recompute_over_swap"])
    middle = _best_covered(_sound(table))
    _draw_cost(cost, with_both[with_both["prompt_tokens"] == middle])
    cost.set_title(f"{table['model'].iloc[0]} on {table['hardware'].iloc[0]}\none preemption, prompt {middle}")
    _draw_ratio(ratio, with_both, prompts)
    ratio.set_title("recompute over swap")
    _draw_whole(whole, table, prompts)
    whole.set_title("recompute over swap, whole run")
    for axis in (cost, ratio, whole):
        sizes = sorted(table["block_size"].unique())
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("tokens a block")
    figure.legend(
        handles=_legend(prompts, any_unsound=not with_both["is_comparable"].all()), loc="outside upper center", ncols=4
    )
    return Drawn(figure, table[list(COLUMNS)], _claims(table, served(runs, ["output"])))


def _table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a prompt length and block size, both ways of preemption beside each other.

    Swap costs the time that the compute stream waited for its copies. What the run with recompute takes beyond the run
    with swap, and beyond those waits, is recompute's where both preempted (nearly) as often: only then do the two
    differ in nothing else (`is_comparable`, COUNTS_WITHIN).
    """
    if absent := sorted({SWAP, RECOMPUTE} - set(runs["mechanism"])):
        raise ValueError(f"preemption: no run of {' or '.join(absent)}; it compares {SWAP} with {RECOMPUTE}")
    one_of_each(runs, ("model", "hardware", "origin"), "preemption")
    usable = runs.dropna(subset=["prompt_tokens", *_NUMBERS]).copy()
    usable[KEY] = usable[KEY].astype(int)
    usable[list(_NUMBERS)] = usable[list(_NUMBERS)].astype(float)
    try:
        usable = medians(usable, ["mechanism", *KEY], keep=["duration_s", "stall_s"])
    except ValueError as error:
        raise ValueError(f"preemption: {error}") from None
    usable["bytes_a_call"] = [_piece_bytes(run) for _, run in usable.iterrows()]
    usable["call_us"] = [float(setting["hardware.link.copy_call_us"]) for setting in usable["setting"]]
    columns = [*KEY, *_NUMBERS, "bytes_a_call", "call_us", "num_runs", f"duration_s{REPEATS}", f"stall_s{REPEATS}"]
    swap = usable.loc[usable["mechanism"] == SWAP, [*columns, "model", "hardware", "origin", "output_tokens"]]
    recompute = usable.loc[usable["mechanism"] == RECOMPUTE, columns]
    both = swap.merge(recompute, on=KEY, suffixes=("_swap", "_recompute")).sort_values(KEY).reset_index(drop=True)
    if both.empty:
        raise ValueError(f"preemption: {SWAP} and {RECOMPUTE} have no prompt_tokens and block_size in common")
    each = both["preemptions_swap"].where(both["preemptions_swap"] > 0)
    again = both["preemptions_recompute"].where(both["preemptions_recompute"] > 0)
    both["swap_ms"] = 1e3 * both["stall_s_swap"] / each
    both["recompute_ms"] = 1e3 * (both["duration_s_recompute"] - both["duration_s_swap"] + both["stall_s_swap"]) / again
    calls = (both["h2d_bytes_swap"] + both["d2h_bytes_swap"]) / both["bytes_a_call_swap"] / each
    both["swap_call_a_piece_ms"] = both["swap_ms"] + 1e-3 * calls * both["call_us_swap"]
    both["recompute_over_swap"] = both["recompute_ms"] / both["swap_ms"]
    both["recompute_over_swap_call_a_piece"] = both["recompute_ms"] / both["swap_call_a_piece_ms"]
    both["duration_swap_s"], both["duration_recompute_s"] = both["duration_s_swap"], both["duration_s_recompute"]
    both["duration_ratio"] = both["duration_recompute_s"] / both["duration_swap_s"]
    if both["recompute_over_swap"].isna().all():
        raise ValueError("preemption: no run preempted anything; give it less device KV or longer outputs")
    counts = both[["preemptions_swap", "preemptions_recompute"]]
    both["is_comparable"] = counts.max(axis=1) - counts.min(axis=1) <= COUNTS_WITHIN * counts.max(axis=1)
    if _sound(both).empty:
        raise ValueError(
            f"preemption: at no point the two preempt as often, within {COUNTS_WITHIN:.0%}; their times say nothing"
        )
    both["cheaper"] = [_cheaper(point) for _, point in both.iterrows()]
    for column, told in (("recompute_over_swap", "crossings"), (CALL_A_PIECE, "crossings_call_a_piece")):
        at = {prompt: crossings(*_line(part, column)) for prompt, part in _sound(both).groupby("prompt_tokens")}
        both[told] = [" ".join(f"{x:.4g}" for x in at.get(prompt, [])) for prompt in both["prompt_tokens"]]
    return both


def _sound(table: pd.DataFrame) -> pd.DataFrame:
    """Points whose times say what a preemption costs in either way."""
    return table[table["is_comparable"] & table["recompute_over_swap"].notna()]


def _line(part: pd.DataFrame, column: str) -> tuple[list[float], list[float]]:
    part = part.sort_values("block_size")
    return part["block_size"].tolist(), part[column].tolist()


def _cheaper(point: pd.Series[Any]) -> str:
    """swap, recompute or neither, AMBIGUOUS where repeats do not decide, nothing where the two are not comparable."""
    if not point["is_comparable"] or pd.isna(point["recompute_over_swap"]):
        return ""
    rest = point["duration_s_swap"] - point["stall_s_swap"]
    again = [(x - rest) / point["preemptions_recompute"] for x in point[f"duration_s{REPEATS}_recompute"]]
    swaps = [x / point["preemptions_swap"] for x in point[f"stall_s{REPEATS}_swap"]]
    if min(*again, *swaps) <= 0:
        return "AMBIGUOUS"
    word = judge(again, swaps, INDIFFERENT, measured=point["origin"] == MEASURED).word
    return {"HIGHER": "swap", "LOWER": "recompute", "SAME": "neither"}.get(word, word)


def _piece_bytes(run: pd.Series[Any]) -> float:
    """K, or V, of one block in one layer."""
    setting = run["setting"]
    values = int(run["block_size"]) * setting["model.num_kv_heads"] * setting["model.head_dim"]
    return float(values * run["kv_bits"] / 8)


def crossings(x: Sequence[float], ratio: Sequence[float]) -> list[float]:
    """Where `ratio` (positive, at ascending `x`) passes through 1, between neighbours interpolated linearly in the
    logarithms of both."""
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(ratio, float))
    found = []
    for x0, x1, y0, y1 in zip(log_x, log_x[1:], log_y, log_y[1:], strict=False):
        if (y0 < 0) != (y1 < 0):
            found.append(float(np.exp(x0 - y0 * (x1 - x0) / (y1 - y0))))
    return found


def _best_covered(table: pd.DataFrame) -> int:
    """The prompt length with most block sizes; of several the middle one."""
    counts = table["prompt_tokens"].value_counts().sort_index()
    full = counts[counts == counts.max()].index
    return int(full[(len(full) - 1) // 2])


_COSTS = {
    "recompute_ms": ("recompute", "#000000", "-", "s"),
    "swap_ms": ("swap, batched copies", SPARE[0], "-", "^"),
    "swap_call_a_piece_ms": ("swap, a copy call a piece (closed form)", SPARE[0], ":", "v"),
}
_PROMPTS = ((SPARE[1], "o"), (SPARE[2], "P"), (SPARE[3], "X"), (SPARE[4], "D"), (SPARE[5], "*"), (SPARE[6], "h"))


def _draw_cost(axis: Any, part: pd.DataFrame) -> None:
    for column, (_, colour, line, marker) in _COSTS.items():
        _points(axis, part, column, color=colour, linestyle=line, marker=marker)
    axis.set_yscale("log")
    axis.set_ylabel("cost (ms)")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:g}" if f"{v:e}"[0] in "235" else ""))


def _points(axis: Any, part: pd.DataFrame, column: str, **look: Any) -> None:
    """A line through the comparable points; the others as open markers beside it."""
    sound = part["is_comparable"]
    axis.plot(part["block_size"][sound], part[column][sound], **look)
    if not sound.all():
        open_ = look | {"linestyle": "", "markerfacecolor": "white", "markersize": 4}
        axis.plot(part["block_size"][~sound], part[column][~sound], **open_)


def _draw_ratio(axis: Any, table: pd.DataFrame, prompts: Sequence[int]) -> None:
    """Above 1 swap is cheaper. Solid: as simulated; dotted: a call a piece; circled: where they cross."""
    for i, prompt in enumerate(prompts):
        part = table[table["prompt_tokens"] == prompt]
        colour, marker = _PROMPTS[i % len(_PROMPTS)]
        for column, line in (("recompute_over_swap", "-"), (CALL_A_PIECE, ":")):
            _points(axis, part, column, color=colour, linestyle=line, marker=marker)
            for x in crossings(*_line(_sound(part), column)):
                axis.plot(x, 1, marker="o", markersize=6, color="black", markerfacecolor="none", zorder=4)
    axis.axhline(1, color="black", linewidth=0.7, zorder=0)
    axis.set_yscale("log")
    axis.set_ylabel("cost ratio (> 1: swap is cheaper)")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:g}" if f"{v:.0e}"[0] in "235" else ""))


def _draw_whole(axis: Any, table: pd.DataFrame, prompts: Sequence[int]) -> None:
    for i, prompt in enumerate(prompts):
        part = table[table["prompt_tokens"] == prompt]
        colour, marker = _PROMPTS[i % len(_PROMPTS)]
        axis.plot(part["block_size"], part["duration_ratio"], color=colour, marker=marker)
    axis.axhline(1, color="black", linewidth=0.7, zorder=0)
    axis.axhline(WITHIN, color="black", linewidth=0.7, linestyle=(0, (4, 3)), zorder=0)
    axis.annotate("vLLM's bound, +20 %", (0.98, WITHIN), (0, 2), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", fontsize=6)  # fmt: skip
    axis.set_ylabel("time to serve all, ratio")


def _legend(prompts: Sequence[int], *, any_unsound: bool) -> list[Line2D]:
    lines = [
        Line2D([], [], color=colour, linestyle=line, marker=marker, label=name)
        for name, colour, line, marker in _COSTS.values()
    ]
    lines.append(
        Line2D([], [], linestyle="", color="black", marker="o", markerfacecolor="none", markersize=6, label="crossover")
    )
    if any_unsound:
        lines.append(Line2D([], [], linestyle="", color="black", marker="D", markerfacecolor="white", markersize=4,
                            label="preempt unequally often"))  # fmt: skip
    for i, prompt in enumerate(prompts):
        colour, marker = _PROMPTS[i % len(_PROMPTS)]
        lines.append(Line2D([], [], color=colour, marker=marker, label=f"prompt {prompt}"))
    return lines


def _claims(table: pd.DataFrame, scope: str) -> list[str]:
    """`scope`: what was served."""
    both, sound = table.dropna(subset=["recompute_over_swap"]), _sound(table)
    model = f"{table['model'].iloc[0]} on a {table['origin'].iloc[0]} {table['hardware'].iloc[0]}"
    low, high = sound["recompute_over_swap"].min(), sound["recompute_over_swap"].max()
    unclear = int((sound["cheaper"] == "AMBIGUOUS").sum())
    doubt = f"; which is the cheaper one is AMBIGUOUS at {unclear} of {len(sound)} points" if unclear else ""
    claims = [
        f"{model}: a preemption by recompute costs {low:.2g} to {high:.2g} times one by swap with batched copies, over "
        f"prompts of {_range(sound['prompt_tokens'])} tokens and blocks of {_range(sound['block_size'])} "
        f"({scope}); one of "
        f"{_example(sound)}{doubt}."
    ]
    if len(idle := table[table["recompute_over_swap"].isna()]):
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
    for column, how in (
        ("recompute_over_swap", "with batched copies (as run)"),
        (CALL_A_PIECE, "with a copy call for the K and the V of each block and layer"),
    ):
        claims.append(_crossover(sound, column, how))
    claims.append(_small_blocks(sound))
    claims.append(_whole_run(table))
    above = sound[sound[CALL_A_PIECE] > WITHIN]
    claims.append(
        f"For the preemption alone, with a call a piece, recompute stays within 20 % of swapping at "
        f"{len(sound) - len(above)} of {len(sound)} points"
        + ("." if above.empty else f"; beyond it blocks are of {_range(above['block_size'])} tokens.")
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


def _range(values: pd.Series[Any]) -> str:
    return f"{values.min()}" if values.min() == values.max() else f"{values.min()} to {values.max()}"


def _example(both: pd.DataFrame) -> str:
    part = both[both["prompt_tokens"] == _best_covered(both)]
    point = part.iloc[(len(part) - 1) // 2]
    return (
        f"prompt {point['prompt_tokens']} and block {point['block_size']} {point['recompute_ms']:.3g} ms against "
        f"{point['swap_ms']:.3g} ms"
    )


def _crossover(both: pd.DataFrame, column: str, how: str) -> str:
    found: list[str] = []
    always: dict[str, list[str]] = {}
    for prompt, part in both.groupby("prompt_tokens", sort=True):
        part = part.sort_values("block_size")
        if at := crossings(part["block_size"].tolist(), part[column].tolist()):
            cheaper = "recompute" if part[column].iloc[0] < 1 else "swap"
            places = " and ".join(f"{x:.3g}" for x in at)
            found.append(f"{places} tokens for prompt {prompt} (below the first {cheaper} is cheaper)")
        else:
            always.setdefault("swap" if part[column].min() >= 1 else "recompute", []).append(str(prompt))
    rest = [f"{who} is cheaper at all blocks for prompts {', '.join(prompts)}" for who, prompts in always.items()]
    return (
        f"Crossover over the block size, {how}: " + "; ".join([*(found or ["no crossover in the range"]), *rest]) + "."
    )


def _small_blocks(both: pd.DataFrame) -> str:
    """Whether swapping is bad at small blocks, as vLLM's paper has it."""
    sizes = sorted(both["block_size"].unique())
    part = both[both["prompt_tokens"] == _best_covered(both)].sort_values("block_size")
    first, last = part.iloc[0], part.iloc[-1]
    if len(part) < 2:
        return f"Only blocks of {sizes[0]} tokens were run: nothing can be said of small blocks."
    batched = first["swap_ms"] > WITHIN * last["swap_ms"]
    pieces = first["swap_call_a_piece_ms"] > WITHIN * last["swap_call_a_piece_ms"]
    line = (
        f"Prompt {first['prompt_tokens']}, block {first['block_size']} against block {last['block_size']}: a swap "
        f"takes {first['swap_ms']:.3g} against {last['swap_ms']:.3g} ms with batched copies and "
        f"{first['swap_call_a_piece_ms']:.3g} against {last['swap_call_a_piece_ms']:.3g} ms with a call a piece: "
    )
    if batched:
        return line + "swapping is bad at small blocks, as in vLLM's paper."
    if pieces:
        return (
            line + "swapping is bad at small blocks, as in vLLM's paper, only where each piece has a call of its own."
        )
    return line + "swapping is not bad at small blocks."


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
