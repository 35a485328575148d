"""The kernels on the card: append and paged attention over every kind of memory, against float64; and graphs."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.cuda.paged import POISON, TOLERANCE, Paged, Rows, Shape, attention_in_float64, to_stored, whole
from tests.cuda.slabs import get
from uvm_kv.memory import (
    PagedAttention,
    PagedKV,
    Placed,
    Slab,
    append_kv,
    copy_blocks,
    new_event,
    new_stream,
    new_workspace,
    plan_capacity,
    slab_layout,
)
from uvm_kv.memory.layout import slab_bytes
from uvm_kv.types import MIB, Layout, MemoryKind

LAYER, BLOCK = Layout.LAYER_MAJOR, Layout.BLOCK_MAJOR
KINDS = list(MemoryKind)
SHAPES = (
    Shape("float16", 128, 2, 2, 16, LAYER),
    Shape("float16", 128, 8, 2, 16, BLOCK),
    Shape("float16", 128, 16, 2, 32, LAYER),
    Shape("float16", 64, 2, 2, 8, BLOCK),
    Shape("float16", 64, 6, 2, 128, LAYER),
    Shape("float16", 80, 2, 2, 16, LAYER),
    Shape("float16", 96, 8, 2, 64, BLOCK),
    Shape("float16", 256, 4, 1, 16, LAYER),
    Shape("bfloat16", 128, 8, 2, 16, LAYER),
    Shape("bfloat16", 64, 14, 2, 16, BLOCK),
    Shape("bfloat16", 80, 12, 2, 8, LAYER),
    Shape("bfloat16", 128, 40, 1, 16, LAYER),
    Shape("bfloat16", 256, 8, 8, 16, BLOCK),
    Shape("float32", 128, 3, 3, 16, BLOCK),
    Shape("float32", 64, 8, 2, 16, LAYER),
    Shape("float32", 80, 4, 2, 16, BLOCK),
    Shape("float32", 96, 2, 1, 8, LAYER),
    Shape("float32", 256, 8, 2, 16, BLOCK),
    Shape("float32", 64, 71, 1, 32, LAYER),
)
QUERY_LENS = (1, 1, 0, 5, 40, 1, 16, 17)
CONTEXT_LENS = (1, 700, 90, 333, 41, 1025, 200, 129)

Make = Callable[..., Paged]


@pytest.fixture
def make(stream: Any) -> Iterator[Make]:
    made: list[Paged] = []

    def build(kind: MemoryKind, shape: Shape, longest: Sequence[int], *, seed: int = 0, **options: Any) -> Paged:
        made.append(Paged(kind, shape, longest, stream=stream, places=np.random.default_rng(seed), **options))
        return made[-1]

    yield build
    for cache in made:
        cache.close()


def name_of(shape: Shape) -> str:
    heads = f"{shape.num_q_heads}q{shape.num_kv_heads}kv"
    return f"{shape.dtype}-{shape.head_dim}-{heads}-{shape.block_size}-{shape.layout}"


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_matches_float64(make: Make, kind: MemoryKind, shape: Shape) -> None:
    """Decode, a resting sequence, speculative rows and chunks of prefill in one ragged batch."""
    cache = make(kind, shape, CONTEXT_LENS)
    rows, expected = whole(cache, np.random.default_rng(1), QUERY_LENS, CONTEXT_LENS)
    assert cache.error(cache.attend(rows, layer=1), expected) < TOLERANCE[shape.dtype]


@pytest.mark.parametrize("host_share", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("kind", [MemoryKind.PINNED, MemoryKind.VMM])
def test_attention_with_nearly_all_blocks_in_one_tier(make: Make, kind: MemoryKind, host_share: float) -> None:
    cache = make(kind, Shape(), CONTEXT_LENS, host_share=host_share)
    rows, expected = whole(cache, np.random.default_rng(2), QUERY_LENS, CONTEXT_LENS)
    assert cache.error(cache.attend(rows, layer=1), expected) < TOLERANCE["float16"]


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[4], SHAPES[14]], ids=name_of)
def test_bits_do_not_depend_on_the_memory(make: Make, shape: Shape) -> None:
    """The same tokens in other blocks, tiers, kinds and layouts, several times over."""
    outputs = set()
    for (kind, layout), seed in zip(itertools.product(KINDS, Layout), itertools.count()):
        shape_here = Shape(**{**shape.__dict__, "layout": layout})
        cache = make(kind, shape_here, CONTEXT_LENS, seed=seed, host_share=0.1 * (1 + seed))
        rows, _ = whole(cache, np.random.default_rng(3), QUERY_LENS, CONTEXT_LENS)
        outputs |= {cache.attend(rows, layer=1).tobytes() for _ in range(3)}
        cache.close()
    assert len(outputs) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_append_writes_its_slots_and_nothing_else(make: Make, kind: MemoryKind, stream: Any) -> None:
    shape = Shape("float16", 80, 3, 3, 8, LAYER, num_layers=3)
    cache = make(kind, shape, (20, 1, 9))
    lens = np.int32([20, 1, 9])
    rows = cache.rows(np.random.default_rng(4), 30)
    cache.append(rows, lens, lens, layer=2)
    near, far = cache.memory.device, cache.memory.host
    slabs = [near.slab] if far is None or far.slab is near.slab else [near.slab, far.slab]
    want = {s.address: np.full(s.num_bytes, POISON, np.uint8) for s in slabs}
    stored = [to_stored(x, shape.dtype) for x in (rows.key, rows.value)]
    for token, (seq, position) in enumerate((s, p) for s in range(3) for p in range(lens[s])):
        block = int(cache.table.host[seq, position // 8])
        for which, head in itertools.product(range(2), range(3)):
            at = cache.kv.raw.slot_address(2, block, value=bool(which), head=head, slot=position % 8)
            base = next(s.address for s in slabs if s.address <= at < s.address + s.num_bytes)
            want[base][at - base : at - base + 160] = stored[which][token, head].view(np.uint8)
    with Slab.pinned(max(s.num_bytes for s in slabs)) as staging:
        for slab in slabs:
            np.testing.assert_array_equal(get(slab, slab.num_bytes, stream, staging), want[slab.address])


def test_append_skips_tokens_without_a_sequence(make: Make, stream: Any) -> None:
    cache = make(MemoryKind.DEVICE, Shape(), (16,))
    arena = cache.arena
    row = cache.shared(np.ones((2, 2, 128))).device
    at = {"seqs": arena.array(np.int32([-1, -1])).device, "positions": arena.array(np.int32([3, 4])).device}
    append_kv(cache.kv, 0, row, row, **at, block_table=cache.table.device, stream=stream)
    slab = cache.memory.device.slab
    with Slab.pinned(slab.num_bytes) as staging:
        assert (get(slab, slab.num_bytes, stream, staging) == POISON).all()


@pytest.mark.parametrize("kind", [MemoryKind.DEVICE, MemoryKind.PINNED])
def test_128_ki_tokens_beside_short_ones(make: Make, kind: MemoryKind) -> None:
    shape = Shape("float16", 64, 4, 1, 32, LAYER, num_layers=2, split_tokens=0)
    contexts = (131072, 5, 3000)
    cache = make(kind, shape, contexts, arena_bytes=256 * MIB)
    rows, expected = whole(cache, np.random.default_rng(5), (1, 1, 2), contexts)
    assert cache.error(cache.attend(rows, layer=1), expected) < TOLERANCE["float16"]


def test_plans_follow_each_other_without_a_wait(make: Make, stream: Any) -> None:
    """More of them than there are staging buffers."""
    cache, one = make(MemoryKind.DEVICE, Shape(), (400,)), np.int32([1])
    rows, lens = cache.rows(np.random.default_rng(12), 400), np.int32([400])
    cache.append(rows, lens, lens, layer=1)
    query, contexts = cache.shared(rows.query[:1]), (400, 129, 257, 1, 300)
    outs = [cache.shared(np.full((1, 8, 128), np.nan)) for _ in contexts]
    for context, out in zip(contexts, outs, strict=True):
        cache.plan(one, np.int32([context]))
        cache.attention.run(1, query.device, out.device, block_table=cache.table.device, stream=stream)
    stream.synchronize()
    for n, out in zip(contexts, outs, strict=True):
        expected = attention_in_float64(rows.query[:1], one, [(rows.key[:n], rows.value[:n])])
        assert cache.error(out.host, expected) < TOLERANCE["float16"]


def test_csr_tables_and_flags_give_the_same_bits(make: Make) -> None:
    cache = make(MemoryKind.MANAGED, Shape(), CONTEXT_LENS)
    rows, _ = whole(cache, np.random.default_rng(6), QUERY_LENS, CONTEXT_LENS)
    padded = cache.attend(rows, layer=1)
    queries, contexts = np.int32(QUERY_LENS), np.int32(CONTEXT_LENS)
    flags = np.random.default_rng(7).integers(0, 2, int(cache.kv.raw.num_blocks)).astype(np.uint8)
    cache.plan(queries, contexts, block_on_host=flags)
    np.testing.assert_array_equal(cache.attend(rows, layer=1), padded)
    counts = -(-contexts // 16)
    table = {
        "block_table": np.concatenate([row[:n] for row, n in zip(cache.table.host, counts, strict=True)]),
        "indptr": np.int32([0, *np.cumsum(counts)]),
    }
    cache.attention.plan(query_lens=queries, context_lens=contexts, **table, stream=cache.stream)
    query, out = cache.shared(rows.query), cache.shared(np.full_like(rows.query, np.nan))
    on_device = {name: cache.arena.array(values).device for name, values in table.items()}
    cache.attention.run(1, query.device, out.device, **on_device, stream=cache.stream)
    cache.stream.synchronize()
    np.testing.assert_array_equal(out.host, padded)


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_step_replays_with_other_data(make: Make, kind: MemoryKind, stream: Any) -> None:
    """Append and attention in one graph; lengths, tables, plans and rows change between replays, addresses do not."""
    shape, longest = Shape(split_tokens=256), (400, 400, 400)
    one = np.int32([1, 1, 1])
    limit = make(kind, shape, longest)
    most = np.int32(longest)
    capacity = plan_capacity(limit.kv, num_q_heads=8, query_lens=one, context_lens=most, split_tokens=256)
    cache = make(kind, shape, longest, capacity=capacity, seed=1)
    arena, rng = cache.arena, np.random.default_rng(8)
    query, key, value = (cache.shared(np.zeros((3, h, 128))) for h in (8, 2, 2))
    out = cache.shared(np.zeros((3, 8, 128)))
    seqs, positions = arena.array(np.int32([0, 1, 2])), arena.array(np.zeros(3, np.int32))
    past = [cache.rows(rng, 399) for _ in range(3)]
    for s in range(3):
        lens = np.int32([0, 0, 0])
        lens[s] = 399
        cache.append(past[s], lens, lens, layer=1)
    history = [(p.key, p.value) for p in past]

    def prepare(contexts: Any) -> Any:
        rows = cache.rows(rng, 3)
        for target, values in ((query, rows.query), (key, rows.key), (value, rows.value)):
            target.host[...] = to_stored(values, shape.dtype)
        positions.host[...] = contexts - 1
        out.host.view(np.uint8)[...] = POISON
        cache.plan(one, contexts)
        return rows

    def step() -> None:
        at = {"seqs": seqs.device, "positions": positions.device, "block_table": cache.table.device}
        append_kv(cache.kv, 1, key.device, value.device, **at, stream=stream)
        cache.attention.run(1, query.device, out.device, block_table=cache.table.device, stream=stream)

    prepare(np.int32([400, 400, 400]))
    step()  # The kernels are loaded before a capture.
    stream.synchronize()
    stream.begin_capture()
    try:
        step()
    finally:
        graph = stream.end_capture()
    for contexts in (np.int32([1, 257, 400]), np.int32([399, 2, 130]), np.int32([16, 17, 255])):
        rows = prepare(contexts)
        graph.launch(stream=stream.handle)
        stream.synchronize()
        seen = []
        for s, n in enumerate(contexts):
            joined = (np.concatenate([history[s][i][: n - 1], rows[1 + i][s : s + 1]]) for i in range(2))
            seen.append(tuple(joined))
            for i in range(2):
                history[s][i][n - 1 : n] = rows[1 + i][s : s + 1]
        expected = attention_in_float64(rows.query, one, seen)
        assert cache.error(out.host, expected) < TOLERANCE["float16"]


def test_graphs_of_several_sizes_share_a_workspace(make: Make, stream: Any) -> None:
    """Each call leaves its queues as it found them, whatever the capacity: replays and eager calls take turns."""
    shape, longest = Shape(split_tokens=128), (600, 600, 600)
    cache, one = make(MemoryKind.PINNED, shape, longest), np.int32([1, 1, 1])
    rows = cache.rows(np.random.default_rng(13), 1800)
    cache.append(rows, np.int32(longest), np.int32(longest), layer=1)
    query, out = cache.shared(rows.query[:3]), cache.shared(np.zeros((3, 8, 128)))
    most = [np.int32([600] * n) for n in (3, 2, 1)]
    counted = [
        plan_capacity(cache.kv, num_q_heads=8, query_lens=one[: len(m)], context_lens=m, split_tokens=128) for m in most
    ]
    workspace = new_workspace(cache.kv, 2 * MIB, stream=stream)
    options: dict[str, Any] = {"num_q_heads": 8, "split_tokens": 128, "workspace": workspace}
    sizes = [PagedAttention(cache.kv, capacity=capacity, **options) for capacity in counted]
    eager, graphs = PagedAttention(cache.kv, **options), []

    def plan(attention: PagedAttention, contexts: Any) -> None:
        lengths = {"query_lens": one[: len(contexts)], "context_lens": contexts}
        attention.plan(**lengths, block_table=cache.table.host[: len(contexts)], stream=stream)

    def attend(attention: PagedAttention) -> None:
        attention.run(1, query.device, out.device, block_table=cache.table.device, stream=stream)

    for attention, contexts in zip(sizes, most, strict=True):
        plan(attention, contexts)
        attend(attention)
        stream.synchronize()
        stream.begin_capture()
        try:
            attend(attention)
        finally:
            graphs.append(stream.end_capture())
    for turn, contexts in enumerate([[600, 1, 300], [129, 600], [500], [7, 599, 257], [400, 300, 200]]):
        out.host.view(np.uint8)[...] = POISON
        attention = eager if turn == 4 else sizes[3 - len(contexts)]
        plan(attention, np.int32(contexts))
        if turn == 4:
            attend(eager)
        else:
            graphs[3 - len(contexts)].launch(stream=stream.handle)
        stream.synchronize()
        seen = [(rows.key[s * 600 :][:n], rows.value[s * 600 :][:n]) for s, n in enumerate(contexts)]
        expected = attention_in_float64(rows.query[: len(contexts)], one[: len(contexts)], seen)
        assert cache.error(out.host[: len(contexts)], expected) < TOLERANCE["float16"]
        assert (out.host[len(contexts) :].view(np.uint8) == POISON).all()
    assert not any(attention._workspace for attention in (*sizes, eager))
    plan(tight := PagedAttention(cache.kv, num_q_heads=8, split_tokens=128, workspace=workspace), np.int32([600] * 3))
    assert tight._workspace is None
    for attention in (*sizes, eager, tight):
        attention.close()
    workspace.close()


def test_a_query_has_at_least_the_planned_rows(make: Make, stream: Any) -> None:
    cache = make(MemoryKind.DEVICE, Shape(), (40, 40))
    rows, expected = whole(cache, np.random.default_rng(14), (2, 1), (40, 20))
    with pytest.raises(ValueError, match="query has 2 rows, the plan is for 3"):
        cache.attend(Rows(*(values[:2] for values in rows)), layer=1)
    out = cache.attend(Rows(*(np.concatenate([values, values[:1]]) for values in rows)), layer=1)
    assert cache.error(out[:3], expected) < TOLERANCE["float16"]
    assert (out[3:].view(np.uint8) == POISON).all()


@pytest.mark.parametrize("failing", ["plan", "staging", "workspace"])
def test_memory_that_ran_out_leaves_attention_of_use(
    c: Any, make: Make, failing: str, stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that found no room is no plan; a smaller one afterwards is served."""
    cache = make(MemoryKind.DEVICE, Shape(), (400,))
    rows, expected = whole(cache, np.random.default_rng(15), (1,), (400,))
    num_calls = 0

    def full(*given: Any, **options: Any) -> Slab:
        nonlocal num_calls
        num_calls += 1
        if failing == "workspace" and num_calls == 1:
            return Slab(c.DeviceResource(device=0), given[0])
        raise c.OutOfMemoryError("the card is full")

    batch = 1 << 16  # More than 2 MiB of plan and of partials.
    large = {"query_lens": np.ones(batch, np.int32), "context_lens": np.full(batch, 400, np.int32)}
    table = np.repeat(cache.table.host, batch, axis=0)
    with monkeypatch.context() as patch:
        patch.setattr(Slab, "pinned" if failing == "staging" else "device", full)
        with pytest.raises(c.OutOfMemoryError, match="the card is full"):
            cache.attention.plan(**large, block_table=table, stream=stream)
    with pytest.raises(ValueError, match=r"run\(\) before plan\(\)"):
        cache.attend(rows, layer=1)
    cache.plan(np.int32([1]), np.int32([400]))
    assert cache.error(cache.attend(rows, layer=1), expected) < TOLERANCE["float16"]


