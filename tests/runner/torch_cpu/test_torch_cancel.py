"""Requests cancelled at random on the real model: the others' tokens stay, and what was freed is poisoned."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import make_sim
from tests.runner.torch_cpu.models import (
    MECHANISMS,
    Reference,
    Served,
    TorchRunner,
    assert_same_tokens,
    axes_of,
    context_for,
    load_model,
    ragged,
    save_model,
    serve,
    tight_capacity,
)
from uvm_kv.sched.request import Request, Status
from uvm_kv.sched.scheduler import Scheduler

NUM_REQUESTS = 14
NUM_STEPS = 60
"""In which somebody is cancelled; most of a run."""
SEEDS = (6, 11)
"""With these, requests of pinned_swap are cancelled in every state there is."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder, "float32")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvm_kv.kvcache.spec.CHUNK_BYTES", 8 << 10)


class Watch:
    """Looks at the store after every step, and in which state each request was when its step came to be cancelled."""

    def __init__(self, requests: list[Request], cancel: dict[int, list[int]]) -> None:
        self.requests, self.cancel = requests, cancel
        self.num_steps = 0
        self.states: set[str] = set()

    def __call__(self, scheduler: Scheduler, runner: Any) -> None:
        self.num_steps += 1
        assert_free_blocks_are_poisoned(scheduler, runner)
        for request_id in self.cancel.get(self.num_steps, ()):
            request = self.requests[request_id]
            in_prefill = request.status is Status.RUNNING and request.num_computed < request.prompt_tokens
            self.states.add("in its prefill" if in_prefill else request.status.name)


def assert_free_blocks_are_poisoned(scheduler: Scheduler, runner: Any) -> None:
    """A block that no table holds is NaN in every layer, in both buffers of managed memory."""
    pool, store = scheduler.kv.pool, runner._kv._store
    free = [block for block in range(sum(scheduler.kv.capacity)) if pool.is_free(block)]
    device = [block for block in free if block < store.num_device]
    host = [block - store.num_device for block in free if block >= store.num_device]
    assert store._device[:, device].isnan().all() and store._host[:, host].isnan().all()
    if store._evicted is not None:
        assert store._host[:, device].isnan().all()


def served_with_cancellations(
    mechanism: str, model: Any, folder: Path, seed: int, *, simulated: bool = False
) -> tuple[Served, Watch]:
    axes, requests, rng = axes_of(mechanism), ragged(NUM_REQUESTS, seed=seed), random.Random(seed)
    cancel: dict[int, list[int]] = {}
    for request_id in rng.sample(range(NUM_REQUESTS), 6):
        cancel.setdefault(rng.randint(1, NUM_STEPS), []).append(request_id)
    capacity = tight_capacity(axes, requests, 8, 8)
    context = context_for(model, folder, axes, capacity, block_size=8, link_gb_per_s=2000.0)
    watch = Watch(requests, cancel)
    served = serve(
        model, context, axes, requests, batch_size=8, max_num_batched_tokens=13, cancel=cancel,
        runner=make_sim(context) if simulated else None, check=None if simulated else watch,
    )  # fmt: skip
    return served, watch


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_cancelled_requests_do_not_change_the_others(
    mechanism: str, model: Any, folder: Path, reference: Reference
) -> None:
    """Those that are served have the tokens of `generate`, the cancelled ones their beginning; and the simulator, to
    which the same is done, is given the same plans. A swapped request's KV lies in host blocks that are in no table of
    the runner: those are poisoned, too."""
    states: set[str] = set()
    for seed in SEEDS if mechanism == "pinned_swap" else SEEDS[:1]:
        served, watch = served_with_cancellations(mechanism, model, folder, seed)
        states |= watch.states
        assert_same_tokens(reference, [r for r in served.requests if r.status is Status.FINISHED])
        cancelled = [r for r in served.requests if r.status is Status.CANCELLED]
        assert 0 < served.scheduler.num_cancelled == len(cancelled)
        for request in cancelled:
            assert request.token_ids == reference.tokens(request.prompt_ids or (), request.num_generated)
        simulated, _ = served_with_cancellations(mechanism, model, folder, seed, simulated=True)
        assert [plan for plan, _ in simulated.log] == [plan for plan, _ in served.log]
    assert {"WAITING", "RUNNING"} <= states
    if mechanism == "pinned_swap":
        assert states == {"WAITING", "RUNNING", "SWAPPED", "FINISHED", "in its prefill"}


def test_a_filled_request_that_never_ran_is_forgotten(model: Any, folder: Path) -> None:
    axes = axes_of("device_resident")
    requests = [
        Request(i, 9, 4, prompt_ids=tuple(range(3, 12)), num_filled_tokens=8) for i in range(3)
    ]  # fmt: skip
    context = context_for(model, folder, axes, tight_capacity(axes, requests, 8, 1), block_size=8)
    runner = TorchRunner(model, context.spec, context.capacity, context.memory, max_tokens=13)
    served = serve(
        model, context, axes, requests, batch_size=1, max_num_batched_tokens=8, runner=runner, cancel={1: [1]},
        check=assert_free_blocks_are_poisoned,
    )  # fmt: skip
    assert [r.status for r in served.requests] == [Status.FINISHED, Status.CANCELLED, Status.FINISHED]
    assert [r.num_generated for r in served.requests] == [4, 0, 4]
