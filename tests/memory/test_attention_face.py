"""The kernels' Python face where there is no GPU: addresses, plans, and every check that precedes the driver."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.memory import (
    ExtensionMissingError,
    PagedAttention,
    PagedKV,
    append_kv,
    decode_workspace_bytes,
    extension,
    num_devices,
)
from uvm_kv.memory import plan_capacity as capacity_of
from uvm_kv.memory.layout import slab_layout
from uvm_kv.types import MIB, Layout

NEAR, FAR = 1 << 40, 3 << 40
DEVICE_BLOCKS, HOST_BLOCKS = 30, 12


@pytest.fixture(scope="module")
def c() -> Any:
    try:
        return extension()
    except ExtensionMissingError as missing:
        if os.environ.get("CI") and not os.environ.get("UVM_KV_NO_CUDA"):
            raise
        pytest.skip(str(missing))


def view(c: Any, spec: KVCacheSpec, *, far: int | None = FAR, dtype: str = "float16", **changes: Any) -> PagedKV:
    """Two tiers at addresses that nobody touches."""
    fields = {
        "near": slab_layout(spec, num_blocks=DEVICE_BLOCKS, base_bytes=2 * MIB),
        "near_slab": NEAR,
        "far": None if far is None else slab_layout(spec, num_blocks=HOST_BLOCKS),
        "far_slab": far or 0,
        "staged": None,
        "staged_slab": 0,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "block_size": spec.block_size,
        "dtype": dtype,
        "device": 0,
    }
    return PagedKV(c.KVView(**(fields | changes)), spec, dtype, 0)


def spec_of(layout: Layout = Layout.LAYER_MAJOR, *, kv_heads: int = 2, head_dim: int = 64, block: int = 16) -> Any:
    return KVCacheSpec(3, kv_heads, head_dim, 2, block, layout)


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize(("kv_heads", "head_dim", "block"), [(2, 64, 16), (8, 128, 16), (3, 80, 8), (32, 256, 128)])
def test_kernels_and_copies_agree_where_a_block_lies(
    c: Any, layout: Layout, kv_heads: int, head_dim: int, block: int
) -> None:
    """Groups of several pieces, one piece, and pieces larger than a chunk."""
    spec = spec_of(layout, kv_heads=kv_heads, head_dim=head_dim, block=block)
    kv = view(c, spec)
    assert (kv.raw.num_layers, kv.raw.num_blocks) == (3, DEVICE_BLOCKS + HOST_BLOCKS)
    near = slab_layout(spec, num_blocks=DEVICE_BLOCKS, base_bytes=2 * MIB)
    far = slab_layout(spec, num_blocks=HOST_BLOCKS)
    for index in range(DEVICE_BLOCKS + HOST_BLOCKS):
        base, layout_of, local = (NEAR, near, index) if index < DEVICE_BLOCKS else (FAR, far, index - DEVICE_BLOCKS)
        for layer in range(3):
            begin = base + layout_of.offset(local, layer)
            assert kv.raw.slot_address(layer, index, value=False, head=0, slot=0) == begin
            row = head_dim * 2
            last = kv.raw.slot_address(layer, index, value=True, head=kv_heads - 1, slot=block - 1)
            assert last == begin + spec.layer_block_bytes - row
            second = kv.raw.slot_address(layer, index, value=False, head=1, slot=2)
            assert second == begin + (block + 2) * row


@pytest.mark.parametrize(
    ("spec", "changes", "said"),
    [
        (spec_of(block=24), {}, "block_size=24; the kernels take 8, 16, 32, 64 or 128"),
        (spec_of(), {"dtype": "int8"}, "KV of dtype int8; the kernels take float16, bfloat16 or float32"),
        (spec_of(), {"head_dim": 128}, "the layout says 8192 B"),
        (spec_of(head_dim=4), {}, "a row must be a multiple of 16 bytes"),
        (spec_of(), {"near_slab": NEAR + 8}, "base and strides must be multiples of 16 bytes"),
    ],
)
def test_a_view_refuses_what_no_kernel_reads(c: Any, spec: KVCacheSpec, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        view(c, spec, **changes)


def test_the_ring_of_staged_copies_begins_where_it_is_told(c: Any) -> None:
    """Three layers in a ring of two places."""
    spec, base = spec_of(), 5 << 40
    ring = slab_layout(replace(spec, num_layers=2), num_blocks=4)
    kv = view(c, spec, staged=ring, staged_slab=base)
    first_id = DEVICE_BLOCKS + HOST_BLOCKS
    for first in (0, 1):
        kv.set_staged_first(first)
        for layer in range(3):
            for slot in range(4):
                place = (first + layer) % 2
                at = kv.raw.slot_address(layer, first_id + slot, value=False, head=0, slot=0)
                assert at == base + ring.offset(slot, place)
    for place in (2, -1):
        with pytest.raises(ValueError, match=f"staged_first={place} of a ring of 2"):
            kv.set_staged_first(place)


@dataclass
class Batch:
    query_lens: Any
    context_lens: Any
    block_table: Any
    indptr: Any = None
    block_on_host: Any = None


def filled(c: Any, kv: PagedKV, batch: Batch, *, num_q_heads: int = 4, capacity: Any = None) -> np.ndarray[Any, Any]:
    lengths = {"query_lens": np.int32(batch.query_lens), "context_lens": np.int32(batch.context_lens)}
    shape = {"num_q_heads": num_q_heads, "split_tokens": 0}
    capacity = capacity or c.count_plan(kv.raw, **shape, **lengths)
    out = np.full(capacity.plan_bytes, 0xA5, np.uint8)
    indptr = None if batch.indptr is None else np.int32(batch.indptr)
    flags = None if batch.block_on_host is None else np.asarray(batch.block_on_host, np.uint8)
    table = {"block_table": np.int32(batch.block_table), "indptr": indptr, "block_on_host": flags}
    c.fill_plan(kv.raw, **shape, **lengths, **table, capacity=capacity, out=out)
    return out


def num_host_items(plan: np.ndarray[Any, Any]) -> int:
    return int(plan[:8].view(np.int32).sum())


def test_pieces_of_the_host_tier_are_known_by_their_blocks_or_by_flags(c: Any) -> None:
    near, far = [0, 1], [2, DEVICE_BLOCKS]
    flags = np.zeros(DEVICE_BLOCKS + HOST_BLOCKS, np.uint8)
    flags[1] = 1
    for table, blocks, on_host in ((near, None, 0), (far, None, 1), (near, flags, 1), (far, flags, 0)):
        assert num_host_items(filled(c, view(c, spec_of()), Batch([1], [20], [table], None, blocks))) == on_host
    csr = Batch([1, 0, 1], [20, 7, 3], [*near, DEVICE_BLOCKS], [0, 2, 2, 3])
    assert num_host_items(filled(c, view(c, spec_of()), csr)) == 1
    one = view(c, spec_of(), far=None)
    assert one.raw.num_blocks == DEVICE_BLOCKS
    assert num_host_items(filled(c, one, Batch([1], [20], [near]))) == 0


def test_a_staged_copy_has_no_flag(c: Any) -> None:
    """Its id lies behind the flags, where nothing is read: a staged copy lies on the device."""
    num_blocks = DEVICE_BLOCKS + HOST_BLOCKS
    staged = {"staged": slab_layout(spec_of(), num_blocks=4), "staged_slab": 5 << 40}
    flags = np.ones(num_blocks + 4, np.uint8)
    flags[:num_blocks] = 0
    batch = Batch([1], [20], [[0, num_blocks + 3]], None, flags[:num_blocks])
    assert num_host_items(filled(c, view(c, spec_of(), **staged), batch)) == 0


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (Batch([1], [20], [[0, 42]]), "sequence 0: block 42 of 42"),
        (Batch([1], [20], [[0, -1]]), "sequence 0: block -1 of 42"),
        (Batch([1], [33], [[0, 1]]), "context_len=33 takes 3 blocks; its row of the block table has 2"),
        (Batch([1, 1], [16, 17], [0, 1], [0, 1, 2]), "sequence 1: context_len=17 takes 2 blocks; .* has 1"),
        (Batch([2], [1], [[0]]), "sequence 0: query_len=2, context_len=1"),
        (Batch([1, 1], [1], [[0]]), "2 query lengths for 1 context lengths"),
        (Batch([1], [1], [[0], [1]]), r"a block table of 1 sequences must be int32 \[sequences, blocks\]"),
        (Batch([1], [1], [0], [0]), r"indptr int32 \[2\]"),
        (Batch([1], [1], [0], [0, 2]), "indptr ends behind the block table"),
        (Batch([1], [1], [0], [1, 0]), "never fall"),
        (Batch([1], [1], [[0]], None, [1]), "block_on_host has 1 flags for 42 blocks"),
    ],
)
def test_a_plan_refuses_blocks_and_lengths_that_do_not_fit(c: Any, batch: Batch, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        filled(c, view(c, spec_of()), batch)


def test_a_resting_sequence_needs_no_blocks(c: Any) -> None:
    filled(c, view(c, spec_of()), Batch([0, 1], [500, 1], [[-1], [3]]))


def test_a_fixed_capacity_is_a_limit(c: Any) -> None:
    kv, lengths = view(c, spec_of()), {"query_lens": np.int32([1]), "context_lens": np.int32([600])}
    large = capacity_of(kv, num_q_heads=4, **lengths)
    assert (large.narrow_items, large.wide_items, large.merges) == (2, 0, 1)
    assert large.workspace_bytes(64) == 256 + 256 + large.partial_rows * 64 * 4
    filled(c, kv, Batch([1], [100], [range(7)]), capacity=large)
    small = capacity_of(kv, num_q_heads=4, query_lens=np.int32([1]), context_lens=np.int32([100]))
    with pytest.raises(ValueError, match=r"the plan takes 2 narrow .* the capacity is 1, 0, 0 and 0"):
        filled(c, kv, Batch([1], [600], [list(range(38))]), capacity=small)


def test_lengths_must_be_integers(c: Any) -> None:
    with pytest.raises(TypeError, match="Cannot cast"):
        capacity_of(view(c, spec_of()), num_q_heads=4, query_lens=np.float32([1]), context_lens=np.int32([2]))


@pytest.mark.parametrize("length", [2**32 + 16, -(2**31) - 1, np.uint64(2**63)])
def test_lengths_beyond_int32_are_not_wrapped(c: Any, length: Any) -> None:
    lengths = {"query_lens": np.int64([1]), "context_lens": np.array([length])}
    with pytest.raises(ValueError, match=f"lengths and blocks are int32; given are {length} to {length}"):
        capacity_of(view(c, spec_of()), num_q_heads=4, **lengths)
    lengths["context_lens"] = np.array([16], lengths["context_lens"].dtype)
    assert capacity_of(view(c, spec_of()), num_q_heads=4, **lengths).narrow_items == 1


@pytest.mark.parametrize("max_tokens", [100, 1025, 131072])
def test_the_workspace_of_decode_steps_is_known_without_memory(c: Any, max_tokens: int) -> None:
    spec = spec_of(kv_heads=8, head_dim=128)
    lengths = {"query_lens": np.ones(64, np.int32), "context_lens": np.full(64, max_tokens, np.int32)}
    exact = capacity_of(view(c, spec), num_q_heads=32, **lengths).workspace_bytes(128)
    told = decode_workspace_bytes(spec, dtype="float16", num_q_heads=32, num_seqs=64, max_tokens=max_tokens)
    assert told % (2 * MIB) == 0
    assert exact <= told < exact + 2 * MIB


def test_attention_before_a_plan_is_refused(c: Any) -> None:
    attention = PagedAttention(view(c, spec_of()), num_q_heads=4)
    with pytest.raises(ValueError, match=r"run\(\) before plan\(\)"):
        attention.run(0, None, None, block_table=None, stream=2)
    attention.close()


class OnDevice:
    """Device memory by __cuda_array_interface__, at an address that nobody touches."""

    def __init__(self, shape: tuple[int, ...], typestr: str = "<f2", strides: tuple[int, ...] | None = None) -> None:
        at = {"data": (NEAR, False), "shape": shape, "typestr": typestr, "strides": strides, "version": 3}
        self.__cuda_array_interface__ = at


def append(kv: PagedKV, **changes: Any) -> None:
    arguments: dict[str, Any] = {
        "layer": 0,
        "key": OnDevice((5, 2, 64)),
        "value": OnDevice((5, 2, 64), strides=(1024, 128, 2)),
        "seqs": OnDevice((5,), "<i4"),
        "positions": OnDevice((5,), "<i4"),
        "block_table": OnDevice((3, 4), "<i4"),
        "stream": 64,
    }
    append_kv(kv, **(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"layer": 3}, ValueError, "layer 3 of 3"),
        ({"key": OnDevice((5, 2, 32))}, ValueError, r"key is float16 \[5, 2, 32\]; it must be float16 \[\*, 2, 64\]"),
        ({"key": OnDevice((5, 2, 64), "<f4")}, ValueError, "key is float32 .* it must be float16"),
        (
            {"value": OnDevice((4, 2, 64))},
            ValueError,
            r"value is float16 \[4, 2, 64\]; it must be float16 \[5, 2, 64\]",
        ),
        ({"key": OnDevice((5, 2, 64), strides=(256, 2, 4))}, ValueError, "every axis but the first must be contiguous"),
        ({"seqs": OnDevice((5,), "<i8")}, ValueError, r"seqs is int64 \[5\]; it must be int32 \[5\]"),
        ({"positions": OnDevice((5,), "<i4", (8,))}, ValueError, "positions has strides"),
        ({"block_table": OnDevice((4,), "<i4")}, ValueError, r"it must be int32 \[\*, \*\]"),
        ({"key": [1, 2]}, TypeError, "key is no device array: it has neither DLPack nor __cuda_array_interface__"),
        ({"stream": 0}, ValueError, "legacy default stream"),
        ({"stream": None}, TypeError, "is no CUDA stream"),
    ],
)
def test_arrays_are_checked_before_the_driver_is_asked(
    c: Any, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        append(view(c, spec_of()), **changes)


def test_sound_arrays_reach_the_driver(c: Any) -> None:
    if num_devices() > 0:
        pytest.skip("there is a GPU here: tests/cuda")
    with pytest.raises(c.CudaError, match="cudaGetDevice"):
        append(view(c, spec_of()))


def test_the_cache_has_one_dtype() -> None:
    with pytest.raises(ValueError, match="dtype=float32, and the cache has elements of 2 bytes"):
        PagedKV.of(None, spec_of(), dtype="float32")  # type: ignore[arg-type]
