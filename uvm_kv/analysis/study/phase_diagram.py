"""Where CPU-backed KV pays: the gain over device-only serving on a grid, with the closed-form frontiers over it.

The gain of a cell is the best throughput of a placement over the batches tried beyond the card's capacity, over the
best of device_resident in that cell, less one; both under worst-case admission. What fits the card is the same in both,
and is no answer. `draw_grid` serves every grid of this kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import SymLogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from uvm_kv.analysis.load import GROUP, points
from uvm_kv.analysis.study.base import Drawn, Study, percent
from uvm_kv.analysis.style import PAGE_IN, SMALL, STYLES
from uvm_kv.analysis.verdict import INDIFFERENT, is_cpu_backed, with_gains
from uvm_kv.types import GIB

BASELINE = "device_resident"
LEVELS = (0.0, 0.05, 0.2, 1.0, 5.0)
"""Gains of the closed form that have a line."""
LINEAR_BELOW = 0.05
"""Colours are linear in the gain up to here and logarithmic beyond, on both sides of white."""
TICKS = (-0.5, -0.1, -0.03, 0, 0.03, 0.1, 0.5, 2.0)
HOW = {"static_split": "in place", "prefetch_ahead": "copy ahead", "bandwidth_balanced": "both"}
ONE_MORE = (0, (4, 1.5))
MAX_CHARS = 4


@dataclass(frozen=True)
class Axis:
    name: str
    """Its column in the table drawn."""
    title: str
    of: Callable[[pd.Series[Any]], tuple[float, str]]
    """Of a run: where its cell lies along the axis, and what is written there."""


def cells(runs: pd.DataFrame, x: Axis, y: Axis) -> pd.DataFrame:
    """One row a cell and CPU-backed mechanism, with its gain (NaN where device_resident has no run in the cell) and the
    closed form's; `x_rank` and `y_rank` count the cells along the axes. ValueError where one cell holds runs that
    differ in more than mechanism and batch."""
    if "working_set_ratio" not in runs:
        raise ValueError("these runs do not say their working_set_ratio, as those of older versions; run them again")
    used = runs[runs["admission"] == "worst_case"].copy()
    written: dict[str, list[str]] = {}
    for rank, axis in (("x_rank", x), ("y_rank", y)):
        keys = [axis.of(run) for _, run in used.iterrows()]
        order = sorted(set(keys))
        used[rank], written[rank] = [order.index(key) for key in keys], [text for _, text in order]
    if used.empty or len(written["x_rank"]) < 2 or len(written["y_rank"]) < 2:
        raise ValueError(
            f"a diagram of {x.title} and {y.title} needs runs of two values of each, of worst_case admission"
        )
    table = with_gains(points(used))
    groups = table.groupby(["x_rank", "y_rank"])
    if (groups["group"].nunique() > 1).any():
        several = next(part for _, part in groups if part["group"].nunique() > 1)
        raise ValueError(f"one cell holds several comparisons: {'; '.join(sorted(set(several['title']))[:3])}")
    base = table[table["mechanism"] == BASELINE].groupby("group")["throughput"].max()
    backed = table[is_cpu_backed(table) & (table["working_set_ratio"] > 1)]
    if backed.empty:
        raise ValueError(
            "no run of a CPU-backed mechanism whose full requests exceed the device KV; take larger batches"
        )
    best = backed.loc[backed.groupby([*GROUP, "label"])["throughput"].idxmax()].copy()
    best[["x_rank", "y_rank"]] = best[["x_rank", "y_rank"]].astype(int)
    least = backed.groupby([*GROUP, "label"])["offered_batch"].transform("min")
    best["least_batch"] = least[best.index]
    best["baseline_throughput"] = best["group"].map(base)
    best["gain"] = best["gain_over_resident"]
    best[x.name] = [written["x_rank"][rank] for rank in best["x_rank"]]
    best[y.name] = [written["y_rank"][rank] for rank in best["y_rank"]]
    for column in ("closed_form_ceiling", "closed_form.link", "closed_form.stranded", "closed_form.num_seqs"):
        best[column] = pd.to_numeric(best[column]) if column in best else np.nan
    return best.sort_values(["label", "y_rank", "x_rank"]).reset_index(drop=True)


def draw_grid(runs: pd.DataFrame, x: Axis, y: Axis) -> Drawn:
    """A panel a mechanism."""
    table = cells(runs, x, y)
    labels = sorted(set(table["label"]), key=lambda name: (list(STYLES).index(name) if name in STYLES else 99, name))
    num_x, num_y = int(table["x_rank"].max()) + 1, int(table["y_rank"].max()) + 1
    num_columns = min(len(labels), 3)
    num_rows = -(-len(labels) // num_columns)
    num_lines = max(text.count("\n") for text in table[x.name])
    height = num_rows * (0.62 + 0.12 * num_lines + 0.3 * num_y) + 0.75
    figure, axes = plt.subplots(num_rows, num_columns, figsize=(PAGE_IN, height), sharey=True, squeeze=False)
    limit = max(2 * LINEAR_BELOW, float(table["gain"].abs().max()))
    norm = SymLogNorm(LINEAR_BELOW, vmin=-limit, vmax=limit)
    image = None
    for axis, label in zip(axes.flat, labels, strict=False):
        part = table[table["label"] == label]
        image = _panel(axis, part, (num_y, num_x), norm)
        how = part["placement"].iloc[0]
        axis.set_title(f"{label} ({HOW.get(how, how)})")
    for axis in axes.flat[len(labels) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel(x.title)
    for axis in axes.flat:
        axis.set_xticks(range(num_x), _texts(table, "x_rank", x.name))
        axis.set_yticks(range(num_y), _texts(table, "y_rank", y.name))
        axis.grid(False)
        axis.tick_params(length=0)
    for row in axes:
        row[0].set_ylabel(y.title)
    ticks = [tick for tick in TICKS if abs(tick) <= limit]
    bar = figure.colorbar(image, ax=axes, ticks=ticks, aspect=25, pad=0.01)
    bar.ax.set_yticklabels([f"{100 * tick:+.0f} %" if tick else "0" for tick in ticks])
    bar.ax.minorticks_off()
    bar.set_label(f"best gain over {BASELINE}")
    handles: list[Any] = [
        Line2D([], [], color="black", linewidth=0.7, label="closed form: at most this gain"),
        Line2D([], [], color="black", linewidth=1.2, linestyle=ONE_MORE, label="closed form: one request more"),
    ]
    if table["gain"].isna().any():
        handles.append(Patch(facecolor="white", hatch="////", edgecolor="#888888", label=f"{BASELINE} has no run here"))
    where = f"{table['model'].iloc[0]}, {table['origin'].iloc[0]} {runs['hardware'].iloc[0]}"
    figure.legend(handles=handles, loc="outside upper center", ncols=3, title=f"gain in %, {where}; bold: it pays")
    return Drawn(figure, _table(table, x, y), claims(table, x, y))


def _texts(table: pd.DataFrame, rank: str, name: str) -> list[str]:
    return [str(text) for _, text in sorted(set(zip(table[rank], table[name], strict=True)))]


def _grid(part: pd.DataFrame, column: str, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    grid = np.full(shape, np.nan)
    grid[part["y_rank"], part["x_rank"]] = part[column]
    return grid


def _panel(axis: Any, part: pd.DataFrame, shape: tuple[int, int], norm: Any) -> Any:
    image = axis.imshow(_grid(part, "gain", shape), norm=norm, cmap="RdBu", origin="lower", aspect="auto")
    _frontiers(axis, part, shape)
    for _, cell in part.iterrows():
        at = (cell["x_rank"], cell["y_rank"])
        if np.isnan(cell["gain"]):
            corner = (at[0] - 0.5, at[1] - 0.5)
            look = {"facecolor": "white", "hatch": "////", "edgecolor": "#888888", "linewidth": 0, "zorder": 2.5}
            axis.add_patch(plt.Rectangle(corner, 1, 1, **look))
            continue
        value = 100 * cell["gain"]
        text = f"{value:+.1f}" if abs(value) < 9.95 else f"{value:+.0f}"
        weight = "bold" if cell["gain"] > INDIFFERENT else "normal"
        colour = "white" if abs(norm(cell["gain"]) - 0.5) > 0.33 else "black"
        clear = [withStroke(linewidth=2.5, foreground=image.cmap(norm(cell["gain"])))]
        axis.text(*at, text, ha="center", va="center", fontsize=SMALL, weight=weight, color=colour, path_effects=clear)
    return image


def _frontiers(axis: Any, part: pd.DataFrame, shape: tuple[int, int]) -> None:
    """Lines of equal closed form, each labelled where it leaves the cells, and where it is one request more."""
    # Values are those of cell centres; the outermost hold to the edges of the cells.
    ends = [np.r_[-0.5, np.arange(length), length - 0.5] for length in (shape[1], shape[0])]
    bound, num_seqs = (_to_the_edges(_grid(part, c, shape)) for c in ("closed_form_ceiling", "closed_form.num_seqs"))
    requests = np.ma.masked_less_equal(np.ma.masked_invalid(bound * num_seqs), 0)
    if requests.count() and requests.min() < 1 < requests.max():
        axis.contour(*ends, np.ma.log(requests), levels=[0.0], colors="black", linestyles=[ONE_MORE], linewidths=1.2)
    known = ~np.isnan(_grid(part, "gain", shape))
    levels = [level for level in LEVELS if known.any() and np.nanmin(bound) < level < np.nanmax(bound)]
    if not levels:
        return
    widths = [1.4 if level == 0 else 0.7 for level in levels]
    lines = axis.contour(*ends, bound, levels=levels, colors="black", linestyles="-", linewidths=widths)
    for level, segments in zip(levels, lines.allsegs, strict=True):
        dense = np.concatenate([_dense(segment) for segment in segments])
        columns, rows = (np.clip(np.round(dense[:, i]), 0, shape[1 - i] - 1).astype(int) for i in (0, 1))
        if not len(inside := dense[known[rows, columns]]):
            continue
        right = inside[inside[:, 0] > inside[:, 0].max() - 0.02]
        x, y = right[abs(right[:, 1] - (shape[0] - 1) / 2).argmax()]
        beside = {"x": x + 0.06, "y": y, "ha": "left", "va": "center"}
        if abs(y - ends[1][0]) < 0.05 or abs(y - ends[1][-1]) < 0.05:  # It leaves at the bottom or the top.
            beside = {"x": x, "y": y, "ha": "center", "va": "bottom" if y < 0 else "top"}
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
        axis.text(s=f"{100 * level:+.0f} %", fontsize=SMALL, bbox=white, **beside)


def _to_the_edges(grid: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """With a row or column more on each side, and cells without a value as the one before them in their row."""
    return np.pad(pd.DataFrame(grid).ffill(axis=1).to_numpy(), 1, mode="edge")


def _dense(segment: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """More points of a polyline."""
    at = np.linspace(0, len(segment) - 1, 40 * len(segment))
    return np.stack([np.interp(at, np.arange(len(segment)), segment[:, i]) for i in (0, 1)], axis=1)


def _table(table: pd.DataFrame, x: Axis, y: Axis) -> pd.DataFrame:
    columns = ["model", "label", "placement", y.name, x.name, "gain", "throughput", "baseline_throughput"]
    columns += ["offered_batch", "running_batch_mean", "working_set_ratio", "closed_form_ceiling", "closed_form.link"]
    columns += ["closed_form.stranded", "closed_form.num_seqs", "least_batch", "h2d_bytes", "d2h_bytes"]
    return table[columns]


def claims(table: pd.DataFrame, x: Axis, y: Axis) -> list[str]:
    """Where each placement pays, how that compares to the closed form, and which is best where."""
    said = [_best(table, x, y)]
    for label, part in table.groupby("label", sort=True):
        said += [_pays(str(label), part, x, y), _agrees(str(label), part, x, y)]
    absent = table[table["gain"].isna()].drop_duplicates(["x_rank", "y_rank"])
    if len(absent):
        places = "; ".join(_cell(cell, x, y) for _, cell in absent.head(MAX_CHARS).iterrows())
        more = f" and {len(absent) - MAX_CHARS} more" if len(absent) > MAX_CHARS else ""
        said.append(f"{BASELINE} has no run in {len(absent)} cells, where no gain can be named ({places}{more}).")
    return said


def _cell(cell: pd.Series[Any], x: Axis, y: Axis) -> str:
    return f"{y.title} {cell[y.name]}, {x.title} {cell[x.name]}".replace("\n", " ")


def _pays(label: str, part: pd.DataFrame, x: Axis, y: Axis) -> str:
    known = part.dropna(subset=["gain"])
    if known.empty:
        return f"{label}: no cell has a {BASELINE} run to compare with."
    pays, loses = known[known["gain"] > INDIFFERENT], known[known["gain"] < -INDIFFERENT]
    top = known.iloc[int(known["gain"].argmax())]
    margin = f"{INDIFFERENT:.0%}"
    if pays.empty:
        return (
            f"{label} pays in none of {len(known)} cells (loses more than {margin} in {len(loses)}); its best is "
            f"{percent(top['gain'])}, at {_cell(top, x, y)}."
        )
    low = known.iloc[int(known["gain"].argmin())]
    text = (
        f"{label} pays (more than {margin}) in {len(pays)} of {len(known)} cells ({len(pays) / len(known):.0%}), by "
        f"{percent(float(pays['gain'].median()))} in their median and at most {percent(top['gain'])}, at "
        f"{_cell(top, x, y)}, with {top['offered_batch']:.0f} requests where the card alone holds "
        f"{top['closed_form.num_seqs']:.0f}"
    )
    if loses.empty:
        return f"{text}; it loses more than {margin} in none."
    return (
        f"{text}; it loses more than {margin} in {len(loses)}, at worst {percent(low['gain'])}, at {_cell(low, x, y)}."
    )


def _agrees(label: str, part: pd.DataFrame, x: Axis, y: Axis) -> str:
    known = part.dropna(subset=["gain", "closed_form_ceiling"])
    if known.empty:
        return f"{label}: no closed form to compare with."
    bound, gain = known["closed_form_ceiling"], known["gain"]
    promised = known[(bound > INDIFFERENT) & (gain <= INDIFFERENT)]
    beyond = known[(bound <= INDIFFERENT) & (gain > INDIFFERENT)]
    # The bound is of a batch that could grow by any part of a request.
    allowed = promised["closed_form.num_seqs"] * (1 + promised["closed_form_ceiling"])
    coarse = int((allowed < promised["least_batch"]).sum())
    differ = len(promised) + len(beyond)
    widest = known.iloc[int((bound - gain).abs().argmax())]
    above = int((gain > bound + INDIFFERENT).sum())
    text = f"{label}: closed form and simulation differ on whether it pays in {differ} of {len(known)} cells"
    if differ:
        text += f" ({len(promised)} where only the closed form says so, {len(beyond)} where only the simulation does"
        text += (
            f"; in {coarse} of the former the bound is below the smallest batch that was tried beyond the card)"
            if coarse
            else ")"
        )
    return (
        f"{text}; the simulated gain is above the bound in {above}; they are "
        f"{100 * float((bound - gain).abs().median()):.1f} points apart in the median and at most "
        f"{100 * abs(widest['closed_form_ceiling'] - widest['gain']):.0f}, at {_cell(widest, x, y)} "
        f"({percent(widest['gain'])} of {percent(widest['closed_form_ceiling'])})."
    )


def _best(table: pd.DataFrame, x: Axis, y: Axis) -> str:
    known = table.dropna(subset=["gain"])
    if known.empty:
        return f"No cell has a {BASELINE} run: no placement can be called the best."
    best = known.loc[known.groupby(["y_rank", "x_rank"])["gain"].idxmax()]
    paying = best[best["gain"] > INDIFFERENT]
    across = f"{y.title} x {x.title}".replace("\n", " ")
    if paying.empty:
        return f"Over {across}, no placement of KV in CPU memory pays in any of {len(best)} cells."
    shares = ", ".join(f"{name} in {count}" for name, count in paying["label"].value_counts().sort_index().items())
    top = paying.iloc[int(paying["gain"].argmax())]
    return (
        f"Over {across}, some placement of KV in CPU memory beats {BASELINE} in {len(paying)} of {len(best)} cells "
        f"({len(paying) / len(best):.0%}), by {percent(float(paying['gain'].median()))} in their median and at most "
        f"{percent(float(top['gain']))} ({top['label']} at {_cell(top, x, y)}); the best is {shares}."
    )


def _gib(run: pd.Series[Any]) -> tuple[float, str]:
    size = run["setting"]["memory.device_kv_bytes"] / GIB
    return size, f"{size:g}"


def _context(run: pd.Series[Any]) -> tuple[float, str]:
    if pd.isna(run["prompt_tokens"]):
        raise ValueError(f"workload={run['workload']} has no one context length; this diagram takes workload=fixed")
    tokens = int(run["prompt_tokens"] + run["output_tokens"])
    return tokens, str(tokens)


CONTEXT = Axis("context_tokens", "tokens a request", _context)
DEVICE_KV = Axis("device_kv_gib", "device KV (GiB)", _gib)


def draw(runs: pd.DataFrame, failures: Sequence[dict[str, Any]]) -> Drawn:
    del failures
    return draw_grid(runs, CONTEXT, DEVICE_KV)


STUDY = Study(
    name="phase_diagram",
    title="Where CPU-backed KV pays: device KV against context length",
    question="For which sizes of the card's KV memory and which contexts does CPU-backed KV pay, by which placement?",
    how_to_read=(
        "Each panel is a way to use CPU memory, each cell a size of the KV memory on the card and a length of the "
        "requests. The number is by how many per cent the best batch beyond the card's capacity is faster (blue) or "
        "slower (red) than the best batch on the card alone. The lines are the closed form's bound on that gain: what "
        "the link can carry while a step computes. A cell far below its line mostly holds so few requests that one "
        "more is already more than the link can carry."
    ),
    factors=("model", "mechanism", "device_kv_bytes", "prompt_tokens", "offered_batch"),
    draw=draw,
)
