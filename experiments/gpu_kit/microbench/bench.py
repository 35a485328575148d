"""The measuring side: memory under limits, two-sided timing on one stream, cases that may fail alone.

Times are of CUDA events on a stream of our own, with everything enqueued ahead behind a short delay kernel, sides
taking turns repeat by repeat. Where a call itself is what is measured (a prefetch, a small copy), the host's clock
around call and synchronisation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from experiments.gpu_kit.microbench.limits import Ledger, whole_chunks
from experiments.gpu_kit.microbench.nominal import Prediction
from experiments.gpu_kit.microbench.record import FAILED, NOT_RUN, PartRecord
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.memory import KVMemory, Slab, new_event, new_stream, probes
from uvm_kv.memory.copies import CopyMethod
from uvm_kv.memory.extension import extension
from uvm_kv.memory.layout import slab_bytes
from uvm_kv.types import MemoryKind

Array = npt.NDArray[Any]
T = TypeVar("T")

ENQUEUE_NS = 60_000
"""About what one call of ours costs in Python; the delay in front covers as much for every call."""
NOT_RUN_ERRORS = ("MissingCapabilityError", "OversubscriptionError", "OutOfMemoryError", "NotRunError", "LimitError")
"""Errors by name, since most live in the extension, after which the machine cannot do a thing and nothing is wrong."""


OUR_ERRORS = ("WrongResultError", "CudaError")
"""Errors that are nobody else's fault."""


class NotRunError(Exception):
    """Why a case is not run here."""


class WrongResultError(Exception):
    """What was to be timed computes the wrong thing."""


class Settings(NamedTuple):
    quick: bool
    repeats: int
    host_repeats: int
    """Repeats of cases that take tens of milliseconds each."""

    @classmethod
    def of(cls, *, quick: bool) -> Settings:
        return cls(True, 5, 3) if quick else cls(False, 11, 7)


class Side(NamedTuple):
    enqueue: Callable[[int], object]
    """Given a number that goes up call by call, for rotating among inputs."""
    calls: int = 1
    """Between one pair of events."""


