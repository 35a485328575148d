"""The verdict: did CPU-backed KV raise throughput over device-only serving, by how much, by which mechanism, where.

The baseline is the better of device_resident and device_recompute (design, section 3): an offload mechanism must beat
what the same card does without it, under whichever admission suits the card better. The gain over the baseline of the
mechanism's own admission stands beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from uvm_kv.analysis.load import GROUP
from uvm_kv.analysis.statistics import MIN_REPEATS, Ratio, judge
from uvm_kv.types import BASELINES, OUR_ENGINE

SAME_ADMISSION = {"worst_case": "device_resident", "optimistic": "device_recompute"}
INDIFFERENT = 0.01
"""Gains within +-1 % are called no difference: below what the roofline's fit can tell apart."""
MEASURED = "measured"
ONE_DRAW = 0.03
"""The same for a single draw of random lengths: twice the spread over seeds that the Azure workloads showed."""


@dataclass(frozen=True)
class Best:
    mechanism: str
    batch: int
    throughput: float
    tpot_p99_s: float | None


@dataclass(frozen=True)
class Verdict:
    """Of one group of points that differ in mechanism and batch only."""

    title: str
    baseline: Best | None
    challenger: Best | None
    """The best point of any CPU-backed mechanism."""
    gain: float | None
    gain_same_admission: float | None
    loses_from: dict[str, int | None]
    """Per CPU-backed mechanism: the batch from which on it is below the baseline at every batch tried."""
    noise: float
    """Gains up to this size, as a fraction, are no difference; of measured runs see `judged`."""
    challenger_is_idle: bool
    """Whether the challenger's best point moved no KV over the link: it only filled device blocks."""
    equal_tpot: Best | None
    """The best CPU-backed point whose p99 TPOT does not exceed that of the baseline's best point."""
    gain_equal_tpot: float | None
    same_batch: Best | None
    """The CPU-backed point with the largest gain over the baseline at its own batch."""
    gain_same_batch: float | None
    judged: Ratio | None
    """Challenger over baseline, and what the runs allow to say of it: AMBIGUOUS is of measured ones only."""
    judged_equal_tpot: Ratio | None
    origin: str
    hardware: str

    @property
    def tolerance(self) -> float:
        """What `judged` calls no difference: of measured runs the spread is in the interval."""
        return INDIFFERENT if self.origin == MEASURED else self.noise

    def line(self) -> str:
        """One line for people; it begins with `Verdict:`."""
        head = f"Verdict: {self.title}:"
        if self.baseline is None or self.challenger is None or self.gain is None or self.judged is None:
            absent = "device_resident or device_recompute" if self.baseline is None else "CPU-backed mechanism"
            return f"{head} none, because no {absent} is among the results."
        base, best = self.baseline, self.challenger
        answer = {
            "AMBIGUOUS": f"AMBIGUOUS, CPU-backed KV moved the best throughput by {self.gain:+.1%}",
            "HIGHER": f"yes, CPU-backed KV raised the best throughput by {self.gain:+.1%}",
            "LOWER": f"no, CPU-backed KV did not raise the best throughput ({self.gain:+.1%})",
            "SAME": (
                f"no difference within {self.tolerance:.0%}, "
                f"CPU-backed KV moved the best throughput by {self.gain:+.1%}"
            ),
        }[self.judged.word]
        if self.judged.word == "AMBIGUOUS":
            answer += interval(self.judged)
        lose = self.loses_from[best.mechanism]
        text = (
            f"{head} {answer}: {best.mechanism} {best.throughput:.0f} tok/s at batch {best.batch}, against "
            f"{base.mechanism} {base.throughput:.0f} tok/s at batch {base.batch}; "
        )
        if self.challenger_is_idle:
            text += "that point moved no KV over the link; "
        if self.gain_same_admission is not None:
            text += f"{self.gain_same_admission:+.1%} over the device-only baseline of its own admission; "
        text += "it does not lose at the largest batch tried; " if lose is None else f"it loses from batch {lose} on; "
        if self.same_batch is not None and self.gain_same_batch is not None:
            most = self.same_batch
            text += f"most at an equal batch: {self.gain_same_batch:+.1%}, by {most.mechanism} at batch {most.batch}; "
        if self.equal_tpot is None or self.gain_equal_tpot is None or base.tpot_p99_s is None:
            return text + "at equal p99 TPOT no CPU-backed point remains."
        equal = self.equal_tpot
        return text + (
            f"at equal p99 TPOT (at most {base.tpot_p99_s * 1e3:.1f} ms) {self.gain_equal_tpot:+.1%}, "
            f"by {equal.mechanism} at batch {equal.batch}."
        )


def interval(ratio: Ratio) -> str:
    """Of an AMBIGUOUS comparison: its interval, or why it has none."""
    if math.isnan(ratio.low):
        return f", which needs {MIN_REPEATS} repeats on both sides to be told from noise"
    return f" (95 % interval {ratio.low - 1:+.1%} to {ratio.high - 1:+.1%})"


def is_cpu_backed(points: pd.DataFrame) -> pd.Series[bool]:
    """Peers are neither baselines nor answers: they stand beside them in tables and figures."""
    return (points["memory"] != "device") & (points["engine"] == OUR_ENGINE)


