"""Does CPU-backed KV help this card, model and workload? Simulated, in memory: no run directory is written.

The best batch of both device-only baselines, and of every CPU-backed mechanism that the workload allows, is searched
(`uvm_kv.sweep.search`), of the latter among those that move KV over the link. The best of each side, with the least
host memory that keeps the gain, is then run with other seeds, and with the profile's main quantities moved by what they
are uncertain by: the range of the gain. A job of any side is the one that its `command` runs.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import shlex
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from math import ceil, hypot
from multiprocessing import get_context
from operator import attrgetter
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from omegaconf import DictConfig, OmegaConf

from uvm_kv.config.command import compose_config
from uvm_kv.config.names import check_overrides, folders_of, groups, own_options, parse_overrides
from uvm_kv.config.option_file import check_files, without_source
from uvm_kv.config.schema import WorkloadSchema
from uvm_kv.config.shipped import command
from uvm_kv.engine import Engine
from uvm_kv.hw.profile import HardwareProfile
from uvm_kv.job import build
from uvm_kv.job.resolve import Resolved, resolve
from uvm_kv.store.family import end_children_with_me
from uvm_kv.sweep.search import Tried, search_best
from uvm_kv.telemetry.recorder import Recorder
from uvm_kv.telemetry.summary import FULL, is_limited_by_memory, summarize
from uvm_kv.types import BASELINES, GIB, MemoryKind
from uvm_kv.workload.lengths import mean_lengths

NOT_ADVISED = (*BASELINES, "custom", "managed_demand_capped")
"""Mechanisms that are never advised: those without CPU-backed KV, `custom`, and the one whose evictions are planned
instead of the driver's."""
ON_REQUEST = ("pageable_swap", "vmm_balanced")
"""To the simulator never better than pinned_swap, and the same as pinned_balanced."""
TAKEN = (
    *("hydra", "hardware", "model", "workload", "driver", "scheduler", "allocation", "layout", "block_size", "kv_bits"),
    *("dtype", "max_model_len", "seed", "batch_size"),
    *("memory.device_kv_bytes", "memory.host_kv_bytes", "memory.gpu_memory_utilization"),
)
"""Keys, with what is below them, that are part of the question."""
MAX_OUTPUT_TOKENS = 500_000
"""Output tokens of one run of a trace: about a second."""
KEPT = 0.99
"""Share of the gain that the least host memory must keep."""
WORTH = 0.01
"""A smaller gain is none: below what the operators' fit can tell apart."""
NUM_SEEDS = 5
HALF_WIDTH = 2.776 / NUM_SEEDS**0.5
"""Half width of the 95 % interval of the mean over the seeds, in standard deviations (Student's t, 4 degrees of
freedom)."""
ASSUMED = 0.10
"""Uncertainty of a quantity that was not measured on the card."""
BOUND = 0.75
"""What is busy for this share of the time bounds a run; KV memory, if requests wait for it in so many steps; the link
also if the GPU waits for it for the rest of the time."""
QUANTITIES = {
    "link": ("link.h2d_gb_per_s", "link.d2h_gb_per_s"),
    "HBM": ("gpu.hbm_efficiency",),
    "operators": (),
}
"""What is moved together, by the dotted paths whose sources say how uncertain it is; none: all operators."""


@dataclass(frozen=True)
class Point:
    """One simulated run; of a side at its best the rates are means over the seeds."""

    mechanism: str
    batch_size: int
    host_kv_bytes: int
    """Size of the host tier."""
    tokens_per_s: float
    tpot_p99_s: float | None
    running_batch: float
    bound: str
    """link, capacity (requests wait for KV memory), HBM or operators."""
    moved_kv: bool
    """Whether KV moved over the link."""
    preempted: bool
    limited: bool
    """Whether KV memory limited the batch."""
    peak_host_bytes: int


@dataclass(frozen=True)
class Effect:
    """The effect of a quantity's uncertainty on the gain."""

    quantity: str
    uncertainty: float
    why: str
    gains: tuple[float, float]
    """Changes of the gain, with the quantity lower and higher; of the lengths, the 95 % interval."""


