"""Simulated against recorded runs: an error per metric, and a verdict that says when it cannot tell.

Both sides are computed from the request and step tables by the same code. The error of a pair (a recorded run, and the
simulation that served the same requests) is simulated / recorded - 1.

The verdict is a test of equivalence, not of difference: more noise must never make two sides look more alike.

- With n >= 2 recorded runs of one config, the noise is the half width of the 95 % interval (Student's t) of the
  mean error over the n pairs. Pairing takes the workload's own randomness out of it.
- SAME: the whole interval lies within +-tolerance. FAST or SLOW: the whole interval lies beyond it, and the simulation
  is faster or slower than what was recorded; of counts, which have no better side, it is LESS or MORE. AMBIGUOUS: the
  interval straddles the tolerance, so that the noise hides the answer.
- One recorded run says nothing of its noise: the interval is its error alone, and the tolerance stands for the noise.
- AMBIGUOUS too: a percentile of so few samples that none is expected beyond it (p99 of fewer than 100), or a mean of
  one sample.
- Equal numbers are the SAME whatever the noise. What a side did not observe has no error and no verdict.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from uvm_kv.kvcache.ops import MemoryCounters
from uvm_kv.store.checks import formula_safe
from uvm_kv.telemetry.recorder import Table
from uvm_kv.telemetry.summary import summarize
from uvm_kv.types import NS_PER_S
from uvm_kv.validate.recorded import Recording

TOLERANCE = 0.05
"""Errors within +-5 % are called the SAME: about what the roofline's fit can tell (docs/roofline.md)."""
EQUAL = 1e-9
NOT_OBSERVED = "not observed"
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""97.5 % points of Student's t for 1 to 10 degrees of freedom; beyond, that of 10, which is a little too wide."""
STATISTICS = {"mean": 2, "p50": 2, "p99": 100}
"""Statistics of a distribution, each with the number of samples that it needs."""

Better = Literal["higher", "lower"] | None


@dataclass(frozen=True)
class Metric:
    label: str
    """Title for the user."""
    unit: str
    """Unit: s, tok/s, bytes, or nothing for a count."""
    better: Better
    num_needed: int = 0


DISTRIBUTIONS = {
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "e2e_s": "end to end",
    "decode_step_s": "decode step",
    "prefill_step_s": "step with prefill",
}


def _metrics() -> dict[str, Metric]:
    found = {
        "output_tokens_per_s": Metric("output, steady window", "tok/s", "higher"),
        "output_tokens_per_s_whole_run": Metric("output, whole run", "tok/s", "higher"),
    }
    for name, label in DISTRIBUTIONS.items():
        for statistic, needed in STATISTICS.items():
            found[f"{name}.{statistic}"] = Metric(f"{label} {statistic}", "s", "lower", needed)
    found["num_steps"] = Metric("steps", "", None)
    found["running_batch_mean"] = Metric("running batch", "", None)
    found["preemptions"] = Metric("preemptions", "", None)
    found["stall_s"] = Metric("stall", "s", "lower")
    for name in MemoryCounters._fields:
        if name != "stall_ns":
            label = name.removesuffix("_bytes").replace("_", " ")
            found[name] = Metric(label, "bytes" if name.endswith("_bytes") else "", None)
    return found


METRICS = _metrics()


class Observed(NamedTuple):
    value: float | None
    num_samples: int | None = None
    """Number of samples behind a statistic; None where the value is not a statistic."""


def observe(run: Recording) -> dict[str, Observed]:
    """Every metric of a run; value None where it was not observed. Latencies are those of measured requests."""
    found: dict[str, Observed] = {}
    if run.steps is not None:
        found |= _observe_steps(run.steps, run.requests, run.steady_until_ns)
    table = {name: _floats(run.requests[name]) for name in ("arrival_ns", "first_token_ns", "finish_ns")}
    tokens, measured = _floats(run.requests["output_tokens"]), np.array(run.requests["measured"], bool)
    arrival, first, finish = table.values()
    gaps = (finish - first)[measured & (tokens > 1)] / (tokens[measured & (tokens > 1)] - 1)
    found |= _distribution("tpot_s", gaps)
    if run.steady_until_ns is None:  # Else nothing is counted from an arrival, and the end is no request's.
        for name, values in {"ttft_s": (first - arrival)[measured], "e2e_s": (finish - arrival)[measured]}.items():
            found |= _distribution(name, values)
        seconds = float(finish.max() - arrival.min()) / NS_PER_S
        found["output_tokens_per_s_whole_run"] = Observed(float(tokens.sum()) / seconds)
    preemptions = run.requests["num_preemptions"]
    found["preemptions"] = Observed(None if None in preemptions else float(sum(p or 0 for p in preemptions)))
    return {name: found.get(name, Observed(None)) for name in METRICS}