def _best(points: pd.DataFrame) -> Best | None:
    points = points.dropna(subset=["throughput"])
    if points.empty:
        return None
    # Of equal throughputs the smallest batch.
    row = points.sort_values(["throughput", "offered_batch"], ascending=[False, True]).iloc[0]
    tpot = row["tpot_s.p99"]
    return Best(
        str(row["label"]),
        int(row["offered_batch"]),
        float(row["throughput"]),
        None if pd.isna(tpot) else float(tpot),
    )


def baseline_by_batch(points: pd.DataFrame) -> pd.Series[float]:
    """Throughput of the better baseline at each offered batch."""
    return points[points["mechanism"].isin(BASELINES)].groupby("offered_batch")["throughput"].max()


def verdicts(points: pd.DataFrame) -> list[Verdict]:
    return [_verdict(part) for _, part in points.groupby(GROUP, sort=True)]


def _noise(part: pd.DataFrame) -> float:
    """Twice the relative spread over repeats where there are any; else by whether the lengths are random."""
    spread = (part["throughput_std"] / part["throughput"]).dropna()
    if not spread.empty:
        return max(INDIFFERENT, 2 * float(spread.median()))
    return ONE_DRAW if part["prompt_tokens"].isna().all() else INDIFFERENT


def _loses_from(rows: pd.DataFrame, by_batch: pd.Series[float], noise: float) -> int | None:
    """The smallest batch of the last unbroken run of losing batches, up to the largest batch tried."""
    losing = None
    for _, row in rows.sort_values("offered_batch", ascending=False).iterrows():
        base = by_batch.get(row["offered_batch"])
        if base is None or not row["throughput"] < (1 - noise) * base:
            break
        losing = int(row["offered_batch"])
    return losing


def _verdict(part: pd.DataFrame) -> Verdict:
    base_points = part[part["mechanism"].isin(BASELINES)]
    backed = part[is_cpu_backed(part)]
    baseline, challenger = _best(base_points), _best(backed)
    by_batch, noise = baseline_by_batch(part), _noise(part)
    loses = {str(label): _loses_from(rows, by_batch, noise) for label, rows in backed.groupby("label", sort=True)}
    gain = same = equal_gain = equal = most = most_gain = judged = judged_equal = None
    idle = False
    if baseline is not None and challenger is not None:
        gain = challenger.throughput / baseline.throughput - 1
        point, base = _row(backed, challenger), _row(base_points, baseline)
        is_measured = point["origin"] == MEASURED
        tolerance = INDIFFERENT if is_measured else noise

        def over_base(best: Best) -> Ratio:
            values = _row(backed, best)["throughputs"]
            return judge(values, base["throughputs"], tolerance, measured=is_measured)

        judged = over_base(challenger)
        idle = bool(point["h2d_bytes"] == 0 and point["d2h_bytes"] == 0)
        own = _best(part[part["mechanism"] == SAME_ADMISSION[point["admission"]]])
        same = None if own is None else challenger.throughput / own.throughput - 1
        ratio = (backed["throughput"] / backed["offered_batch"].map(by_batch)).dropna()
        if not ratio.empty:
            most, most_gain = _best(backed.loc[[ratio.idxmax()]]), float(ratio.max()) - 1
        if baseline.tpot_p99_s is not None:
            equal = _best(backed[backed["tpot_s.p99"] <= baseline.tpot_p99_s])
            if equal is not None:
                equal_gain, judged_equal = equal.throughput / baseline.throughput - 1, over_base(equal)
    return Verdict(
        title=str(part["title"].iloc[0]),
        baseline=baseline,
        challenger=challenger,
        gain=gain,
        gain_same_admission=same,
        loses_from=loses,
        noise=noise,
        challenger_is_idle=idle,
        equal_tpot=equal,
        gain_equal_tpot=equal_gain,
        same_batch=most,
        gain_same_batch=most_gain,
        judged=judged,
        judged_equal_tpot=judged_equal,
        origin=str(part["origin"].iloc[0]),
        hardware=str(part["hardware"].iloc[0]),
    )


def _row(points: pd.DataFrame, best: Best) -> pd.Series[Any]:
    return points[(points["label"] == best.mechanism) & (points["offered_batch"] == best.batch)].iloc[0]


def with_gains(points: pd.DataFrame) -> pd.DataFrame:
    """Points with their gain over the best point of a baseline in their group, as a fraction; NaN without one.

    `gain`: over the better of the two baselines. `gain_same_admission`: over the baseline of the point's own admission,
    which is what the closed-form ceilings bound; a peer has none. `gain_over_resident`: over device_resident.
    """
    table = points.copy()
    base = points[points["mechanism"].isin(BASELINES)]
    best = base.groupby([*GROUP, "mechanism"])["throughput"].max().unstack().reindex(columns=list(BASELINES))
    rows = best.reindex(pd.MultiIndex.from_frame(table[GROUP])).reset_index(drop=True)
    table = table.reset_index(drop=True)
    table["gain"] = table["throughput"] / rows.max(axis=1) - 1
    table["gain_over_resident"] = table["throughput"] / rows["device_resident"] - 1
    same = rows["device_resident"].where(table["admission"] == "worst_case", rows["device_recompute"])
    table["gain_same_admission"] = (table["throughput"] / same - 1).where(table["engine"] == OUR_ENGINE)
    return table