@dataclass(frozen=True)
class Advice:
    answer: str
    """Answer: yes, no, or cannot tell."""
    hardware: str
    measured_on: str | None
    model: str
    workload: str
    device_kv_bytes: int
    num_device_seqs: int
    """Sequences of mean length that the card's KV memory holds."""
    best: Point | None
    """CPU-backed; None where no mechanism can serve the workload."""
    baseline: Point | None
    """Device only; None where it refuses the workload."""
    best_command: str | None
    baseline_command: str | None
    refused: str | None
    """Why a side is None."""
    tried: list[Point]
    left_out: dict[str, str]
    """Mechanisms that cannot run this, and why."""
    no_source: dict[str, str] = field(default_factory=dict)
    """Numbers of the profile that nothing vouches for, and who gave them: how wrong they are is not in the range."""
    gain: float | None = None
    """Gain of best over baseline, as a fraction. None, like the fields below, where one of them is None."""
    gain_range: tuple[float, float] | None = None
    equal_tpot: Point | None = None
    """The best CPU-backed point tried whose p99 TPOT does not exceed the baseline's."""
    gain_equal_tpot: float | None = None
    uncertainty: tuple[Effect, ...] = ()
    origin: str = "simulated"


@dataclass(frozen=True)
class Question:
    """What every job of it shares; travels to the worker processes."""

    overrides: tuple[str, ...]
    num_requests: int | None = None
    """Requests per run; None: as the config says."""

    def changes(self, mechanism: str, batch_size: int, host_kv_bytes: int | None, num_repeats: int) -> dict[str, Any]:
        changes: dict[str, Any] = {"batch_size": batch_size}
        if self.num_requests is not None:
            changes["workload.num_requests"] = self.num_requests
        if host_kv_bytes is not None and mechanism not in BASELINES:
            changes["memory.host_kv_bytes"] = host_kv_bytes
        return changes | ({"num_repeats": num_repeats} if num_repeats > 1 else {})

    def resolved(self, mechanism: str, batch_size: int, host_kv_bytes: int | None = None) -> Resolved:
        config = copy.deepcopy(_composed(self.overrides, mechanism))
        for path, value in self.changes(mechanism, batch_size, host_kv_bytes, 1).items():
            OmegaConf.update(config, path, value)
        return resolve(config, folders_of(parse_overrides(list(self.overrides))))

    def command(self, mechanism: str, batch_size: int, host_kv_bytes: int | None, num_repeats: int) -> str:
        changes = {"mechanism": mechanism} | self.changes(mechanism, batch_size, host_kv_bytes, num_repeats)
        given = [o for o in self.overrides if o.partition("=")[0] not in {*changes, "memory.host_kv_bytes"}]
        return shlex.join([*command("run"), *given, *(f"{k}={v}" for k, v in changes.items())])


@cache
def _composed(overrides: tuple[str, ...], mechanism: str) -> DictConfig:
    kept = [o for o in overrides if mechanism not in BASELINES or not o.startswith("memory.host_kv_bytes=")]
    return compose_config([*kept, f"mechanism={mechanism}"])


