"""StepPlan and StepOutput: what goes down through the seam, and what comes back. Frozen and JSON-able."""

from __future__ import annotations

from typing import Any, NamedTuple

from uvm_kv.kvcache.ops import MemoryCounters, MemoryOp
from uvm_kv.types import Phase


class ScheduledSequence(NamedTuple):
    request_id: int
    phase: Phase
    num_new_tokens: int
    context_len: int
    """Tokens that hold KV before the step."""
    new_blocks: tuple[int, ...]
    """Blocks appended to the sequence's block table; the whole table where the plan drops the old table."""


class StepPlan(NamedTuple):
    step: int
    scheduled: tuple[ScheduledSequence, ...]
    ops: tuple[MemoryOp, ...]
    dropped: tuple[int, ...] = ()
    """Requests whose block table the runner must forget first: preempted, swapped out or relocated."""

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "scheduled": [s._asdict() for s in self.scheduled],
            "ops": [op.to_json() for op in self.ops],
            "dropped": list(self.dropped),
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> StepPlan:
        scheduled = tuple(
            ScheduledSequence(**dict(s, phase=Phase(s["phase"]), new_blocks=tuple(s["new_blocks"])))
            for s in raw["scheduled"]
        )
        ops = tuple(MemoryOp.from_json(op) for op in raw["ops"])
        return cls(raw["step"], scheduled, ops, tuple(raw["dropped"]))


class StepTiming(NamedTuple):
    start_ns: int
    end_ns: int


class StepOutput(NamedTuple):
    timing: StepTiming
    counters: MemoryCounters
    token_ids: tuple[int, ...] | None = None
    """One per sequence that sampled, in schedule order; None where the runner has no model."""

    def to_json(self) -> dict[str, Any]:
        return {
            "timing": list(self.timing),
            "counters": list(self.counters),
            "token_ids": None if self.token_ids is None else list(self.token_ids),
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> StepOutput:
        tokens = None if raw["token_ids"] is None else tuple(raw["token_ids"])
        return cls(StepTiming(*raw["timing"]), MemoryCounters(*raw["counters"]), tokens)
