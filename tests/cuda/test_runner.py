"""TorchRunner over real memory of every kind: in float32 the tokens are those of `generate`, whatever moves.

Without a GPU, on the CUDA runtime in host memory, torch computes on the CPU and the kernels reach its tensors there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
    torch,
)
from tests.runner.torch_cpu.test_torch_same_tokens import FAST_LINK_GB_PER_S, assert_it_happened
from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.ops import OpKind
from uvm_kv.memory import attention
from uvm_kv.placement.base import PlacementContext
from uvm_kv.runner.torch import cuda_kv
from uvm_kv.runner.torch.cuda_kv import CudaKV
from uvm_kv.runner.torch.graphs import DecodeGraphs, padded_sizes
from uvm_kv.sched.request import Request
from uvm_kv.types import KIB, MIB, Hints, Layout, MemoryKind

SERVED = [name for name in MECHANISMS if name != "pageable_swap"]
"""Ordinary host memory is simulated only."""
STAGING = ("pinned_prefetch_ahead", "pinned_balanced", "vmm_balanced")
HINTS = {
    "managed_by_tier": Hints("by_tier", accessed_by=True),
    "managed_prefetch_ahead": Hints("by_tier", accessed_by=True),
}
BY_KIND = {
    MemoryKind.DEVICE: "device_resident",
    MemoryKind.PINNED: "pinned_zero_copy",
    MemoryKind.MANAGED: "managed_demand",
    MemoryKind.VMM: "vmm_balanced",
}
HEADS = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama") / "model", initializer_range=0.12, **HEADS)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture
def device(c: Any) -> Iterator[Any]:
    if torch.cuda.is_available():
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        yield torch.device("cuda", 0)
        torch.backends.cuda.matmul.allow_tf32 = before
        return
    if not c.pageable_memory_access(0):
        pytest.skip("torch sees no GPU, and this one does not read torch's tensors on the CPU")
    yield torch.device("cpu")


@pytest.fixture
def model(folder: Path, device: Any) -> Any:
    return load_model(folder, "float32").to(device)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pieces per chunk, so that a small cache has many."""
    monkeypatch.setattr("uvm_kv.kvcache.spec.CHUNK_BYTES", 32 * KIB)


@pytest.mark.parametrize(("num_layers", "lead"), [(4, 2), (5, 1), (5, 3)])
def test_staged_layers_of_two_steps_keep_apart(
    num_layers: int, lead: int, tmp_path: Path, device: Any, small_chunks: None
) -> None:
    """What is copied ahead for the next step must not take the place of a layer that this step has yet to read,
    whether the ring's layers divide the model's or not."""
    folder = save_model(tmp_path / "model", initializer_range=0.12, **HEADS | {"num_hidden_layers": num_layers})
    model = load_model(folder, "float32").to(device)
    axes, requests = axes_of("pinned_prefetch_ahead"), few()
    capacity = tight_capacity(axes, requests, 8, 6)
    context = context_for(
        *(model, folder, axes, capacity), block_size=8, num_layers_ahead=lead, link_gb_per_s=FAST_LINK_GB_PER_S
    )
    served = run(model, context, "pinned_prefetch_ahead", requests, batch=6, chunk=64)
    assert_same_tokens(Reference(folder), requests)
    assert served.ops(OpKind.COPY_IN, staged=True)


def run(
    model: Any,
    context: PlacementContext,
    mechanism: str,
    requests: list[Request],
    *,
    batch: int,
    chunk: int,
    graph_seqs: int = 0,
    on_logits: Any = None,
) -> Served:
    axes = axes_of(mechanism)
    kv = CudaKV(
        context.spec,
        context.capacity,
        context.memory,
        model.dtype,
        num_q_heads=model.config.num_attention_heads,
        device=model.device,
        hints=HINTS.get(mechanism),
        staged_layers=context.options["num_layers_ahead"] + 1 if mechanism in STAGING else 0,
        waits_for_evictions=mechanism == "managed_demand_capped",
        poison_freed=True,
    )
    longest = max(r.max_tokens for r in requests)
    runner = TorchRunner(
        model,
        context.spec,
        context.capacity,
        context.memory,
        max_tokens=longest,
        kv=kv,
        graph_seqs=graph_seqs,
        on_logits=on_logits,
    )
    return serve(model, context, axes, requests, batch_size=batch, max_num_batched_tokens=chunk, runner=runner)


def few() -> list[Request]:
    return ragged(6, longest_prompt=24, longest_output=20, seed=5)


