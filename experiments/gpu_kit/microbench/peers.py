"""The same things done with other libraries, in the same run: managed memory by CuPy and cuda.core, pinned copies by
torch. A library that is missing, or lacks the call, is recorded as not run with its reason."""

from __future__ import annotations

import ctypes
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from experiments.gpu_kit.microbench.bench import Array, Bench, Memory, NotRunError, Side, WrongResultError, theirs
from experiments.gpu_kit.microbench.limits import scaled
from experiments.gpu_kit.microbench.managed import tile, tiles_sum, write
from experiments.gpu_kit.microbench.stats import ratios
from uvm_kv.memory import Slab, probes
from uvm_kv.memory.residency import device_place, prefetch
from uvm_kv.types import CHUNK_BYTES, MIB

MANAGED_CHUNKS = 256
COPY_CHUNKS = 512
STEPS = ("allocate", "prefetch", "read", "free")


class Held(NamedTuple):
    """Managed memory of some library."""

    address: int
    prefetch: Callable[[], object] | None
    """To the card, on our stream or one that `wait` waits for; None where the library has no such call."""
    wait: Callable[[], object]
    free: Callable[[], object]


Allocate = Callable[[int], Held]


def run(bench: Bench) -> None:
    bench.case("managed memory of the libraries", partial(_managed, bench))
    bench.case("pinned copies of torch", partial(theirs, partial(_pinned, bench)))


def library(name: str) -> Any:
    """NotRunError where it is missing, or breaks while it is loaded."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise NotRunError(f"{error.name or name} is not installed") from None
    except Exception as error:
        raise NotRunError(f"{name} does not load: {type(error).__name__}: {error}") from None


def ours(bench: Bench, num_bytes: int) -> Held:
    slab = Slab.managed(num_bytes)

    def bring() -> None:
        prefetch(slab, [(0, num_bytes)], device_place(), stream=bench.stream)

    return Held(slab.address, bring, bench.stream.synchronize, slab.close)


def by_cupy(bench: Bench, _: Memory) -> Allocate:
    cuda = library("cupy").cuda
    stream = cuda.ExternalStream(bench.stream.handle)

    def allocate(num_bytes: int) -> Held:
        kept = [cuda.malloc_managed(num_bytes)]
        address = int(kept[0].ptr)
        return Held(address, lambda: kept[0].mem.prefetch(stream), bench.stream.synchronize, kept.clear)

    return allocate


def by_cuda_core(_: Bench, __: Memory) -> Allocate:
    core = library("cuda.core")
    if not hasattr(core, "ManagedMemoryResource"):
        core = library("cuda.core.experimental")
    if not hasattr(core, "ManagedMemoryResource"):
        raise NotRunError("this cuda.core has no ManagedMemoryResource")
    device = core.Device(0)
    device.set_current()
    stream = device.create_stream()
    resource = core.ManagedMemoryResource()

    def allocate(num_bytes: int) -> Held:
        buffer = resource.allocate(num_bytes, stream=stream)
        stream.sync()
        bring = getattr(buffer, "prefetch", None)

        def free() -> None:
            buffer.close(stream)
            stream.sync()

        return Held(int(buffer.handle), bring and partial(bring, device, stream=stream), stream.sync, free)

    return allocate


def _managed(bench: Bench, memory: Memory) -> None:
    num = scaled(
        MANAGED_CHUNKS // 4 if bench.settings.quick else MANAGED_CHUNKS, bench.ledger.room("managed"), CHUNK_BYTES
    )
    num_bytes = num * CHUNK_BYTES
    memory.book("managed", num_bytes)  # One library at a time holds as much.
    total = memory.device(2 * MIB)
    makers: dict[str, Allocate] = {"uvm_kv": partial(ours, bench)}
    for name, maker in (("cupy.cuda.malloc_managed", by_cupy), ("cuda.core ManagedMemoryResource", by_cuda_core)):
        found = bench.case(name, partial(theirs, partial(maker, bench)))
        if found is not None:
            makers[name] = found
    times: dict[str, dict[str, list[float]]] = {name: {} for name in makers}
    for repeat in range(1 + bench.settings.host_repeats):
        for name in list(makers):
            one = partial(_one, bench, makers[name], num_bytes, total, repeat)
            seconds = bench.case(name, one if name == "uvm_kv" else partial(theirs, one))
            if seconds is None:
                del makers[name]
            elif repeat:  # The first warms up.
                for step, value in seconds.items():
                    times[name].setdefault(step, []).append(value)
    _record_managed(bench, times, num_bytes)


def _one(bench: Bench, allocate: Allocate, num_bytes: int, total: Slab, repeat: int, _: Memory) -> dict[str, float]:
    """Seconds of each step by the host's clock: allocate, (the CPU writes), prefetch, read by the device, free."""
    pattern = tile(seed=repeat)
    seconds: dict[str, float] = {}
    with timed(seconds, "allocate"):
        held = allocate(num_bytes)
    try:
        write(host_bytes(held.address, num_bytes), pattern)
        if held.prefetch is not None:
            with timed(seconds, "prefetch"):
                held.prefetch()
                held.wait()
        total.fill(0, offset=0, num_bytes=16, stream=bench.stream)
        bench.stream.synchronize()
        with timed(seconds, "read"):
            what = probes.Span(held.address, num_bytes)
            probes.stream_read(what, total=probes.span(total, num_bytes=8), stream=bench.stream)
            bench.stream.synchronize()
        found = int(bench.download(total, 8).view(np.uint64)[0])
        if found != tiles_sum(pattern, num_bytes):
            raise WrongResultError("the device read other bytes than the CPU wrote")
    finally:
        bench.stream.synchronize()
        with timed(seconds, "free"):
            held.free()
    return seconds


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    begin = time.perf_counter_ns()
    yield
    seconds[step] = (time.perf_counter_ns() - begin) * 1e-9