class Memory:
    """Slabs of one scope, all under the ledger, all freed at its end."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._open = ExitStack()

    def keep(self, end: Callable[[], object]) -> None:
        """Calls `end` at the end of the scope, before what was taken earlier is freed."""
        self._open.callback(end)

    def book(self, kind: str, num_bytes: int) -> None:
        """Memory that somebody else allocates for us."""
        self.ledger.take(kind, num_bytes)
        self._open.callback(self.ledger.give_back, kind, num_bytes)

    def device(self, num_bytes: int) -> Slab:
        return self._slab("device", whole_chunks(num_bytes), Slab.device)

    def pinned(self, num_bytes: int) -> Slab:
        return self._slab("pinned", whole_chunks(num_bytes), Slab.pinned)

    def managed(self, num_bytes: int) -> Slab:
        return self._slab("managed", whole_chunks(num_bytes), Slab.managed)

    def kv(self, kind: MemoryKind, spec: KVCacheSpec, num_device_blocks: int, num_host_blocks: int) -> KVMemory:
        near, far = slab_bytes(spec, num_device_blocks), slab_bytes(spec, num_host_blocks)
        if kind is MemoryKind.MANAGED:
            self.book("managed", slab_bytes(spec, num_device_blocks + num_host_blocks))
        else:
            self.book("device", near)
            self.book("pinned", far)
        made = KVMemory(kind, spec, num_device_blocks, num_host_blocks)
        self._open.callback(made.close)
        return made

    def close(self) -> None:
        self._open.close()

    def _slab(self, kind: str, num_bytes: int, make: Callable[[int], Slab]) -> Slab:
        self.book(kind, num_bytes)
        slab = make(num_bytes)
        self._open.callback(slab.close)
        return slab


def theirs(body: Callable[[Memory], T], memory: Memory) -> T:
    """Runs what rests on another library: whatever that raises means that the case is not run, and why."""
    try:
        return body(memory)
    except Exception as error:
        kind = type(error).__name__
        if kind in (*NOT_RUN_ERRORS, *OUR_ERRORS):
            raise
        raise NotRunError(f"{kind}: {error}") from error


class Bench:
    """What every part is given."""

    def __init__(
        self,
        record: PartRecord,
        ledger: Ledger,
        prediction: Prediction,
        settings: Settings,
        deadline: float,
    ) -> None:
        self.record, self.ledger, self.prediction, self.settings = record, ledger, prediction, settings
        self.deadline = deadline
        """Value of time.monotonic() after which no case begins."""
        self.broken: str | None = None
        """The case after which the device answers every call with an error; none is run after it."""
        self.stream = new_stream()
        self._delay_ns = int(extension().max_delay_ns)

    def case(self, name: str, body: Callable[[Memory], T]) -> T | None:
        """What `body` returns, run with memory of its own. What goes wrong in it is recorded under `name`, ends this
        case alone, and makes it None."""
        if time.monotonic() > self.deadline:
            self.record.content["out_of_time"] = True
            self.record.without(name, NOT_RUN, "the time of this part is used up")
            return None
        if self.broken is not None:
            self.record.without(name, NOT_RUN, f"the device answers nothing but errors since: {self.broken}")
            return None
        memory = Memory(self.ledger)
        try:
            return body(memory)
        except Exception as error:
            kind = type(error).__name__
            status = NOT_RUN if kind in NOT_RUN_ERRORS else FAILED
            self.record.without(name, status, f"{error}" if status == NOT_RUN else f"{kind}: {error}")
            return None
        finally:
            self._end(name, memory)

    def _end(self, name: str, memory: Memory) -> None:
        """Nothing may still run on what is freed."""
        try:
            self.stream.synchronize()
            memory.close()
        except Exception as error:
            if self.broken is None:
                self.broken = name
                self.record.without(f"end of {name}", FAILED, f"{type(error).__name__}: {error}")

    def times(self, sides: Mapping[str, Side], repeats: int, *, warmup: int = 1) -> dict[str, list[float]]:
        """Seconds of one call of each side, repeat by repeat; in each repeat another side goes first."""
        self._warm_up(sides, warmup)
        num_calls = repeats * sum(side.calls for side in sides.values())
        events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in sides}
        indices = dict.fromkeys(sides, warmup)
        names = list(sides)
        ahead_ns = min(self._delay_ns, 2_000_000 + num_calls * ENQUEUE_NS)
        made = {name: [(new_event(timing=True), new_event(timing=True)) for _ in range(repeats)] for name in sides}
        clock = time.perf_counter_ns()
        probes.delay(ahead_ns, stream=self.stream)
        for repeat in range(repeats):
            turn = repeat % len(names)
            for name in names[turn:] + names[:turn]:
                begin, end = made[name][repeat]
                begin.record(stream=self.stream.handle)
                for _ in range(sides[name].calls):
                    sides[name].enqueue(indices[name])
                    indices[name] += 1
                end.record(stream=self.stream.handle)
                events[name].append((begin, end))
        enqueued_ns = time.perf_counter_ns() - clock
        self.stream.synchronize()
        found = {name: [end.ns_since(begin) for begin, end in pairs] for name, pairs in events.items()}
        if enqueued_ns > ahead_ns + sum(map(sum, found.values())):
            self.record.note("the host fell behind the device in a timed run: its gaps are in the times")
        return {name: [ns * 1e-9 / sides[name].calls for ns in times] for name, times in found.items()}

    def _warm_up(self, sides: Mapping[str, Side], warmup: int) -> None:
        for side in sides.values():
            for index in range(warmup):
                side.enqueue(index)
        self.stream.synchronize()

    def wall(self, call: Callable[[], object]) -> tuple[float, float]:
        """Seconds by the host's clock: until `call` returned, and until the stream was done too."""
        begin = time.perf_counter_ns()
        call()
        returned = time.perf_counter_ns()
        self.stream.synchronize()
        return (returned - begin) * 1e-9, (time.perf_counter_ns() - begin) * 1e-9

    def move(
        self, source: Slab, source_offset: int, target: Slab, target_offset: int, num_bytes: int, stream: Any = None
    ) -> None:
        """One cudaMemcpyAsync."""
        runs = one_run(source_offset, target_offset, num_bytes)
        on = (stream or self.stream).handle
        extension().copy(source=source.raw, target=target.raw, runs=runs, method=int(CopyMethod.EACH), stream=on)

    def upload(self, slab: Slab, data: Array, *, offset: int = 0) -> None:
        """Host bytes to any slab, through pinned memory; waits."""
        raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        memory = Memory(self.ledger)
        try:
            staging = memory.pinned(raw.size)
            staging.host_view(offset=0, num_bytes=raw.size)[:] = raw
            self.move(staging, 0, slab, offset, raw.size)
            self.stream.synchronize()
        finally:
            memory.close()

    def download(self, slab: Slab, num_bytes: int, *, offset: int = 0) -> Array:
        """The bytes of any slab, through pinned memory; waits."""
        memory = Memory(self.ledger)
        try:
            staging = memory.pinned(num_bytes)
            self.move(slab, offset, staging, 0, num_bytes)
            self.stream.synchronize()
            return staging.host_view(offset=0, num_bytes=num_bytes).copy()
        finally:
            memory.close()

    def checksum(self, what: probes.Span, total: Slab) -> int:
        """Sum of the 32-bit words modulo 2^64, by the read probe; `total` is a slab for its result."""
        total.fill(0, offset=0, num_bytes=16, stream=self.stream)
        probes.stream_read(what, total=probes.span(total, num_bytes=8), stream=self.stream)
        self.stream.synchronize()
        return int(self.download(total, 8).view(np.uint64)[0])


def one_run(source_offset: int, target_offset: int, num_bytes: int) -> Any:
    """The run of bytes that one copy moves."""
    layouts = [_flat(1, num_bytes, offset) for offset in (source_offset, target_offset)]
    return extension().copy_runs(source=layouts[0], target=layouts[1], blocks=[(0, 0)], layers=(0, 1))


def _flat(num_blocks: int, block_bytes: int, base_bytes: int = 0) -> Any:
    """Blocks side by side, no chunks between them."""
    fields = {"num_layers": 1, "layer_block_bytes": block_bytes, "layer_major": True, "pieces_per_group": 1}
    return extension().SlabLayout(**fields, num_blocks=num_blocks, group_bytes=block_bytes, base_bytes=base_bytes)


def block_runs(pairs: Sequence[tuple[int, int]], num_blocks: int, block_bytes: int) -> Any:
    """Runs that move whole blocks between two slabs of blocks side by side."""
    flat = _flat(num_blocks, block_bytes)
    return extension().copy_runs(source=flat, target=flat, blocks=list(pairs), layers=(0, 1))


def scattered(num_blocks: int) -> list[tuple[int, int]]:
    """Each block to another place, no two neighbours to neighbouring places, so that no two runs join."""
    if num_blocks < 4:
        raise ValueError(f"{num_blocks} blocks; four are the least that can be scattered")
    step = next(k for k in range(num_blocks * 5 // 8 | 1, 2 * num_blocks + 3, 2) if _coprime(k, num_blocks))
    return [(block, block * step % num_blocks) for block in range(num_blocks)]


def _coprime(a: int, b: int) -> bool:
    return bool(np.gcd(a, b) == 1) and a % b not in (0, 1)
