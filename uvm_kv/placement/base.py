"""PlacementPolicy: the whole of what the scheduler asks of a placement, and the view it gives in return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

from uvm_kv.hw.roofline import Roofline
from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.ops import MemoryOp, OpKind
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.setting import Role, setting
from uvm_kv.types import Layout, MemoryKind, Reach, ceil_div


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
    """Number of blocks for each tier."""

    device: int
    host: int


@dataclass(frozen=True)
class PlacementContext:
    """The inputs that a policy is built from. They are fixed for a run."""

    spec: KVCacheSpec
    capacity: KVCapacity
    memory: MemoryKind
    roofline: Roofline
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of any placement by name; a policy takes its own, and the default of one that is not given."""
    grows: bool = False
    """Whether sequences claim more blocks as they grow, as under optimistic admission."""


@dataclass(frozen=True)
class Options:
    """The options of a policy. One with options of its own declares a subclass; config, errors and run ids follow."""


@dataclass(frozen=True)
class CopyAheadOptions(Options):
    num_layers_ahead: int = setting(2, role=Role.VARIANT)
    """Layers that a copy is issued ahead of its use."""


class PlacementPolicy(ABC):
    """Deterministic; may remember what it planned, never what time it is."""

    memory_kinds: ClassVar[frozenset[MemoryKind]]
    """The memory kinds that can serve this policy."""
    uses_host: ClassVar[bool]
    """Whether sequences may own host blocks while they run."""
    needs_tables: ClassVar[bool] = False
    options_type: ClassVar[type[Options]] = Options

    def __init__(self, context: PlacementContext) -> None:
        self.context = context

    @classmethod
    def options_in(cls, given: Mapping[str, Any]) -> Any:
        """Its own among the options of all placements, as its `options_type`."""
        return cls.options_type(**{it.name: given[it.name] for it in fields(cls.options_type) if it.name in given})

    @property
    @abstractmethod
    def reach(self) -> Reach | None:
        """The reach, which selects the closed-form ceiling on the gain; None where no ceiling applies."""

    @abstractmethod
    def place(self, view: PlacementView, num_blocks: int, *, admitting: bool) -> Share | None:
        """Tiers for `num_blocks` more blocks of one sequence, a new one if `admitting`; None if not now."""

    @abstractmethod
    def plan(self, view: PlacementView) -> tuple[MemoryOp, ...]:
        """The memory ops of this step."""


def device_then_host(view: PlacementView, num_blocks: int) -> Share | None:
    """Fill the device first; the overflow lives on the host."""
    device = min(num_blocks, view.available_device)
    host = num_blocks - device
    return Share(device, host) if host <= view.available_host else None


class CopyAhead:
    """Host blocks brought to the device `lead` layers ahead, across the step boundary, and dropped after their layer.

    So lead + 1 layers of every such block are staged at once: (lead + 1) / num_layers of a device block each, which is
    held back from the device tier. Managed memory moves by chunks, hence by groups of the blocks that share them, and
    has no second copy: what is dropped is evicted by plan, that of the last layer as the next step begins.
    """

    def __init__(self, context: PlacementContext, lead: int) -> None:
        spec, managed = context.spec, context.memory is MemoryKind.MANAGED
        if not 1 <= lead < spec.num_layers - 1:
            raise ValueError(
                f"placement.num_layers_ahead={lead}; copying ahead in a model of "
                f"{spec.num_layers} layers takes 1 to {spec.num_layers - 2}"
            )
        if managed and spec.layout is not Layout.LAYER_MAJOR:
            raise ValueError(f"prefetching ahead needs chunks of one layer, layout=layer_major; given is {spec.layout}")
        self._num_layers, self._lead, self._capacity = spec.num_layers, lead, context.capacity
        self._into, self._group = (OpKind.PREFETCH, spec.pieces_per_chunk) if managed else (OpKind.COPY_IN, 1)
        self._blocks: tuple[int, ...] = ()
        self._ops: tuple[MemoryOp, ...] = ()
        self._steady: tuple[int, ...] | None = None

    def place(self, view: PlacementView, num_blocks: int, *, admitting: bool) -> Share | None:
        """Like `device_then_host`, but with staging held back: for the host blocks there are, and for those that the
        waiting requests will want, since a device once full could never make room for it. A sequence that would run
        alone, and for which that leaves no room, is placed as if nobody waited."""
        share = self.split(view, num_blocks, self._staging(view, max(1, view.num_waiting) * num_blocks))
        if share is None and view.num_running + admitting <= 1:
            share = self.split(view, num_blocks, self._staging(view, num_blocks))
        return share

    def _staging(self, view: PlacementView, num_blocks: int) -> int:
        """Device blocks that staging takes once `num_blocks` more are claimed, as many as may be on the device."""
        num_layers, staged_layers, size = self._num_layers, self._lead + 1, self._group
        num_device, num_host = self._capacity
        overflow = max(0, view.claimed_device + view.claimed_host + num_blocks - num_device)
        wanted = ceil_div(overflow * num_layers, num_layers - staged_layers)
        return ceil_div(ceil_div(min(wanted, num_host), size) * staged_layers, num_layers) * size

    def split(self, view: PlacementView, num_blocks: int, held_back: int) -> Share | None:
        """As many as may be on the device, of which `held_back` blocks stay unclaimed; None where the host blocks
        that there would be could not be staged."""
        num_layers, staged_layers, size = self._num_layers, self._lead + 1, self._group
        room = ceil_div(self._capacity.num_device_blocks, size) * num_layers
        most = max(0, min(num_blocks, view.available_device - held_back))
        for device in range(most, max(0, num_blocks - view.available_host) - 1, -1):
            host = num_blocks - device
            staged = ceil_div(view.claimed_host + host, size) * staged_layers
            if ceil_div(view.claimed_device + device, size) * num_layers + staged <= room:
                return Share(device, host)
        return None

    def ops(self, blocks: tuple[int, ...]) -> tuple[MemoryOp, ...]:
        """The ops of this step: those for layers [lead, num_layers + lead), and the copies that the last step did not
        make ahead. `blocks`: the host blocks to stage."""
        if blocks is self._steady:
            return self._ops
        given, before, size, end = blocks, self._blocks, self._group, sum(self._capacity)
        groups = sorted({b // size for b in given})
        blocks = tuple(b for g in groups for b in range(g * size, min((g + 1) * size, end)))
        late, gone = (tuple(sorted(set(x) - set(y))) for x, y in ((blocks, before), (before, blocks)))
        lead, last, managed = self._lead, self._num_layers - 1, self._into is OpKind.PREFETCH
        out = ((before, last, last + 1, last), (gone, 0, lead, lead), (blocks, 0, last, -1))
        into = ((late, 0, lead, lead), (blocks, lead, last + 1 + lead, lead))
        ops = tuple(MemoryOp(OpKind.EVICT, *move) for move in out if managed and move[0])
        ops += tuple(MemoryOp(self._into, *move) for move in into if move[0])
        # The same object while nothing changes, so that a runner need not read it again.
        self._ops = self._ops if ops == self._ops else ops
        self._blocks, self._steady = blocks, given if blocks == before else None
        return self._ops
