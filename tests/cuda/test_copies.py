"""Every copy path between every pair of kinds: the named blocks arrive, and no other byte changes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.cuda.slabs import POISON, get, put, random_bytes
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.memory import CopyMethod, KVMemory, Slab, TransferCounters, TwoWayCopies, copy_blocks, slab_layout
from uvm_kv.memory.copies import Placed
from uvm_kv.memory.layout import slab_bytes
from uvm_kv.types import KIB, MIB, Layout, MemoryKind

NUM_BLOCKS = 24
SPECS = {
    "64 KiB pieces": (8, 128, 16),
    "1 KiB pieces": (1, 32, 8),
    "24 KiB pieces, not a power of two": (3, 128, 16),
}
KINDS = ("device", "pinned", "managed", "vmm")


def make(kind: str, num_bytes: int) -> Slab:
    if kind == "vmm":
        return Slab.vmm(num_bytes, device_bytes=num_bytes // 2 // (2 * MIB) * (2 * MIB))
    return getattr(Slab, kind)(num_bytes)  # type: ignore[no-any-return]


def spec_of(name: str, layout: Layout) -> KVCacheSpec:
    heads, dim, block_size = SPECS[name]
    return KVCacheSpec(3, heads, dim, 2, block_size, layout)


def placed(kind: str, spec: KVCacheSpec) -> Placed:
    num_bytes = max(4 * MIB, slab_bytes(spec, NUM_BLOCKS))
    return Placed(make(kind, num_bytes), slab_layout(spec, num_blocks=NUM_BLOCKS))


@pytest.fixture
def staging() -> Iterator[Slab]:
    with Slab.pinned(32 * MIB) as made:
        yield made


@pytest.mark.parametrize("method", list(CopyMethod))
@pytest.mark.parametrize("shape", SPECS)
@pytest.mark.parametrize("target_kind", KINDS)
@pytest.mark.parametrize("source_kind", KINDS)
def test_blocks_arrive_and_nothing_else_changes(
    source_kind: str, target_kind: str, shape: str, method: CopyMethod, stream: Any, staging: Slab
) -> None:
    rng = random.Random(f"{source_kind}{target_kind}{shape}{method}")
    source = placed(source_kind, spec_of(shape, Layout.LAYER_MAJOR))
    target = placed(target_kind, spec_of(shape, rng.choice(list(Layout))))
    data = random_bytes(source.slab.num_bytes, seed=3)
    put(source.slab, data, stream, staging)
    target.slab.fill(POISON, stream=stream)
    pairs = list(zip(rng.sample(range(NUM_BLOCKS), 9), rng.sample(range(NUM_BLOCKS), 9), strict=True))
    layers = (0, 3) if rng.random() < 0.5 else (1, 2)
    copy_blocks(source, target, pairs, layers=layers, method=method, stream=stream)
    stream.synchronize()
    want = np.full(target.slab.num_bytes, POISON, dtype=np.uint8)
    size = source.layout.layer_block_bytes
    for a, b in pairs:
        for layer in range(*layers):
            begin, end = source.layout.offset(a, layer), target.layout.offset(b, layer)
            want[end : end + size] = data[begin : begin + size]
    np.testing.assert_array_equal(get(target.slab, target.slab.num_bytes, stream, staging), want)
    source.slab.close()
    target.slab.close()


@pytest.mark.parametrize("offset", [1, 4, 16])
def test_the_kernel_copies_at_any_alignment(c: Any, offset: int, stream: Any, staging: Slab) -> None:
    fields = {"num_blocks": 5, "num_layers": 1, "layer_major": True, "pieces_per_group": 5}
    layout = c.SlabLayout(**fields, layer_block_bytes=997, group_bytes=5 * 997, base_bytes=offset)
    source, target = Slab.device(2 * MIB), Slab.device(2 * MIB)
    data = random_bytes(2 * MIB, seed=4)
    put(source, data, stream, staging)
    target.fill(POISON, stream=stream)
    copy_blocks(Placed(source, layout), Placed(target, layout), [(1, 3)], method=CopyMethod.KERNEL, stream=stream)
    want = np.full(2 * MIB, POISON, dtype=np.uint8)
    want[offset + 3 * 997 : offset + 4 * 997] = data[offset + 997 : offset + 2 * 997]
    np.testing.assert_array_equal(get(target, 2 * MIB, stream, staging), want)


def test_short_runs_go_by_kernel_and_long_ones_by_batch(stream: Any) -> None:
    small, large = KVCacheSpec(1, 1, 32, 2, 8, Layout.LAYER_MAJOR), KVCacheSpec(1, 8, 128, 2, 64, Layout.LAYER_MAJOR)
    for spec, wanted in ((small, CopyMethod.KERNEL), (large, CopyMethod.BATCH)):
        source, target = placed("pinned", spec), placed("device", spec)
        used = copy_blocks(source, target, [(0, 1), (2, 5)], stream=stream)
        stream.synchronize()
        assert used is wanted


def test_copies_that_meet_are_refused_and_nothing_is_copied(stream: Any, staging: Slab) -> None:
    one = placed("device", spec_of("64 KiB pieces", Layout.LAYER_MAJOR))
    one.slab.fill(POISON, stream=stream)
    for pairs in ([(0, 1), (1, 2)], [(0, 2), (1, 2)], [(3, 3)]):
        with pytest.raises(ValueError, match="overlap"):
            copy_blocks(one, one, pairs, stream=stream)
    assert (get(one.slab, one.slab.num_bytes, stream, staging) == POISON).all()


def test_the_legacy_stream_is_refused() -> None:
    one = placed("device", spec_of("64 KiB pieces", Layout.LAYER_MAJOR))
    with pytest.raises(ValueError, match="legacy default stream"):
        copy_blocks(one, one, [(0, 1)], stream=0)


def test_both_directions_at_once(stream: Any, staging: Slab) -> None:
    """Two copies of each half pass each other on two streams; the counters know both."""
    spec = KVCacheSpec(4, 8, 128, 2, 64, Layout.BLOCK_MAJOR)
    memory = KVMemory(MemoryKind.PINNED, spec, 16, 16)
    assert memory.host is not None
    near, far = random_bytes(memory.device.slab.num_bytes, 5), random_bytes(memory.host.slab.num_bytes, 6)
    put(memory.device.slab, near, stream, staging)
    put(memory.host.slab, far, stream, staging)
    both = TwoWayCopies(memory.device, memory.host)
    events = [both.copy_in([(b, b + 8) for b in range(8)]), both.copy_out([(b, b + 8) for b in range(8)])]
    for event in events:
        event.synchronize()
    half = 8 * spec.block_bytes
    got_near = get(memory.device.slab, 2 * half, stream, staging)
    got_far = get(memory.host.slab, 2 * half, stream, staging)
    np.testing.assert_array_equal(got_near, np.concatenate([near[:half], far[:half]]))
    np.testing.assert_array_equal(got_far, np.concatenate([far[:half], near[:half]]))
    totals = both.counters.totals(wait=True)
    assert {label: (t.num_calls, t.num_bytes) for label, t in totals.items()} == {"h2d": (1, half), "d2h": (1, half)}
    assert all(0 < total.ns < 10**9 for total in totals.values())
    memory.close()


def test_a_copy_waits_for_the_one_it_is_told_of(stream: Any, staging: Slab) -> None:
    """A copy in and a copy out: only the second one is waited for."""
    memory = KVMemory(MemoryKind.PINNED, KVCacheSpec(2, 8, 128, 2, 64, Layout.BLOCK_MAJOR), 4, 4)
    assert memory.host is not None
    size = memory.host.layout.offset(1, 0)
    data = random_bytes(memory.host.slab.num_bytes, 8)
    put(memory.host.slab, data, stream, staging)
    both = TwoWayCopies(memory.device, memory.host)
    both.copy_out([(1, 2)], after=both.copy_in([(0, 1)])).synchronize()
    data[2 * size : 3 * size] = data[:size]
    np.testing.assert_array_equal(get(memory.host.slab, data.size, stream, staging), data)
    memory.close()


def test_counters_wait_only_when_told(stream: Any) -> None:
    spec = KVCacheSpec(4, 8, 128, 2, 64, Layout.BLOCK_MAJOR)
    source, target = placed("pinned", spec), placed("device", spec)
    counters = TransferCounters()
    for _ in range(3):
        counters.copy_blocks("h2d", source, target, [(0, 0), (1, 1)], stream=stream)
    assert counters.totals(wait=True)["h2d"][:2] == (3, 6 * spec.block_bytes)
    assert counters.totals(wait=False)["h2d"].num_calls == 3


def test_counters_do_not_gather_events(c: Any, stream: Any) -> None:
    spec = KVCacheSpec(1, 1, 32, 2, 8, Layout.LAYER_MAJOR)
    source, target = placed("pinned", spec), placed("device", spec)
    counters, layouts = c.TransferCounters(), {"source": source.layout, "target": target.layout}
    runs = c.copy_runs(**layouts, blocks=[(0, 1)], layers=(0, 1))
    for _ in range(200):
        where = {"source": source.slab.raw, "target": target.slab.raw, "stream": stream.handle}
        counters.copy("h2d", **where, runs=runs, method=3)
        stream.synchronize()
    assert counters.num_pending <= 65
    assert counters.totals(wait=True)["h2d"].num_calls == 200


@pytest.mark.parametrize("kind", list(MemoryKind))
@pytest.mark.parametrize("layout", list(Layout))
def test_blocks_of_both_tiers_lie_apart(kind: MemoryKind, layout: Layout) -> None:
    spec = KVCacheSpec(3, 8, 128, 2, 16, layout)
    host = 0 if kind is MemoryKind.DEVICE else 7
    memory = KVMemory(kind, spec, 9, host)
    size = spec.layer_block_bytes
    at = sorted(memory.address(block, layer) for block in range(9 + host) for layer in range(3))
    assert all(b - a >= size for a, b in itertools.pairwise(at))
    slabs = {memory.device.slab, *([memory.host.slab] if memory.host else [])}
    inside = [any(s.address <= a and a + size <= s.address + s.num_bytes for s in slabs) for a in at]
    assert all(inside)
    memory.close()


def test_a_run_is_not_cut_by_the_parameter_limit(c: Any, stream: Any, staging: Slab) -> None:
    """More than 128 runs take several launches."""
    size = 4 * KIB
    fields = {"num_layers": 1, "layer_block_bytes": size, "layer_major": True, "base_bytes": 0}
    layout = c.SlabLayout(**fields, num_blocks=512, pieces_per_group=512, group_bytes=512 * size)
    source, target = Placed(Slab.pinned(2 * MIB), layout), Placed(Slab.device(2 * MIB), layout)
    data = random_bytes(2 * MIB, seed=7)
    put(source.slab, data, stream, staging)
    target.slab.fill(POISON, stream=stream)
    pairs = [(block, block) for block in range(0, 512, 2)]
    copy_blocks(source, target, pairs, method=CopyMethod.KERNEL, stream=stream)
    got = get(target.slab, 2 * MIB, stream, staging).reshape(512, size)
    np.testing.assert_array_equal(got[::2], data.reshape(512, size)[::2])
    assert (got[1::2] == POISON).all()
