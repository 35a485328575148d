"""Fault-driven migration: a kernel's first touch of managed memory that the CPU wrote, a time for each 2 MiB chunk.

The study of docs/calibration.md within capacity: halves A and B of a working set, gone through in the order A, B.
Ratios above 1 would oversubscribe the card and are not taken.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from experiments.gpu_kit.microbench.bench import Bench, Memory, Side
from experiments.gpu_kit.microbench.limits import scaled
from experiments.gpu_kit.microbench.managed import CHUNKED, TOUCHED, check_sum, tile, tiles_sum, written_slab
from uvm_kv.memory import Slab, probes
from uvm_kv.memory.extension import extension
from uvm_kv.types import CHUNK_BYTES, MIB

STREAM_CHUNKS, RANDOM_CHUNKS, TOUCH_CHUNKS = 128, 16, 16
"""Chunks of one half."""
PASSES = ("A", "B")


def run(bench: Bench) -> None:
    quick = bench.settings.quick
    cases = [("stream", TOUCHED, STREAM_CHUNKS // 4 if quick else STREAM_CHUNKS), ("random", TOUCHED, RANDOM_CHUNKS)]
    if not quick:
        cases.append(("stream", CHUNKED, STREAM_CHUNKS))
        cases.append(("one word a page", TOUCHED, TOUCH_CHUNKS))
    for access, state, num_chunks in cases:
        bench.case(f"faults, {access}, {state}", partial(_walk, bench, access, state, num_chunks))
    bench.record.note("not taken: working sets above the card's capacity, which would oversubscribe it")


def _walk(bench: Bench, access: str, state: str, wanted: int, memory: Memory) -> None:
    num = scaled(wanted, bench.ledger.room("managed") // 2, CHUNK_BYTES)
    half_bytes = num * CHUNK_BYTES
    total, order = memory.device(2 * MIB), memory.device(half_bytes // probes.WORDS_PER_PAGE)
    capacity = int(extension().free_bytes(0))
    found: dict[str, list[float]] = {name: [] for name in PASSES}
    resident: list[float] = []
    for repeat in range(1 + bench.settings.host_repeats):
        seconds = bench.case(
            f"a walk, {access}, {state}",
            partial(_one_walk, bench, access, state, half_bytes, order, total, repeat),
        )
        if seconds is None:
            break
        if repeat:  # The first warms up.
            for name, value in zip(PASSES, seconds, strict=False):
                found[name].append(value)
            resident.append(seconds[2])
    if found["A"]:
        _record(bench, access, state, half_bytes, capacity, found, resident)


def _one_walk(
    bench: Bench, access: str, state: str, half_bytes: int, order: Slab, total: Slab, repeat: int, memory: Memory
) -> list[float]:
    """Seconds of the passes A, B and once more A, which is on the card by then. Memory is new for each walk, since
    what has once been on the card comes back to the CPU in other pages."""
    pattern = tile(seed=repeat)
    halves = [written_slab(bench, memory, half_bytes, state, pattern) for _ in PASSES]
    rng = np.random.default_rng(repeat)
    seconds = []
    for half in (*halves, halves[0]):
        if access != "stream":
            pages = rng.permutation(half_bytes // probes.PAGE_BYTES).astype(np.uint32)
            bench.upload(order, pages)
        seconds.append(_pass(bench, access, half, order))
    words = half_bytes // 4 if access != "one word a page" else half_bytes // probes.PAGE_BYTES
    for half, added in zip(halves, (2, 1), strict=True):
        expected = (tiles_sum(pattern, half_bytes) + added * words) % (1 << 64)
        check_sum(bench, half, half_bytes, expected, total)
    return seconds


def _pass(bench: Bench, access: str, half: Slab, order: Slab) -> float:
    what = probes.span(half)
    pages = probes.span(order, num_bytes=what.num_bytes // probes.WORDS_PER_PAGE)

    def touch(_: int) -> None:
        if access == "stream":
            probes.add_one(what, stream=bench.stream)
        else:
            words = 1 if access == "one word a page" else probes.WORDS_PER_PAGE
            probes.add_one_pages(what, pages, words_per_page=words, stream=bench.stream)

    return bench.times({"pass": Side(touch)}, 1, warmup=0)["pass"][0]


def _record(
    bench: Bench,
    access: str,
    state: str,
    half_bytes: int,
    capacity: int,
    found: dict[str, list[float]],
    resident: list[float],
) -> None:
    chunk_us = bench.prediction.fault_chunk_us if access == "stream" and state == TOUCHED else None
    num_chunks = half_bytes // CHUNK_BYTES
    for name, seconds in found.items():
        per_chunk = [s / num_chunks * 1e6 for s in seconds]
        bench.record.case(
            f"first touch of {num_chunks} chunks, {access}, {state}, {name}",
            num_bytes=half_bytes,
            seconds=seconds,
            predicted_gb_per_s=None if chunk_us is None else CHUNK_BYTES / chunk_us / 1e3,
            us_per_chunk=per_chunk,
        )
        if state == TOUCHED and access in ("stream", "random"):
            passes = list(PASSES[: PASSES.index(name) + 1])
            bench.record.point("fault", fault_point(access, half_bytes, capacity, passes), seconds)
    again = f"the same, on the card, {access}, {state}"
    bench.record.case(again, num_bytes=half_bytes, seconds=resident)


def fault_point(access: str, half_bytes: int, capacity: int, passes: list[str]) -> dict[str, object]:
    """Coordinates of the curves file. The ratio is rounded down, so that halves of whole chunks are found from it."""
    ratio = 2 * half_bytes / capacity * (1 - 1e-12)
    return {
        "prefetcher": "tree",
        "access": access,
        "capacity_bytes": capacity,
        "working_set_ratio": ratio,
        "passes": passes,
    }
