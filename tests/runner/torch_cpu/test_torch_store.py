"""The two tiers of the CPU's store are separate memory, what is dead is NaN, and a wrong plan shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runner.torch_cpu.models import (
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
    torch,
)
from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.ops import MemoryOp, OpKind
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.runner.base import ModelRunner
from uvm_kv.runner.torch.kv_store import BlockIndex, KVStore, SlotIndex
from uvm_kv.sched.plan import StepOutput, StepPlan
from uvm_kv.sched.request import Request
from uvm_kv.types import Layout

LAYERS, BLOCK, HEADS, DIM = 3, 4, 2, 5
DEVICE, HOST = 4, 3

both_layouts = pytest.mark.parametrize("layout", Layout)


def make_store(layout: Layout, *, managed: bool = False) -> KVStore:
    spec = KVCacheSpec(LAYERS, HEADS, DIM, 4, BLOCK, layout)
    return KVStore(spec, KVCapacity(DEVICE, HOST), torch.float32, managed=managed)


def fill(store: KVStore, layer: int, block: int, seed: int = 0) -> Any:
    """Random K and V in all slots of a block; [slot, K|V, head, dim]."""
    generator = torch.Generator().manual_seed(1000 * seed + 10 * layer + block)
    value = torch.randn(BLOCK, 2, HEADS, DIM, generator=generator)
    slots = SlotIndex([block] * BLOCK, list(range(BLOCK)), store.num_device)
    store.write(layer, slots, value[:, 0], value[:, 1])
    return value


def read(store: KVStore, layer: int, *blocks: int) -> Any:
    return store.read(layer, BlockIndex(torch.tensor(blocks), store.num_device))


def filled(store: KVStore, blocks: range) -> dict[tuple[int, int], Any]:
    store.acquire(list(blocks))
    return {(layer, block): fill(store, layer, block) for layer in range(LAYERS) for block in blocks}


def assert_holds(store: KVStore, content: dict[tuple[int, int], Any]) -> None:
    for (layer, block), value in content.items():
        torch.testing.assert_close(read(store, layer, block)[0], value, rtol=0, atol=0)


@both_layouts
def test_what_was_never_written_is_nan(layout: Layout) -> None:
    store = make_store(layout)
    assert read(store, 0, *range(DEVICE + HOST)).isnan().all()


@both_layouts
def test_layouts_are_what_they_are_named_for(layout: Layout) -> None:
    """layer_major keeps a layer's blocks together, block_major a block's layers."""
    slab = make_store(layout)._device
    assert slab.shape == (LAYERS, DEVICE, BLOCK, 2, HEADS, DIM)
    piece = BLOCK * 2 * HEADS * DIM
    strides = {Layout.LAYER_MAJOR: (DEVICE * piece, piece), Layout.BLOCK_MAJOR: (piece, LAYERS * piece)}
    assert slab.stride()[:2] == strides[layout]


@both_layouts
def test_every_block_of_every_layer_is_a_place_of_its_own(layout: Layout) -> None:
    store = make_store(layout)
    content = filled(store, range(DEVICE + HOST))
    assert_holds(store, content)
    order = [6, 0, 4, 0, 3]
    expected = torch.stack([content[1, block] for block in order])
    torch.testing.assert_close(read(store, 1, *order), expected, rtol=0, atol=0)


@both_layouts
def test_one_token_changes_one_slot(layout: Layout) -> None:
    store = make_store(layout)
    content = filled(store, range(DEVICE + HOST))
    new = torch.full((2, HEADS, DIM), 7.0)
    # One token on the device, one on the host, in one step.
    store.write(1, SlotIndex([2, 5], [3, 0], store.num_device), new, -new)
    for block, slot in ((2, 3), (5, 0)):
        content[1, block][slot, 0], content[1, block][slot, 1] = 7.0, -7.0
    assert_holds(store, content)


@both_layouts
def test_device_and_host_are_separate_memory(layout: Layout) -> None:
    store = make_store(layout)
    assert store._device.untyped_storage().data_ptr() != store._host.untyped_storage().data_ptr()
    content = filled(store, range(2))
    store.move([0, 1], [5, 4])
    fill(store, 0, 0, seed=9)
    store.poison([1])
    for layer in range(LAYERS):
        torch.testing.assert_close(read(store, layer, 5)[0], content[layer, 0], rtol=0, atol=0)
        torch.testing.assert_close(read(store, layer, 4)[0], content[layer, 1], rtol=0, atol=0)


@both_layouts
def test_moves_round_trip_and_may_exchange_blocks(layout: Layout) -> None:
    store = make_store(layout)
    content = filled(store, range(DEVICE + HOST))
    store.move([0, 1, 2], [4, 5, 6])
    store.poison([0, 1, 2])
    store.move([4, 5, 6], [2, 0, 1])
    for layer in range(LAYERS):
        torch.testing.assert_close(
            read(store, layer, 2, 0, 1), torch.stack([content[layer, b] for b in range(3)]), rtol=0, atol=0
        )
    before = read(store, 0, 2, 0)
    store.move([0, 2], [2, 0])
    torch.testing.assert_close(read(store, 0, 0, 2), before, rtol=0, atol=0)


@both_layouts
def test_a_freed_block_is_nan_and_a_new_one_is_finite(layout: Layout) -> None:
    """The slots of a new block that no token has reached are masked out, and must be finite for that."""
    store = make_store(layout)
    content = filled(store, range(DEVICE + HOST))
    store.poison([1, 5])
    for layer in range(LAYERS):
        assert read(store, layer, 1, 5).isnan().all()
    assert_holds(store, {key: value for key, value in content.items() if key[1] not in (1, 5)})
    store.acquire([1, 5])
    assert read(store, 2, 1, 5).isfinite().all()


@both_layouts
def test_a_staged_copy_is_read_instead_of_the_host(layout: Layout) -> None:
    store = make_store(layout)
    content = filled(store, range(DEVICE + HOST))
    store.stage(1, [5, 6])
    store._host.fill_(torch.nan)
    torch.testing.assert_close(read(store, 1, 6, 0, 5), torch.stack([content[1, b] for b in (6, 0, 5)]), rtol=0, atol=0)
    assert read(store, 1, 4).isnan().all(), "a block that is not staged is read in place"
    assert read(store, 0, 5).isnan().all(), "another layer is not staged"
    store.drop_staged(1)
    assert read(store, 1, 5, 6).isnan().all()


@both_layouts
def test_a_staged_copy_is_other_memory_until_its_layer_has_run(layout: Layout) -> None:
    store = make_store(layout)
    content = filled(store, range(DEVICE + HOST))
    store.stage(1, [5])
    store._host[1, 1] = 3.0
    torch.testing.assert_close(read(store, 1, 5)[0], content[1, 5], rtol=0, atol=0)


@both_layouts
def test_new_tokens_go_to_both_copies(layout: Layout) -> None:
    store = make_store(layout)
    content = filled(store, range(DEVICE + HOST))
    store.stage(1, [6, 4])
    new = torch.arange(3.0 * HEADS * DIM).reshape(3, HEADS, DIM)
    # To a staged block, to a host block that is not staged, to the device.
    store.write(1, SlotIndex([4, 5, 0], [2, 1, 3], store.num_device), new, -new)
    for i, (block, slot) in enumerate(((4, 2), (5, 1), (0, 3))):
        content[1, block][slot, 0], content[1, block][slot, 1] = new[i], -new[i]
    assert_holds(store, content)
    store.drop_staged(1)
    assert_holds(store, content)


@both_layouts
def test_staging_adds_up(layout: Layout) -> None:
    """A layer's blocks may be staged by several ops, one of them again."""
    store = make_store(layout)
    content = filled(store, range(DEVICE + HOST))
    store.stage(0, [5])
    store.stage(0, [5, 6])
    store.stage(0, [4])
    store._host.fill_(torch.nan)
    torch.testing.assert_close(read(store, 0, 4, 5, 6), torch.stack([content[0, b] for b in (4, 5, 6)]), rtol=0, atol=0)


