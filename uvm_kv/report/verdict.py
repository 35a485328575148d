"""The verdict: did CPU-backed KV raise throughput over device-only serving, by how much, by which mechanism, where.

The baseline is the better of device_resident and device_recompute (design, section 3): an offload mechanism must beat
what the same card does without it, under whichever admission suits the card better. The gain over the baseline of the
mechanism's own admission stands beside it. The challenger is the best CPU-backed point that moved KV over the link: one
that moved none owes nothing to CPU memory.

A best point is claimed only as far as the batches that were tried allow (`_headroom`): what may lie between two of
them, or beyond the largest, bounds the gain from below and from above. Where the bounds do not decide, the verdict is
"cannot say", with what is missing and the command that brings it.

Noise. Fixed lengths draw nothing: gains up to INDIFFERENT are no difference. Where lengths or arrivals are drawn, both
sides serve the same draws and the gains are paired: no difference is |gain| <= max(INDIFFERENT, t s / sqrt(n)), with s
the standard deviation of the n paired gains and t Student's (2.776 for five draws, a 95 % interval). Measured runs are
judged by their repeats (`uvm_kv.report.statistics`).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import pandas as pd
from scipy.stats import t as student

from uvm_kv.config.shipped import command
from uvm_kv.report.load import GROUP
from uvm_kv.report.statistics import CONFIDENCE, MIN_REPEATS, Ratio, judge
from uvm_kv.telemetry.summary import is_limited_by_memory
from uvm_kv.types import BASELINES, OUR_ENGINE

SAME_ADMISSION = {"worst_case": "device_resident", "optimistic": "device_recompute"}
INDIFFERENT = 0.01
"""Gains within +-1 % are called no difference: below what the roofline's fit can tell apart."""
RESOLVED = 0.005
"""A headroom up to this, as a fraction, is none."""
LIMIT = 256
"""vLLM's default `max_num_seqs`: the batch limit of somebody who has not searched."""
MEASURED = "measured"


@dataclass(frozen=True)
class Best:
    mechanism: str
    batch: int
    throughput: float
    tpot_p99_s: float | None


@dataclass(frozen=True)
class Gain:
    """One point over another."""

    over: Best
    point: Best
    ratio: Ratio | None
    """None where nothing can be said."""
    gain: float
    noise: float | None
    """What is no difference, as a fraction; None where a single draw does not show it, and of measured runs."""
    num_draws: int
    """Paired draws that the gain is a mean of."""

    @property
    def low(self) -> float:
        """The lower end of the ratio's interval; NaN without one."""
        return math.nan if self.ratio is None else self.ratio.low

    @property
    def high(self) -> float:
        return math.nan if self.ratio is None else self.ratio.high

    @property
    def word(self) -> str:
        """HIGHER, LOWER, SAME, AMBIGUOUS (measured runs), or UNKNOWN."""
        return "UNKNOWN" if self.ratio is None else self.ratio.word


