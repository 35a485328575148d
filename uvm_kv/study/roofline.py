"""Llama-2-7B under the roof of two cards: prefill and decode, by batch and sequence length; open: does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from uvm_kv.report.drawing import Look, draw_roof, handle, line_look, log_scale, log_ticks, plain_numbers
from uvm_kv.report.style import PAGE_IN, SPARE
from uvm_kv.study.base import Drawn, Study

ROWS = {
    ("a6000", "llm_viewer"): "RTX A6000, LLM-Viewer's counting",
    ("rtx3090", "exact"): "RTX 3090, exact counting",
}
"""What is drawn: the published card as its authors count, the card of the study as the simulator charges it."""
PART_SEQUENCE = 2048
"""Tokens a sequence where operators and batches are looked at: those of the published table."""
LINES = (1, 8, 32, 128)
"""Batches that have a line over the sequence lengths."""
FP16 = "w16a16kv16"
PUBLISHED_MS = {
    ("prefill", 1, FP16): 226.88,
    ("decode", 1, FP16): 18.637,
    ("decode", 8, FP16): 28.653,
    ("decode", 1, "w16a16kv8"): 17.938,
    ("decode", 1, "w16a16kv4"): 17.588,
    ("decode", 1, "w8a16kv16"): 10.034,
    ("decode", 1, "w4a16kv16"): 5.732,
    ("decode", 1, "w8a8kv8"): 9.318,
    ("decode", 1, "w4a16kv4"): 4.683,
}
"""Milliseconds of a step of 2048 tokens on an RTX A6000: LLM-Viewer ("LLM Inference Unveiled"), its table 1 and the
same code with other bits."""
AGREES = 0.001
COLUMNS = ["hardware", "model", "counting", "stage", "bits", "batch_size", "sequence_length", "total_ms", "intensity",
           "attained_ops_per_s", "total_ops", "total_bytes", "parts.projections.ms", "parts.projections.intensity",
           "parts.projections.attained_ops_per_s", "parts.attention.ms", "parts.attention.intensity",
           "parts.attention.attained_ops_per_s", "parts.head.ms", "parts.elementwise.ms", "required_bytes",
           "card_bytes", "fits", "beyond_context", "published_ms", "peak_ops_per_s", "hbm_bytes_per_s",
           "drawn_in"]  # fmt: skip


def draw(runs: pd.DataFrame, _: Sequence[dict[str, Any]]) -> Drawn:
    """A row of panels per card: the roof, decode time, prefill time."""
    table = _table(runs)
    parts = dict(list(table[table["bits"] == FP16].groupby(["hardware", "counting"])))
    shown = [key for key in ROWS if key in parts]
    figure, axes = plt.subplots(len(shown), 3, figsize=(PAGE_IN, 1.95 * len(shown) + 0.75), squeeze=False)
    for (roof, decode, prefill), key in zip(axes, shown, strict=True):
        part = parts[key]
        _roof(roof, part)
        roof.set_title(f"{part['model'].iloc[0]} on an {ROWS[key]}")
        _times(decode, part[part["stage"] == "decode"], ms=1)
        decode.set_ylabel("decode step (ms)")
        _times(prefill, part[part["stage"] == "prefill"], ms=1e3)
        prefill.set_ylabel("prefill step (s)")
    for axis, label in zip(axes[-1], ("operations per byte", *2 * ["tokens per sequence"]), strict=True):
        axis.set_xlabel(label)
    figure.legend(handles=_legend(), loc="outside upper center", ncols=5)
    return Drawn(figure, table[COLUMNS], _claims(table))


def _table(runs: pd.DataFrame) -> pd.DataFrame:
    """The points that are drawn, and those that have a published time, with intensities and rates."""
    needed = {"counting", "stage", "total_ms", "parts.attention.ops"}
    if absent := sorted(needed - set(runs.columns)):
        raise ValueError(
            f"roofline: these are runs and no analysed steps, without {', '.join(absent)}; "
            f"python -m experiments.study roofline computes the points"
        )
    table = runs[[pair in ROWS for pair in zip(runs["hardware"], runs["counting"], strict=True)]].copy()
    if table.empty:
        raise ValueError(f"roofline: no point of {' or '.join('/'.join(key) for key in ROWS)} (card/counting)")
    if len(models := sorted(set(table["model"]))) > 1:
        raise ValueError(f"roofline: points of several models ({', '.join(models)}); give those of one")
    numbers = [c for c in table.columns if c.startswith(("parts.", "total_"))]
    table[numbers] = table[numbers].astype(float)
    table["fits"] = table["fits"].astype(bool)
    table["intensity"] = table["total_ops"] / table["total_bytes"]
    table["attained_ops_per_s"] = table["total_ops"] / table["total_ms"] * 1e3
    for name in ("projections", "attention"):
        table[f"parts.{name}.intensity"] = table[f"parts.{name}.ops"] / table[f"parts.{name}.bytes"]
        table[f"parts.{name}.attained_ops_per_s"] = table[f"parts.{name}.ops"] / table[f"parts.{name}.ms"] * 1e3
    table["beyond_context"] = table["sequence_length"] > table["max_position_embeddings"]
    is_printed = (table["counting"] == "llm_viewer") & (table["sequence_length"] == PART_SEQUENCE)
    keys = zip(table["stage"], table["batch_size"], table["bits"], strict=True)
    table["published_ms"] = pd.Series([PUBLISHED_MS.get(key, np.nan) for key in keys], table.index).where(is_printed)
    table["drawn_in"] = [_drawn_in(point) for _, point in table.iterrows()]
    order = ["hardware", "counting", "stage", "bits", "batch_size", "sequence_length"]
    return table.sort_values(order).reset_index(drop=True)


def _drawn_in(point: pd.Series[Any]) -> str:
    """The panels that show it: roof, times, both, or none of what is in the table for the sentences alone."""
    if point["bits"] != FP16:
        return ""
    at_roof = point["sequence_length"] == PART_SEQUENCE
    in_times = point["batch_size"] in LINES or pd.notna(point["published_ms"])
    return " ".join(name for name, shown in (("roof", at_roof), ("times", in_times)) if shown)


# Attention's points lie on each other, below the first of the others, and are drawn larger.
SERIES = {
    "decode: attention": line_look(SPARE[3], "-", "s", markersize=7.0),
    "decode: projections": line_look(SPARE[0], "-", "o", markersize=3.8),
    "decode: whole step": line_look(SPARE[7], "-", "D", markersize=2.2),
    "prefill: whole step": line_look(SPARE[2], "-", "^", markersize=3.2),
}
BATCH_LOOKS = [
    line_look(SPARE[i], "-", marker, markersize=3.6) for i, marker in ((5, "v"), (1, "P"), (4, "h"), (6, "X"))
]
STAR: Look = {"linestyle": "", "marker": "*", "markerfacecolor": "white"}


def _roof(axis: Any, part: pd.DataFrame) -> None:
    """The roof, and what operators attain at 2048 tokens per sequence, one point per batch."""
    part = part[part["sequence_length"] == PART_SEQUENCE].sort_values("batch_size")
    peak, hbm = float(part["peak_ops_per_s"].iloc[0]), float(part["hbm_bytes_per_s"].iloc[0])
    draw_roof(axis, peak, hbm, 0.5, 1e4, unit=1e12)
    axis.text(0.04, 0.94, f"{hbm / 1e9:.4g} GB/s\n{peak / 1e12:.4g} TOP/s", transform=axis.transAxes, va="top")
    for name, look in SERIES.items():
        stage, _, what = name.partition(": ")
        points, prefix = part[part["stage"] == stage], "" if what == "whole step" else f"parts.{what}."
        _line(axis, points[f"{prefix}intensity"], points[f"{prefix}attained_ops_per_s"] / 1e12, points["fits"], look)
    axis.set_ylabel("TOP/s attained")
    plain_numbers(axis.xaxis)
    plain_numbers(axis.yaxis)


def _times(axis: Any, part: pd.DataFrame, ms: float) -> None:
    """Time in units of `ms` against sequence length, a line per batch; published totals as stars."""
    for batch, look in zip(LINES, BATCH_LOOKS, strict=True):
        points = part[part["batch_size"] == batch].sort_values("sequence_length")
        _line(axis, points["sequence_length"], points["total_ms"] / ms, points["fits"], look)
    printed = part[part["published_ms"].notna()]
    star = STAR | {"markersize": 8, "markeredgecolor": "black", "markeredgewidth": 0.8, "zorder": 5}
    axis.plot(printed["sequence_length"], printed["published_ms"] / ms, **star)
    log_ticks(axis.xaxis, [t for t in (128, 512, 2048, 8192, 50000) if t in set(part["sequence_length"])])
    log_scale(axis.yaxis)
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if ms == 1 else (1.0,)))
    axis.yaxis.set_minor_locator(NullLocator())


def _line(axis: Any, x: pd.Series[float], y: pd.Series[float], fits: pd.Series[bool], look: Look) -> None:
    """Filled where it fits the card, open where it does not."""
    axis.plot(x, y, color=look["color"], linewidth=0.8, zorder=2)
    for where, face in ((fits, look["color"]), (~fits, "white")):
        points = look | {"linestyle": "", "markerfacecolor": face, "markeredgewidth": 0.8, "zorder": 3}
        axis.plot(x[where], y[where], **points)


def _legend() -> list[Line2D]:
    batches = {f"batch {batch}": look for batch, look in zip(LINES, BATCH_LOOKS, strict=True)}
    pairs = zip(SERIES.items(), batches.items(), strict=True)
    usual: Look = {"linewidth": 0.8, "markersize": 3.2}
    lines = [handle(name, **look | usual) for pair in pairs for name, look in pair]
    open_ = line_look("black", "", "o", markerfacecolor="white")
    return [*lines, handle("does not fit", **open_), handle("published", color="black", markersize=7, **STAR)]


def _claims(table: pd.DataFrame) -> list[str]:
    claims = []
    if (printed := table[table["published_ms"].notna()]).empty:
        claims.append("No point has a published time: the counting could not be held against LLM-Viewer's totals.")
    else:
        claims.append(_against_published(printed))
    for (card, counting), part in table[table["bits"] == FP16].groupby(["hardware", "counting"], sort=True):
        title = ROWS[(str(card), str(counting))]
        claims += _of_card(title, part)
    return claims


def _against_published(printed: pd.DataFrame) -> str:
    off = (printed["total_ms"] / printed["published_ms"] - 1).abs()
    each = ", ".join(
        f"{p['stage']} batch {p['batch_size']}{'' if p['bits'] == FP16 else ' ' + p['bits']} {p['total_ms']:.5g} ms "
        f"({p['published_ms']:g})"
        for _, p in printed.iterrows()
    )
    verdict = "agrees with" if off.max() <= AGREES else "differs from"
    return (
        f"LLM-Viewer's counting {verdict} its {len(printed)} published totals of Llama-2-7B on an A6000 at "
        f"{PART_SEQUENCE} tokens; the largest difference is {100 * off.max():.2g} % (published in brackets): {each}."
    )


def _of_card(title: str, part: pd.DataFrame) -> list[str]:
    claims = []
    at = part[part["sequence_length"] == PART_SEQUENCE].sort_values("batch_size")
    decode, prefill = at[at["stage"] == "decode"], at[at["stage"] == "prefill"]
    if len(decode) > 1:
        first, last = decode.iloc[0], decode.iloc[-1]
        claims.append(
            f"{title}, decode at {PART_SEQUENCE} tokens, batch {first['batch_size']} to {last['batch_size']}: the "
            f"projections go from {first['parts.projections.intensity']:.2g} to "
            f"{last['parts.projections.intensity']:.3g} operations per byte, attention from "
            f"{first['parts.attention.intensity']:.2g} to {last['parts.attention.intensity']:.2g}; attention's share "
            f"of the step goes from {_share(first):.0f} to {_share(last):.0f} %."
        )
        ridge = float(first["peak_ops_per_s"] / first["hbm_bytes_per_s"])
        above = decode[decode["parts.projections.intensity"] >= ridge]
        reach = f"from batch {above['batch_size'].iloc[0]} on" if len(above) else "at no batch tried"
        claims.append(
            f"{title}: the ridge lies at {ridge:.0f} operations per byte; decode's projections are bound by compute "
            f"{reach}{_prefill_side(prefill, ridge)}."
        )
        claims.append(_capacity(title, decode))
    for stage, rows in part.groupby("stage", sort=True):
        missing = rows[~rows["fits"]]
        claims.append(
            f"{title}, {stage}: {len(missing)} of {len(rows)} points exceed the card's memory"
            + ("." if missing.empty else f", the smallest at {_smallest(missing)}.")
        )
    return claims


def _share(point: pd.Series[Any]) -> float:
    return float(100 * point["parts.attention.ms"] / point["total_ms"])


def _prefill_side(prefill: pd.DataFrame, ridge: float) -> str:
    if prefill.empty:
        return ""
    point = prefill.iloc[0]
    side = "right" if point["intensity"] >= ridge else "left"
    return f", and prefill at batch {point['batch_size']} ({point['intensity']:.0f}) lies {side} of it"


def _capacity(title: str, decode: pd.DataFrame) -> str:
    """What the largest batch would bring, and what the card holds."""
    rated = decode.assign(rate=decode["batch_size"] / decode["total_ms"] * 1e3).sort_values("rate", kind="stable")
    fitting = rated[rated["fits"]]
    if fitting.empty:
        return f"{title}: no batch tried fits the card in decode at {PART_SEQUENCE} tokens."
    top, best = rated.iloc[-1], fitting.iloc[-1]
    line = (
        f"{title}, decode at {PART_SEQUENCE} tokens: {best['rate']:.0f} tokens/s of decode steps alone at "
        f"batch {best['batch_size']}, the best of those that fit the card"
    )
    if top["fits"]:
        return f"{line}; a larger memory would bring nothing among the batches tried."
    return (
        f"{line}; with memory without end batch {top['batch_size']} would reach {top['rate']:.0f}, "
        f"{top['rate'] / best['rate']:.2g} times that."
    )


def _smallest(missing: pd.DataFrame) -> str:
    point = missing.sort_values(["required_bytes", "batch_size"]).iloc[0]
    need, have = point["required_bytes"] / 1e9, point["card_bytes"] / 1e9
    return f"batch {point['batch_size']} of {point['sequence_length']} tokens ({need:.1f} of {have:.1f} GB)"


STUDY = Study(
    name="roofline",
    title="Llama-2-7B under the roof of two cards",
    question="What bounds prefill and decode, how far does batching carry decode, where does the card's memory end?",
    how_to_read=(
        "Left, the roof of each card: nothing can lie above the black line. A larger batch moves the projections, "
        "whose weights are read once for all sequences, to the right and up; attention stays where it is, because "
        "every sequence reads its own KV cache. In the middle and on the right, the time of a step by tokens per "
        "sequence, a line per batch. Open markers do not fit the card's memory: the time that a card with more memory "
        "would take. Stars are the totals that LLM-Viewer publishes. Sequences beyond 4096 tokens are of the model's "
        "shapes, beyond what it was trained for."
    ),
    factors=("hardware", "counting", "stage", "bits", "batch_size", "sequence_length"),
    draw=draw,
)
