"""Prefetches of managed memory to the card: 1 GiB in one call, one batch and one call a chunk, against one large
cudaMemcpyAsync; and what a call costs by size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from experiments.gpu_kit.microbench.bench import Bench, Memory
from experiments.gpu_kit.microbench.limits import scaled
from experiments.gpu_kit.microbench.managed import CHUNKED, STATES, check_sum, tile, tiles_sum, to_host, written_slab
from experiments.gpu_kit.microbench.nominal import Prediction
from experiments.gpu_kit.microbench.stats import ratios
from uvm_kv.memory import Slab, probes
from uvm_kv.memory.extension import extension
from uvm_kv.memory.residency import device_place, host_place, prefetch, prefetch_batch
from uvm_kv.types import CHUNK_BYTES, MIB

TARGET = 0.85
NUM_CHUNKS, LEAST_CHUNKS = 512, 64
CALL_CHUNKS = (1, 4, 16, 64, 256)
"""Sizes of the calls whose cost is measured; the points of the curves file."""
SPARE_BYTES = 256 * MIB

Ranges = list[tuple[int, int]]


def run(bench: Bench) -> None:
    for state in STATES[:1] if bench.settings.quick else STATES:
        bench.case(f"prefetch, {state}", partial(_state, bench, state))
    bench.record.note("not taken: prefetches onto a full card (`evicting`), which would need oversubscription")


def chunk_ranges(first: int, num: int) -> Ranges:
    return [((first + i) * CHUNK_BYTES, CHUNK_BYTES) for i in range(num)]


def _state(bench: Bench, state: str, memory: Memory) -> None:
    room = min(
        bench.ledger.room("managed"), bench.ledger.room("pinned") - SPARE_BYTES, bench.ledger.room("device") // 2
    )
    num = scaled(NUM_CHUNKS // 2 if bench.settings.quick else NUM_CHUNKS, room, CHUNK_BYTES, LEAST_CHUNKS)
    pattern = tile()
    slab = written_slab(bench, memory, num * CHUNK_BYTES, state, pattern)
    total = memory.device(2 * MIB)
    bench.case(f"large prefetches, {state}", partial(_large, bench, slab, state))
    # Calls are costed on whole chunks: that is what the driver itself leaves on the host.
    if state == CHUNKED:
        bench.case("prefetch calls, from the host", partial(_calls_from_host, bench, slab))
        bench.case("prefetch calls, resident", partial(_calls_resident, bench, slab))
    check_sum(bench, slab, slab.num_bytes, tiles_sum(pattern, slab.num_bytes), total)


def _large(bench: Bench, slab: Slab, state: str, memory: Memory) -> None:
    num_bytes = slab.num_bytes
    host, device = memory.pinned(num_bytes), memory.device(num_bytes)
    probes.fill_random(probes.span(host), "words", seed=3, stream=bench.stream)
    bench.stream.synchronize()
    chunks = chunk_ranges(0, num_bytes // CHUNK_BYTES)
    place, stream = device_place(), bench.stream
    ways: dict[str, Callable[[], None]] = {
        "one cudaMemcpyAsync": lambda: bench.move(host, 0, device, 0, num_bytes),
        "one call": lambda: prefetch(slab, [(0, num_bytes)], place, stream=stream),
        "a call a chunk": lambda: prefetch(slab, chunks, place, stream=stream),
    }
    if extension().batch_prefetch():
        ways["batch"] = lambda: prefetch_batch(slab, chunks, place, stream=stream)
    back: list[float] = []
    times = _alternate(bench, slab, ways, back)
    rates = {}
    for name, seconds in times.items():
        predicted = bench.prediction.h2d if "Memcpy" in name else bench.prediction.prefetch
        label = name if "Memcpy" in name else f"prefetch by {name}"
        rates[name] = bench.record.case(
            f"{label}, {state}", num_bytes=num_bytes, seconds=seconds, predicted_gb_per_s=predicted
        )
    bench.record.case(f"prefetch to the host, {state}", num_bytes=num_bytes, seconds=back)
    large = rates.pop("one cudaMemcpyAsync")
    for name, found in rates.items():
        target = TARGET if name == "batch" else None
        bench.record.ratio(f"prefetch by {name} / one cudaMemcpyAsync, {state}", ratios(found, large), target)


def _alternate(
    bench: Bench, slab: Slab, ways: dict[str, Callable[[], None]], back: list[float]
) -> dict[str, list[float]]:
    """Seconds of each way by the host's clock, in turns; before each the slab goes back to the host."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(1 + bench.settings.host_repeats):
        for name, go in ways.items():
            whole = [(0, slab.num_bytes)]
            took_back = bench.wall(partial(prefetch, slab, whole, host_place(), stream=bench.stream))[1]
            seconds = bench.wall(go)[1]
            if repeat:  # The first warms up.
                found[name].append(seconds)
            if repeat and name == "a call a chunk":
                back.append(took_back)  # What the call before it had brought to the card.
    return found


def _calls_from_host(bench: Bench, slab: Slab, _: Memory) -> None:
    """Each repeat on chunks that are on the host."""
    total = slab.num_bytes // CHUNK_BYTES
    for num in (n for n in CALL_CHUNKS if n <= total):
        seconds: list[float] = []
        called: list[float] = []
        per_trip = total // num
        while len(seconds) < 1 + bench.settings.repeats:
            to_host(bench, slab)
            for first in range(min(per_trip, 1 + bench.settings.repeats - len(seconds))):
                part = [(first * num * CHUNK_BYTES, num * CHUNK_BYTES)]
                returned, done = bench.wall(partial(prefetch, slab, part, device_place(), stream=bench.stream))
                called.append(returned)
                seconds.append(done)
        _record_call(bench, "from_host", num, seconds[1:], called[1:], bench.prediction.h2d)


def _calls_resident(bench: Bench, slab: Slab, _: Memory) -> None:
    """Nothing moves: what the call itself costs."""
    prefetch(slab, [(0, slab.num_bytes)], device_place(), stream=bench.stream)
    bench.stream.synchronize()
    total = slab.num_bytes // CHUNK_BYTES
    for num in (n for n in CALL_CHUNKS if n <= total):
        seconds, called = [], []
        for repeat in range(1 + bench.settings.repeats):
            part = [(repeat * num % (total - num + 1) * CHUNK_BYTES, num * CHUNK_BYTES)]
            returned, done = bench.wall(partial(prefetch, slab, part, device_place(), stream=bench.stream))
            called.append(returned)
            seconds.append(done)
        _record_call(bench, "resident", num, seconds[1:], called[1:], None)


def _record_call(
    bench: Bench, case: str, num: int, seconds: list[float], called: list[float], h2d: float | None
) -> None:
    num_bytes = num * CHUNK_BYTES
    known = bench.prediction.h2d is not None
    us = Prediction.prefetch_call_us(num, h2d) if known else None
    bench.record.case(
        f"prefetch call, {case}, {num} chunks",
        num_bytes=num_bytes,
        seconds=seconds,
        predicted_gb_per_s=None if us is None else num_bytes / us / 1e3,
        call_seconds=called,
    )
    bench.record.point("prefetch", {"case": case, "num_chunks": num}, seconds)
