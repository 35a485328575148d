"""Copies of 2 MiB blocks between the tiers by every method, against one large cudaMemcpyAsync; which method which run
length wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from experiments.gpu_kit.microbench.bench import Bench, Memory, Side, WrongResultError, block_runs, scattered
from experiments.gpu_kit.microbench.limits import scaled
from experiments.gpu_kit.microbench.stats import ratios, summary
from uvm_kv.memory import Slab, new_event, new_stream, probes
from uvm_kv.memory.copies import CopyMethod
from uvm_kv.memory.extension import extension
from uvm_kv.types import CHUNK_BYTES, KIB, MIB

TARGET = 0.95
METHODS = (CopyMethod.BATCH, CopyMethod.EACH, CopyMethod.KERNEL)
DIRECTIONS = ("h2d", "d2h")
BLOCK_BYTES = CHUNK_BYTES
NUM_BLOCKS = 512
RUN_SIZES = tuple(4 * KIB << i for i in range(10))
"""4 KiB to 2 MiB."""
MAX_RUNS = 2048
MAX_RUN_TOTAL = 64 * MIB
NUM_VERIFIED = 64
BEST_SHARE = 1.02
"""A method counts as the better one from 2 % on."""


class Buffers(NamedTuple):
    """Two slabs of each tier, so that both directions can go at once; `num_blocks` of 2 MiB each."""

    num_blocks: int
    host_in: Slab
    device_in: Slab
    device_out: Slab
    host_out: Slab

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * BLOCK_BYTES

    def ends(self, direction: str) -> tuple[Slab, Slab]:
        """Source and target."""
        return (self.host_in, self.device_in) if direction == "h2d" else (self.device_out, self.host_out)


def run(bench: Bench) -> None:
    bench.case("buffers", partial(_all, bench))


def new_buffers(bench: Bench, memory: Memory, num_blocks: int = NUM_BLOCKS) -> Buffers:
    room = min(bench.ledger.room("pinned") - 64 * MIB, bench.ledger.room("device"))
    num = scaled(num_blocks, room // 2, BLOCK_BYTES, 8)
    if num < num_blocks:
        bench.record.note(f"buffers of {num} blocks of 2 MiB instead of {num_blocks}: no more memory may be taken here")
    size = num * BLOCK_BYTES
    buffers = Buffers(num, memory.pinned(size), memory.device(size), memory.device(size), memory.pinned(size))
    for seed, slab in enumerate((buffers.host_in, buffers.device_out)):
        probes.fill_random(probes.span(slab), "words", seed=41 + seed, stream=bench.stream)
    bench.stream.synchronize()
    return buffers


def _all(bench: Bench, memory: Memory) -> None:
    buffers = new_buffers(bench, memory, NUM_BLOCKS // 2 if bench.settings.quick else NUM_BLOCKS)
    for direction in DIRECTIONS:
        bench.case(f"blocks of 2 MiB, {direction}", partial(_one_way, bench, buffers, direction))
    bench.case("blocks of 2 MiB, both ways at once", partial(_both_ways, bench, buffers))
    for direction in DIRECTIONS:
        bench.case(f"run lengths, {direction}", partial(_run_lengths, bench, buffers, direction))


def enqueue(bench: Bench, buffers: Buffers, direction: str, runs: Any, method: CopyMethod, stream: Any = None) -> None:
    source, target = buffers.ends(direction)
    on = (stream or bench.stream).handle
    extension().copy(source=source.raw, target=target.raw, runs=runs, method=int(method), stream=on)


def _again(bench: Bench, buffers: Buffers, direction: str, runs: Any, method: CopyMethod, _: int) -> None:
    enqueue(bench, buffers, direction, runs, method)


def _is_right(
    bench: Bench,
    buffers: Buffers,
    direction: str,
    method: CopyMethod,
    pairs: Sequence[tuple[int, int]],
    _: Memory,
) -> bool:
    """Some blocks, byte by byte, after a copy onto poison."""
    source, target = buffers.ends(direction)
    target.fill(0xA5, stream=bench.stream)
    enqueue(bench, buffers, direction, block_runs(pairs, buffers.num_blocks, BLOCK_BYTES), method)
    bench.stream.synchronize()
    step = max(1, len(pairs) // NUM_VERIFIED)
    for begin, end in pairs[::step]:
        sent, arrived = (
            bench.download(slab, BLOCK_BYTES, offset=block * BLOCK_BYTES)
            for slab, block in ((source, begin), (target, end))
        )
        if not np.array_equal(sent, arrived):
            raise WrongResultError(f"{method.name}, {direction}: block {begin} did not arrive at block {end}")
    return True


def _methods() -> tuple[CopyMethod, ...]:
    return tuple(method for method in METHODS if method is not CopyMethod.BATCH or extension().batch_copy())


def _one_way(bench: Bench, buffers: Buffers, direction: str, _: Memory) -> None:
    pairs = scattered(buffers.num_blocks)
    runs = block_runs(pairs, buffers.num_blocks, BLOCK_BYTES)
    methods = []
    for method in _methods():
        right = partial(_is_right, bench, buffers, direction, method, pairs)
        if bench.case(f"{method.name.lower()} is right, {direction}", right):
            methods.append(method)
    sides = {m.name.lower(): Side(partial(_again, bench, buffers, direction, runs, m)) for m in methods}
    source, target = buffers.ends(direction)
    sides["memcpy"] = Side(lambda _: bench.move(source, 0, target, 0, buffers.num_bytes))
    times = bench.times(sides, bench.settings.host_repeats)
    large = _record(bench, buffers, f"one cudaMemcpyAsync, {direction}", times["memcpy"], direction)
    for method in methods:
        rates = _record(bench, buffers, f"{method.name.lower()}, {direction}", times[method.name.lower()], direction)
        bench.record.ratio(f"{method.name.lower()} / one cudaMemcpyAsync, {direction}", ratios(rates, large), TARGET)


def _record(bench: Bench, buffers: Buffers, name: str, seconds: Sequence[float], direction: str) -> list[float]:
    predicted = bench.prediction.link(direction)
    return bench.record.case(name, num_bytes=buffers.num_bytes, seconds=seconds, predicted_gb_per_s=predicted)


def _both_ways(bench: Bench, buffers: Buffers, _: Memory) -> None:
    """Both directions on two streams from one start; a direction's time ends with its own last byte."""
    other = new_stream()
    runs = block_runs(scattered(buffers.num_blocks), buffers.num_blocks, BLOCK_BYTES)
    found: dict[str, dict[str, list[float]]] = {}
    methods: Mapping[str, CopyMethod | None] = {"memcpy": None} | {m.name.lower(): m for m in _methods()}
    for repeat in range(1 + bench.settings.host_repeats):
        for name, method in methods.items():
            seconds = _start_both(bench, buffers, runs, method, other)
            if repeat:  # The first warms up.
                for direction, value in seconds.items():
                    found.setdefault(name, {}).setdefault(direction, []).append(value)
    for name, by_direction in found.items():
        for direction, seconds_of in by_direction.items():
            _record(bench, buffers, f"{name}, {direction}, both ways at once", seconds_of, direction)
    total = {name: [max(pair) for pair in zip(*times.values(), strict=True)] for name, times in found.items()}
    for name, slowest in total.items():
        if name != "memcpy":
            values = ratios(total["memcpy"], slowest)  # The same bytes: a ratio of times, the other way round.
            bench.record.ratio(f"{name} / cudaMemcpyAsync, both ways at once", values, TARGET)