@both_layouts
def test_eviction_leaves_nan_and_a_touch_brings_back(layout: Layout) -> None:
    store = make_store(layout, managed=True)
    content = filled(store, range(DEVICE + HOST))
    store.evict(1, 3, [0, 6, 3])
    evicted = [(layer, block) for layer in (1, 2) for block in (0, 6, 3)]
    for layer, block in evicted:
        assert store._device[layer, block].isnan().all() and store._host[layer, block].isfinite().all()
    assert store._device[0].isfinite().all()
    assert_holds(store, content)
    for layer, block in evicted:
        assert store._device[layer, block].isfinite().all() and store._host[layer, block].isnan().all()
    store.evict(0, 3, list(range(DEVICE + HOST)))
    store.evict(0, 3, list(range(DEVICE + HOST)))
    assert store._device.isnan().all()
    assert_holds(store, content)


@both_layouts
def test_a_write_to_an_evicted_block_brings_it_back_first(layout: Layout) -> None:
    store = make_store(layout, managed=True)
    content = filled(store, range(DEVICE + HOST))
    store.evict(0, LAYERS, [2, 5])
    new = torch.ones(1, HEADS, DIM)
    store.write(1, SlotIndex([5], [3], store.num_device), new, -new)
    content[1, 5][3, 0], content[1, 5][3, 1] = 1.0, -1.0
    assert_holds(store, content)