def test_a_graph_waits_for_blocks_copied_outside_it(make: Make, stream: Any) -> None:
    """prefetch_ahead in small: host blocks are copied into device blocks by a batch copy on another stream, and the
    captured attention, whose table names the device blocks, waits for it through an external event node."""
    shape, one = Shape(), np.int32([1])
    cache = make(MemoryKind.PINNED, shape, (64,), host_share=0.5)
    near, far = cache.memory.device, cache.memory.host
    assert far is not None
    assert near.layout.num_blocks >= 3
    rng, copies, arrived = np.random.default_rng(9), new_stream(), new_event()
    first_host = cache.memory.num_device_blocks
    query, out = cache.shared(np.zeros((1, 8, 128))), cache.shared(np.zeros((1, 8, 128)))

    def use(blocks: Sequence[int]) -> None:
        cache.table.host[0, : len(blocks)] = blocks

    contexts = np.int32([48])
    use([0, 1, 2, 0])
    cache.plan(one, contexts)
    cache.attention.run(1, query.device, out.device, block_table=cache.table.device, stream=stream)
    stream.synchronize()
    stream.begin_capture()
    try:
        arrived.wait(stream=stream.handle, external=True)
        cache.attention.run(1, query.device, out.device, block_table=cache.table.device, stream=stream)
    finally:
        graph = stream.end_capture()
    for host_block in (0, 1):
        use([0, 1, first_host + host_block, 0])
        told = cache.rows(rng, 48)
        cache.append(told, contexts, contexts, layer=1)
        stream.synchronize()  # The kernel reads the table in pinned memory.
        use([0, 1, 2, 0])
        query.host[...] = to_stored(told.query[-1:], shape.dtype)
        cache.plan(one, contexts)
        copy_blocks(far, near, [(host_block, 2)], stream=copies)
        arrived.record(stream=copies.handle)
        graph.launch(stream=stream.handle)
        stream.synchronize()
        expected = attention_in_float64(told.query[-1:], one, [(told.key, told.value)])
        assert cache.error(out.host, expected) < TOLERANCE["float16"]