@dataclass(frozen=True)
class Verdict:
    """The verdict on one group of points that differ in mechanism and batch only."""

    title: str
    baseline: Best | None
    challenger: Best | None
    """The best point of a CPU-backed mechanism that moved KV over the link."""
    main: Gain | None
    """Challenger over baseline."""
    same_admission: Gain | None
    equal_tpot: Gain | None
    """The best CPU-backed point with a p99 TPOT not above that of the baseline's best point, over that point."""
    at_limit: Gain | None
    """Both sides at a batch limit of LIMIT sequences."""
    idle_at_limit: bool
    """Whether both sides were run at LIMIT, and no CPU-backed point moved KV over the link there."""
    same_batch: Gain | None
    """The CPU-backed point with the largest gain over the baseline at its own batch."""
    loses_from: dict[str, int | None]
    """Per CPU-backed mechanism: the batch from which on it is below the baseline at every batch tried."""
    missing: str | None
    """Why there is no answer; None where there is one."""
    command: str | None
    """What brings the missing runs."""
    origin: str
    hardware: str
    drawn: bool
    """Whether lengths or arrivals are drawn."""

    @property
    def word(self) -> str:
        """What can be said of the best throughput: HIGHER, LOWER, SAME, AMBIGUOUS, or UNKNOWN."""
        return "UNKNOWN" if self.main is None or self.missing is not None else self.main.word

    @property
    def gain(self) -> float | None:
        return None if self.main is None else self.main.gain

    def line(self) -> str:
        """A few sentences for people; they begin with `Verdict:`."""
        head = f"Verdict: {self.title}:"
        if self.missing is not None:
            command = f" Run: {self.command}" if self.command else ""
            return f"{head} cannot say: {self.missing}.{command}"
        assert self.main is not None and self.baseline is not None
        answer = {"HIGHER": "yes", "LOWER": "no", "SAME": "no difference", "AMBIGUOUS": "AMBIGUOUS"}[self.main.word]
        text = (
            f"{head} {answer}: {_told(self.main)}, {_at(self.main.point)}, against {_at(self.baseline)}. "
            f"These are the best points, of CPU-backed KV among those that moved KV over the link."
        )
        if self.same_admission is not None and self.same_admission.over.mechanism != self.baseline.mechanism:
            text += f" Over {_at(self.same_admission.over)}, of its own admission: {_told(self.same_admission)}."
        if self.baseline.tpot_p99_s is not None:
            limit = f" At equal p99 TPOT (at most {self.baseline.tpot_p99_s * 1e3:.1f} ms)"
            if self.equal_tpot is None:
                text += f"{limit} no CPU-backed point remains."
            else:
                text += f"{limit}: {_told(self.equal_tpot)}, {_at(self.equal_tpot.point)}."
        if self.at_limit is not None:
            text += f" At a limit of {LIMIT} sequences: {_told(self.at_limit)}, {self.at_limit.point.mechanism}."
        elif self.idle_at_limit:
            text += f" At a limit of {LIMIT} sequences no CPU-backed point moved KV over the link."
        if self.same_batch is not None:
            text += f" Most at an equal batch: {_told(self.same_batch)}, {_at(self.same_batch.point)}."
        lose = self.loses_from.get(self.main.point.mechanism)
        return text + (
            " It does not lose at the largest batch tried." if lose is None else f" It loses from batch {lose} on."
        )


def _at(best: Best) -> str:
    return f"{best.mechanism} {best.throughput:.0f} tok/s at batch {best.batch}"


def _told(gain: Gain) -> str:
    """`+4.3% (5 paired draws; up to 1.2% is no difference)`."""
    text = f"{gain.gain:+.1%}"
    if gain.word == "AMBIGUOUS" and gain.ratio is not None:
        return text + interval(gain.ratio)
    if gain.noise is None:
        return text + (" (one draw of the lengths, noise unknown)" if gain.ratio is None else "")
    draws = f"{gain.num_draws} paired draws; " if gain.num_draws > 1 else ""
    return f"{text} ({draws}up to {gain.noise:.1%} is no difference)"


def interval(ratio: Ratio) -> str:
    """The interval of an AMBIGUOUS comparison, or why it has none."""
    if math.isnan(ratio.low):
        return f", which needs {MIN_REPEATS} repeats on both sides to be told from noise"
    return f" (95 % interval {ratio.low - 1:+.1%} to {ratio.high - 1:+.1%})"


def is_cpu_backed(points: pd.DataFrame) -> pd.Series[bool]:
    """Peers are neither baselines nor answers: they stand beside them in tables and figures."""
    return (points["memory"] != "device") & (points["engine"] == OUR_ENGINE)


def moved_kv(points: pd.DataFrame) -> pd.Series[bool]:
    """Whether any KV went over the link, either way."""
    return (points["h2d_bytes"].fillna(0) > 0) | (points["d2h_bytes"].fillna(0) > 0)


def _is_limited(row: pd.Series[Any]) -> bool:
    names = {"running": "running_batch_mean", "waiting": "waiting_batch_mean", "preemptions": "preemptions"}
    means = {name: 0.0 if pd.isna(row[column]) else float(row[column]) for name, column in names.items()}
    return is_limited_by_memory(row["offered_batch"], **means)


def baseline_by_batch(points: pd.DataFrame) -> pd.Series[float]:
    """Throughput of the better baseline at each offered batch."""
    return points[points["mechanism"].isin(BASELINES)].groupby("offered_batch")["throughput"].max()


def verdicts(points: pd.DataFrame) -> list[Verdict]:
    return [_verdict(part) for _, part in points.groupby(GROUP, sort=True)]


