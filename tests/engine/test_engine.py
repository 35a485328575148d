"""Engine: it serves until the source is dry, idles between arrivals, stops at max_steps, cancels, records all steps."""

from __future__ import annotations

import pytest

from tests.helpers import ScriptedRunner, make_context, make_request, make_scheduler
from uvm_kv.engine import Engine
from uvm_kv.sched.batching import StaticBatching
from uvm_kv.sched.plan import StepOutput, StepPlan
from uvm_kv.sched.request import Request, Status
from uvm_kv.telemetry.recorder import Recorder
from uvm_kv.workload.lengths import Lengths
from uvm_kv.workload.source import ClosedLoop, OpenLoop

CONTEXT = make_context(16)


def make_engine(requests: list[Request], **options: object) -> Engine:
    scheduler = make_scheduler(CONTEXT, **options)  # type: ignore[arg-type]
    return Engine(scheduler, ScriptedRunner(CONTEXT, step_ns=10), OpenLoop(requests), Recorder())


def test_it_serves_all_and_idles_until_the_next_arrival() -> None:
    requests = [make_request(i, 4, 2, arrival_ns=t) for i, t in enumerate((0, 5, 1_000))]
    engine = make_engine(requests)
    steps: list[int] = []
    assert engine.run(on_step=steps.append) == "done"
    assert [(r.status, r.admitted_ns, r.finish_ns) for r in requests] == [
        (Status.FINISHED, 0, 20),
        (Status.FINISHED, 10, 30),
        (Status.FINISHED, 1_000, 1_020),
    ]
    assert steps == [1, 2, 3, 4, 5]
    assert (engine.recorder.num_steps, engine.recorder.num_requests) == (5, 3)


def test_max_steps_stops_it_and_it_can_go_on() -> None:
    requests = [make_request(0, 4, 6)]
    engine = make_engine(requests)
    assert engine.run(max_steps=2) == "steps"
    assert (engine.recorder.num_steps, requests[0].num_generated) == (2, 2)
    assert engine.run() == "done"
    assert requests[0].status is Status.FINISHED


def test_max_ns_counts_from_the_start_of_the_run_and_ends_idling() -> None:
    engine = make_engine([make_request(0, 4, 6), make_request(1, 4, 6, arrival_ns=10_000)])
    assert engine.run(max_ns=25) == "seconds"
    assert engine.recorder.num_steps == 3
    assert engine.run(max_ns=1_000) == "seconds"
    assert (engine.recorder.num_steps, engine.runner.now_ns()) == (6, 1_030)
    assert engine.run() == "done"


def test_an_empty_source_is_served_at_once() -> None:
    engine = make_engine([])
    assert engine.run() == "done"
    assert engine.recorder.num_steps == 0


@pytest.mark.parametrize("batching", [StaticBatching(3), StaticBatching(3, 40)], ids=["static", "dynamic"])
def test_batches_that_wait_do_not_stall_the_engine(batching: StaticBatching) -> None:
    requests = [make_request(i, 4, 3, arrival_ns=35 * i) for i in range(7)]
    engine = make_engine(requests, batching=batching)
    assert engine.run(max_steps=200) == "done"
    assert all(r.status is Status.FINISHED for r in requests)


def test_recorded_tokens_are_those_of_the_requests() -> None:
    requests = [make_request(i, 3 + i, 2 + 3 * i) for i in range(6)]
    engine = make_engine(requests, max_num_batched_tokens=8)
    assert engine.run() == "done"
    steps = engine.recorder.steps()
    assert sum(n or 0 for n in steps["num_output_tokens"]) == sum(r.output_tokens for r in requests)
    assert sum(n or 0 for n in steps["num_scheduled_tokens"]) == sum(r.max_tokens - 1 for r in requests)
    assert steps["kv_used_bytes"][-1] == steps["claimed_device_blocks"][-1] == 0


# ---- cancellation


def test_a_cancelled_request_is_gone_before_the_next_step() -> None:
    """Scheduler, runner and recorder forget it; the others are served as before."""
    requests = [make_request(i, 4, 6) for i in range(3)]
    engine = make_engine(requests, batch_size=2)
    scheduled: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}

    def on_step(num_steps: int) -> None:
        for request in engine.scheduler.running:
            scheduled[request.id].add(num_steps)
        if num_steps == 2:
            engine.cancel(1)

    assert engine.run(on_step=on_step) == "done"
    assert [r.status for r in requests] == [Status.FINISHED, Status.CANCELLED, Status.FINISHED]
    assert scheduled[1] == {1, 2} and min(scheduled[2]) == 3, "the waiting one takes its place at once"
    assert engine.recorder.num_requests == 2
    assert engine.recorder.requests()["request_id"] == [0, 2]
    steps = engine.recorder.steps()
    assert sum(n or 0 for n in steps["num_output_tokens"]) == 6 + 2 + 6, "the steps did put its tokens out"
    assert steps["kv_used_bytes"][-1] == steps["claimed_device_blocks"][-1] == 0


def test_it_can_be_called_while_a_step_runs_and_for_any_id() -> None:
    """The calls come as if from another thread. Unknown, ended or repeated ids are not errors."""
    requests = [make_request(0, 4, 6), make_request(1, 4, 1)]

    class Interrupted(ScriptedRunner):
        def execute(self, plan: StepPlan) -> StepOutput:
            if plan.step == 2:
                for request_id in (0, 0, 1, 77):
                    engine.cancel(request_id)
            return super().execute(plan)

    engine = Engine(make_scheduler(CONTEXT), Interrupted(CONTEXT, step_ns=10), OpenLoop(requests), Recorder())
    assert engine.run() == "done"
    assert [(r.status, r.num_generated) for r in requests] == [(Status.CANCELLED, 3), (Status.FINISHED, 1)]
    assert engine.scheduler.num_cancelled == 1


def test_a_request_that_arrives_and_is_cancelled_at_once_never_runs() -> None:
    requests = [make_request(0, 4, 2), make_request(1, 4, 2)]
    engine = make_engine(requests)
    engine.cancel(0)
    assert engine.run() == "done"
    assert [(r.status, r.admitted_ns) for r in requests] == [(Status.CANCELLED, None), (Status.FINISHED, 0)]


def test_the_client_of_a_cancelled_request_sends_its_next_one() -> None:
    """All lengths of a closed loop are used up, though one request of each client is cancelled."""
    source = ClosedLoop([Lengths(4, 6)] * 8, 2)
    engine = Engine(make_scheduler(CONTEXT), ScriptedRunner(CONTEXT, step_ns=10), source, Recorder())
    cancelled = {2: 1, 5: 2}
    assert engine.run(max_steps=200, on_step=lambda n: engine.cancel(cancelled.get(n, -1))) == "done"
    assert engine.scheduler.num_cancelled == 2
    assert engine.recorder.requests()["request_id"] == [0, 3, 4, 5, 6, 7]
