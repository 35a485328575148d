"""The verdict: did CPU-backed KV raise throughput over device-only serving, by how much, by which mechanism, where.

The baseline is the better of device_resident and device_recompute (design, section 3): an offload mechanism must beat
what the same card does without it, under whichever admission suits the card better. The gain over the baseline of the
mechanism's own admission stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from uvm_kv.analysis.load import GROUP

BASELINES = ("device_resident", "device_recompute")
SAME_ADMISSION = {"worst_case": "device_resident", "optimistic": "device_recompute"}
INDIFFERENT = 0.01
"""Gains within +-1 % are called no difference: below what the roofline's fit can tell apart."""


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
    """Per CPU-backed mechanism: the smallest batch where it is more than 1 % below the baseline at that batch."""
    equal_tpot: Best | None
    """The best CPU-backed point whose p99 TPOT does not exceed that of the baseline's best point."""
    gain_equal_tpot: float | None
    same_batch: Best | None
    """The CPU-backed point with the largest gain over the baseline at its own batch."""
    gain_same_batch: float | None

    def line(self) -> str:
        """One line for people; it begins with `Verdict:`."""
        head = f"Verdict: {self.title}:"
        if self.baseline is None or self.challenger is None or self.gain is None:
            absent = "device_resident or device_recompute" if self.baseline is None else "CPU-backed mechanism"
            return f"{head} none, because no {absent} is among the results."
        base, best = self.baseline, self.challenger
        if self.gain > INDIFFERENT:
            answer = f"yes, CPU-backed KV raised the best throughput by {self.gain:+.1%}"
        elif self.gain < -INDIFFERENT:
            answer = f"no, CPU-backed KV did not raise the best throughput ({self.gain:+.1%})"
        else:
            answer = f"no difference, CPU-backed KV moved the best throughput by {self.gain:+.1%}"
        lose = self.loses_from[best.mechanism]
        text = (
            f"{head} {answer}: {best.mechanism} {best.throughput:.0f} tok/s at batch {best.batch}, against "
            f"{base.mechanism} {base.throughput:.0f} tok/s at batch {base.batch}; "
        )
        if self.gain_same_admission is not None:
            text += f"{self.gain_same_admission:+.1%} over the device-only baseline of its own admission; "
        text += "it does not lose at any batch tried; " if lose is None else f"it loses from batch {lose} on; "
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


def is_cpu_backed(points: pd.DataFrame) -> pd.Series[bool]:
    return points["memory"] != "device"


def _best(points: pd.DataFrame) -> Best | None:
    points = points.dropna(subset=["throughput"])
    if points.empty:
        return None
    # Of equal throughputs the smallest batch.
    row = points.sort_values(["throughput", "offered_batch"], ascending=[False, True]).iloc[0]
    tpot = row["tpot_s.p99"]
    return Best(
        str(row["mechanism"]),
        int(row["offered_batch"]),
        float(row["throughput"]),
        None if pd.isna(tpot) else float(tpot),
    )


def baseline_by_batch(points: pd.DataFrame) -> pd.Series[float]:
    """Throughput of the better baseline at each offered batch."""
    return points[points["mechanism"].isin(BASELINES)].groupby("offered_batch")["throughput"].max()


def verdicts(points: pd.DataFrame) -> list[Verdict]:
    return [_verdict(part) for _, part in points.groupby(GROUP, sort=True)]


def title_of(part: pd.DataFrame) -> str:
    """What a group is, for people: `llama_7b, fixed 512+512, on a simulated rtx3090`."""
    row = part.iloc[0]
    lengths = ""
    if pd.notna(row["prompt_tokens"]):
        lengths = f" {int(row['prompt_tokens'])}+{int(row['output_tokens'])}"
    return f"{row['model']}, {row['workload']}{lengths}, on a {row['origin']} {row['hardware']}"


def _verdict(part: pd.DataFrame) -> Verdict:
    base_points = part[part["mechanism"].isin(BASELINES)]
    backed = part[is_cpu_backed(part)]
    baseline, challenger = _best(base_points), _best(backed)
    by_batch = baseline_by_batch(part)
    loses: dict[str, int | None] = {}
    for mechanism, rows in backed.groupby("mechanism", sort=True):
        behind = rows[rows["throughput"] < (1 - INDIFFERENT) * rows["offered_batch"].map(by_batch)]
        loses[str(mechanism)] = None if behind.empty else int(behind["offered_batch"].min())
    gain = same = equal_gain = equal = most = most_gain = None
    if baseline is not None and challenger is not None:
        gain = challenger.throughput / baseline.throughput - 1
        admission = backed.loc[backed["mechanism"] == challenger.mechanism, "admission"].iloc[0]
        own = _best(part[part["mechanism"] == SAME_ADMISSION[admission]])
        same = None if own is None else challenger.throughput / own.throughput - 1
        ratio = (backed["throughput"] / backed["offered_batch"].map(by_batch)).dropna()
        if not ratio.empty:
            most, most_gain = _best(backed.loc[[ratio.idxmax()]]), float(ratio.max()) - 1
        if baseline.tpot_p99_s is not None:
            equal = _best(backed[backed["tpot_s.p99"] <= baseline.tpot_p99_s])
            equal_gain = None if equal is None else equal.throughput / baseline.throughput - 1
    return Verdict(
        title_of(part),
        baseline,
        challenger,
        gain,
        same,
        loses,
        equal,
        equal_gain,
        most,
        most_gain,
    )


def with_gains(points: pd.DataFrame) -> pd.DataFrame:
    """Points with their gain over the best point of a baseline in their group, as a fraction; NaN without one.

    `gain`: over the better of the two baselines. `gain_same_admission`: over the baseline of the point's own admission,
    which is what the closed-form ceilings bound. `gain_over_resident`: over device_resident.
    """
    table = points.copy()
    base = points[points["mechanism"].isin(BASELINES)]
    best = base.groupby([*GROUP, "mechanism"])["throughput"].max().unstack().reindex(columns=list(BASELINES))
    rows = best.reindex(pd.MultiIndex.from_frame(table[GROUP])).reset_index(drop=True)
    table = table.reset_index(drop=True)
    table["gain"] = table["throughput"] / rows.max(axis=1) - 1
    table["gain_over_resident"] = table["throughput"] / rows["device_resident"] - 1
    same = rows["device_resident"].where(table["admission"] == "worst_case", rows["device_recompute"])
    table["gain_same_admission"] = table["throughput"] / same - 1
    return table