def gain_of(point: pd.Series[Any], over: pd.Series[Any]) -> Gain:
    """The gain of one row of `points` over another; paired by draw where their workload is drawn."""
    sides = _best_of(over), _best_of(point)
    if point["origin"] == MEASURED:
        ratio = judge(point["throughputs"], over["throughputs"], INDIFFERENT, measured=True)
        return Gain(*sides, ratio, ratio.ratio - 1, None, len(point["throughputs"]))
    if not point["drawn"]:
        ratio = judge(point["throughputs"], over["throughputs"], INDIFFERENT, measured=False)
        return Gain(*sides, ratio, ratio.ratio - 1, INDIFFERENT, 1)
    mine, theirs = dict(point["by_draw"]), dict(over["by_draw"])
    gains = [mine[draw] / theirs[draw] - 1 for draw in sorted(mine.keys() & theirs.keys())]
    if not gains:
        return Gain(*sides, None, point["throughput"] / over["throughput"] - 1, None, 0)
    gain, noise = fmean(gains), _noise(gains)
    if noise is None:
        return Gain(*sides, None, gain, None, 1)
    word = "HIGHER" if gain > noise else "LOWER" if gain < -noise else "SAME"
    return Gain(*sides, Ratio(1 + gain, 1 + gain - noise, 1 + gain + noise, word), gain, noise, len(gains))


def _noise(gains: Sequence[float]) -> float | None:
    """What is no difference, by paired gains of several draws; None for one."""
    count = len(gains)
    if count < 2:
        return None
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, count - 1))
    return max(INDIFFERENT, quantile * stdev(gains) / math.sqrt(count))


def _best_of(row: pd.Series[Any]) -> Best:
    tpot = row["tpot_s.p99"]
    return Best(
        str(row["label"]), int(row["offered_batch"]), float(row["throughput"]), None if pd.isna(tpot) else float(tpot)
    )


def best_row(points: pd.DataFrame) -> pd.Series[Any] | None:
    """The fastest, of equals the smallest batch; None without any. Where some points were drawn several times, one of
    those."""
    points = points.dropna(subset=["throughput"])
    if points.empty:
        return None
    if points["drawn"].any():
        points = points[points["by_draw"].map(len) == points["by_draw"].map(len).max()]
    return points.sort_values(["throughput", "offered_batch"], ascending=[False, True]).iloc[0]


def _loses_from(rows: pd.DataFrame, by_batch: pd.Series[float]) -> int | None:
    """The smallest batch of the last unbroken run of losing batches, up to the largest batch tried."""
    losing = None
    for _, row in rows.sort_values("offered_batch", ascending=False).iterrows():
        base = by_batch.get(row["offered_batch"])
        if base is None or not row["throughput"] < (1 - INDIFFERENT) * base:
            break
        losing = int(row["offered_batch"])
    return losing


@dataclass(frozen=True)
class _Headroom:
    """By how much, as a fraction, a batch size that was not tried may be faster than the best one, and why."""

    fraction: float
    why: str
    batches: tuple[int, ...] = ()
    """Batch sizes that would tell: of the gap its ends and its middle."""


