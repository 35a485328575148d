"""Throughput, TPOT and running batch against offered batch, by mechanism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from uvm_kv.report.drawing import REFERENCE, log_scale, panels_by_batch
from uvm_kv.report.load import GROUP, points
from uvm_kv.report.verdict import LIMIT, Verdict, interval, verdicts, with_gains
from uvm_kv.study.base import Drawn, Study
from uvm_kv.study.kit import inserted, percent, phases

PANELS = {
    "throughput": ("output tokens/s", 1.0),
    "tpot_s.p99": ("p99 TPOT (ms)", 1e3),
    "running_batch_mean": ("mean running batch", 1.0),
}
COLUMNS = ("origin", "hardware", "title", "model", "workload", "label", "offered_batch", "throughput", "throughput_low",
           "throughput_high", "num_runs", "tpot_s.p50", "tpot_s.p99", "running_batch_mean", "gain",
           "gain_same_admission", "closed_form_ceiling")  # fmt: skip


def draw(runs: pd.DataFrame, _: Sequence[dict[str, Any]]) -> Drawn:
    """A row of panels for each model and workload of fixed lengths; those of drawn lengths are in the table."""
    everything = with_gains(points(runs))
    fixed = ~everything["drawn"].astype(bool)
    figure, rows = panels_by_batch(everything[fixed] if fixed.any() else everything, PANELS, height=1.65, margin=0.6)
    for part, (speed, latency, running) in rows:
        speed.set_ylim(bottom=0)
        log_scale(latency.yaxis)
        log_scale(running.yaxis, base=2)
        ends = [part["offered_batch"].min(), part["offered_batch"].max()]
        running.plot(ends, ends, **REFERENCE)  # Where all clients run at once.
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
