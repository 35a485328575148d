"""The proof of the seam: one trace, and the same plans whichever runner carries them out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest

from tests.helpers import ScriptedRunner, drive, make_context, make_requests, make_scheduler, make_sim
from uvm_kv.kvcache.ops import OpKind
from uvm_kv.placement.base import PlacementContext
from uvm_kv.runner.base import ModelRunner
from uvm_kv.runner.replay import PlanMismatch, ReplayRunner
from uvm_kv.sched.plan import StepOutput, StepPlan
from uvm_kv.sched.scheduler import Scheduler
from uvm_kv.types import MemoryKind
from uvm_kv.workload.lengths import Lengths
from uvm_kv.workload.source import ClosedLoop
from uvm_kv.workload.steady import steady_start

Log = list[tuple[StepPlan, StepOutput]]

TRACE = [(150, 60), (90, 110), (20, 140), (200, 30), (64, 64), (33, 100), (120, 120)]
"""Prompts beyond the 48 tokens of a step, and outputs that outgrow 24 blocks of 16 tokens."""
SYSTEMS: dict[str, tuple[PlacementContext, dict[str, Any]]] = {
    "swap, and recompute once the host is full": (
        make_context(24, 9, memory=MemoryKind.PINNED, block_size=16),
        {"admission": "optimistic", "preemption": "swap"},
    ),
    "planned eviction and recompute": (
        make_context(24, 8, memory=MemoryKind.MANAGED, block_size=16),
        {"admission": "optimistic", "preemption": "recompute", "placement": "demand_capped"},
    ),
    "prefetches ahead, planned eviction and recompute": (
        make_context(24, 16, memory=MemoryKind.MANAGED, block_size=16),
        {"admission": "optimistic", "preemption": "recompute", "placement": "prefetch_ahead"},
    ),
}


def serve(system: str, runner: ModelRunner, cancel: Mapping[int, Iterable[int]] | None = None) -> tuple[Log, Scheduler]:
    context, options = SYSTEMS[system]
    scheduler = make_scheduler(context, max_num_batched_tokens=48, **options)
    return drive(scheduler, runner, make_requests(TRACE), cancel=cancel), scheduler


def encoded(log: Log) -> bytes:
    return json.dumps([plan.to_json() for plan, _ in log], sort_keys=True).encode()


@pytest.mark.parametrize("system", SYSTEMS)
def test_all_runners_are_given_the_same_plans(system: str) -> None:
    context, options = SYSTEMS[system]
    log, scheduler = serve(system, make_sim(context))
    kinds = {op.kind for plan, _ in log for op in plan.ops}
    assert any(s.context_len for plan, _ in log for s in plan.scheduled if s.num_new_tokens > 1), "no chunked prefill"
    assert scheduler.num_recomputed > 0
    if options["preemption"] == "swap":
        assert scheduler.num_swapped_out > 0
        assert kinds == {OpKind.COPY_IN, OpKind.COPY_OUT}
    elif options["placement"] == "prefetch_ahead":
        assert kinds == {OpKind.EVICT, OpKind.PREFETCH}
    else:
        assert kinds == {OpKind.EVICT}
    recorded = [
        (StepPlan.from_json(json.loads(json.dumps(plan.to_json()))), StepOutput.from_json(output.to_json()))
        for plan, output in log
    ]
    for runner in (ScriptedRunner(context), ReplayRunner(context.capacity, recorded)):
        assert encoded(serve(system, runner)[0]) == encoded(log)


@pytest.mark.parametrize("system", SYSTEMS)
def test_cancelled_requests_leave_the_plans_alike(system: str) -> None:
    """Cancelled in the middle of a prefill, running, waiting, after preemption, and after its end."""
    context, _ = SYSTEMS[system]
    cancel = {2: [0], 5: [6], 12: [2], 60: [1], 90: [4]}
    log, scheduler = serve(system, make_sim(context), cancel)
    assert scheduler.num_cancelled >= 3
    assert encoded(log) != encoded(serve(system, make_sim(context))[0])
    for runner in (ScriptedRunner(context), ReplayRunner(context.capacity, log)):
        assert encoded(serve(system, runner, cancel)[0]) == encoded(log)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_loop_that_starts_in_the_middle_is_planned_alike(system: str) -> None:
    context, options = SYSTEMS[system]

    def serve_loop(runner: ModelRunner) -> tuple[Log, Scheduler]:
        scheduler = make_scheduler(context, max_num_batched_tokens=48, **options)
        lengths = [Lengths(*pair) for pair in TRACE] * 2
        first = steady_start(lengths, 5, 4, np.random.default_rng(0))
        return drive(scheduler, runner, ClosedLoop(lengths, 5, steady=first)), scheduler

    log, scheduler = serve_loop(make_sim(context))
    assert [s.context_len > 0 for s in log[0][0].scheduled] == [True] * len(log[0][0].scheduled)
    assert scheduler.num_recomputed > 0 or scheduler.num_swapped_out > 0
    for runner in (ScriptedRunner(context), ReplayRunner(context.capacity, log)):
        assert encoded(serve_loop(runner)[0]) == encoded(log)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_replay_answers_with_what_was_recorded(system: str) -> None:
    context, _ = SYSTEMS[system]
    log, _ = serve(system, make_sim(context))
    assert serve(system, ReplayRunner(context.capacity, log))[0] == log


@pytest.mark.parametrize(
    ("field", "value"), [("scheduled", ()), ("ops", ("x",)), ("dropped", (99,)), ("step", 77)], ids=lambda v: str(v)
)
def test_a_replay_fails_on_the_first_differing_plan(field: str, value: Any) -> None:
    """It names the step and the field, and plans after it do not matter."""
    system = "planned eviction and recompute"
    context, _ = SYSTEMS[system]
    log, _ = serve(system, make_sim(context))
    for step in (9, 5):
        log[step] = (log[step][0]._replace(**{field: value}), log[step][1])
    with pytest.raises(PlanMismatch, match=f"step 5, {field}: recorded"):
        serve(system, ReplayRunner(context.capacity, log))


def test_a_replay_that_ends_early_says_so() -> None:
    system = "planned eviction and recompute"
    context, _ = SYSTEMS[system]
    log, _ = serve(system, make_sim(context))
    with pytest.raises(PlanMismatch, match="step 4: the recording ends"):
        serve(system, ReplayRunner(context.capacity, log[:4]))
