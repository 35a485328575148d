"""Where CPU-backed KV pays: the gain over device-only serving on a grid, with the closed-form frontiers over it.

The gain of a cell is the best throughput of a placement over the batches tried beyond the card's capacity, over the
best of device_resident in that cell, less one; both under worst-case admission. What fits the card is the same in both,
and is no answer. Where the throughput still rose at the largest batch, and all of its requests ran, the gain is a lower
bound: `at_least`. Where runs start in the steady state, hence decode alone, runs of the same cells that start cold,
with their prefill, tell what is left of each gain: `cold_gain`. `draw_grid` serves every grid of this kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.colors import SymLogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from uvm_kv.report.load import GROUP, points
from uvm_kv.report.statistics import judge
from uvm_kv.report.style import PAGE_IN, SMALL, STYLES
from uvm_kv.report.verdict import INDIFFERENT, MEASURED, is_cpu_backed, with_gains
from uvm_kv.study.base import Drawn, Study
from uvm_kv.study.kit import inserted, percent, phases, served
from uvm_kv.types import GIB

BASELINE = "device_resident"
LEVELS = (0.0, 0.05, 0.2, 1.0, 5.0)
"""Gains of the closed form that have a line."""
LINEAR_BELOW = 0.05
"""Colours are linear in the gain up to here and logarithmic beyond, on both sides of white."""
TICKS = (-0.5, -0.1, -0.03, 0, 0.03, 0.1, 0.5, 2.0)
HOW = {"static_split": "in place", "prefetch_ahead": "copy ahead", "bandwidth_balanced": "both"}
ONE_MORE = (0, (2.5, 1.2))
MAX_CELLS = 4
COLD = ["cold_gain", "cold_at_least", "cold_word"]
ALL_RUN = 0.95
"""Of the offered requests in the mean running batch: the mechanism itself holds none back."""


@dataclass(frozen=True)
class Axis:
    name: str
    """Its column in the table drawn."""
    title: str
    of: Callable[[pd.Series[Any]], tuple[float, str]]
    """Of a run: where its cell lies along the axis, and what is written there."""


def cells(runs: pd.DataFrame, x: Axis, y: Axis) -> pd.DataFrame:
    """One row a cell and CPU-backed mechanism, with its gain (NaN where device_resident has no run in the cell), what
    its repeats allow to say of it (`word`, as of `judge`), and the closed form's; `x_rank` and `y_rank` count the cells
    along the axes. ValueError where the runs are of several models or cards, or one cell holds runs that differ in more
    than mechanism, batch and seed."""
    if "working_set_ratio" not in runs:
        raise ValueError("these runs do not say their working_set_ratio, as those of older versions; run them again")
    used = runs[(runs["admission"] == "worst_case") & ~runs["memory_emulated"].astype(bool)].copy()
    for name in ("model", "hardware", "origin"):
        if len(found := sorted(set(used[name]))) > 1:
            raise ValueError(f"runs of several {name}s ({', '.join(found)}) in one diagram; give those of one")
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
    base = table[table["mechanism"] == BASELINE]
    base = base.loc[base.groupby("group")["throughput"].idxmax()].set_index("group")
    backed = table[is_cpu_backed(table) & (table["working_set_ratio"] > 1)]
    if backed.empty:
        raise ValueError(
            "no run of a CPU-backed mechanism whose full requests exceed the device KV; take larger batches"
        )
    best = backed.loc[backed.groupby([*GROUP, "label"])["throughput"].idxmax()].copy()
    best[["x_rank", "y_rank"]] = best[["x_rank", "y_rank"]].astype(int)
    least = backed.groupby([*GROUP, "label"])["offered_batch"].transform("min")
    best["least_batch"] = least[best.index]
    best["baseline_throughput"] = best["group"].map(base["throughput"])
    best["gain"] = best["gain_over_resident"]
    best["word"] = [_word(row, base) for _, row in best.iterrows()]
    best["at_least"] = [_still_rises(row, table) for _, row in best.iterrows()]
    best[x.name] = [written["x_rank"][rank] for rank in best["x_rank"]]
    best[y.name] = [written["y_rank"][rank] for rank in best["y_rank"]]
    for column in ("closed_form_ceiling", "closed_form.link", "closed_form.stranded", "closed_form.num_seqs"):
        best[column] = pd.to_numeric(best[column]) if column in best else np.nan
    return best.sort_values(["label", "y_rank", "x_rank"]).reset_index(drop=True)


def _word(best: pd.Series[Any], base: pd.DataFrame) -> str | None:
    if best["group"] not in base.index:
        return None
    theirs = base.loc[best["group"], "throughputs"]
    return judge(best["throughputs"], theirs, INDIFFERENT, measured=best["origin"] == MEASURED).word


def _still_rises(best: pd.Series[Any], table: pd.DataFrame) -> bool:
    """Whether a larger batch might be faster yet: none was tried, this one is above all smaller ones and the card
    alone, and what keeps requests out is not the mechanism (but their number, or the size of the CPU memory)."""
    own = table[(table["group"] == best["group"]) & (table["label"] == best["label"])]
    smaller = own[own["offered_batch"] < best["offered_batch"]]["throughput"]
    if best["offered_batch"] < own["offered_batch"].max() or best["gain"] <= INDIFFERENT:
        return False
    if len(smaller) and best["throughput"] <= (1 + INDIFFERENT) * smaller.max():
        return False
    host_bytes = best.get("host_kv_bytes", np.nan)
    is_full = best["working_set_ratio"] > 1 + host_bytes / best["device_kv_bytes"]
    return bool(is_full or best["running_batch_mean"] >= ALL_RUN * best["offered_batch"])


def with_cold(runs: pd.DataFrame, x: Axis, y: Axis) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs that the cells are of, and the cells. Beside runs that start steady, those that start otherwise are not
    among them, but give the same cells (and mechanisms) the columns COLD, NaN or None where there is no such run."""
    is_steady = runs["start"] == "steady" if "start" in runs else pd.Series(False, runs.index)
    if not is_steady.any() or is_steady.all():
        return runs, cells(runs, x, y).assign(**dict.fromkeys(COLD))
    try:
        cold = cells(runs[~is_steady], x, y)
    except ValueError as error:
        raise ValueError(f"of the runs that start cold: {error}") from None
    key = ["label", y.name, x.name]
    cold = cold[[*key, "gain", "at_least", "word"]].set_axis([*key, *COLD], axis=1)
    return runs[is_steady], cells(runs[is_steady], x, y).merge(cold, how="left", on=key)


