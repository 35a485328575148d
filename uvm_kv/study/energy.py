"""Energy per output token, with and without what the card takes at rest, and throughput, against batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from uvm_kv.report.load import GROUP, points
from uvm_kv.report.repeats import REPEATS
from uvm_kv.report.statistics import judge
from uvm_kv.report.style import PAGE_IN, STYLES, look
from uvm_kv.report.verdict import INDIFFERENT, MEASURED, interval, is_cpu_backed, moved_kv
from uvm_kv.study.base import Drawn, Study, percent, phases
from uvm_kv.types import BASELINES

TOTAL, ABOVE_IDLE = "energy_j_per_output_token", "energy_j_per_output_token_above_idle"
WORDS = {"LOWER": "less than", "HIGHER": "more than", "SAME": "as much as"}
J_TICKS = [mantissa * 10.0**power for power in range(-2, 4) for mantissa in (1, 2, 3, 5, 7)]
PANELS = {"throughput": "output tokens/s", TOTAL: "J per output token", ABOVE_IDLE: "J per output token above idle"}
COLUMNS = (*GROUP, "origin", "hardware", "model", "label", "offered_batch", *PANELS, "power_w", "idle_power_w",
           "running_batch_mean", "stall_s", "duration_s", "num_runs")  # fmt: skip


def draw(runs: pd.DataFrame, failures: Sequence[dict[str, Any]]) -> Drawn:
    """A row a comparison."""
    del failures
    if absent := [name for name in (TOTAL, ABOVE_IDLE) if name not in runs or runs[name].isna().all()]:
        raise ValueError(f"energy: no run has {absent[0]}: without a power model or the card's counter there is none")
    table = points(runs[runs[TOTAL].notna()], keep=(TOTAL, ABOVE_IDLE))
    several = table[["origin", "hardware"]].drop_duplicates().shape[0] > 1
    groups = [part for _, part in table.groupby(GROUP, sort=True)]
    figure, axes = plt.subplots(len(groups), 3, figsize=(PAGE_IN, 1.9 * len(groups) + 0.75), squeeze=False)
    others = sorted(set(table["label"]) - set(STYLES))
    shown: dict[str, Any] = {}
    for row, part in zip(axes, groups, strict=True):
        for axis, (column, title) in zip(row, PANELS.items(), strict=True):
            for label, line in part.groupby("label", sort=True):
                line = line.sort_values("offered_batch")
                style = look(str(label), others)
                shown[str(label)] = axis.plot(line["offered_batch"], line[column], **style)[0]
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axis.set_ylabel(title)
            if column != "throughput":
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(FixedLocator(J_TICKS))
                axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
                axis.yaxis.set_minor_formatter(NullFormatter())
        row[0].set_ylim(bottom=0)
        title = part["title"].iloc[0]
        row[0].set_title(title.replace(", on a ", "\non a ") if several else title.partition(", on a ")[0])
    for axis in axes[-1]:
        axis.set_xlabel("offered batch (clients)")
    order = [name for name in (*STYLES, *others) if name in shown]
    figure.legend(
        [shown[name] for name in order],
        [f"{name} (baseline)" if name in BASELINES else name for name in order],
        loc="outside upper center",
        ncols=4,
        title="; ".join(
            f"{card}, at rest {part['idle_power_w'].median():.0f} W"
            for card, part in table.groupby("hardware", sort=True)
        ),
    )
    drawn = table[[c for c in COLUMNS if c in table]].sort_values([*GROUP, "label", "offered_batch"])
    said = [claim for part in groups for claim in claims(part, phases(runs))]
    return Drawn(figure, drawn.drop(columns="group").reset_index(drop=True), said)


def claims(part: pd.DataFrame, scope: str = "") -> list[str]:
    """Of one comparison: what batching saves, the least energy with and without CPU memory, and the most wasted.
    `scope`: what was run of the requests."""
    title = f"{part['title'].iloc[0]}{f', {scope}' if scope else ''}"
    base, backed = part[part["mechanism"].isin(BASELINES)], part[is_cpu_backed(part) & moved_kv(part)]
    if base.empty or backed.empty:
        absent = "device-only" if base.empty else "CPU-backed"
        return [f"{title}: no {absent} run{' that moved KV' * backed.empty}, so that energies cannot be compared."]
    said = []
    for column, name in ((TOTAL, "J per output token"), (ABOVE_IDLE, "J per output token above idle")):
        least, other = base.iloc[int(base[column].argmin())], backed.iloc[int(backed[column].argmin())]
        sides = other[f"{column}{REPEATS}"], least[f"{column}{REPEATS}"]
        found = judge(*sides, INDIFFERENT, measured=least["origin"] == MEASURED)
        if found.word == "AMBIGUOUS":
            head = f"whether CPU-backed KV at its best takes less than the card alone is AMBIGUOUS{interval(found)}"
        else:
            head = f"at its best CPU-backed KV takes {WORDS[found.word]} the card alone"
        said.append(
            f"{title}: {head}: {other[column]:.3g} {name} "
            f"({other['label']}, batch {other['offered_batch']:.0f}) against {least[column]:.3g} ({least['label']}, "
            f"batch {least['offered_batch']:.0f}), {percent(found.ratio - 1)}; the card's energy, without the CPU's."
        )
    one = base.iloc[int(base["offered_batch"].argmin())]
    least = base.iloc[int(base[TOTAL].argmin())]
    said.append(
        f"{title}: on the card alone batching takes it from {one[TOTAL]:.3g} J per output token at batch "
        f"{one['offered_batch']:.0f} to {least[TOTAL]:.3g} at batch {least['offered_batch']:.0f}, a factor of "
        f"{one[TOTAL] / least[TOTAL]:.3g}."
    )
    at_batch = base.groupby("offered_batch")[TOTAL].min()
    ratio = backed[TOTAL] / backed["offered_batch"].map(at_batch)
    if ratio.notna().any():
        worst = backed.iloc[int(ratio.argmax())]
        said.append(
            f"{title}: most is wasted by {worst['label']} at batch {worst['offered_batch']:.0f}: {worst[TOTAL]:.3g} J "
            f"per output token, {ratio.max():.3g} times the card alone at that batch."
        )
    fastest, thriftiest = part.iloc[int(part["throughput"].argmax())], part.iloc[int(part[TOTAL].argmin())]
    same = fastest["label"] == thriftiest["label"] and fastest["offered_batch"] == thriftiest["offered_batch"]
    point = f"{thriftiest['label']} at batch {thriftiest['offered_batch']:.0f}"
    said.append(
        f"{title}: the point of least energy, {point}, is {'also' if same else 'not'} the fastest"
        + ("." if same else f", which is {fastest['label']} at batch {fastest['offered_batch']:.0f}.")
    )
    return said


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