def _start_both(bench: Bench, buffers: Buffers, runs: Any, method: CopyMethod | None, other: Any) -> dict[str, float]:
    streams = {"h2d": bench.stream, "d2h": other}
    begin, ends = new_event(timing=True), {direction: new_event(timing=True) for direction in DIRECTIONS}
    probes.delay(10_000_000, stream=bench.stream)
    begin.record(stream=bench.stream.handle)
    begin.wait(stream=other.handle)
    for direction, stream in streams.items():
        if method is None:
            source, target = buffers.ends(direction)
            bench.move(source, 0, target, 0, buffers.num_bytes, stream)
        else:
            enqueue(bench, buffers, direction, runs, method, stream)
        ends[direction].record(stream=stream.handle)
    for stream in streams.values():
        stream.synchronize()
    return {direction: end.ns_since(begin) * 1e-9 for direction, end in ends.items()}


def num_runs(run_bytes: int, room_bytes: int) -> int:
    """As many as a test of that length copies."""
    return min(MAX_RUNS, MAX_RUN_TOTAL // run_bytes, room_bytes // run_bytes)


def _run_lengths(bench: Bench, buffers: Buffers, direction: str, _: Memory) -> None:
    """On an idle stream, so that what a method costs the caller is in its time."""
    medians: dict[str, dict[int, float]] = {}
    sizes = RUN_SIZES[::3] if bench.settings.quick else RUN_SIZES
    for run_bytes in sizes:
        num = num_runs(run_bytes, buffers.num_bytes)
        runs = block_runs(scattered(num), num, run_bytes)
        seconds: dict[str, list[float]] = {}
        for repeat in range(1 + bench.settings.host_repeats):
            for method in _methods():
                took = bench.wall(partial(enqueue, bench, buffers, direction, runs, method))[1]
                if repeat:
                    seconds.setdefault(method.name.lower(), []).append(took)
        for name, times in seconds.items():
            label = f"{name}, {num} runs of {run_bytes // KIB} KiB, {direction}"
            bench.record.case(label, num_bytes=num * run_bytes, seconds=times)
            medians.setdefault(name, {})[run_bytes] = summary(times).median
    bench.record.note(advice(direction, medians))


def advice(direction: str, medians: Mapping[str, Mapping[int, float]]) -> str:
    """From which run length on the copy engine (batch, or each where there is no batch) beats the kernel."""
    engine = "batch" if "batch" in medians else "each"
    if engine not in medians or "kernel" not in medians:
        return f"{direction}: kernel and {engine} were not both measured, so kSmallRunBytes stays an estimate"
    wins = [size for size in sorted(medians[engine]) if medians["kernel"][size] > BEST_SHARE * medians[engine][size]]
    sizes = sorted(medians[engine])
    first = next((size for size in sizes if all(larger in wins for larger in sizes if larger >= size)), None)
    if first is None:
        return f"{direction}: {engine} never beats the kernel for good up to {sizes[-1] // KIB} KiB a run"
    return f"{direction}: {engine} beats the kernel from runs of {first // KIB} KiB on (kSmallRunBytes is an estimate)"