def draw_grid(runs: pd.DataFrame, x: Axis, y: Axis, note: str = "") -> Drawn:
    """A panel a mechanism; `note`: what else is to be known of the axes, for the figure's title."""
    runs, table = with_cold(runs, x, y)
    labels = sorted(set(table["label"]), key=lambda name: (list(STYLES).index(name) if name in STYLES else 99, name))
    num_x, num_y = int(table["x_rank"].max()) + 1, int(table["y_rank"].max()) + 1
    num_columns = min(len(labels), 3)
    num_rows = -(-len(labels) // num_columns)
    num_lines = max(text.count("\n") for text in table[x.name])
    height = num_rows * (0.72 + 0.12 * num_lines + 0.3 * num_y) + 1.2
    figure, axes = plt.subplots(num_rows, num_columns, figsize=(PAGE_IN, height), sharey=True, squeeze=False)
    limit = max(2 * LINEAR_BELOW, float(table["gain"].abs().max()))
    norm = SymLogNorm(LINEAR_BELOW, vmin=-limit, vmax=limit)
    image = None
    for axis, label in zip(axes.flat, labels, strict=False):
        part = table[table["label"] == label]
        image = _panel(axis, part, (num_y, num_x), norm)
        how = part["placement"].iloc[0]
        axis.set_title(f"{label} ({HOW.get(how, how)})", pad=12)
    for axis in axes.flat[len(labels) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel(x.title)
    for axis in axes.flat:
        axis.set_xticks(range(num_x), _texts(table, "x_rank", x.name), fontsize=SMALL)
        axis.set_yticks(range(num_y), _texts(table, "y_rank", y.name))
        axis.grid(False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    for row in axes:
        row[0].set_ylabel(y.title)
    ticks = [tick for tick in TICKS if abs(tick) <= limit]
    bar = figure.colorbar(image, ax=axes, ticks=ticks, location="bottom", aspect=60, shrink=0.6, pad=0.03)
    bar.ax.set_xticklabels([f"{100 * tick:+.0f} %" if tick else "0" for tick in ticks])
    bar.ax.minorticks_off()
    scope = phases(runs)
    bar.set_label(f"best gain over {BASELINE}{f', {scope}' if scope else ''}")
    handles: list[Any] = [
        Line2D([], [], color="black", linewidth=0.9, label="the closed form's bound passes this gain"),
        Line2D([], [], color="black", linewidth=2, linestyle=ONE_MORE, label="it passes one request more"),
    ]
    if table["gain"].isna().any():
        handles.append(Patch(facecolor="white", hatch="////", edgecolor="#888888", label=f"{BASELINE} has no run here"))
    marks = ["bold: it pays"]
    marks += ["\u2265: still rising at the largest batch"] if table["at_least"].any() else []
    marks += ["?: AMBIGUOUS over repeats"] if (table["word"] == "AMBIGUOUS").any() else []
    marks += ["below, small: served cold, with its prefill"] if table["cold_gain"].notna().any() else []
    where = ", ".join(part for part in (_where(table), note, scope) if part)
    title = f"gain in %, {where}\n{'; '.join(marks)}"
    legend = figure.legend(handles=handles, loc="outside upper center", ncols=3, title=title)
    legend.get_title().set_multialignment("center")
    return Drawn(figure, _table(table, x, y), claims(table, x, y, scope, served(runs, ["output"])))


def _where(table: pd.DataFrame) -> str:
    first = table.iloc[0]
    return f"{first['model']} on a {first['origin']} {first['hardware']}"


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
            corner = (at[0] - 0.5, at[1] - 0.5)
            look = {"facecolor": "white", "hatch": "////", "edgecolor": "#888888", "linewidth": 0, "zorder": 1}
            axis.add_patch(plt.Rectangle(corner, 1, 1, **look))
            continue
        weight = "bold" if cell["word"] == "HIGHER" else "normal"
        colour = "white" if abs(norm(cell["gain"]) - 0.5) > 0.33 else "black"
        look = {"ha": "center", "va": "center", "color": colour}
        has_cold = pd.notna(cell["cold_gain"])
        axis.text(at[0], at[1] + 0.16 * has_cold, _number(cell), fontsize=SMALL, weight=weight, **look)
        if has_cold:
            below = {"gain": cell["cold_gain"], "at_least": cell["cold_at_least"], "word": cell["cold_word"]}
            axis.text(at[0], at[1] - 0.24, _number(pd.Series(below)), fontsize=0.8 * SMALL, **look)
    _frontiers(axis, part, shape)
    return image


def _number(cell: pd.Series[Any]) -> str:
    value = 100 * cell["gain"]
    digits = 1 if abs(value) < 1.95 else 0
    mark = "?" if cell["word"] == "AMBIGUOUS" else ""
    return f"\u2265{value:.{digits}f}{mark}" if cell["at_least"] else f"{value:+.{digits}f}{mark}"


def _frontiers(axis: Any, part: pd.DataFrame, shape: tuple[int, int]) -> None:
    """Between the cells whose closed form is above a level and the others, each labelled at an end; thick and dashed
    between those where it is one request more and the others."""
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
    """Cells without a value as the one before them in their row."""
    return pd.DataFrame(grid).ffill(axis=1).to_numpy()


def _borders(mask: np.ndarray[Any, Any]) -> list[list[tuple[float, float]]]:
    """The sides of cells where the mask changes, cell centres being whole numbers."""
    beside = [[(i + 0.5, j - 0.5), (i + 0.5, j + 0.5)] for j, i in np.argwhere(mask[:, 1:] != mask[:, :-1])]
    above = [[(i - 0.5, j + 0.5), (i + 0.5, j + 0.5)] for j, i in np.argwhere(mask[1:] != mask[:-1])]
    return beside + above


def _end(lines: list[list[tuple[float, float]]], shape: tuple[int, int]) -> tuple[float, float]:
    """Of a border: where it leaves on the right, else on top, else its rightmost point."""
    at = [point for line in lines for point in line]
    right = [point for point in at if point[0] == shape[1] - 0.5]
    top = [point for point in at if point[1] == shape[0] - 0.5]
    return max(right or top or at)


def _table(table: pd.DataFrame, x: Axis, y: Axis) -> pd.DataFrame:
    columns = ["origin", "hardware", "model", "label", "placement", y.name, x.name]
    columns += ["gain", "at_least", "word", "throughput", "baseline_throughput", "num_runs"]
    columns += ["offered_batch", "running_batch_mean", "working_set_ratio", "closed_form_ceiling", "closed_form.link"]
    columns += ["closed_form.stranded", "closed_form.num_seqs", "least_batch", "h2d_bytes", "d2h_bytes", *COLD]
    return table[columns]


def claims(table: pd.DataFrame, x: Axis, y: Axis, scope: str = "", details: str = "") -> list[str]:
    """Where each placement pays, how that compares to the closed form, and which is best where. `scope`: what was run
    of the requests, which every claim says; `details`: the same with lengths and admission, for the first one."""
    said = [_best(table, x, y, details)]
    for label, part in table.groupby("label", sort=True):
        said += [_pays(f"{label}{inserted(scope)}", part, x, y)]
        said += [_agrees(f"{label}, {scope}" if scope else str(label), part, x, y)]
    absent = table[table["gain"].isna()].drop_duplicates(["x_rank", "y_rank"])
    if len(absent):
        places = "; ".join(_cell(cell, x, y) for _, cell in absent.head(MAX_CELLS).iterrows())
        more = f" and {len(absent) - MAX_CELLS} more" if len(absent) > MAX_CELLS else ""
        said.append(f"{BASELINE} has no run in {len(absent)} cells, where no gain can be named ({places}{more}).")
    return said


def _cell(cell: pd.Series[Any], x: Axis, y: Axis) -> str:
    return f"{y.title} {cell[y.name]}, {x.title} {cell[x.name]}".replace("\n", " ")


def _gains(paying: pd.DataFrame, top: pd.Series[Any], where: str) -> str:
    """By how much, in the median and at the top. A gain that still rose is a lower bound."""
    rising = paying["at_least"]
    median = f"by {'at least ' if rising.any() else ''}{percent(float(paying['gain'].median()))} in their median"
    if not rising.any():
        return f"{median} and at most {percent(top['gain'])} ({where})"
    return (
        f"{median}, the largest {'at least ' if top['at_least'] else ''}{percent(top['gain'])} ({where}); in "
        f"{rising.sum()} of them it still rose at the largest batch tried, and is at least that"
    )


def _served_cold(paying: pd.DataFrame, known: pd.DataFrame) -> str:
    """What the cells that pay in decode gain from a cold start, and in how many of all it pays then."""
    both, num = paying[paying["cold_gain"].notna()], int(known["cold_gain"].notna().sum())
    if both.empty:
        return ""
    which = f"the same {_count(len(both))}" if len(both) == len(paying) else f"the {len(both)} of them that were run so"
    one = len(both) == 1
    rising = "at least " if both["cold_at_least"].astype(bool).any() else ""
    gains = both["cold_gain"].astype(float)
    num_paying = int((known["cold_word"] == "HIGHER").sum())
    return (
        f"; served cold, with {'its' if one else 'their'} prefill, {which} gain{'s' * one} "
        f"{rising}{percent(float(gains.median()))} in {'its' if one else 'their'} median and "
        f"{rising or 'at most '}{percent(float(gains.max()))}, and {num_paying or 'none'} of {num} cells "
        f"pay{'s' if num_paying == 1 else ''}"
    )


def _count(num: int) -> str:
    return f"{num} cell{'s' if num > 1 else ''}"


def _unclear(known: pd.DataFrame) -> str:
    num = int((known["word"] == "AMBIGUOUS").sum())
    return f"; AMBIGUOUS over its repeats, and not counted, in {num}" if num else ""


def _pays(label: str, part: pd.DataFrame, x: Axis, y: Axis) -> str:
    known = part.dropna(subset=["gain"])
    if known.empty:
        return f"{label} has no cell with a {BASELINE} run to compare with."
    pays, loses = known[known["word"] == "HIGHER"], known[known["word"] == "LOWER"]
    margin, unclear = f"{INDIFFERENT:.0%}", _unclear(known)
    if pays.empty:
        top = known.iloc[int(known["gain"].argmax())]
        return (
            f"{label} pays in none of {len(known)} cells (loses more than {margin} in {len(loses)}){unclear}; its best "
            f"is {percent(top['gain'])}, at {_cell(top, x, y)}."
        )
    top = pays.iloc[int(pays["gain"].argmax())]
    where = (
        f"at {_cell(top, x, y)}, with {top['offered_batch']:.0f} requests where the card alone holds "
        f"{top['closed_form.num_seqs']:.0f}"
    )
    text = (
        f"{label} pays (more than {margin}) in {len(pays)} of {len(known)} cells ({len(pays) / len(known):.0%}), "
        f"{_gains(pays, top, where)}{unclear}{_served_cold(pays, known)}"
    )
    if loses.empty:
        return f"{text}; it loses more than {margin} in none."
    low = loses.iloc[int(loses["gain"].argmin())]
    return (
        f"{text}; it loses more than {margin} in {len(loses)}, at worst {percent(low['gain'])}, at {_cell(low, x, y)}."
    )


def _agrees(label: str, part: pd.DataFrame, x: Axis, y: Axis) -> str:
    known = part.dropna(subset=["gain", "closed_form_ceiling"])
    if known.empty:
        return f"{label}: no closed form to compare with."
    bound, gain, pays = known["closed_form_ceiling"], known["gain"], known["word"] == "HIGHER"
    promised = known[(bound > INDIFFERENT) & ~pays]
    beyond = known[(bound <= INDIFFERENT) & pays]
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


def _best(table: pd.DataFrame, x: Axis, y: Axis, details: str) -> str:
    across = f"{y.title} x {x.title}".replace("\n", " ")
    first = table.iloc[0]
    card = f"On a {first['origin']} {first['hardware']} with {first['model']}"
    start = f"{card}{inserted(details) or ','} over {across},"
    known = table.dropna(subset=["gain"])
    if known.empty:
        return f"{start} no cell has a {BASELINE} run, and no placement can be called the best."
    at = ["y_rank", "x_rank"]
    num = len(known[at].drop_duplicates())
    # Another placement of the cell might rise above the best.
    known = known.assign(at_least=known.groupby(at)["at_least"].transform("any"))
    paying = known[known["word"] == "HIGHER"]
    unclear = _unclear(known[~known.set_index(at).index.isin(paying.set_index(at).index)].drop_duplicates(at))
    if paying.empty:
        return f"{start} no placement of KV in CPU memory pays in any of {num} cells{unclear}."
    paying = paying.loc[paying.groupby(at)["gain"].idxmax()]
    cold = _cold_of_cells(known, at)
    both = paying.drop(columns=COLD).merge(cold, how="left", on=at)
    shares = ", ".join(f"{name} in {count}" for name, count in paying["label"].value_counts().sort_index().items())
    top = paying.iloc[int(paying["gain"].argmax())]
    where = f"{top['label']} at {_cell(top, x, y)}"
    return (
        f"{start} some placement of KV in CPU memory beats {BASELINE} in {len(paying)} of {num} cells "
        f"({len(paying) / num:.0%}), {_gains(paying, top, where)}{unclear}{_served_cold(both, cold)}; "
        f"the best is {shares}."
    )


def _cold_of_cells(known: pd.DataFrame, at: list[str]) -> pd.DataFrame:
    """A row a cell: the best that any placement gains in it from a cold start."""
    gain = known["cold_gain"].astype(float)
    best = known.assign(cold_gain=gain, order=gain.fillna(-np.inf)).groupby(at)["order"].idxmax()
    return known.loc[best, [*at, *COLD]]


def _gib(run: pd.Series[Any]) -> tuple[float, str]:
    size = (run["setting"]["memory.device_kv_bytes"] or run["device_kv_bytes"]) / GIB
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
        "slower (red) than the best batch on the card alone. It is of decode alone: runs begin in their steady state, "
        "no prompt is computed. The small number below it is what is left of the gain when the same requests start "
        "cold, with their prefill, over fewer working sets. Where a cell has \u2265, the largest "
        "batch tried was still the best, with all its requests running, and the gain is at least that. The lines are "
        "the closed form's bound on the gain, what the link can carry while a step computes: they part the cells whose "
        "bound is above the line's gain from the others. Beyond the dashed line, where so few requests fit that one "
        "more is already more than the link can carry, cells fall far below their bound."
    ),
    factors=("model", "mechanism", "device_kv_bytes", "prompt_tokens", "offered_batch", "start"),
    draw=draw,
    experiments=("phase_diagram", "phase_diagram_cold"),
)
