"""Recorder: one row per step and one row per request, kept compactly while the engine runs."""

from __future__ import annotations

from array import array

import numpy as np

from uvm_kv.kvcache.manager import KVUsage
from uvm_kv.kvcache.ops import MemoryCounters
from uvm_kv.sched.plan import StepOutput, StepPlan
from uvm_kv.sched.request import Request
from uvm_kv.sched.scheduler import Scheduler
from uvm_kv.types import Tier

Column = list[int | None] | list[bool | None]
Table = dict[str, Column]

STEP_COLUMNS = (
    "step",
    "start_ns",
    "end_ns",
    "num_running",
    "num_waiting",
    "num_swapped",
    "num_scheduled_tokens",
    "num_output_tokens",
    "claimed_device_blocks",
    "claimed_host_blocks",
    *(f"kv_{name}_bytes" for name in KVUsage._fields),
    "preemptions_recompute",
    "preemptions_swap",
    *MemoryCounters._fields,
)
REQUEST_COLUMNS = (
    "request_id",
    "prompt_tokens",
    "output_tokens",
    "arrival_ns",
    "admitted_ns",
    "first_token_ns",
    "finish_ns",
    "num_preemptions",
    "measured",
)
_NOT_OBSERVED = -1
"""Stands for None in the packed rows; every recorded quantity is >= 0."""


class Recorder:
    def __init__(self) -> None:
        self._steps = array("q")
        self.finished: list[Request] = []
        self._plans: list[tuple[StepPlan, StepOutput]] | None = None

    def keep_plans(self) -> None:
        """Also keep every plan and output, for replay."""
        self._plans = []

    @property
    def plans(self) -> list[tuple[StepPlan, StepOutput]] | None:
        return self._plans

    @property
    def num_steps(self) -> int:
        return len(self._steps) // len(STEP_COLUMNS)

    @property
    def num_requests(self) -> int:
        return len(self.finished)

    @property
    def last_end_ns(self) -> int:
        """When the last step ended; 0 before there is one."""
        return self._steps[STEP_COLUMNS.index("end_ns") - len(STEP_COLUMNS)] if self._steps else 0

    def step(self, plan: StepPlan, output: StepOutput, scheduler: Scheduler) -> None:
        """Book a step, after the scheduler's update: `num_running` is who was scheduled, not who is left."""
        kv, counters = scheduler.kv, output.counters
        future = sum(r.num_slots for r in scheduler.running) - scheduler.num_context_tokens
        if None in counters:
            counters = MemoryCounters(*(_NOT_OBSERVED if c is None else c for c in counters))
        self._steps.extend(
            (
                plan.step,
                *output.timing,
                len(plan.scheduled),
                len(scheduler.waiting),
                len(scheduler.swapped),
                scheduler.num_scheduled_tokens,
                scheduler.num_sampled,
                kv.claimed(Tier.DEVICE),
                kv.claimed(Tier.HOST),
                *kv.usage(scheduler.num_context_tokens + scheduler.num_swapped_tokens, future),
                scheduler.num_recomputed,
                scheduler.num_swapped_out,
                *counters,
            )  # type: ignore[arg-type]
        )
        if self._plans is not None:
            self._plans.append((plan, output))

    def request(self, request: Request) -> None:
        """Book a request that finished. One that was cancelled is never booked: it is not among the finished and in no
        latency. The tokens that it took in and put out stay in the rows of the steps, which did that work."""
        self.finished.append(request)

    def steps(self) -> Table:
        rows = np.frombuffer(self._steps, np.int64).reshape(-1, len(STEP_COLUMNS)) if self._steps else None
        table: Table = {}
        for i, name in enumerate(STEP_COLUMNS):
            values: list[int | None] = [] if rows is None else rows[:, i].tolist()
            table[name] = [None if v == _NOT_OBSERVED else v for v in values]
        return table

    def requests(self) -> Table:
        rows = [
            (
                r.id,
                r.prompt_tokens,
                r.num_generated,
                r.arrival_ns,
                r.admitted_ns,
                r.first_token_ns,
                r.finish_ns,
                r.num_preemptions,
                r.measured,
            )
            for r in sorted(self.finished, key=lambda request: request.id)
        ]
        return {name: [row[i] for row in rows] for i, name in enumerate(REQUEST_COLUMNS)}