def simulate(resolved: Resolved, repeat: int = 0, profile: HardwareProfile | None = None) -> Point:
    """Run a job without writing anything; on another `profile`, if one is given, with the tiers as they are."""
    resolved = dataclasses.replace(resolved, profile=profile or resolved.profile)
    job = build.Job(resolved, repeat, Path())
    workload, roofline, recorder = build.workload_of(job), build.build_roofline(resolved), Recorder()
    build.check_requests_fit(resolved, workload.all_lengths)
    scheduler = build.build_scheduler(resolved, build.build_placement(resolved, roofline))
    runner = build.build_runner(resolved, roofline, job.sampling_seed)
    Engine(scheduler, runner, build.build_source(job, workload), recorder).run()
    steps = recorder.steps()
    steady = resolved.config.workload.start == "steady"
    until = recorder.last_end_ns if steady else None
    summary = summarize(steps, recorder.requests(), power=None, complete=True, steady_until_ns=until)
    seconds, link, block = summary["duration_s"], resolved.profile.link, resolved.spec.block_bytes
    copied_s = summary["h2d_bytes"] / link.h2d_bytes_per_s, summary["d2h_bytes"] / link.d2h_bytes_per_s
    weights = -next(size for name, size in resolved.memory_account if name.startswith("weights"))
    kv = min(summary["kv_bytes_mean"]["used"], resolved.capacity.num_device_blocks * block)
    read_s = summary["num_steps"] * (weights + kv) / resolved.profile.gpu.hbm_bytes_per_s
    waiting = fmean(bool(w or s) for w, s in zip(steps["num_waiting"], steps["num_swapped"], strict=True))
    batch, running = resolved.config.batch_size, summary["running_batch_mean"]
    if max(copied_s) >= BOUND * seconds or summary["stall_s"] >= (1 - BOUND) * seconds:
        bound = "link"
    elif waiting >= BOUND and running < FULL * batch:
        bound = "capacity"
    else:
        bound = "HBM" if read_s >= BOUND * seconds else "operators"
    return Point(
        resolved.config.mechanism,
        batch,
        resolved.config.memory.host_kv_bytes or 0,
        summary["output_tokens_per_s"] or summary["output_tokens_per_s_whole_run"],
        summary["tpot_s"]["p99"],
        running,
        bound,
        max(copied_s) > 0,
        bool(summary["preemptions"]),
        is_limited_by_memory(
            batch, running=running, waiting=summary["waiting_batch_mean"], preemptions=summary["preemptions"]
        ),
        max(n or 0 for n in steps["claimed_host_blocks"]) * block,
    )


def search(question: Question, mechanism: str, start: Sequence[int], most: int) -> list[Point] | str:
    """Points of a mechanism at every batch that the search for its best one tried, `start` first; or why none.

    A larger batch may be refused where the first is not: its activations leave less room.
    """
    found: dict[int, Point] = {}
    refusals: list[str] = []

    def evaluate(batch_size: int) -> Tried | None:
        try:
            resolved = question.resolved(mechanism, batch_size)
            if resolved.memory is MemoryKind.MANAGED and resolved.config.workload.start == "steady":
                raise ValueError("a steady start does not lay managed memory out as the driver would; use start=cold")
            point = found[batch_size] = simulate(resolved)
        except ValueError as error:
            refusals.append(str(error))
            return None
        counts = mechanism in BASELINES or point.moved_kv
        return Tried(batch_size, point.tokens_per_s, point.running_batch, point.limited, point.preempted, counts)

    one_length = _composed(question.overrides, mechanism).workload.prompt_tokens is not None
    search_best(evaluate, start, one_length=one_length, most=most)
    return [found[b] for b in sorted(found)] or refusals[0]


def rerun(question: Question, point: Point, repeat: int = 0, quantity: str = "", factor: float = 1.0) -> Point:
    """The job of a point, with another seed or on a moved profile."""
    resolved = question.resolved(point.mechanism, point.batch_size, point.host_kv_bytes)
    return simulate(resolved, repeat, moved_profile(resolved.profile, quantity, factor))


def moved_profile(profile: HardwareProfile, quantity: str, factor: float) -> HardwareProfile:
    """Rates times `factor`, times of operators divided by it."""

    def scaled(node: Any, **factors: float) -> Any:
        return dataclasses.replace(node, **{name: getattr(node, name) * f for name, f in factors.items()})

    gpu = profile.gpu
    match quantity:
        case "link":
            return dataclasses.replace(profile, link=scaled(profile.link, h2d_gb_per_s=factor, d2h_gb_per_s=factor))
        case "HBM":
            share = min(1.0, gpu.hbm_efficiency * factor)
            return dataclasses.replace(profile, gpu=dataclasses.replace(gpu, hbm_efficiency=share))
        case "operators":
            # Their efficiencies cannot rise above 1, so the peaks move; the rate of plain reads, HBM's, is held.
            names = ("hbm_gb_per_s", "tensor_tflop_per_s", "tensor_int8_top_per_s", "float32_tflop_per_s")
            peaks = {name: factor for name in names if getattr(gpu, name) is not None}
            share = min(1.0, gpu.hbm_efficiency / factor)
            gpu = dataclasses.replace(scaled(gpu, **peaks), hbm_efficiency=share)
            operators = {name: scaled(cost, overhead_us=1 / factor) for name, cost in profile.operators.items()}
            return dataclasses.replace(profile, gpu=gpu, operators=operators)
    return profile


