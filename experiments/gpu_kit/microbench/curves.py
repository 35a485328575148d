"""The points of a curves file that no other part takes: link, copy and hbm; and the file itself, put together from
what every part has taken.

The format is that of uvm_kv/calibrate/curves.py (docs/calibration.md), whose module needs Hydra and so is not imported;
a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from experiments.gpu_kit.microbench.bench import Bench, Memory, Side
from experiments.gpu_kit.microbench.copies import DIRECTIONS, Buffers, new_buffers
from experiments.gpu_kit.microbench.nominal import Card
from uvm_kv.memory import Slab, new_event, new_stream, probes
from uvm_kv.types import KIB, MIB

FILE_FORMAT, FILE_VERSION, TOOL = "uvm-kv curves", 1, "experiments.microbench"
LINK_MIB = (64, 256, 1024)
COPY_SIZES = tuple(4 * KIB << 2 * i for i in range(9))
HBM_MIB = (4, 16, 64, 256, 1024)
MIN_POINTS = {"link": 2, "copy": 2, "zero_copy": 1, "hbm": 2, "prefetch": 2, "fault": 2}
BUSY_PIECE = 64 * MIB
NUM_BLOCKS = 512
"""Blocks of 2 MiB in each of four buffers."""


def run(bench: Bench) -> None:
    bench.case("link, copy", partial(_link_and_copy, bench))
    bench.case("hbm", partial(_hbm, bench))


def _link_and_copy(bench: Bench, memory: Memory) -> None:
    buffers = new_buffers(bench, memory, NUM_BLOCKS // 2 if bench.settings.quick else NUM_BLOCKS)
    for direction in DIRECTIONS:
        bench.case(f"copy, {direction}", partial(_copy, bench, buffers, direction))
    for direction in DIRECTIONS:
        for size in (mib * MIB for mib in LINK_MIB if mib * MIB <= buffers.num_bytes):
            bench.case(f"link, {direction}, {size // MIB} MiB", partial(_link, bench, buffers, direction, size))


def _copy(bench: Bench, buffers: Buffers, direction: str, _: Memory) -> None:
    source, target = buffers.ends(direction)
    for size in (size for size in COPY_SIZES if size <= buffers.num_bytes):
        places = buffers.num_bytes // size
        seconds = [
            bench.wall(partial(_move, bench, source, target, repeat % places * size, size))[1]
            for repeat in range(2 + bench.settings.repeats)
        ][2:]
        name = f"one cudaMemcpyAsync and its synchronisation, {size // KIB} KiB, {direction}"
        bench.record.case(name, num_bytes=size, seconds=seconds)
        bench.record.point("copy", {"direction": direction, "bytes": size}, seconds)


def _move(bench: Bench, source: Slab, target: Slab, offset: int, size: int) -> None:
    bench.move(source, offset, target, offset, size)


def _link(bench: Bench, buffers: Buffers, direction: str, size: int, _: Memory) -> None:
    source, target = buffers.ends(direction)
    idle = bench.times({"copy": Side(lambda _: bench.move(source, 0, target, 0, size))}, bench.settings.host_repeats)
    _record_link(bench, direction, "idle", size, idle["copy"])
    other = new_stream()
    found = [_busy(bench, buffers, direction, size, other) for _ in range(1 + bench.settings.host_repeats)][1:]
    busy = [seconds for seconds in found if seconds is not None]
    if busy:
        _record_link(bench, direction, "busy", size, busy)
    if len(busy) < len(found):
        name = f"{direction}, {size // MIB} MiB: {len(found) - len(busy)} of {len(found)} repeats"
        bench.record.note(f"{name} thrown away, since the other direction was not busy throughout")


def _busy(bench: Bench, buffers: Buffers, direction: str, size: int, other: Any) -> float | None:
    """Seconds of one copy while the other direction is busy from before its start until after its end."""
    back = "d2h" if direction == "h2d" else "h2d"
    source, target = buffers.ends(direction)
    far_source, far_target = buffers.ends(back)
    piece = min(BUSY_PIECE, buffers.num_bytes)
    started, begin, end, stopped = (new_event(timing=True) for _ in range(4))
    probes.delay(5_000_000, stream=other)
    bench.move(far_source, 0, far_target, 0, piece, other)
    started.record(stream=other.handle)
    for _ in range(4 * size // piece + 2):
        bench.move(far_source, 0, far_target, 0, piece, other)
    stopped.record(stream=other.handle)
    started.wait(stream=bench.stream.handle)
    begin.record(stream=bench.stream.handle)
    bench.move(source, 0, target, 0, size)
    end.record(stream=bench.stream.handle)
    for stream in (bench.stream, other):
        stream.synchronize()
    return end.ns_since(begin) * 1e-9 if stopped.ns_since(end) > 0 else None


def _record_link(bench: Bench, direction: str, other: str, size: int, seconds: list[float]) -> None:
    predicted = bench.prediction.link(direction) if other == "idle" else None
    name = f"link {direction}, {size // MIB} MiB, the other direction {other}"
    bench.record.case(name, num_bytes=size, seconds=seconds, predicted_gb_per_s=predicted)
    bench.record.point("link", {"direction": direction, "other_direction": other, "bytes": size}, seconds)


def _hbm(bench: Bench, memory: Memory) -> None:
    largest = HBM_MIB[-2 if bench.settings.quick else -1] * MIB
    source, target = memory.device(largest), memory.device(largest)
    probes.fill_random(probes.span(source), "words", seed=2, stream=bench.stream)
    for size in (mib * MIB for mib in HBM_MIB if mib * MIB <= source.num_bytes):
        places = source.num_bytes // size
        calls = max(1, min(16, places))

        def enqueue(index: int, size: int = size, places: int = places) -> None:
            _move(bench, source, target, index % places * size, size)

        seconds = bench.times({"copy": Side(enqueue, calls)}, bench.settings.repeats)["copy"]
        predicted = bench.prediction.hbm
        bench.record.case(
            f"copy within the card, {size // MIB} MiB",
            num_bytes=2 * size,
            seconds=seconds,
            predicted_gb_per_s=predicted,
        )
        bench.record.point("hbm", {"bytes": size}, seconds)


def curves_file(
    parts: Iterable[Mapping[str, Any]], card: Card | None, gpu: Mapping[str, Any], date: str, commit: str | None
) -> dict[str, Any] | None:
    """What calibrate reads, from the parts' records; None without a point, or for a card whose nominal figures are not
    known. A curve with too few points is left out."""
    merged: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        for curve, points in part["curves"].items():
            merged.setdefault(curve, []).extend(points)
    curves = {name: points for name, points in merged.items() if len(points) >= MIN_POINTS[name]}
    if card is None or not curves:
        return None
    return {
        "format": FILE_FORMAT,
        "schema_version": FILE_VERSION,
        "origin": "measured",
        "date": date,
        "tool": TOOL,
        "commit": commit,
        "card": {
            "name": gpu["name"],
            "driver": gpu["driver"],
            "memory_bytes": gpu["memory_bytes"],
            "hbm_gb_per_s": card.hbm_gb_per_s,
            "tensor_tflop_per_s": card.tensor_tflop_per_s,
            "tensor_int8_top_per_s": card.tensor_int8_top_per_s,
            "float32_tflop_per_s": card.float32_tflop_per_s,
        },
        "curves": curves,
    }
