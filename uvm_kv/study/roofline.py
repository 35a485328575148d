"""Llama-2-7B under the roof of two cards: prefill and decode, by batch and sequence length; open: does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

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
COLUMNS = (
    *("hardware", "model", "counting", "stage", "bits", "batch_size", "sequence_length", "total_ms", "intensity"),
    *("attained_ops_per_s", "total_ops", "total_bytes", "parts.projections.ms", "parts.projections.intensity"),
    *("parts.projections.attained_ops_per_s", "parts.attention.ms", "parts.attention.intensity"),
    *("parts.attention.attained_ops_per_s", "parts.head.ms", "parts.elementwise.ms", "required_bytes"),
    *("card_bytes", "fits", "beyond_context", "published_ms", "peak_ops_per_s", "hbm_bytes_per_s", "drawn_in"),
)


def draw(runs: pd.DataFrame, failures: Sequence[dict[str, Any]]) -> Drawn:
    """A row of panels a card: the roof, decode time, prefill time."""
    del failures
    table = _table(runs)
    shown = [key for key in ROWS if not table[(table["hardware"] == key[0]) & (table["counting"] == key[1])].empty]
    figure, axes = plt.subplots(len(shown), 3, figsize=(PAGE_IN, 1.95 * len(shown) + 0.75), squeeze=False)
    for row, key in zip(axes, shown, strict=True):
        part = table[(table["hardware"] == key[0]) & (table["counting"] == key[1]) & (table["bits"] == FP16)]
        _roof(row[0], part)
        row[0].set_title(f"{part['model'].iloc[0]} on an {ROWS[key]}")
        _times(row[1], part[part["stage"] == "decode"], ms=1)
        row[1].set_ylabel("decode step (ms)")
        _times(row[2], part[part["stage"] == "prefill"], ms=1e3)
        row[2].set_ylabel("prefill step (s)")
    for axis in axes[-1, 1:]:
        axis.set_xlabel("tokens a sequence")
    axes[-1, 0].set_xlabel("operations per byte")
    figure.legend(handles=_legend(), loc="outside upper center", ncols=5)
    return Drawn(figure, table[list(COLUMNS)], _claims(table))


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
    published = []
    for _, point in table.iterrows():
        printed = point["counting"] == "llm_viewer" and point["sequence_length"] == PART_SEQUENCE
        key = (str(point["stage"]), int(point["batch_size"]), str(point["bits"]))
        published.append(PUBLISHED_MS.get(key, np.nan) if printed else np.nan)
    table["published_ms"] = published
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


# Colour, marker, its size: attention's points lie on each other, below the first of the others, and are drawn larger.
_SERIES = {
    "decode: attention": (SPARE[3], "s", 7.0),
    "decode: projections": (SPARE[0], "o", 3.8),
    "decode: whole step": (SPARE[7], "D", 2.2),
    "prefill: whole step": (SPARE[2], "^", 3.2),
}
_BATCH_LOOKS = ((SPARE[5], "v"), (SPARE[1], "P"), (SPARE[4], "h"), (SPARE[6], "X"))


def _roof(axis: Any, part: pd.DataFrame) -> None:
    """The roof, and what operators attain at 2048 tokens a sequence, one point a batch."""
    part = part[part["sequence_length"] == PART_SEQUENCE].sort_values("batch_size")
    decode, prefill = part[part["stage"] == "decode"], part[part["stage"] == "prefill"]
    peak, hbm = float(part["peak_ops_per_s"].iloc[0]), float(part["hbm_bytes_per_s"].iloc[0])
    x = np.geomspace(0.5, 1e4, 200)
    axis.plot(x, np.minimum(peak, hbm * x) / 1e12, color="black", linewidth=1.2, zorder=1)
    axis.text(0.04, 0.94, f"{hbm / 1e9:.4g} GB/s\n{peak / 1e12:.4g} TOP/s", transform=axis.transAxes, va="top")
    for name, (colour, marker, size) in _SERIES.items():
        points = prefill if name.startswith("prefill") else decode
        if name.endswith("whole step"):
            intensity, rate = points["intensity"], points["attained_ops_per_s"]
        else:
            column = f"parts.{name.partition(': ')[2]}"
            intensity, rate = points[f"{column}.intensity"], points[f"{column}.attained_ops_per_s"]
        _line(axis, intensity, rate / 1e12, points["fits"], colour, marker, size)
    axis.set(xscale="log", yscale="log", ylabel="TOP/s attained")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def _times(axis: Any, part: pd.DataFrame, ms: float) -> None:
    """Time in units of `ms` against sequence length, a line a batch; published totals as stars."""
    for batch, (colour, marker) in zip(LINES, _BATCH_LOOKS, strict=True):
        points = part[part["batch_size"] == batch].sort_values("sequence_length")
        _line(axis, points["sequence_length"], points["total_ms"] / ms, points["fits"], colour, marker, 3.6)
    printed = part[part["published_ms"].notna()]
    axis.plot(printed["sequence_length"], printed["published_ms"] / ms, linestyle="", marker="*", markersize=8,
              markerfacecolor="white", markeredgecolor="black", markeredgewidth=0.8, zorder=5)  # fmt: skip
    axis.set(xscale="log", yscale="log")
    ticks = [t for t in (128, 512, 2048, 8192, 50000) if t in set(part["sequence_length"])]
    axis.set_xticks(ticks, [f"{t}" for t in ticks])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if ms == 1 else (1.0,)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def _line(
    axis: Any, x: pd.Series[float], y: pd.Series[float], fits: pd.Series[bool], colour: str, marker: str, size: float
) -> None:
    """Filled where it fits the card, open where it does not."""
    axis.plot(x, y, color=colour, linewidth=0.8, zorder=2)
    for where, face in ((fits, colour), (~fits, "white")):
        axis.plot(x[where], y[where], linestyle="", marker=marker, markersize=size, color=colour,
                  markerfacecolor=face, markeredgewidth=0.8, zorder=3)  # fmt: skip


def _legend() -> list[Line2D]:
    looks = [(name, colour, marker) for name, (colour, marker, _) in _SERIES.items()]
    batches = [(f"batch {batch}", *style) for batch, style in zip(LINES, _BATCH_LOOKS, strict=True)]
    lines = [
        Line2D([], [], color=colour, marker=marker, linewidth=0.8, label=name)
        for pair in zip(looks, batches, strict=True)
        for name, colour, marker in pair
    ]
    open_ = Line2D([], [], color="black", marker="o", markerfacecolor="white", linestyle="", label="does not fit")
    star = Line2D([], [], linestyle="", marker="*", markersize=7, color="black", markerfacecolor="white",
                  label="published")  # fmt: skip
    return [*lines, open_, star]


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
        "every sequence reads its own KV cache. In the middle and on the right, the time of a step by tokens a "
        "sequence, a line a batch. Open markers do not fit the card's memory: the time that a card with more memory "
        "would take. Stars are the totals that LLM-Viewer publishes. Sequences beyond 4096 tokens are of the model's "
        "shapes, beyond what it was trained for."
    ),
    factors=("hardware", "counting", "stage", "bits", "batch_size", "sequence_length"),
    draw=draw,
)