def uncertainty_of(profile: HardwareProfile, quantity: str) -> tuple[float, str]:
    """(relative uncertainty, why) by the sources of the profile: the noise that a calibration wrote there, the largest
    of spread, standard error and residual; 10 % of what was not measured on the card itself."""
    paths = QUANTITIES[quantity] or tuple(f"operators.{name}" for name in profile.operators)
    noise: list[float] = []
    for source in {profile.source_of(path) for path in paths}:
        found = re.findall(r"(?:relative spread|standard error|residual of the fit) ([\d.e+-]+) %", source)
        if not source.startswith("measured on ") or not found:
            return ASSUMED, "assumed: not measured on this card"
        noise += map(float, found)
    return max(noise) / 100, "the noise that its calibration recorded"


def _checked(arguments: list[str]) -> tuple[tuple[str, ...], list[str], int | None]:
    """(overrides, mechanisms to try, largest batch given); ValueError for what is unknown or not part of a question."""
    overrides = parse_overrides(arguments)
    check_overrides(overrides)
    check_files(overrides, folders_of(overrides))
    kept, most = [], None
    own = own_options(folders_of(overrides)).get("mechanism", [])
    allowed = [m for m in (*groups()["mechanism"], *own) if m not in NOT_ADVISED]
    mechanisms = [m for m in allowed if m not in (*ON_REQUEST, *own)]
    for override in overrides:
        key, text = override.key_or_group, str(override.input_line)
        if key == "mechanism":
            swept = override.is_sweep_override()
            mechanisms = list(override.sweep_string_iterator()) if swept else [str(override.value())]
            if extra := sorted(set(mechanisms) - set(allowed)):
                raise ValueError(f"mechanism={extra[0]} is not one of CPU-backed KV; allowed: {', '.join(allowed)}")
            continue
        if not any(key == taken or key.startswith(taken + ".") for taken in TAKEN):
            raise ValueError(f"{text}: advise simulates, and tries mechanisms and their settings itself; drop it")
        if override.is_sweep_override():
            raise ValueError(f"{text} has several values; only mechanism takes several here, ask once for each")
        most = int(override.value()) if key == "batch_size" else most
        kept.append(text)
    # Of equals the plainest memory is advised.
    return tuple(kept), sorted(mechanisms, key=lambda m: (not m.startswith("pinned"), m)), most


def _question(overrides: tuple[str, ...], most: int | None) -> tuple[Question, Resolved, int, list[int], int]:
    """(question, a device-only job, sequences that fit the card, batches to begin with, largest batch)."""
    base = Question(overrides).resolved(BASELINES[0], 64 if most is None else most)
    workload = base.config.workload
    lengths = build.workload_of(build.Job(base, 0, Path())).lengths
    prompt, output = mean_lengths(lengths)
    num_seqs = base.capacity.num_device_blocks // base.spec.num_blocks(round(prompt + output))
    # Where optimistic admission is full on average: no preemption yet, and nothing is reserved.
    full = base.capacity.num_device_blocks // base.spec.num_blocks(round(prompt + output / 2))
    limit = base.config.scheduler.max_num_batched_tokens if most is None else most
    start = sorted({max(1, min(limit, size)) for size in (num_seqs, full)})
    num_requests = None
    if workload.path is not None:
        num_requests = min(len(lengths), max(1, int(MAX_OUTPUT_TOKENS / output)))
    return Question(overrides, num_requests), base, num_seqs, start, limit