def test_a_plan_refuses_a_capturing_stream(c: Any, make: Make, stream: Any) -> None:
    cache = make(MemoryKind.DEVICE, Shape(), (40,))
    cache.plan(np.int32([1]), np.int32([40]))
    stream.synchronize()
    stream.begin_capture()
    try:
        with pytest.raises(c.CapturingStreamError, match="a plan"):
            cache.plan(np.int32([1]), np.int32([40]))
    finally:
        stream.end_capture()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_q_heads": 16}, r"query is float16 \[1, 8, 128\]; it must be float16 \[\*, 16, 128\]"),
        ({"layer": 2}, "layer 2 of 2"),
    ],
)
def test_attention_refuses_what_does_not_fit(make: Make, changes: dict[str, int], said: str, stream: Any) -> None:
    cache = make(MemoryKind.DEVICE, Shape(), (40,))
    attention = PagedAttention(cache.kv, num_q_heads=changes.get("num_q_heads", 8))
    lengths = {"query_lens": np.int32([1]), "context_lens": np.int32([40])}
    attention.plan(**lengths, block_table=cache.table.host, stream=stream)
    query, out = cache.shared(np.ones((1, 8, 128))), cache.shared(np.ones((1, 8, 128)))
    with pytest.raises(ValueError, match=said):
        attention.run(changes.get("layer", 0), query.device, out.device, block_table=cache.table.device, stream=stream)
    attention.close()


