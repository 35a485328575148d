"""Admission, growth, preemption, swap, relocation and cancellation in random order, on tiny pools."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.helpers import ScriptedRunner, make_context, make_request, make_scheduler
from tests.jobs import composed
from uvm_kv.config.names import groups
from uvm_kv.sched.plan import StepOutput, StepPlan
from uvm_kv.sched.request import Request, Status
from uvm_kv.types import Allocation, MemoryKind, Tier

NUM_DEVICE = 7
LONGEST = NUM_DEVICE * 4
OPTIMISTIC: dict[str, Any] = {"admission": "optimistic"}
WHOLE: dict[str, Any] = {"chunked_prefill": False, "max_num_batched_tokens": LONGEST}
SCHEMES: dict[str, tuple[int, dict[str, Any]]] = {
    "paged, worst_case": (0, {}),
    "paged, recompute": (0, OPTIMISTIC | {"preemption": "recompute"}),
    "paged, recompute, watermark": (0, OPTIMISTIC | {"preemption": "recompute", "watermark": 0.3}),
    "paged, swap": (20, OPTIMISTIC | {"preemption": "swap"}),
    "paged, swap, small host": (3, OPTIMISTIC | {"preemption": "swap"}),
    "split over two tiers": (5, {"placement": "static_split"}),
    "split, recompute": (3, OPTIMISTIC | {"placement": "static_split", "preemption": "recompute"}),
    "on_demand": (0, OPTIMISTIC | {"preemption": "recompute", "allocation": Allocation.ON_DEMAND}),
    "reserve_max": (0, {"allocation": Allocation.RESERVE_MAX, "max_model_len": 12}),
    "orca_max": (0, {"allocation": Allocation.ORCA_MAX, "max_model_len": 12}),
    "orca_pow2": (0, {"allocation": Allocation.ORCA_POW2, "max_model_len": 16}),
    "orca_oracle": (0, {"allocation": Allocation.ORCA_ORACLE, "max_model_len": 16}),
    "whole prompts, worst_case": (5, WHOLE | {"placement": "static_split"}),
    "whole prompts, recompute": (0, WHOLE | OPTIMISTIC | {"preemption": "recompute"}),
    "whole prompts, swap, small host": (3, WHOLE | OPTIMISTIC | {"preemption": "swap"}),
    "whole prompts, on_demand": (
        0,
        WHOLE | OPTIMISTIC | {"preemption": "recompute", "allocation": Allocation.ON_DEMAND},
    ),
}


class Walk(RuleBasedStateMachine):
    """The scripted runner checks what a device would see, `check_integrity` what the host believes."""

    def __init__(
        self, num_host: int, options: dict[str, Any], memory: MemoryKind = MemoryKind.PINNED, scale: int = 1
    ) -> None:
        """`scale` multiplies all lengths in tokens: blocks of managed memory then pack into chunks as they do in use.
        Requests that exceed the device may be refused."""
        super().__init__()
        context = make_context(NUM_DEVICE, num_host, memory=memory, block_size=4 * scale)
        self.scale = scale
        self.longest = min(LONGEST, options.get("max_model_len", LONGEST))
        if "placement" in options:
            self.longest += 4 * num_host
        self.scheduler = make_scheduler(context, **({"batch_size": 4, "max_num_batched_tokens": 9} | options))
        self.runner = ScriptedRunner(context)
        self.requests: list[Request] = []
        self.in_flight: tuple[StepPlan, StepOutput] | None = None

    @rule(prompt=st.integers(1, 20), output=st.integers(1, 20))
    def add(self, prompt: int, output: int) -> None:
        prompt = min(prompt, self.longest - 1)
        output = min(output, self.longest - prompt)
        request = make_request(len(self.requests), prompt * self.scale, output * self.scale)
        try:
            self.scheduler.add(request)
        except ValueError:
            assert prompt + output > LONGEST, "a request that the device holds is refused"
            return
        self.runner.add(request)
        self.requests.append(request)

    @precondition(lambda self: self.in_flight is None)
    @rule()
    def start(self) -> None:
        plan = self.scheduler.schedule(self.runner.now_ns())
        assert plan is not None or not self.scheduler.has_work(), "work is left that no step serves"
        if plan is not None:
            self.in_flight = plan, self.runner.execute(plan)

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def finish(self) -> None:
        assert self.in_flight is not None
        for request in self.scheduler.update(*self.in_flight):
            self.runner.remove(request.id)
        self.in_flight = None

    @precondition(lambda self: self.in_flight is None and self.requests)
    @rule(pick=st.integers(0, 1_000))
    def cancel(self, pick: int) -> None:
        """Cancel any request that ever arrived, so that some have ended before."""
        request = self.requests[pick % len(self.requests)]
        has_ended = request.status in (Status.FINISHED, Status.CANCELLED)
        cancelled = self.scheduler.cancel(request.id)
        assert cancelled is (None if has_ended else request)
        if cancelled is not None:
            self.runner.remove(request.id)

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def cancel_too_early(self) -> None:
        with pytest.raises(RuntimeError, match="call update first"):
            self.scheduler.cancel(self.requests[0].id)

    @precondition(lambda self: self.in_flight is None)
    @rule(num_steps=st.integers(2, 12))
    def several(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.start()
            if self.in_flight is None:
                break
            self.finish()
            self.scheduler.check_integrity()

    @invariant()
    def is_sound(self) -> None:
        self.scheduler.check_integrity()

    def teardown(self) -> None:
        if self.in_flight is not None:
            self.finish()
        while self.scheduler.has_work():
            self.start()
            self.finish()
        cancelled = [r for r in self.requests if r.status is Status.CANCELLED]
        assert self.scheduler.num_cancelled == len(cancelled) and all(r.finish_ns is None for r in cancelled)
        for request in self.requests:
            assert request in cancelled or request.status is Status.FINISHED
            assert request in cancelled or request.num_generated == request.output_tokens
        pool, kv = self.scheduler.kv.pool, self.scheduler.kv
        assert [pool.num_free(tier) for tier in Tier] == list(kv.capacity)
        assert [kv.available(tier) for tier in Tier] == list(kv.capacity)
        self.scheduler.check_integrity()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_walks_stay_sound_and_drain(scheme: str) -> None:
    num_host, options = SCHEMES[scheme]
    run_state_machine_as_test(
        lambda: Walk(num_host, options), settings=settings(max_examples=100, stateful_step_count=30)
    )


@pytest.mark.parametrize("mechanism", [name for name in groups()["mechanism"] if name != "custom"])
@pytest.mark.parametrize("num_host", [2, 12])
def test_every_mechanism_serves_what_fits_alone_at_any_queue_length(mechanism: str, num_host: int) -> None:
    """A host tier of two blocks has no room for what the staging of a whole queue would push off the device."""
    config = composed(f"mechanism={mechanism}")
    memory, scale = MemoryKind(config.memory.kind), 8 if config.memory.kind == "managed" else 1
    options = {
        "placement": config.placement.name,
        "admission": config.scheduler.admission,
        "preemption": config.scheduler.preemption,
        "max_num_batched_tokens": 9 * scale,
    }
    num_host = 0 if memory is MemoryKind.DEVICE else num_host
    run_state_machine_as_test(
        lambda: Walk(num_host, options, memory, scale), settings=settings(max_examples=30, stateful_step_count=20)
    )