@both_layouts
def test_a_chunk_is_evicted_with_its_free_blocks(layout: Layout) -> None:
    """A block that was evicted while nobody held it is as good as new when it is taken."""
    store = make_store(layout, managed=True)
    filled(store, range(2))
    store.evict(0, LAYERS, [0, 1, 2, 3])
    store.acquire([2])
    assert read(store, 0, 2).isfinite().all()
    store.poison([0])
    assert read(store, 0, 0).isnan().all()
    store.acquire([0])
    assert (read(store, 0, 0) == 0).all()


def test_only_managed_memory_is_evicted() -> None:
    with pytest.raises(AssertionError, match="only managed memory"):
        make_store(Layout.LAYER_MAJOR).evict(0, 1, [0])


# ---- wrong plans


class Tampered(ModelRunner):
    """Hands every plan on to a runner, changed. Whether `change` changed any is in `num_changed`."""

    def __init__(self, inner: ModelRunner, change: Callable[[StepPlan], StepPlan]) -> None:
        self._inner = inner
        self._change = change
        self.num_changed = 0

    def capacity(self) -> KVCapacity:
        return self._inner.capacity()

    def add(self, request: Request) -> None:
        self._inner.add(request)

    def remove(self, request_id: int) -> None:
        self._inner.remove(request_id)

    def now_ns(self) -> int:
        return self._inner.now_ns()

    def wait_until_ns(self, time_ns: int) -> None:
        self._inner.wait_until_ns(time_ns)

    def execute(self, plan: StepPlan) -> StepOutput:
        changed = self._change(plan)
        self.num_changed += changed != plan
        return self._inner.execute(changed)

    def close(self) -> None:
        self._inner.close()


def other_targets(plan: StepPlan, kind: OpKind) -> StepPlan:
    """Targets in the wrong order."""
    ops = [op._replace(targets=op.targets[::-1]) if op.kind is kind and len(op.targets) > 1 else op for op in plan.ops]
    return plan._replace(ops=tuple(ops))


def other_sources(plan: StepPlan) -> StepPlan:
    """Each host block is the next one."""

    def wrong(op: MemoryOp) -> MemoryOp:
        moved = op.kind is OpKind.COPY_IN and op.targets
        return op._replace(blocks=(*op.blocks[1:], op.blocks[0] + 1)) if moved else op

    return plan._replace(ops=tuple(wrong(op) for op in plan.ops))


def without_copies(plan: StepPlan, kind: OpKind) -> StepPlan:
    return plan._replace(ops=tuple(op for op in plan.ops if op.kind is not kind))


def another_ones_block(plan: StepPlan) -> StepPlan:
    """The second sequence that gets blocks gets those of the first."""
    growing = [i for i, s in enumerate(plan.scheduled) if s.new_blocks]
    if len(growing) < 2:
        return plan
    scheduled = list(plan.scheduled)
    first, second = scheduled[growing[0]], scheduled[growing[1]]
    blocks = (first.new_blocks * len(second.new_blocks))[: len(second.new_blocks)]
    scheduled[growing[1]] = second._replace(new_blocks=blocks)
    return plan._replace(scheduled=tuple(scheduled))


def nothing_dropped(plan: StepPlan) -> StepPlan:
    return plan._replace(dropped=())


WRONG: dict[str, tuple[str, Callable[[StepPlan], StepPlan]]] = {
    "swapped in to the wrong targets": ("pinned_swap", lambda plan: other_targets(plan, OpKind.COPY_IN)),
    "swapped out to the wrong targets": ("pinned_swap", lambda plan: other_targets(plan, OpKind.COPY_OUT)),
    "swapped in from the wrong sources": ("pinned_swap", other_sources),
    "not swapped in": ("pinned_swap", lambda plan: without_copies(plan, OpKind.COPY_IN)),
    "not swapped out": ("pinned_swap", lambda plan: without_copies(plan, OpKind.COPY_OUT)),
    "a block of another sequence": ("pinned_zero_copy", another_ones_block),
    "a table that should have been dropped": ("device_recompute", nothing_dropped),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("wrong") / "model")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


