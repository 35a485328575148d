"""What every runner promises, as far as it needs no model. A new runner inherits this by a line in RUNNERS."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import ScriptedRunner, drive, make_context, make_request, make_scheduler, make_sim, submit
from uvm_kv.runner.base import ModelRunner
from uvm_kv.runner.replay import ReplayRunner
from uvm_kv.sched.plan import StepOutput, StepPlan
from uvm_kv.sched.request import Request
from uvm_kv.types import NS_PER_S, Allocation

CONTEXT = make_context(12, 12)


def requests() -> list[Request]:
    """The last two arrive when all others have long ended, so that the runner idles."""
    arrivals = [0, 0, 10, 20, 50 * NS_PER_S, 60 * NS_PER_S]
    return [make_request(i, 3 + 2 * i, 4 + i, t) for i, t in enumerate(arrivals)]


def serve(runner: ModelRunner) -> list[tuple[StepPlan, StepOutput]]:
    scheduler = make_scheduler(CONTEXT, max_num_batched_tokens=9, admission="optimistic", preemption="recompute")
    return drive(scheduler, runner, requests())


RUNNERS: dict[str, Callable[[], ModelRunner]] = {
    "sim": lambda: make_sim(CONTEXT),
    "scripted": lambda: ScriptedRunner(CONTEXT, token_of=lambda *at: sum(at)),
    "replay": lambda: ReplayRunner(CONTEXT.capacity, serve(make_sim(CONTEXT))),
}

every_runner = pytest.mark.parametrize("make", RUNNERS.values(), ids=list(RUNNERS))


@every_runner
def test_the_clock_never_goes_back(make: Callable[[], ModelRunner]) -> None:
    """Steps follow one another, an idle clock reaches the arrival, and the runner's clock ends where the log does."""
    runner = make()
    log = serve(runner)
    now_ns = 0
    for _, output in log:
        assert type(output.timing.start_ns) is type(output.timing.end_ns) is int
        assert now_ns <= output.timing.start_ns < output.timing.end_ns
        now_ns = output.timing.end_ns
    assert runner.now_ns() == now_ns > 60 * NS_PER_S


@every_runner
def test_waiting_moves_the_clock_forward_only(make: Callable[[], ModelRunner]) -> None:
    runner = make()
    start = runner.now_ns()
    runner.wait_until_ns(start + 500)
    assert runner.now_ns() >= start + 500
    later = runner.now_ns()
    runner.wait_until_ns(start)
    assert runner.now_ns() >= later


@every_runner
def test_capacity_is_fixed_and_close_ends_it(make: Callable[[], ModelRunner]) -> None:
    runner = make()
    assert runner.capacity() == CONTEXT.capacity
    serve(runner)
    assert runner.capacity() == CONTEXT.capacity
    runner.close()


@every_runner
def test_a_token_comes_back_for_every_sequence_that_reached_its_end(make: Callable[[], ModelRunner]) -> None:
    """None where the runner has no model, else one for each sequence whose tokens are all computed."""
    known = {r.id: r.prompt_tokens for r in requests()}
    num_sampled = 0
    for plan, output in serve(make()):
        sampled = [s for s in plan.scheduled if s.context_len + s.num_new_tokens == known[s.request_id]]
        for sequence in sampled:
            known[sequence.request_id] += 1
        num_sampled += len(sampled)
        assert output.token_ids is None or len(output.token_ids) == len(sampled)
    assert num_sampled == sum(r.output_tokens for r in requests())


@every_runner
def test_what_is_observed_is_never_negative(make: Callable[[], ModelRunner]) -> None:
    for _, output in serve(make()):
        assert all(c is None or c >= 0 for c in output.counters)


# ---- the order within a plan

FILLED_TOKENS = 7


def filled_requests() -> list[Request]:
    """Requests whose first step computes the last token of two whole blocks, and whose next step needs a third
    block."""
    return [Request(i, 8, 4, prompt_ids=tuple(range(3 + i, 11 + i)), num_filled_tokens=FILLED_TOKENS) for i in range(3)]


def serve_relocated(runner: ModelRunner) -> tuple[list[tuple[StepPlan, StepOutput]], list[Request]]:
    """Two runs of blocks that are in each other's way, and a third request that comes just when the first must move."""
    scheduler = make_scheduler(CONTEXT, admission="optimistic", preemption="recompute", allocation=Allocation.ON_DEMAND)
    requests = filled_requests()
    submit(scheduler, runner, *requests[:2])
    log: list[tuple[StepPlan, StepOutput]] = []
    while plan := scheduler.schedule(runner.now_ns()):
        log.append((plan, runner.execute(plan)))
        for request in scheduler.update(*log[-1]):
            runner.remove(request.id)
        if len(log) == 1:
            submit(scheduler, runner, requests[2])
    assert scheduler.num_recomputed == 0 and [r.num_generated for r in requests] == [4, 4, 4]
    return log, requests


def torch_runner(folder: Path) -> ModelRunner:
    """A real model over as many blocks of as many tokens; skips without torch."""
    models = importlib.import_module("tests.runner.torch_cpu.models")
    model = models.load_model(models.save_model(folder / "model"), "float32")
    axes = models.axes_of("device_recompute")
    context = models.context_for(model, folder / "model", axes, CONTEXT.capacity, block_size=CONTEXT.spec.block_size)
    runner: ModelRunner = models.TorchRunner(model, context.spec, context.capacity, context.memory, max_tokens=12)
    return runner


@pytest.mark.parametrize("name", [*RUNNERS, "torch"])
def test_a_filled_request_keeps_its_kv_when_it_is_relocated(name: str, tmp_path: Path) -> None:
    """The request that is filled in the same step gets the blocks that the relocated one has just left: a runner that
    appended and filled blocks before it carried out the moves would hand it the other's KV. The scripted runner, which
    takes the contract by its letter, fails on that; the real model's tokens are those without any relocation; and every
    runner is given the same plans."""
    log, _ = serve_relocated(ScriptedRunner(CONTEXT))
    (before, _), (moving, _) = log[:2]
    old = before.scheduled[0].new_blocks
    assert moving.dropped[0] == 0 and moving.ops[0].blocks == old
    assert moving.ops[0].targets == moving.scheduled[0].new_blocks[: len(old)]
    assert moving.scheduled[2] == (2, "decode", 1, FILLED_TOKENS, old)
    makers: dict[str, Callable[[], ModelRunner]] = RUNNERS | {
        "replay": lambda: ReplayRunner(CONTEXT.capacity, log),
        "torch": lambda: torch_runner(tmp_path),
    }
    served, requests = serve_relocated(makers[name]())
    assert [plan for plan, _ in served] == [plan for plan, _ in log]
    if name == "torch":
        alone = filled_requests()
        for request in alone:
            drive(make_scheduler(CONTEXT), makers[name](), [request])
        assert [r.token_ids for r in requests] == [r.token_ids for r in alone]
        assert len({tuple(r.token_ids) for r in requests}) == 3
