"""A grid of gains as a figure: a panel per mechanism, the closed form's frontiers over its cells."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.colors import SymLogNorm
from matplotlib.patches import Patch

from uvm_kv.report.drawing import Look, handle, in_order
from uvm_kv.report.style import PAGE_IN, SMALL
from uvm_kv.study.base import Drawn
from uvm_kv.study.grid import BASELINE, COLD, Axis, with_cold
from uvm_kv.study.grid_claims import claims
from uvm_kv.study.kit import on_card, phases, served

LEVELS = (0.0, 0.05, 0.2, 1.0, 5.0)
"""Gains of the closed form that have a line."""
LINEAR_BELOW = 0.05
"""Colours are linear in the gain up to here and logarithmic beyond, on both sides of white."""
TICKS = (-0.5, -0.1, -0.03, 0, 0.03, 0.1, 0.5, 2.0)
HOW = {"static_split": "in place", "prefetch_ahead": "copy ahead", "bandwidth_balanced": "both"}
ONE_MORE = (0, (2.5, 1.2))
HATCHED: Look = {"facecolor": "white", "hatch": "////", "edgecolor": "#888888"}


def draw_grid(runs: pd.DataFrame, x: Axis, y: Axis, note: str = "") -> Drawn:
    """A panel per mechanism; `note`: what else is to be known of the axes, for the figure's title."""
    runs, table = with_cold(runs, x, y)
    scope = phases(runs)
    xs, ys = _texts(table, "x_rank", x.name), _texts(table, "y_rank", y.name)
    labels = in_order(table["label"])
    num_columns = min(len(labels), 3)
    num_rows = -(-len(labels) // num_columns)
    height = num_rows * (0.72 + 0.12 * max(text.count("\n") for text in xs) + 0.3 * len(ys)) + 1.2
    figure, axes = plt.subplots(num_rows, num_columns, figsize=(PAGE_IN, height), sharey=True, squeeze=False)
    limit = max(2 * LINEAR_BELOW, float(table["gain"].abs().max()))
    norm = SymLogNorm(LINEAR_BELOW, vmin=-limit, vmax=limit)
    image = None
    for axis, label in zip(axes.flat, labels, strict=False):
        part = table[table["label"] == label]
        image = _panel(axis, part, (len(ys), len(xs)), norm)
        how = part["placement"].iloc[0]
        axis.set_title(f"{label} ({HOW.get(how, how)})", pad=12)
    for axis in axes.flat[len(labels) :]:
        axis.set_visible(False)
    for axis in axes.flat:
        axis.set_xticks(range(len(xs)), xs, fontsize=SMALL)
        axis.set_yticks(range(len(ys)), ys)
        axis.grid(False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel(x.title)
    for axis in axes[:, 0]:
        axis.set_ylabel(y.title)
    ticks = [tick for tick in TICKS if abs(tick) <= limit]
    bar = figure.colorbar(image, ax=axes, ticks=ticks, location="bottom", aspect=60, shrink=0.6, pad=0.03)
    bar.ax.set_xticklabels([f"{100 * tick:+.0f} %" if tick else "0" for tick in ticks])
    bar.ax.minorticks_off()
    bar.set_label(f"best gain over {BASELINE}{f', {scope}' if scope else ''}")
    handles: list[Any] = [
        handle("the closed form's bound passes this gain", color="black", linewidth=0.9),
        handle("it passes one request more", color="black", linewidth=2, linestyle=ONE_MORE),
    ]
    if table["gain"].isna().any():
        handles.append(Patch(label=f"{BASELINE} has no run here", **HATCHED))
    marks = ["bold: it pays"]
    marks += ["\u2265: still rising at the largest batch"] if table["at_least"].any() else []
    marks += ["?: AMBIGUOUS over repeats"] if (table["word"] == "AMBIGUOUS").any() else []
    marks += ["below, small: served cold, with its prefill"] if table["cold_gain"].notna().any() else []
    where = ", ".join(part for part in (on_card(table), note, scope) if part)
    title = f"gain in %, {where}\n{'; '.join(marks)}"
    legend = figure.legend(handles=handles, loc="outside upper center", ncols=3, title=title)
    legend.get_title().set_multialignment("center")
    columns = ["origin", "hardware", "model", "label", "placement", y.name, x.name, "gain", "at_least", "word",
               "throughput", "baseline_throughput", "num_runs", "offered_batch", "running_batch_mean",
               "working_set_ratio", "closed_form_ceiling", "closed_form.link", "closed_form.stranded",
               "closed_form.num_seqs", "least_batch", "h2d_bytes", "d2h_bytes", *COLD]  # fmt: skip
    return Drawn(figure, table[columns], claims(table, x, y, scope, served(runs, ["output"])))


def _texts(table: pd.DataFrame, rank: str, name: str) -> list[str]:
    return [str(text) for _, text in sorted(set(zip(table[rank], table[name], strict=True)))]


def _grid(part: pd.DataFrame, column: str, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    grid = np.full(shape, np.nan)
    grid[part["y_rank"], part["x_rank"]] = part[column]
    return grid


def _panel(axis: Any, part: pd.DataFrame, shape: tuple[int, int], norm: Any) -> Any:
    look = {"norm": norm, "cmap": "RdBu", "edgecolors": "white", "linewidth": 1.2}
    sides = [np.arange(length + 1) - 0.5 for length in (shape[1], shape[0])]
    image = axis.pcolormesh(*sides, np.ma.masked_invalid(_grid(part, "gain", shape)), **look)
    for _, cell in part.iterrows():
        at = (cell["x_rank"], cell["y_rank"])
        if np.isnan(cell["gain"]):
            axis.add_patch(plt.Rectangle((at[0] - 0.5, at[1] - 0.5), 1, 1, linewidth=0, zorder=1, **HATCHED))
            continue
        weight = "bold" if cell["word"] == "HIGHER" else "normal"
        colour = "white" if abs(norm(cell["gain"]) - 0.5) > 0.33 else "black"
        look = {"ha": "center", "va": "center", "color": colour}
        has_cold = pd.notna(cell["cold_gain"])
        axis.text(at[0], at[1] + 0.16 * has_cold, _number(cell, ""), fontsize=SMALL, weight=weight, **look)
        if has_cold:
            axis.text(at[0], at[1] - 0.24, _number(cell, "cold_"), fontsize=0.8 * SMALL, **look)
    _frontiers(axis, part, shape)
    return image


def _number(cell: pd.Series[Any], prefix: str) -> str:
    """The gain in per cent, with its marks; `prefix`: of its columns."""
    value = 100 * cell[f"{prefix}gain"]
    digits = 1 if abs(value) < 1.95 else 0
    mark = "?" if cell[f"{prefix}word"] == "AMBIGUOUS" else ""
    return f"\u2265{value:.{digits}f}{mark}" if cell[f"{prefix}at_least"] else f"{value:+.{digits}f}{mark}"


def _frontiers(axis: Any, part: pd.DataFrame, shape: tuple[int, int]) -> None:
    """Lines between the cells whose closed form is above a level and the others, each labelled at an end; thick and
    dashed between the cells where it is at least one request more and the others."""
    bound, num_seqs = (_filled(_grid(part, name, shape)) for name in ("closed_form_ceiling", "closed_form.num_seqs"))
    ends: dict[tuple[float, float], list[str]] = {}
    for level in LEVELS:
        lines = _borders(bound > level)
        width = 1.6 if level == 0 else 0.9
        axis.add_collection(LineCollection(lines, colors="black", linewidths=width, capstyle="projecting", zorder=3))
        if lines:
            ends.setdefault(_end(lines, shape), []).append(f"{100 * level:+.0f} %")
    more = _borders(bound * num_seqs >= 1)
    axis.add_collection(LineCollection(more, colors="black", linewidths=2, linestyles=[ONE_MORE], zorder=3))
    for (x, y), names in ends.items():
        place = {"x": x, "y": y + 0.08, "ha": "center", "va": "bottom"}
        if y < shape[0] - 0.6:
            place = {"x": x + 0.08, "y": y, "ha": "left", "va": "center"}
        axis.text(s="\n".join(reversed(names)), fontsize=SMALL, clip_on=False, **place)


def _filled(grid: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The grid, with cells without a value taking that of the one before them in their row."""
    return pd.DataFrame(grid).ffill(axis=1).to_numpy()


def _borders(mask: np.ndarray[Any, Any]) -> list[list[tuple[float, float]]]:
    """The sides of cells where the mask changes, cell centres being whole numbers."""
    beside = [[(i + 0.5, j - 0.5), (i + 0.5, j + 0.5)] for j, i in np.argwhere(mask[:, 1:] != mask[:, :-1])]
    above = [[(i - 0.5, j + 0.5), (i + 0.5, j + 0.5)] for j, i in np.argwhere(mask[1:] != mask[:-1])]
    return beside + above


def _end(lines: list[list[tuple[float, float]]], shape: tuple[int, int]) -> tuple[float, float]:
    """Where a border leaves on the right, else on top, else its rightmost point."""
    at = [point for line in lines for point in line]
    right = [point for point in at if point[0] == shape[1] - 0.5]
    top = [point for point in at if point[1] == shape[0] - 0.5]
    return max(right or top or at)