def advise(arguments: list[str], *, num_workers: int | None = None, progress: Callable[[str], Any] = print) -> Advice:
    """The answer for Hydra overrides. `num_workers`: 1 is this process, None is one per core. ValueError for a mistake
    in the overrides, or where no side can serve the workload."""
    overrides, mechanisms, most = _checked(arguments)
    question, base, num_seqs, start, limit = _question(overrides, most)
    workload = base.config.workload
    most_host, block_bytes = _composed(overrides, mechanisms[0]).memory.host_kv_bytes, base.spec.block_bytes
    if most_host is not None and most_host < block_bytes:
        raise ValueError(
            f"memory.host_kv_bytes={most_host}; a block of KV takes {block_bytes}: give more, or leave it out"
        )
    leave_interrupts = (signal.SIGINT, signal.SIG_IGN)
    with ExitStack() as stack:
        end_children_with_me()
        pool = ProcessPoolExecutor(num_workers or os.cpu_count(), get_context("spawn"), signal.signal, leave_interrupts)
        stack.callback(pool.shutdown, cancel_futures=True)

        def run(what: str, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> list[Any]:
            results = []
            waiting: list[Callable[[], Any]] = [partial(function, question, *call) for call in calls]
            if num_workers != 1:
                waiting = [pool.submit(call).result for call in waiting]
            for number, result in enumerate(waiting, 1):
                progress(f"{what}: {number} of {len(waiting)}")
                results.append(result())
            return results

        rate = attrgetter("tokens_per_s")
        found = dict(zip(BASELINES, run("baselines", search, [(m, start, limit) for m in BASELINES]), strict=True))
        tops = [max(points, key=rate).batch_size for points in found.values() if not isinstance(points, str)]
        beyond = sorted({*start, *(min(limit, top + more) for top in tops for more in (0, 1))})
        # The best batch of what preempts lies beyond the largest that runs without, which is a baseline's.
        preempts = {m for m in mechanisms if _composed(overrides, m).scheduler.preemption != "none"}
        calls = [(m, beyond if m in preempts else start, limit) for m in mechanisms]
        found |= zip(mechanisms, run("mechanisms", search, calls), strict=True)
        left_out = {m: points for m, points in found.items() if isinstance(points, str)}
        device = [p for m in BASELINES if m not in left_out for p in found[m]]
        backed = [p for m in mechanisms if m not in left_out for p in found[m]]
        moving = [p for p in backed if p.moved_kv]
        baseline, best = (max(points, key=rate, default=None) for points in (device, moving or backed))
        if best is not None:
            best = dataclasses.replace(best, host_kv_bytes=_least_host(question, best, baseline, progress))
        sides = [side for side in (best, baseline) if side is not None]
        if not sides:
            raise ValueError(left_out[mechanisms[0]])
        random = workload.lengths is not None or workload.arrival == "poisson"
        num_seeds = NUM_SEEDS if random else 1
        repeats = run("seeds", rerun, [(side, seed) for side in sides for seed in range(num_seeds)])
        moves = []
        if len(sides) == 2:
            moves = [(quantity, *uncertainty_of(base.profile, quantity)) for quantity in QUANTITIES]
        turns = [(side, 0, q, 1 + sign * share) for q, share, _ in moves for sign in (-1, 1) for side in sides]
        moved = [a.tokens_per_s / b.tokens_per_s - 1 for a, b in _pairs(run("profile moved", rerun, turns))]
    runs = [repeats[i : i + num_seeds] for i in range(0, len(repeats), num_seeds)]
    means = dict(zip([side.mechanism for side in sides], map(_mean, runs), strict=True))
    commands = {p.mechanism: question.command(p.mechanism, p.batch_size, p.host_kv_bytes, num_seeds) for p in sides}
    advice = Advice(
        answer="no" if best is None else "yes",
        hardware=base.profile.name,
        measured_on=base.config.hardware.measured_on,
        model=f"{base.model.name} {base.config.dtype} ({base.understood()})",
        workload=f"{workload.name}{_lengths(workload)}, {workload.arrival}"
        + (", steady start: decode alone" if workload.start == "steady" else ""),
        device_kv_bytes=base.capacity.num_device_blocks * base.spec.block_bytes,
        num_device_seqs=num_seqs,
        best=best and means[best.mechanism],
        baseline=baseline and means[baseline.mechanism],
        best_command=best and commands[best.mechanism],
        baseline_command=baseline and commands[baseline.mechanism],
        refused=left_out.get(mechanisms[0] if best is None else BASELINES[0]) if len(sides) == 1 else None,
        tried=device + backed,
        left_out=left_out,
        no_source=without_source(base.profile.sources),
    )
    if advice.best is None or advice.baseline is None:
        return advice
    gains = [a.tokens_per_s / b.tokens_per_s - 1 for a, b in zip(*runs, strict=True)]
    gain = fmean(gains)  # Paired: both sides serve the same draws.
    effects = [
        Effect(*move, (low - gains[0], high - gains[0])) for move, (low, high) in zip(moves, _pairs(moved), strict=True)
    ]
    if random:
        half = HALF_WIDTH * stdev(gains)
        effects.append(Effect("lengths", half, f"95 % interval over {num_seeds} seeds", (-half, half)))
    # Independent of one another, so that their effects add as squares.
    lowest = gain - hypot(*(min(0.0, *effect.gains) for effect in effects))
    highest = gain + hypot(*(max(0.0, *effect.gains) for effect in effects))
    slowest = baseline.tpot_p99_s if baseline is not None else None
    equal = [p for p in moving if slowest is not None and p.tpot_p99_s is not None and p.tpot_p99_s <= slowest]
    within = max(equal, key=rate, default=None)
    return dataclasses.replace(
        advice,
        answer=verdict(gain, lowest, highest) if advice.best.moved_kv else "no",
        gain=gain,
        gain_range=(lowest, highest),
        equal_tpot=within,
        gain_equal_tpot=None if within is None else within.tokens_per_s / max(map(rate, device)) - 1,
        uncertainty=tuple(effects),
    )


def verdict(gain: float, lowest: float, highest: float) -> str:
    """yes, no or cannot tell: by whether the range excludes zero, and the gain is worth having."""
    if highest < WORTH or (lowest > 0 and gain < WORTH):
        return "no"
    return "yes" if lowest > 0 else "cannot tell"


def _pairs(values: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _mean(points: list[Point]) -> Point:
    tpots = [p.tpot_p99_s for p in points if p.tpot_p99_s is not None]
    rate = fmean(p.tokens_per_s for p in points)
    return dataclasses.replace(points[0], tokens_per_s=rate, tpot_p99_s=fmean(tpots) if tpots else None)


def _lengths(workload: WorkloadSchema) -> str:
    return "" if workload.prompt_tokens is None else f" {workload.prompt_tokens} + {workload.output_tokens} tokens"


def _least_host(question: Question, best: Point, baseline: Point | None, progress: Callable[[str], Any]) -> int:
    """The least host KV memory, in whole GiB, that keeps the gain (without a baseline, the throughput)."""
    floor = 0.0 if baseline is None else min(baseline.tokens_per_s, best.tokens_per_s)
    wanted = floor + KEPT * (best.tokens_per_s - floor)
    low, high = 0.0, min(max(1, ceil(best.peak_host_bytes / GIB)), best.host_kv_bytes / GIB)
    while high - low > 1:
        middle = (low + high) // 2
        progress(f"host memory: are {middle:.0f} GiB enough?")
        try:
            enough = rerun(question, dataclasses.replace(best, host_kv_bytes=int(middle) * GIB)).tokens_per_s >= wanted
        except ValueError:  # The longest request does not fit.
            enough = False
        low, high = (low, middle) if enough else (middle, high)
    return int(high * GIB)
