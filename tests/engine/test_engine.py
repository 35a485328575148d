"""Engine: it serves until the source is dry, idles between arrivals, stops at max_steps and records every step."""

from __future__ import annotations

import pytest

from tests.helpers import ScriptedRunner, make_context, make_request, make_scheduler
from uvm_kv.engine import Engine
from uvm_kv.sched.batching import StaticBatching
from uvm_kv.sched.request import Request, Status
from uvm_kv.telemetry.recorder import Recorder
from uvm_kv.workload.source import OpenLoop

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
