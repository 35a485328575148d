"""What the figures share: plain numbers on axes, lines of mechanisms, a row of panels per comparison, legends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from uvm_kv.report.load import GROUP
from uvm_kv.report.style import PAGE_IN, STYLES, look
from uvm_kv.types import BASELINES

Look = dict[str, Any]
"""Keyword arguments of `Axes.plot`."""
REFERENCE: Look = {"color": "black", "linewidth": 0.6, "linestyle": (0, (1, 2)), "zorder": 0}
"""A dotted line to compare with, behind the data."""
BATCH = "offered batch (clients)"


def line_look(colour: str, line: str = "-", marker: str = "", **more: Any) -> Look:
    return {"color": colour, "linestyle": line, "marker": marker} | more


def plain_numbers(axis: Any, minor: str = "") -> None:
    """Label the major ticks of `axis` (`axes.xaxis` or `axes.yaxis`) with plain numbers, not powers of ten; and those
    minor ticks whose first digit is in `minor`."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in minor else ""))


def log_scale(axis: Any, base: int = 10, minor: str = "") -> None:
    """Make `axis` logarithmic, with plain numbers (`plain_numbers`)."""
    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    set_scale("log", base=base)
    plain_numbers(axis, minor)


def log_ticks(axis: Any, ticks: Sequence[Any], labels: Sequence[str] | None = None, **text: Any) -> None:
    """Make `axis` logarithmic (to base 2) with exactly these ticks, labelled with their numbers or with `labels`;
    `text` as in `Axis.set_ticks`."""
    log_scale(axis, base=2)
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks] if labels is None else labels, **text)
    axis.set_minor_locator(NullLocator())


def batch_axis(axis: Any, batches: pd.Series[float]) -> None:
    """A logarithmic axis of batch sizes, with a tick at every power of 4; of 2 where that is less than two ticks, and
    at the batches themselves where that still is."""
    powers = ([base**n for n in range(24) if batches.min() <= base**n <= batches.max()] for base in (4, 2))
    log_ticks(axis, next((ticks for ticks in powers if len(ticks) > 1), sorted(set(batches))))


def draw_roof(axis: Any, peak: float, bandwidth: float, left: float, right: float, unit: float = 1.0) -> None:
    """The roof of a card with `peak` operations/s and `bandwidth` bytes/s, from `left` to `right` operations per byte;
    heights in `unit` operations/s."""
    x = np.geomspace(left, right, 400)
    axis.plot(x, np.minimum(peak, bandwidth * x) / unit, color="black", linewidth=1.2, zorder=1)
    axis.set(xscale="log", yscale="log")


def in_order(labels: Iterable[str]) -> list[str]:
    """Mechanisms in the order of STYLES, then all other labels by name."""
    found = set(labels)
    return [name for name in STYLES if name in found] + without_look(found)


def without_look(labels: Iterable[str]) -> list[str]:
    """Labels with no entry in STYLES: the `others` of `look`."""
    return sorted(set(labels) - set(STYLES))


def mechanism_lines(axis: Any, points: pd.DataFrame, x: str, y: str, others: list[str], scale: float = 1.0) -> None:
    """A line per `label`, in the look of its mechanism: column `y` times `scale` against column `x`."""
    for label, line in points.groupby("label", sort=True):
        line = line.sort_values(x)
        axis.plot(line[x], line[y].astype(float) * scale, **look(str(label), others))


def handle(label: str, **style: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], label=label, **style)


def mechanism_legend(figure: Any, labels: Iterable[str], *, mark_baselines: bool = True, **more: Any) -> None:
    """One legend of all panels; `more` as in `Figure.legend`."""
    names = in_order(labels)
    others = without_look(names)
    handles = [
        handle(f"{name} (baseline)" if mark_baselines and name in BASELINES else name, **look(name, others))
        for name in names
    ]
    figure.legend(handles=handles, **{"loc": "outside upper center", "ncols": 4} | more)


def comparison_rows(
    table: pd.DataFrame, num_panels: int, height: float, margin: float, *, full_titles: bool = False
) -> tuple[Any, list[tuple[pd.DataFrame, Any]]]:
    """A figure with a titled row of panels per comparison (`GROUP`): the figure, and each comparison with its axes.

    A row is `height` inches high, `margin` is left for the legend. Titles name the card only where there are several,
    or several comparisons on one, unless they are `full_titles`.
    """
    several = len(table[["origin", "hardware"]].drop_duplicates()) > 1
    full = full_titles or several or table["title"].str.contains("=").any()  # Settings that tell comparisons apart.
    groups = [part for _, part in table.groupby(GROUP, sort=True)]
    size = (PAGE_IN, height * len(groups) + margin)
    figure, axes = plt.subplots(len(groups), num_panels, figsize=size, squeeze=False)
    for row, part in zip(axes, groups, strict=True):
        title = part["title"].iloc[0]
        row[0].set_title(title.replace(", on a ", "\non a ") if full else title.partition(", on a ")[0])
    return figure, list(zip(groups, axes, strict=True))


def panels_by_batch(
    table: pd.DataFrame, panels: Mapping[str, tuple[str, float]], height: float, margin: float, **legend: Any
) -> tuple[Any, list[tuple[pd.DataFrame, Any]]]:
    """`comparison_rows` with a panel per column of the table (its title and the factor of its unit), drawn against the
    offered batch; `legend` as in `Figure.legend`."""
    figure, rows = comparison_rows(table, len(panels), height, margin)
    others = without_look(table["label"])
    for part, axes in rows:
        for axis, (column, (title, scale)) in zip(axes, panels.items(), strict=True):
            mechanism_lines(axis, part, "offered_batch", column, others, scale)
            axis.set_ylabel(title)
            batch_axis(axis.xaxis, part["offered_batch"])
    for axis in rows[-1][1]:
        axis.set_xlabel(BATCH)
    mechanism_legend(figure, table["label"], **legend)
    return figure, rows