def test_one_row_may_have_any_stride(make: Make, stream: Any) -> None:
    """torch gives an axis of one element whatever stride it likes."""

    class OneRow:
        def __init__(self, view: Any, stride: int) -> None:
            self.__cuda_array_interface__ = view.__cuda_array_interface__ | {"strides": (stride, 256, 2)}

    cache = make(MemoryKind.PINNED, Shape(), (1,))
    one, rows = np.int32([1]), cache.rows(np.random.default_rng(12), 1)
    query, key, value = (cache.shared(values).device for values in rows)
    out = cache.shared(np.full_like(rows.query, np.nan))
    at = {"seqs": cache.arena.array(np.int32([0])).device, "positions": cache.arena.array(np.int32([0])).device}
    append_kv(cache.kv, 1, OneRow(key, 2), OneRow(value, 0), **at, block_table=cache.table.device, stream=stream)
    cache.plan(one, one)
    cache.attention.run(1, OneRow(query, 8), OneRow(out.device, 16), block_table=cache.table.device, stream=stream)
    stream.synchronize()
    assert cache.error(out.host, np.repeat(rows.value, 4, axis=1)) < TOLERANCE["float16"]


def test_host_arrays_are_refused_where_the_device_does_not_reach_them(c: Any, make: Make, stream: Any) -> None:
    cache = make(MemoryKind.DEVICE, Shape(), (40,))
    if c.pageable_memory_access(0):
        pytest.skip("this device reads ordinary host memory; torch on the CPU does without CUDA")
    lens, rows = np.zeros(5, np.int32), np.zeros((5, 2, 128), np.float16)
    with pytest.raises(ValueError, match="key lies in host memory, which device 0 does not reach"):
        append_kv(cache.kv, 0, rows, rows, seqs=lens, positions=lens, block_table=cache.table.device, stream=stream)