def serve_tampered(folder: Path, mechanism: str, change: Callable[[StepPlan], StepPlan]) -> tuple[Served, Tampered]:
    axes, requests = axes_of(mechanism), ragged(17)
    model = load_model(folder, "float32")
    context = context_for(model, folder, axes, tight_capacity(axes, requests, 8, 17), block_size=8)
    longest = max(r.max_tokens for r in requests)
    runner = Tampered(TorchRunner(model, context.spec, context.capacity, context.memory, max_tokens=longest), change)
    served = serve(model, context, axes, requests, batch_size=17, max_num_batched_tokens=64, runner=runner)
    return served, runner


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_plan_shows(wrong: str, folder: Path, reference: Reference) -> None:
    """As NaN in the logits, which ends the run, or as other tokens."""
    mechanism, change = WRONG[wrong]
    runners: list[Tampered] = []

    def serve_wrongly() -> None:
        served, runner = serve_tampered(folder, mechanism, change)
        runners.append(runner)
        assert_same_tokens(reference, served.requests)

    with pytest.raises(
        (AssertionError, ValueError, IndexError), match=r"sequences differ|logits are NaN|out of bounds"
    ):
        serve_wrongly()
    assert all(runner.num_changed > 0 for runner in runners), "the plan is as it was"


def test_nan_logits_end_the_run(folder: Path) -> None:
    """A swap that reads what nobody wrote: greedy would take token 0 for it."""

    def from_nowhere(plan: StepPlan) -> StepPlan:
        ops = [op._replace(blocks=tuple(19 for _ in op.blocks)) if op.targets else op for op in plan.ops]
        return plan._replace(ops=tuple(ops))

    with pytest.raises(ValueError, match=r"request \d+: its logits are NaN; its KV was read from"):
        serve_tampered(folder, "pinned_swap", lambda plan: from_nowhere(plan) if plan.step > 0 else plan)


def test_what_is_not_staged_is_read_in_place(folder: Path, reference: Reference) -> None:
    """Staging is a matter of time alone: a plan without it is slower on a GPU, and right."""
    served, runner = serve_tampered(folder, "pinned_prefetch_ahead", lambda plan: without_copies(plan, OpKind.COPY_IN))
    assert runner.num_changed > 0
    assert_same_tokens(reference, served.requests)


@pytest.mark.parametrize("kind", [OpKind.PREFETCH, OpKind.EVICT])
def test_what_is_not_prefetched_comes_with_its_first_touch(
    kind: OpKind, folder: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefetches and planned evictions are a matter of time alone, too."""
    monkeypatch.setattr("uvm_kv.kvcache.spec.CHUNK_BYTES", 8 << 10)
    served, runner = serve_tampered(folder, "managed_prefetch_ahead", lambda plan: without_copies(plan, kind))
    assert runner.num_changed > 0
    assert_same_tokens(reference, served.requests)


def test_what_is_staged_is_what_is_read(folder: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """If staging copies the wrong bytes the tokens differ: the staged copies are not there for show."""

    stage = KVStore.stage

    def stage_garbage(self: KVStore, layer: int, blocks: Any) -> None:
        stage(self, layer, blocks)
        rows, buffer = self._staged[layer]
        self._staged[layer] = (rows, buffer.flip(0) + 0.5)

    monkeypatch.setattr(KVStore, "stage", stage_garbage)
    served, _ = serve_tampered(folder, "pinned_prefetch_ahead", lambda plan: plan)
    with pytest.raises(AssertionError, match="sequences differ"):
        assert_same_tokens(reference, served.requests)


@pytest.mark.parametrize("step", ["touch", "poison", "acquire"])
def test_a_store_that_forgets_a_step_shows(
    step: str, folder: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the way back of evicted blocks, without the zeros of new ones: NaN. Without the poison: nothing."""
    monkeypatch.setattr("uvm_kv.kvcache.spec.CHUNK_BYTES", 8 << 10)
    monkeypatch.setattr(KVStore, step, lambda *_: None)
    if step == "poison":
        served, _ = serve_tampered(folder, "managed_demand_capped", lambda plan: plan)
        assert_same_tokens(reference, served.requests)
        return
    with pytest.raises(ValueError, match=r"logits are NaN|cannot be served: the logits"):  # At load, or as it serves.
        serve_tampered(folder, "managed_demand_capped", lambda plan: plan)