@pytest.mark.parametrize("mechanism", SERVED)
@pytest.mark.parametrize(("layout", "chunk"), [(Layout.LAYER_MAJOR, 64), (Layout.BLOCK_MAJOR, 13)])
def test_same_tokens(
    mechanism: str, layout: Layout, chunk: int, model: Any, folder: Path, reference: Reference, small_chunks: None
) -> None:
    if layout is Layout.BLOCK_MAJOR and mechanism in ("managed_demand_capped", "managed_prefetch_ahead"):
        pytest.skip("needs layer_major")
    axes, requests = axes_of(mechanism), few()
    capacity = tight_capacity(axes, requests, 8, 6)
    context = context_for(
        model, folder, axes, capacity, block_size=8, layout=layout, num_layers_ahead=1, link_gb_per_s=FAST_LINK_GB_PER_S
    )
    served = run(model, context, mechanism, requests, batch=6, chunk=chunk)
    assert_same_tokens(reference, requests)
    assert_it_happened(mechanism, served)
    moved = {name: sum(getattr(out.counters, name) or 0 for _, out in served.log) for name in out_names(served)}
    if mechanism in ("pinned_swap", *STAGING):
        assert moved["h2d_copy_bytes"] > 0
    assert (moved["d2h_copy_bytes"] > 0) == (mechanism == "pinned_swap")
    assert (moved["d2h_planned_eviction_bytes"] > 0) == (
        mechanism in ("managed_demand_capped", "managed_prefetch_ahead")
    )


