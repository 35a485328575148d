"""The look of every figure: print sizes of a two-column paper, colours, embedded fonts, files without a date."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter

PAGE_IN = 7.0
"""Width of both columns of a paper, in inches; one is COLUMN_IN. Figures are made at the size of their print."""
COLUMN_IN = 3.35
SMALL = 6.0
"""The smallest text, in points; the usual is 7."""
plt.rcParams.update(
    {
        "pdf.fonttype": 42,  # TrueType fonts: some publishers reject Type 3.
        "svg.hashsalt": "uvm-kv",
        "font.size": 7,
        "axes.titlesize": 7,
        "axes.labelsize": 7,
        "xtick.labelsize": 6.5,
        "ytick.labelsize": 6.5,
        "legend.fontsize": 6.5,
        "legend.frameon": False,
        "figure.titlesize": 8,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.5,
        "lines.linewidth": 1.1,
        "lines.markersize": 3.2,
        "errorbar.capsize": 1.5,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "figure.constrained_layout.use": True,
    }
)
# Okabe and Ito's colours, and Tol's wine, told apart by the colour-blind too; baselines are grey and black.
STYLES: dict[str, tuple[str, str, str]] = {
    "device_resident": ("#888888", "-", "o"),
    "device_recompute": ("#000000", "-", "s"),
    "pinned_swap": ("#0072B2", "-", "^"),
    "pinned_zero_copy": ("#E69F00", "-", "v"),
    "pinned_prefetch_ahead": ("#56B4E9", "-", "D"),
    "pinned_balanced": ("#009E73", "-", "P"),
    "managed_demand": ("#D55E00", "--", "X"),
    "managed_by_tier": ("#CC79A7", "--", "*"),
    "managed_prefetch_ahead": ("#882255", "--", "h"),
}
# Peers: neither the solid lines of device and pinned memory nor the dashes of managed memory.
STYLES |= {
    "hf_generate (peer)": ("#44AA99", "-.", "<"),
    "hf_continuous (peer)": ("#332288", "-.", ">"),
    "hf_offloaded (peer)": ("#999933", "-.", "1"),
}
SPARE = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#882255", "#000000"]
"""Colours for things that are no mechanism, in this order."""
_OTHERS = ["#7F3C8D", "#11A579", "#3969AC", "#F2B701", "#E73F74", "#80BA5A"]


def look(mechanism: str, others: Sequence[str]) -> dict[str, Any]:
    """Colour, line and marker of a label, as keyword arguments of `Axes.plot`; `others`: all labels of the figure that
    have none in STYLES."""
    known = STYLES.get(mechanism)
    colour, line, marker = known or (_OTHERS[others.index(mechanism) % len(_OTHERS)], ":", ".")
    return {"color": colour, "linestyle": line, "marker": marker}


def _without_math(figure: Any) -> None:
    """Take the dollars of names as dollars. Labels of logarithmic axes, which matplotlib itself writes as formulas,
    stay."""
    ticks = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            ticks |= {id(label) for label in axis.get_ticklabels(which="both")}
            for formatter in (axis.get_major_formatter(), axis.get_minor_formatter()):
                if isinstance(formatter, FuncFormatter):  # Also of labels that are given.
                    formatter.func = _escaped(formatter.func)
    for text in figure.findobj(Text):
        if id(text) not in ticks:
            text.set_parse_math(False)


def _escaped(label_of: Callable[[float, Any], str]) -> Callable[[float, Any], str]:
    return lambda value, position: label_of(value, position).replace("$", r"\$")


def save_figure(figure: Any, stem: Path) -> list[Path]:
    """PNG and PDF without a date in them, so that equal results give equal files."""
    _without_math(figure)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".pdf")]
    figure.savefig(paths[0], dpi=200, metadata={"Software": None})
    figure.savefig(paths[1], metadata={"CreationDate": None, "Creator": None, "Producer": None})
    plt.close(figure)
    return paths
