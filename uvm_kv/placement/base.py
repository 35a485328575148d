"""PlacementPolicy: the whole of what the scheduler asks of a placement, and the view it gives in return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from uvm_kv.hw.roofline import Roofline
from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.ops import MemoryOp, OpKind
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.types import MemoryKind, Reach, ceil_div


class PlacementView(NamedTuple):
    """What a real host process knows as it plans a step. Read-only; no clock, no counters, no future."""

    available_device: int
    """Device blocks that no sequence has claimed."""
    available_host: int
    claimed_device: int
    claimed_host: int
    num_running: int
    num_waiting: int
    num_context_tokens: int
    """Tokens of all running sequences that hold KV."""
    host_blocks: tuple[int, ...]
    """Host blocks of the running sequences; the same object until they change."""
    tables: tuple[list[int], ...] | None
    """Block tables of the running sequences in schedule order, for policies that `needs_tables`."""


def empty_view(capacity: KVCapacity) -> PlacementView:
    """What a policy sees before the first request."""
    return PlacementView(*capacity, 0, 0, 0, 0, 0, (), ())


class Share(NamedTuple):
    """How many blocks go to which tier."""

    device: int
    host: int


@dataclass(frozen=True)
class PlacementContext:
    """What a policy is built from: fixed for a run."""

    spec: KVCacheSpec
    capacity: KVCapacity
    memory: MemoryKind
    roofline: Roofline
    num_layers_ahead: int = 2
    reach: Reach = Reach.BOTH


class PlacementPolicy(ABC):
    """Deterministic; may remember what it planned, never what time it is."""

    memory_kinds: ClassVar[frozenset[MemoryKind]]
    """Kinds of memory that can serve it."""
    uses_host: ClassVar[bool]
    """Whether sequences may own host blocks while they run."""
    needs_tables: ClassVar[bool] = False

    def __init__(self, context: PlacementContext) -> None:
        self.context = context

    @property
    @abstractmethod
    def reach(self) -> Reach | None:
        """Which closed-form ceiling bounds the gain; None where none applies."""

    @abstractmethod
    def place(self, view: PlacementView, num_blocks: int, *, admitting: bool) -> Share | None:
        """Tiers for `num_blocks` more blocks of one sequence, a new one if `admitting`; None if not now."""

    @abstractmethod
    def plan(self, view: PlacementView) -> tuple[MemoryOp, ...]:
        """What this step moves."""


def device_then_host(view: PlacementView, num_blocks: int) -> Share | None:
    """Fill the device first; the overflow lives on the host."""
    device = min(num_blocks, view.available_device)
    host = num_blocks - device
    return Share(device, host) if host <= view.available_host else None


class CopyAhead:
    """Staged copies of host blocks, `lead` layers ahead and across the step boundary.

    Each layer's copies live from their issue until their layer has run, so lead + 1 layers of every copied block are
    staged at once: (lead + 1) / num_layers of a device block each, which is held back from the device tier.
    """

    def __init__(self, context: PlacementContext) -> None:
        if not 1 <= context.num_layers_ahead < context.spec.num_layers - 1:
            raise ValueError(
                f"placement.num_layers_ahead={context.num_layers_ahead}; copying ahead in a model of "
                f"{context.spec.num_layers} layers takes 1 to {context.spec.num_layers - 2}"
            )
        self._num_layers = context.spec.num_layers
        self._lead = context.num_layers_ahead
        self._num_device = context.capacity.num_device_blocks
        self._blocks: tuple[int, ...] = ()
        self._ops: tuple[MemoryOp, ...] = ()

    def _staging_blocks(self, num_copied: int) -> int:
        return ceil_div(num_copied * (self._lead + 1), self._num_layers)

    def place(self, view: PlacementView, num_blocks: int, max_host: int) -> Share | None:
        """Like `device_then_host`, but with staging held back: for the host blocks there are, and for those that the
        waiting requests will want, up to `max_host`, since a device once full could never make room for it."""
        demand = view.claimed_device + view.claimed_host + max(1, view.num_waiting) * num_blocks
        overflow = max(0, demand - self._num_device)
        wanted = ceil_div(overflow * self._num_layers, self._num_layers - self._lead - 1)
        held_back = self._staging_blocks(min(wanted, max_host, view.claimed_host + view.available_host))
        device = max(0, min(num_blocks, view.available_device - held_back))
        while device >= 0:
            host = num_blocks - device
            if host > view.available_host:
                return None
            if device + self._staging_blocks(view.claimed_host + host) <= view.available_device:
                return Share(device, host)
            device -= 1
        return None

    def ops(self, blocks: tuple[int, ...]) -> tuple[MemoryOp, ...]:
        """Copies of this step: layers [lead, num_layers + lead), and what the last step did not bring ahead."""
        if blocks == self._blocks:
            staged: tuple[MemoryOp, ...] = self._ops[-1:]
        else:
            lead = self._lead
            staged = (MemoryOp(OpKind.COPY_IN, blocks, lead, self._num_layers + lead, lead),) if blocks else ()
            before = set(self._blocks)
            late = tuple(b for b in blocks if b not in before)
            if late:
                staged = (MemoryOp(OpKind.COPY_IN, late, 0, lead, lead), *staged)
        # The same object while nothing changes, so that a runner need not read it again.
        if staged != self._ops:
            self._ops = staged
        self._blocks = blocks
        return self._ops