@pytest.mark.parametrize("kind", [MemoryKind.PINNED, MemoryKind.VMM])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_staged_copies_are_read_in_place_of_their_blocks(
    make: Make, kind: MemoryKind, num_layers: int, stream: Any
) -> None:
    """Half of the host blocks are copied into a ring and poisoned at home: the output keeps every bit."""
    cache = make(kind, Shape(), CONTEXT_LENS, host_share=0.5)
    rows, expected = whole(cache, np.random.default_rng(11), QUERY_LENS, CONTEXT_LENS)
    in_place = cache.attend(rows, layer=1)
    far, first = cache.memory.host, cache.memory.num_device_blocks
    assert far is not None
    num_blocks = first + cache.memory.num_host_blocks
    ring = replace(cache.shape.spec, num_layers=num_layers, layout=LAYER)
    slots = cache.memory.num_host_blocks // 2
    with Slab.device(slab_bytes(ring, slots)) as slab:
        slab.fill(POISON, stream=stream)
        staging = Placed(slab, slab_layout(ring, num_blocks=slots))
        staged = list(range(first, num_blocks, 2))[:slots]
        pairs = [(block - first, slot) for slot, block in enumerate(staged)]
        copy_blocks(far, staging, pairs, layers=(1, 2), target_layer=1 % num_layers, stream=stream)
        for offset, num_bytes in far.layout.ranges([a for a, _ in pairs], layers=(1, 2)).as_list():
            far.slab.fill(POISON, offset=offset, num_bytes=num_bytes, stream=stream)
        stream.synchronize()
        for slot, block in enumerate(staged):
            cache.table.host[cache.table.host == block] = num_blocks + slot
        kv = PagedKV.of(cache.memory, cache.shape.spec, dtype="float16", staging=staging)
        assert int(kv.raw.slot_address(1, num_blocks, value=False, head=0, slot=0)) == (
            slab.address + staging.layout.offset(0, 1 % num_layers)
        )
        cache.attention.close()
        cache.attention = PagedAttention(kv, num_q_heads=8, split_tokens=128)
        cache.plan(np.int32(QUERY_LENS), np.int32(CONTEXT_LENS))
        out = cache.attend(rows, layer=1)
        stream.synchronize()
    np.testing.assert_array_equal(out, in_place)
    assert cache.error(out, expected) < TOLERANCE["float16"]