def host_bytes(address: int, num_bytes: int) -> Array:
    """Managed memory at an address, for the CPU."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))


def _record_managed(bench: Bench, times: dict[str, dict[str, list[float]]], num_bytes: int) -> None:
    rates: dict[tuple[str, str], list[float]] = {}
    for name, steps in times.items():
        for step in STEPS:
            label = f"{step}, {name}"
            if step in steps:
                rates[name, step] = bench.record.case(label, num_bytes=num_bytes, seconds=steps[step])
            elif steps:
                bench.record.without(label, "not run", "this version has no such call")
    for (name, step), found in rates.items():
        mine = rates.get(("uvm_kv", step), [])
        if name != "uvm_kv" and len(mine) == len(found):
            bench.record.ratio(f"{step}: uvm_kv / {name}", ratios(mine, found), None, "rates of the same bytes")


def _pinned(bench: Bench, memory: Memory) -> None:
    torch = library("torch")
    room = min(bench.ledger.room("pinned") // 2 - 64 * MIB, bench.ledger.room("device") // 2)
    num_bytes = scaled(COPY_CHUNKS // 4 if bench.settings.quick else COPY_CHUNKS, room, CHUNK_BYTES) * CHUNK_BYTES
    memory.book("pinned", num_bytes)  # torch's own.
    memory.book("device", num_bytes)
    memory.keep(torch.cuda.empty_cache)
    seconds: dict[str, float] = {}
    with timed(seconds, "torch"):
        their_host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    with timed(seconds, "uvm_kv"):
        host = memory.pinned(num_bytes)
    device, their_device = memory.device(num_bytes), torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    probes.fill_random(probes.span(host), "words", seed=7, stream=bench.stream)
    bench.stream.synchronize()
    their_host.numpy()[:] = host.host_view(offset=0, num_bytes=num_bytes)
    stream = torch.cuda.ExternalStream(bench.stream.handle)

    def copy(target: Any, source: Any, _: int) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    sides = {
        "uvm_kv h2d": Side(lambda _: bench.move(host, 0, device, 0, num_bytes)),
        "torch h2d": Side(partial(copy, their_device, their_host)),
        "uvm_kv d2h": Side(lambda _: bench.move(device, 0, host, 0, num_bytes)),
        "torch d2h": Side(partial(copy, their_host, their_device)),
    }
    times = bench.times(sides, bench.settings.host_repeats)
    if not np.array_equal(their_host.numpy(), host.host_view(offset=0, num_bytes=num_bytes)):
        raise WrongResultError("torch's bytes and ours differ after a round trip")
    for name, took in seconds.items():
        bench.record.case(f"pinned allocation, {name}", num_bytes=num_bytes, seconds=[took])
    found = {
        name: bench.record.case(
            f"pinned copy, {name}",
            num_bytes=num_bytes,
            seconds=took,
            predicted_gb_per_s=bench.prediction.link(name.split()[1]),
        )
        for name, took in times.items()
    }
    for direction in ("h2d", "d2h"):
        values = ratios(found[f"uvm_kv {direction}"], found[f"torch {direction}"])
        bench.record.ratio(f"pinned copy {direction}: uvm_kv / torch", values)
