"""Throughput, TPOT and running batch against offered batch, by mechanism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, NullFormatter

from uvm_kv.report.load import GROUP, points
from uvm_kv.report.style import PAGE_IN, STYLES, look
from uvm_kv.report.verdict import LIMIT, Verdict, interval, verdicts, with_gains
from uvm_kv.study.base import Drawn, Study, inserted, percent, phases
from uvm_kv.types import BASELINES

PANELS = {
    "throughput": ("output tokens/s", 1.0),
    "tpot_s.p99": ("p99 TPOT (ms)", 1e3),
    "running_batch_mean": ("mean running batch", 1.0),
}
COLUMNS = (
    *(
        "origin",
        "hardware",
        "title",
        "model",
        "workload",
        "label",
        "offered_batch",
        "throughput",
        "throughput_low",
        "throughput_high",
        "num_runs",
    ),
    *("tpot_s.p50", "tpot_s.p99", "running_batch_mean", "gain", "gain_same_admission", "closed_form_ceiling"),
)


def draw(runs: pd.DataFrame, failures: Sequence[dict[str, Any]]) -> Drawn:
    """A row of panels for each model and workload of fixed lengths; those of drawn lengths are in the table."""
    del failures
    everything = with_gains(points(runs))
    fixed = ~everything["drawn"].astype(bool)
    table = everything[fixed] if fixed.any() else everything
    several = len(table[["origin", "hardware"]].drop_duplicates()) > 1 or table["title"].str.contains("=").any()
    groups = [part for _, part in table.groupby(GROUP, sort=True)]
    figure, axes = plt.subplots(len(groups), len(PANELS), figsize=(PAGE_IN, 1.65 * len(groups) + 0.6), squeeze=False)
    others = sorted(set(table["label"]) - set(STYLES))
    shown: dict[str, Any] = {}
    for row, part in zip(axes, groups, strict=True):
        for axis, (column, (label, scale)) in zip(row, PANELS.items(), strict=True):
            for name, lines in part.groupby("label", sort=True):
                lines = lines.sort_values("offered_batch")
                shown[str(name)] = axis.plot(
                    lines["offered_batch"], lines[column].astype(float) * scale, **look(str(name), others)
                )[0]
            axis.set_ylabel(label)
            _batch_axis(axis, part["offered_batch"])
        row[0].set_ylim(bottom=0)
        row[1].set_yscale("log")
        row[1].yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        row[1].yaxis.set_minor_formatter(NullFormatter())
        row[2].set_yscale("log", base=2)
        row[2].yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        _diagonal(row[2], part["offered_batch"])
        title = part["title"].iloc[0]
        row[0].set_title(title.replace(", on a ", "\non a ") if several else title.partition(", on a ")[0])
    for axis in axes[-1]:
        axis.set_xlabel("offered batch (clients)")
    order = [m for m in (*STYLES, *others) if m in shown]
    figure.legend(
        [shown[m] for m in order],
        [f"{m} (baseline)" if m in BASELINES else m for m in order],
        loc="outside upper center",
        ncols=4,
    )
    told = everything.sort_values([*GROUP, "label", "offered_batch"])[[c for c in COLUMNS if c in everything]]
    found = verdicts(everything)
    return Drawn(figure, told.reset_index(drop=True), [*_headline(found, phases(runs)), *(v.line() for v in found)])


def _headline(found: Sequence[Verdict], scope: str) -> list[str]:
    """One text, with a sentence for each card and origin and for fixed and drawn lengths; none where no verdict is
    given. `scope`: what was run of the requests."""
    if all(v.word == "UNKNOWN" for v in found):
        return []
    parts: dict[tuple[str, str, bool], list[Verdict]] = {}
    for verdict in found:
        parts.setdefault((verdict.origin, verdict.hardware, verdict.drawn), []).append(verdict)
    return [" ".join(_sentence(*key, part, scope) for key, part in parts.items())]


def _sentence(origin: str, hardware: str, drawn: bool, found: Sequence[Verdict], scope: str) -> str:
    told = [v for v in found if v.word != "UNKNOWN"]
    raised = [v for v in told if v.word == "HIGHER"]
    unclear = [v for v in told if v.word == "AMBIGUOUS"]
    each = ", ".join(_gain(v) for v in told)
    doubt = f"; AMBIGUOUS, and not counted: {', '.join(_doubt(v) for v in unclear)}" if unclear else ""
    unknown = [_name(v) for v in found if v.word == "UNKNOWN"]
    left = f"; no verdict for {', '.join(unknown)}" if unknown else ""
    lengths = " with drawn lengths" if drawn else ""
    where = f"On a {origin} {hardware}{lengths}{inserted(scope) or ','} CPU-backed KV raised the best throughput"
    equal = [v for v in told if v.equal_tpot is not None and v.equal_tpot.word == "HIGHER"]
    limited = [v for v in told if v.at_limit is not None]
    at_limit = [v for v in limited if v.at_limit is not None and v.at_limit.word == "HIGHER"]
    limit = f", at a limit of {LIMIT} sequences in {len(at_limit)} of {len(limited)}" if limited else ""
    return (
        f"{where} of {len(raised) or 'none'} of {len(told)} workloads over the best that the card does alone "
        f"({each}){doubt}{left}; at equal p99 TPOT it did so in {len(equal) or 'none'} of them{limit}."
    )


def _name(verdict: Verdict) -> str:
    """Model, lengths and what else tells the comparison apart, without the card."""
    return verdict.title.replace(f", on a {verdict.origin} {verdict.hardware}", "")


def _gain(verdict: Verdict) -> str:
    assert verdict.main is not None  # Its word is known.
    main = verdict.main
    noise = f" +- {100 * main.noise:.1f}" if main.noise is not None and main.num_draws > 1 else ""
    return f"{_name(verdict)}: {percent(main.gain)}{noise} ({main.point.mechanism})"


def _doubt(verdict: Verdict) -> str:
    assert verdict.main is not None and verdict.main.ratio is not None
    return _name(verdict) + interval(verdict.main.ratio)


def _batch_axis(axis: Any, batches: pd.Series[float]) -> None:
    axis.set_xscale("log", base=2)
    powers = [2**n for n in range(0, 24, 2) if batches.min() <= 2**n <= batches.max()]
    axis.set_xticks(powers, [str(b) for b in powers])
    axis.minorticks_off()


def _diagonal(axis: Any, batches: pd.Series[float]) -> None:
    """Where all clients run at once."""
    ends = np.array([batches.min(), batches.max()], float)
    axis.plot(ends, ends, color="black", linewidth=0.5, linestyle=(0, (1, 2)), zorder=0)


STUDY = Study(
    name="batch_sweep",
    title="Throughput, latency and running batch against the offered batch",
    question="Does CPU-backed KV raise the throughput of an RTX 3090, by how much, and by which mechanism?",
    how_to_read=(
        "Each line is a memory mechanism; the grey and the black one serve from the card alone. While all requests fit "
        "the card the lines lie on each other. To the right of that the card alone queues the rest (its running batch "
        "stays below the dotted diagonal), and the other mechanisms run more requests at once with a part of their KV "
        "cache in CPU memory. Where a line rises above the black and grey ones, that paid; where it falls, the link or "
        "the page faults cost more than the larger batch brings."
    ),
    factors=("model", "workload", "mechanism", "offered_batch"),
    draw=draw,
    experiments=("batch_sweep", "batch_sweep_drawn"),
)