def _torch() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch sees no GPU")
    return torch


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_torch_tensors_go_in_and_out(make: Make, dtype: str, stream: Any) -> None:
    """Slices of a fused projection as K and V, on torch's own memory, and torch's stream."""
    torch = _torch()
    shape = Shape(dtype)
    cache = make(MemoryKind.PINNED, shape, (100, 60))
    contexts = np.int32([100, 60])
    stream.synchronize()
    torch.manual_seed(0)
    fused = torch.randn(160, 12, 128, device="cuda").to(getattr(torch, dtype))
    query, key, value = fused[:, :8], fused[:, 8:10], fused[:, 10:]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        table = torch.tensor(cache.table.host, device="cuda")
        seqs = torch.tensor([0] * 100 + [1] * 60, device="cuda", dtype=torch.int32)
        positions = torch.tensor([*range(100), *range(60)], device="cuda", dtype=torch.int32)
        side.wait_stream(torch.cuda.default_stream())
        append_kv(cache.kv, 1, key, value, seqs=seqs, positions=positions, block_table=table, stream=side)
        lengths = {"query_lens": contexts, "context_lens": contexts}
        cache.attention.plan(**lengths, block_table=cache.table.host, stream=side)
        out = torch.full((160, 8, 128), float("nan"), device="cuda", dtype=getattr(torch, dtype))
        cache.attention.run(1, query, out, block_table=table, stream=side)
    side.synchronize()
    rows = Rows(*(x.double().cpu().numpy() for x in (query, key, value)))
    ends = np.cumsum(contexts)
    seen = [(rows.key[e - n : e], rows.value[e - n : e]) for n, e in zip(contexts, ends, strict=True)]
    expected = attention_in_float64(rows.query, contexts, seen)
    got = out.double().cpu().numpy()
    assert float(np.linalg.norm(got - expected) / np.linalg.norm(expected)) < TOLERANCE[dtype]