@pytest.mark.parametrize("mechanism", SERVED)
def test_graphs_put_out_the_same_tokens(
    mechanism: str, model: Any, folder: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode steps are padded and replayed where nothing moves between the layers; others run eagerly beside them."""
    replays: list[int] = []
    run_padded = DecodeGraphs.run

    def count(self: DecodeGraphs, batch: Any, *arguments: Any) -> Any:
        replays.append(len(batch))
        return run_padded(self, batch, *arguments)

    monkeypatch.setattr(DecodeGraphs, "run", count)
    axes, requests = axes_of(mechanism), few()
    capacity = tight_capacity(axes, requests, 8, 6)
    if quiet := mechanism in ("device_resident", "pinned_zero_copy", "managed_by_tier", "managed_demand"):
        capacity = KVCapacity(12, 48) if capacity.num_host_blocks else KVCapacity(60, 0)
    context = context_for(
        model, folder, axes, capacity, block_size=8, num_layers_ahead=1, link_gb_per_s=FAST_LINK_GB_PER_S
    )
    served = run(model, context, mechanism, requests, batch=6, chunk=64, graph_seqs=6)
    assert_same_tokens(reference, requests)
    num_decodes = sum(all(s.num_new_tokens == 1 for s in plan.scheduled) for plan, _ in served.log)
    if quiet:
        assert len(replays) >= num_decodes - 1
        assert {5, 3} & set(replays), "none of them was padded"


def test_all_sizes_and_eager_steps_share_one_workspace(
    model: Any, folder: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    new_workspace = attention.new_workspace

    def count(kv: Any, num_bytes: int, **options: Any) -> Any:
        made.append(num_bytes)
        return new_workspace(kv, num_bytes, **options)

    monkeypatch.setattr(attention, "new_workspace", count)
    monkeypatch.setattr(cuda_kv, "new_workspace", count)
    axes, requests = axes_of("device_resident"), few()
    context = context_for(
        model, folder, axes, KVCapacity(60, 0), block_size=8, num_layers_ahead=1, link_gb_per_s=FAST_LINK_GB_PER_S
    )
    run(model, context, "device_resident", requests, batch=6, chunk=64, graph_seqs=6)
    assert made == [2 * MIB]
    assert_same_tokens(reference, requests)


NARROW = ("float16", "bfloat16")
WORST_CASE = [name for name in SERVED if name not in ("device_recompute", "pinned_swap")]
"""They all serve the same schedule where there is room for every request."""
SPREAD = {"float16": 0.02, "bfloat16": 0.1}
"""Root mean square difference of a row's logits in another batch, as a share of the row's spread: some roundings of the
type (2^-11, 2^-8) a layer, through four layers whose weights are large."""
PARTED = {"float16": 0.05, "bfloat16": 0.2}
"""Most sequences that part from their tokens in another batch, as a share of the tokens until then."""


def logits_of(folder: Path, model: Any, mechanism: str, requests: list[Request], *, batch: int = 6) -> tuple[Any, Any]:
    """(request, index of its token) -> its logits; and the schedule, without where its blocks lie."""
    rows: dict[tuple[int, int], Any] = {}
    counts: dict[int, int] = {}

    def keep(request_id: int, row: Any) -> None:
        index = counts.get(request_id, 0)
        rows[request_id, index], counts[request_id] = row.clone(), index + 1

    axes = axes_of(mechanism)
    capacity = KVCapacity(60, 0) if axes.memory is MemoryKind.DEVICE else KVCapacity(16, 48)
    dtype = str(model.dtype).removeprefix("torch.")
    context = context_for(
        *(model, folder, axes, capacity),
        block_size=8,
        dtype=dtype,
        num_layers_ahead=1,
        link_gb_per_s=FAST_LINK_GB_PER_S,
    )
    served = run(model, context, mechanism, requests, batch=batch, chunk=24, on_logits=keep)
    on_host = [b for plan, _ in served.log for s in plan.scheduled for b in s.new_blocks if b >= capacity[0]]
    assert bool(on_host) == (capacity.num_host_blocks > 0 and batch > 1), "all of it fits the device"
    schedule = [[s._replace(new_blocks=()) for s in plan.scheduled] for plan, _ in served.log]
    return rows, schedule


@pytest.mark.parametrize("dtype", NARROW)
def test_logits_are_bit_identical_in_every_memory(dtype: str, folder: Path, device: Any, small_chunks: None) -> None:
    """The same plan but for where its blocks lie: the same logits to the last bit."""
    model = load_model(folder, dtype).to(device)
    expected, schedule = logits_of(folder, model, "device_resident", few())
    assert len(expected) == sum(r.output_tokens for r in few())
    assert len({tuple(row.tolist()) for row in expected.values()}) > len(expected) // 2
    for mechanism in WORST_CASE:
        rows, same_schedule = logits_of(folder, model, mechanism, few())
        assert same_schedule == schedule, mechanism
        different = [key for key, row in rows.items() if not torch.equal(row, expected[key])]
        assert not different, f"{mechanism}: {len(different)} of {len(rows)} rows differ, the first is {different[0]}"


@pytest.mark.parametrize("dtype", NARROW)
def test_logits_in_another_batch_differ_by_rounding(
    dtype: str, folder: Path, device: Any, record_testsuite_property: Any
) -> None:
    """One sequence at a time against six: as long as the tokens are the same, the logits are within rounding. The rate
    at which tokens first part is recorded, and bounded."""
    model = load_model(folder, dtype).to(device)
    together, alone = few(), few()
    expected, _ = logits_of(folder, model, "pinned_zero_copy", together)
    rows, _ = logits_of(folder, model, "pinned_zero_copy", alone, batch=1)
    assert rows.keys() == expected.keys()
    differences, num_parted, num_tokens = [], 0, 0
    for a, b in zip(together, alone, strict=True):
        same = [x == y for x, y in zip(a.token_ids, b.token_ids, strict=True)]
        until = same.index(False) + 1 if False in same else len(same)
        num_parted, num_tokens = num_parted + (False in same), num_tokens + until
        for i in range(until):
            one, other = rows[a.id, i], expected[a.id, i]
            differences.append(float((one - other).square().mean().sqrt() / other.std()))
    record_testsuite_property(f"{dtype} logit_difference_of_spread", max(differences))
    record_testsuite_property(f"{dtype} first_divergences_per_token", num_parted / num_tokens)
    print(
        f"\n{dtype}, batch 1 against 6: logits differ by {max(differences):.4f} of a row's spread at most, "
        f"{num_parted} of {len(alone)} sequences part, {num_parted / num_tokens:.4f} per token until then"
    )
    assert max(differences) <= SPREAD[dtype]
    assert num_parted / num_tokens <= PARTED[dtype]


def test_a_batch_is_padded_to_the_next_size() -> None:
    assert padded_sizes(1) == [1]
    assert padded_sizes(6) == [1, 2, 4, 6]
    assert padded_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert padded_sizes(32) == [1, 2, 4, 8, 16, 24, 32]


def out_names(served: Served) -> tuple[str, ...]:
    return served.log[0][1].counters._fields


def test_staged_bytes_are_counted_to_the_block(model: Any, folder: Path, reference: Reference) -> None:
    """Each op of a plan moves its blocks once a layer; what the last step brings ahead is never used, and counted."""
    axes, requests = axes_of("pinned_prefetch_ahead"), few()
    capacity = tight_capacity(axes, requests, 8, 6)
    context = context_for(model, folder, axes, capacity, block_size=8, num_layers_ahead=1)
    served = run(model, context, "pinned_prefetch_ahead", requests, batch=6, chunk=64)
    assert_same_tokens(reference, requests)
    planned = sum(
        len(op.blocks) * (op.last_layer - op.first_layer) for plan, _ in served.log for op in plan.ops if not op.targets
    )
    copied = sum(out.counters.h2d_copy_bytes or 0 for _, out in served.log)
    assert 0.9 * planned * context.spec.layer_block_bytes <= copied <= planned * context.spec.layer_block_bytes


@pytest.mark.parametrize("mechanism", ["device_recompute", "pinned_swap", "pinned_zero_copy", "managed_demand"])
def test_stall_is_a_number_only_where_every_wait_is_seen(mechanism: str, model: Any, folder: Path) -> None:
    """Swaps are waited for by events; how long kernels wait for the link or for faults, nobody can say."""
    axes, requests = axes_of(mechanism), few()
    context = context_for(
        model, folder, axes, tight_capacity(axes, requests, 8, 6), block_size=8, link_gb_per_s=FAST_LINK_GB_PER_S
    )
    log = run(model, context, mechanism, requests, batch=6, chunk=64).log
    stalls = [out.counters.stall_ns for _, out in log]
    if mechanism == "device_recompute":
        assert set(stalls) == {0}
    elif mechanism == "pinned_swap":
        moving = [out.counters.stall_ns for plan, out in log if any(op.targets for op in plan.ops)]
        assert moving and all(ns for ns in moving)
        assert None not in stalls
    elif mechanism == "managed_demand":
        assert set(stalls) == {None}
    else:
        reads = [
            any(block >= context.capacity.num_device_blocks for s in plan.scheduled for block in s.new_blocks)
            for plan, _ in log
        ]
        assert reads.index(True) == stalls.index(None)


def test_without_staging_memory_host_blocks_are_read_in_place(model: Any, folder: Path, reference: Reference) -> None:
    """A ring too small for all of them: the rest is read where it lies, and nothing is wrong."""
    axes, requests = axes_of("pinned_prefetch_ahead"), few()
    capacity = tight_capacity(axes, requests, 8, 6)
    context = context_for(model, folder, axes, capacity, block_size=8, num_layers_ahead=1)
    kv = CudaKV(
        context.spec, capacity, MemoryKind.PINNED, model.dtype, num_q_heads=4, device=model.device, staged_layers=2
    )
    assert kv._staging is not None
    kv._staging._free = kv._staging._free[:2]
    runner = TorchRunner(model, context.spec, capacity, MemoryKind.PINNED, max_tokens=44, kv=kv)
    serve(model, context, axes, requests, batch_size=6, max_num_batched_tokens=64, runner=runner)
    assert_same_tokens(reference, requests)


def test_what_is_staged_is_what_is_read(
    model: Any, folder: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the staged copies hold something else the tokens differ: they are not there for show."""
    stage = CudaKV._stage

    def stage_garbage(self: CudaKV, op: Any, layer: int) -> None:
        stage(self, op, layer)
        assert self._staging is not None
        self._staging.placed.slab.fill(0x3C, stream=self._in)

    monkeypatch.setattr(CudaKV, "_stage", stage_garbage)
    axes, requests = axes_of("pinned_prefetch_ahead"), few()
    context = context_for(model, folder, axes, tight_capacity(axes, requests, 8, 6), block_size=8, num_layers_ahead=1)
    run(model, context, "pinned_prefetch_ahead", requests, batch=6, chunk=64)
    with pytest.raises(AssertionError, match="sequences differ"):
        assert_same_tokens(reference, requests)


def test_a_block_read_before_it_arrives_shows(
    model: Any, folder: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the wait for copies, on streams that run only when something waits for them. On a card it may be luck."""
    if model.device.type == "cuda" or os.environ.get("UVM_KV_HOST_RUNTIME_ORDER") == "others":
        pytest.skip("torch's stream may come last here by luck")
    monkeypatch.setattr(CudaKV, "_await", lambda *_: None)
    axes, requests = axes_of("pinned_prefetch_ahead"), few()
    context = context_for(model, folder, axes, tight_capacity(axes, requests, 8, 6), block_size=8, num_layers_ahead=1)

    def serve_and_compare() -> None:
        run(model, context, "pinned_prefetch_ahead", requests, batch=6, chunk=64)
        assert_same_tokens(reference, requests)

    with pytest.raises((AssertionError, ValueError), match=r"sequences differ|logits are NaN"):
        serve_and_compare()


@pytest.mark.parametrize("kind", list(MemoryKind))
def test_filled_context_is_the_same_in_every_memory(kind: MemoryKind, model: Any, folder: Path) -> None:
    """A steady start: random KV, the same tokens from it wherever it lies."""
    outputs = []
    for memory, mechanism in ((MemoryKind.DEVICE, "device_resident"), (kind, BY_KIND[kind])):
        requests = [Request(i, 20 + i, 6, prompt_ids=tuple(range(3, 23 + i))) for i in range(3)]
        for request in requests:
            request.num_filled_tokens = request.prompt_tokens - 1
        host = 0 if memory is MemoryKind.DEVICE else 8
        axes, capacity = axes_of(mechanism), KVCapacity(16 - host, host)
        context = context_for(model, folder, axes, capacity, block_size=8, num_layers_ahead=1)
        run(model, context, mechanism, requests, batch=3, chunk=64)
        outputs.append([r.token_ids for r in requests])
    assert outputs[0] == outputs[1]
    assert len({tuple(tokens) for tokens in outputs[0]}) > 1