def _headroom(best: pd.Series[Any], points: pd.DataFrame) -> _Headroom:
    """What the best batch of a mechanism leaves open; `points` holds the other batches of it that were tried.

    Until memory limits it, throughput is a concave function of the batch size: each further sequence shares the pass
    over the weights with more others. So a straight line through two tried batches bounds what follows them. It ends at
    the next batch that was tried, or nowhere. Where memory limits the best point, a larger batch that it does not limit
    may lie in the gap in which the limit begins; without preemption none runs more sequences than the best point did.
    """
    rows = points[points["label"] == best["label"]].sort_values("offered_batch").reset_index(drop=True)
    limited = [_is_limited(row) for _, row in rows.iterrows()]
    at = int((rows["offered_batch"] == best["offered_batch"]).idxmax())
    name, batch = best["label"], int(best["offered_batch"])
    found = []
    if not limited[at]:
        if at == len(rows) - 1:
            fits = _num_fitting(best)
            of = f" of about {fits} that fit" if fits else ""
            return _Headroom(math.inf, f"the throughput of {name} still rises at the largest batch tried ({batch}{of})")
        found.append((at, _most_running(rows.iloc[at + 1])))
        if at > 0 and rows["throughput"][at - 1] > best["throughput"]:  # It falls: the peak lies before it.
            found.append((at - 1, _most_running(best)))
    else:
        free = [i for i in range(at) if not limited[i]]
        if not free and at == 0 and batch > 1:
            why = f"the best batch of {name} is the smallest tried ({batch}), and KV memory limits it"
            return _Headroom(math.inf, why)
        if free:
            found.append((free[-1], _most_running(rows.iloc[free[-1] + 1])))
    reached = [(_extended(rows, start, most), start) for start, most in found]
    highest, start = max(reached, default=(0.0, 0))
    fraction = float(highest / best["throughput"] - 1)
    if fraction <= RESOLVED:
        return _Headroom(0.0, "")
    first, last = int(rows["offered_batch"][start]) + 1, max(1, int(rows["offered_batch"][start + 1]) - 1)
    where = f"a batch of {first}" if first == last else f"a batch of {first} to {last}"
    told = tuple(sorted({first, (first + last) // 2, last}))
    return _Headroom(fraction, f"{name} may be up to {fraction:.1%} faster at {where}", told)


def _most_running(after: pd.Series[Any]) -> float:
    """The most sequences that a batch size below that of `after` runs: one less, and without preemption not more than
    ran there."""
    most = float(after["offered_batch"]) - 1
    full = _is_limited(after) and not after["preemptions"]
    return min(most, float(after["running_batch_mean"])) if full else most


def _extended(rows: pd.DataFrame, start: int, most: float) -> float:
    """The straight line through a tried batch and the one before it, at `most` sequences; 0 where there is no gap."""
    x, y = rows["offered_batch"], rows["throughput"]
    if most <= x[start]:
        return 0.0
    before = (x[start - 1], y[start - 1]) if start > 0 else (0, 0.0)
    slope = (y[start] - before[1]) / (x[start] - before[0])
    return float(y[start] + max(0.0, slope) * (most - x[start]))


def _num_fitting(row: pd.Series[Any]) -> int | None:
    """Requests that the device's KV memory holds: full ones where all are alike, else as they are on average."""
    ratio = row.get("working_set_ratio")
    if ratio and not pd.isna(ratio):
        return int(row["offered_batch"] / ratio)
    used, running = row.get("kv_bytes_mean.used"), row.get("running_batch_mean")
    if not used or not running or pd.isna(used) or pd.isna(running):
        return None
    return int(row["device_kv_bytes"] * running / used)


def _side_headroom(side: pd.DataFrame, best: pd.Series[Any], all_points: pd.DataFrame) -> _Headroom:
    """The same over all mechanisms of a side, relative to the best of them."""
    found = []
    for _, rows in side.groupby("label", sort=True):
        row = best_row(rows)
        if row is None:
            continue
        own = _headroom(row, all_points)
        if not own.fraction:
            continue  # Its best is known; with a single draw it may still lie above what was drawn several times.
        share = (1 + own.fraction) * row["throughput"] / best["throughput"] - 1
        found.append(_Headroom(max(0.0, share), own.why, own.batches))
    return max(found, key=lambda it: it.fraction, default=_Headroom(0.0, ""))


def _verdict(part: pd.DataFrame) -> Verdict:
    alone, backed = part[part["mechanism"].isin(BASELINES)], part[is_cpu_backed(part)]
    moving = backed[moved_kv(backed)]
    base, best = best_row(alone), best_row(moving)
    by_batch = baseline_by_batch(part)
    main = same = equal = limit = most = None
    if base is not None and best is not None:
        main = gain_of(best, base)
        own = best_row(part[part["mechanism"] == SAME_ADMISSION[best["admission"]]])
        same = None if own is None else gain_of(best, own)
        as_fast = best_row(moving[moving["tpot_s.p99"] <= base["tpot_s.p99"]])
        equal = None if as_fast is None else gain_of(as_fast, base)
        sides = [best_row(side[side["offered_batch"] == LIMIT]) for side in (alone, moving)]
        if sides[0] is not None and sides[1] is not None:
            limit = gain_of(sides[1], sides[0])
        ratio = (moving["throughput"] / moving["offered_batch"].map(by_batch)).dropna()
        if not ratio.empty:
            point = moving.loc[[ratio.idxmax()]].iloc[0]
            there = best_row(alone[alone["offered_batch"] == point["offered_batch"]])
            most = None if there is None else gain_of(point, there)
            if most is not None and most.ratio is None:
                most = None  # The largest of many single draws is luck.
    missing = _missing(part, alone, backed, moving, base, best, main)
    return Verdict(
        title=str(part["title"].iloc[0]),
        baseline=None if base is None else _best_of(base),
        challenger=None if best is None else _best_of(best),
        main=main,
        same_admission=same,
        equal_tpot=equal,
        at_limit=limit,
        idle_at_limit=limit is None and all((side["offered_batch"] == LIMIT).any() for side in (alone, backed)),
        same_batch=most,
        loses_from={str(name): _loses_from(rows, by_batch) for name, rows in backed.groupby("label", sort=True)},
        missing=None if missing is None else missing.why,
        command=None if missing is None else _command(part, missing),
        origin=str(part["origin"].iloc[0]),
        hardware=str(part["hardware"].iloc[0]),
        drawn=bool(part["drawn"].iloc[0]),
    )


@dataclass(frozen=True)
class _Missing:
    """Why nothing can be said, and which runs would tell."""

    why: str
    mechanisms: tuple[str, ...] = ()
    """To be run beside those there are."""
    batches: tuple[int, ...] = ()
    """In place of those there are."""
    repeats: bool = False


def _missing(
    part: pd.DataFrame,
    alone: pd.DataFrame,
    backed: pd.DataFrame,
    moving: pd.DataFrame,
    base: pd.Series[Any] | None,
    best: pd.Series[Any] | None,
    main: Gain | None,
) -> _Missing | None:
    """None where the runs decide."""
    if base is None:
        return _Missing("no device_resident or device_recompute is among the runs", BASELINES)
    if backed.empty:
        return _Missing("no CPU-backed mechanism is among the runs", ("pinned_swap", "pinned_balanced"))
    challengers = backed.drop_duplicates("label") if best is None else best.to_frame().T
    for _, it in challengers.iterrows():
        own = SAME_ADMISSION[it["admission"]]
        if own not in set(part["mechanism"]):
            why = f"{own}, the device-only baseline of {it['label']}'s own admission, is not among the runs"
            return _Missing(why, (own,))
    below = _side_headroom(alone, base, part)
    if best is None or main is None:
        full = any(_is_limited(row) for _, row in alone.iterrows())
        why = "no CPU-backed point that was tried moved KV over the link" if full or not below.why else below.why
        return _Missing(why)
    if math.isinf(below.fraction):
        return _Missing(below.why)
    if main.ratio is None:
        return _Missing("a single draw of the lengths does not show their noise", repeats=True)
    above = _side_headroom(moving, best, part)
    noise = main.noise or 0.0
    low, high = (1 + main.gain) / (1 + below.fraction) - 1, (1 + main.gain) * (1 + above.fraction) - 1
    decided = {"HIGHER": low > noise, "LOWER": high < -noise, "AMBIGUOUS": True}.get(
        main.word, low >= -noise and high <= noise
    )
    if decided:
        return None
    open_side = below if main.word == "HIGHER" or below.fraction > above.fraction else above
    return _Missing(open_side.why, batches=open_side.batches)


def _command(part: pd.DataFrame, missing: _Missing) -> str | None:
    """The sweep again, with what is missing; None where the runs do not say by which command they were made."""
    typed = part["argv"].iloc[0] if "argv" in part else None
    if not isinstance(typed, list | tuple) or "experiments.run" not in typed:
        return None
    ours = part[part["engine"] == OUR_ENGINE]
    names = [*dict.fromkeys([*missing.mechanisms, *ours["mechanism"].astype(str)])]
    dropped = ["mechanism=", "refine=", "rerun=", "name="]
    more = [f"mechanism={','.join(names)}"]
    if missing.repeats:
        dropped += ["num_repeats=", "seed="]
        more.append("num_repeats=5")
    is_simulated = part["origin"].iloc[0] == "simulated"
    if missing.batches:
        dropped += ["batch_size=", "working_set_ratio="]
        more.append(f"batch_size={','.join(map(str, missing.batches))}")
    if is_simulated:
        more.append("refine=true")
    start = typed.index("experiments.run") + 1
    kept = [it for it in typed[start:] if it != "-m" and not it.startswith(tuple(dropped))]
    if set(more) <= set(typed[start:]):
        return None  # It is what was run.
    return shlex.join([*command("run"), "-m", *kept, *more])


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