def _observe_steps(steps: Table, requests: Table, steady_until_ns: int | None) -> dict[str, Observed]:
    summary = summarize(steps, requests, power=None, complete=True, steady_until_ns=steady_until_ns)
    names = ("output_tokens_per_s", "num_steps", "running_batch_mean", "stall_s", "gpu_fault_groups", "evicted_chunks")
    found = {name: Observed(summary[name]) for name in names}
    found |= {name: Observed(value) for name, value in summary["link_bytes_by_cause"].items()}
    took = _floats(steps["end_ns"]) - _floats(steps["start_ns"])
    decodes = _floats(steps["num_scheduled_tokens"]) == _floats(steps["num_running"])  # One token a sequence.
    return found | _distribution("decode_step_s", took[decodes]) | _distribution("prefill_step_s", took[~decodes])


def _distribution(name: str, values_ns: NDArray[np.float64]) -> dict[str, Observed]:
    if not len(values_ns) or np.isnan(values_ns).any():
        return {f"{name}.{statistic}": Observed(None) for statistic in STATISTICS}
    values = values_ns / NS_PER_S
    found = {"mean": values.mean(), "p50": np.percentile(values, 50), "p99": np.percentile(values, 99)}
    return {f"{name}.{statistic}": Observed(float(x), len(values)) for statistic, x in found.items()}


def _floats(column: Sequence[Any]) -> NDArray[np.float64]:
    """The column as floats; None becomes NaN."""
    return np.array(column, float)


@dataclass(frozen=True)
class Comparison:
    """A row of the error table."""

    metric: str
    """Name of the metric in METRICS."""
    unit: str
    recorded: float | None
    """Mean over the runs; None: not observed."""
    simulated: float | None
    error: float | None
    """Mean of simulated / recorded - 1; None where a side did not observe it, or recorded 0."""
    noise: float | None
    """Half width of the error's 95 % interval; None for a single run."""
    verdict: str


def compare(pairs: Sequence[tuple[Recording, Recording]], tolerance: float = TOLERANCE) -> list[Comparison]:
    """The error table of (recorded, simulated) pairs of one config. Metrics of which neither side observed anything
    above zero are left out."""
    observed = [(observe(recorded), observe(simulated)) for recorded, simulated in pairs]
    rows = []
    for name, metric in METRICS.items():
        both = [(r[name], s[name]) for r, s in observed]
        if any(side.value for pair in both for side in pair):
            rows.append(_compare(name, metric, both, tolerance))
    return rows


def _compare(name: str, metric: Metric, both: list[tuple[Observed, Observed]], tolerance: float) -> Comparison:
    recorded, simulated = (_mean([pair[side].value for pair in both]) for side in (0, 1))
    if recorded is None or simulated is None:
        return Comparison(name, metric.unit, recorded, simulated, None, None, NOT_OBSERVED)
    errors, enough = [], True
    for r, s in both:
        assert r.value is not None and s.value is not None
        errors.append(relative_error(r.value, s.value))
        enough = enough and all(o.num_samples is None or o.num_samples >= metric.num_needed for o in (r, s))
    error, noise = interval(errors)
    verdict = judge(error, noise, tolerance, metric.better) if enough else "AMBIGUOUS"
    if max(map(abs, errors)) <= EQUAL:
        verdict = "SAME"
    return Comparison(name, metric.unit, recorded, simulated, error if math.isfinite(error) else None, noise, verdict)


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def relative_error(recorded: float, simulated: float) -> float:
    """simulated / recorded - 1; infinite where something was simulated of which nothing was recorded."""
    if recorded == simulated:
        return 0.0
    return simulated / recorded - 1 if recorded else math.inf


def interval(errors: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half width of its 95 % interval: None for one value, NaN where only some are finite."""
    mean, n = statistics.fmean(errors), len(errors)
    if n == 1 or not any(map(math.isfinite, errors)):
        return mean, None
    if not math.isfinite(mean):
        return mean, math.nan
    return mean, T_95[min(n - 1, len(T_95)) - 1] * statistics.stdev(errors) / math.sqrt(n)


def judge(error: float, noise: float | None, tolerance: float, better: Better) -> str:
    """The verdict on an error with its noise, as the module says."""
    half = 0.0 if noise is None else noise
    if abs(error) + half <= tolerance:
        return "SAME"
    if not abs(error) - half > tolerance:  # Also where the noise is NaN.
        return "AMBIGUOUS"
    if better is None:
        return "MORE" if error > 0 else "LESS"
    return "FAST" if (error > 0) == (better == "higher") else "SLOW"


def write_comparison(
    folder: Path,
    rows: Sequence[Comparison],
    pairs: Sequence[tuple[Recording, Recording]],
    *,
    tolerance: float,
    argv: Sequence[str],
) -> list[Path]:
    """comparison.json and comparison.csv: what is printed, and what both sides are."""
    sides = {
        side: [{"run": r.name, "origin": r.origin} | r.provenance for r in runs]
        for side, runs in zip(("recorded", "simulated"), zip(*pairs, strict=True), strict=True)
    }
    # JSON has no NaN; a noise that cannot be had is null.
    table = [{k: None if v != v else v for k, v in asdict(row).items()} for row in rows]
    paths = [folder / "comparison.json", folder / "comparison.csv"]
    content = {"tolerance": tolerance, "argv": list(argv), **sides, "metrics": table}
    paths[0].write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with paths[1].open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(Comparison.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: formula_safe(value) for name, value in row.items()} for row in table)
    return paths