def test_slabs_are_torch_tensors_too(stream: Any) -> None:
    """Every kind by DLPack, managed and vmm as well: torch writes, our bytes change."""
    torch = _torch()
    for slab in (Slab.device(2 * MIB), Slab.managed(2 * MIB), Slab.vmm(4 * MIB, device_bytes=2 * MIB)):
        tensor = torch.from_dlpack(slab.view((3, 5), "bfloat16", offset=4096))
        assert (tensor.dtype, tuple(tensor.shape), tensor.device.type) == (torch.bfloat16, (3, 5), "cuda")
        tensor.copy_(torch.arange(15, device="cuda").view(3, 5))
        torch.cuda.synchronize()
        with Slab.pinned(slab.num_bytes) as staging:
            got = get(slab, slab.num_bytes, stream, staging)[4096 : 4096 + 30].view(np.uint16)
        np.testing.assert_array_equal((got.astype(np.uint32) << 16).view(np.float32), np.arange(15))
        del tensor
        slab.close()


def test_cupy_arrays_go_in(make: Make, stream: Any) -> None:
    pytest.importorskip("cupy")
    cupy = importlib.import_module("cupy")
    cache = make(MemoryKind.DEVICE, Shape(), (20,))
    rows = cache.rows(np.random.default_rng(10), 20)
    lens = np.int32([20])
    at = {"seqs": cupy.zeros(20, cupy.int32), "positions": cupy.arange(20, dtype=cupy.int32)}
    key, value, query = (cupy.asarray(x, cupy.float16) for x in (rows.key, rows.value, rows.query))
    out, table = cupy.full((20, 8, 128), cupy.nan, cupy.float16), cupy.asarray(cache.table.host)
    cupy.cuda.Device().synchronize()
    append_kv(cache.kv, 1, key, value, **at, block_table=table, stream=stream)
    cache.attention.plan(query_lens=lens, context_lens=lens, block_table=cache.table.host, stream=stream)
    cache.attention.run(1, query, out, block_table=table, stream=stream)
    stream.synchronize()
    expected = attention_in_float64(rows.query, lens, [(rows.key, rows.value)])
    assert cache.error(cupy.asnumpy(out), expected) < TOLERANCE["float16"]
