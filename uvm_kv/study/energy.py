"""Energy per output token, with and without what the card takes at rest, and throughput, against batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.ticker import FixedLocator

from uvm_kv.report.drawing import log_scale, panels_by_batch
from uvm_kv.report.load import GROUP, points
from uvm_kv.report.verdict import interval, is_cpu_backed, moved_kv
from uvm_kv.study.base import Drawn, Study
from uvm_kv.study.kit import argmax, argmin, judged, percent, phases
from uvm_kv.types import BASELINES

TOTAL, ABOVE_IDLE = "energy_j_per_output_token", "energy_j_per_output_token_above_idle"
UNITS = {TOTAL: "J per output token", ABOVE_IDLE: "J per output token above idle"}
WORDS = {"LOWER": "less than", "HIGHER": "more than", "SAME": "as much as"}
J_TICKS = [mantissa * 10.0**power for power in range(-2, 4) for mantissa in (1, 2, 3, 5, 7)]
PANELS = {"throughput": ("output tokens/s", 1.0)} | {column: (unit, 1.0) for column, unit in UNITS.items()}
COLUMNS = (*GROUP, "origin", "hardware", "model", "label", "offered_batch", *PANELS, "power_w", "idle_power_w",
           "running_batch_mean", "stall_s", "duration_s", "num_runs")  # fmt: skip


def draw(runs: pd.DataFrame, _: Sequence[dict[str, Any]]) -> Drawn:
    """A row of panels per comparison."""
    if absent := [name for name in UNITS if name not in runs or runs[name].isna().all()]:
        raise ValueError(f"energy: no run has {absent[0]}: without a power model or the card's counter there is none")
    table = points(runs[runs[TOTAL].notna()], keep=tuple(UNITS))
    cards = table.groupby("hardware", sort=True)["idle_power_w"].median()
    at_rest = "; ".join(f"{card}, at rest {watts:.0f} W" for card, watts in cards.items())
    figure, rows = panels_by_batch(table, PANELS, height=1.9, margin=0.75, title=at_rest)
    for _part, (speed, *energies) in rows:
        speed.set_ylim(bottom=0)
        for axis in energies:
            log_scale(axis.yaxis)
            axis.yaxis.set_major_locator(FixedLocator(J_TICKS))
    drawn = table[[c for c in COLUMNS if c in table]].sort_values([*GROUP, "label", "offered_batch"])
    said = [claim for part, _ in rows for claim in claims(part, phases(runs))]
    return Drawn(figure, drawn.drop(columns="group").reset_index(drop=True), said)


def claims(part: pd.DataFrame, scope: str = "") -> list[str]:
    """For one comparison: the least energy with and without CPU memory, what batching saves, and the most wasted.
    `scope`: what was run of the requests."""
    title = f"{part['title'].iloc[0]}{f', {scope}' if scope else ''}"
    base, backed = part[part["mechanism"].isin(BASELINES)], part[is_cpu_backed(part) & moved_kv(part)]
    if base.empty or backed.empty:
        absent = "device-only" if base.empty else "CPU-backed"
        return [f"{title}: no {absent} run{' that moved KV' * backed.empty}, so that energies cannot be compared."]
    said = [_least(argmin(backed, column), argmin(base, column), column) for column in UNITS]
    one, least = argmin(base, "offered_batch"), argmin(base, TOTAL)
    said.append(
        f"on the card alone batching takes it from {one[TOTAL]:.3g} J per output token at batch "
        f"{one['offered_batch']:.0f} to {least[TOTAL]:.3g} at batch {least['offered_batch']:.0f}, a factor of "
        f"{one[TOTAL] / least[TOTAL]:.3g}."
    )
    ratio = backed[TOTAL] / backed["offered_batch"].map(base.groupby("offered_batch")[TOTAL].min())
    if ratio.notna().any():
        worst = backed.iloc[int(ratio.argmax())]
        said.append(
            f"most is wasted by {worst['label']} at batch {worst['offered_batch']:.0f}: {worst[TOTAL]:.3g} J per "
            f"output token, {ratio.max():.3g} times the card alone at that batch."
        )
    fastest, thriftiest = (
        f"{point['label']} at batch {point['offered_batch']:.0f}"
        for point in (argmax(part, "throughput"), argmin(part, TOTAL))
    )
    same = "also the fastest." if fastest == thriftiest else f"not the fastest, which is {fastest}."
    said.append(f"the point of least energy, {thriftiest}, is {same}")
    return [f"{title}: {claim}" for claim in said]


def _least(backed: pd.Series[Any], alone: pd.Series[Any], column: str) -> str:
    """The points of least energy of either side against each other."""
    found = judged(backed, alone, column)
    if found.word == "AMBIGUOUS":
        head = f"whether CPU-backed KV at its best takes less than the card alone is AMBIGUOUS{interval(found)}"
    else:
        head = f"at its best CPU-backed KV takes {WORDS[found.word]} the card alone"
    ours, theirs = (
        f"{point[column]:.3g}{unit} ({point['label']}, batch {point['offered_batch']:.0f})"
        for point, unit in ((backed, f" {UNITS[column]}"), (alone, ""))
    )
    change = percent(found.ratio - 1)
    return f"{head}: {ours} against {theirs}, {change}; the card's energy, without the CPU's."


STUDY = Study(
    name="energy",
    title="Energy per output token against the batch",
    question="Does CPU-backed KV save or cost energy?",
    how_to_read=(
        "Left the throughput, then the energy of the card for one output token: all of it, and without what the card "
        "would take at rest in the same time. A larger batch shares the reading of the weights, so that a token costs "
        "less; a step that waits for the link costs more, at less power but for longer. Simulated energy is a stated "
        "power model of the card alone (busy, waiting, idle); the CPU's memory and the host are not in it."
    ),
    factors=("model", "workload", "mechanism", "offered_batch"),
    draw=draw,
)
