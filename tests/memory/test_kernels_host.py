"""The CUDA kernels' shared code on the CPU: index arithmetic, split planning, pieces and merge against float64.

The warps of the attention kernel run here lane by lane (cuda_ext/tests/host_kernels.cpp), over slabs in which every
slot that no token uses is NaN. The same calls run once more under ASan and UBSan, in a process of their own: this file
as a script.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "cuda_ext" / "tests" / "host_kernels.cpp"
FP16, BF16, FP32, FP8, INT8 = range(5)
LAYER_MAJOR, BLOCK_MAJOR = range(2)
NO_SPLIT = 2**31 - 1
OK, INVALID, UNSUPPORTED = range(3)
CHUNK_BYTES = 2 << 20
WORK_ITEM = np.dtype(
    [(name, "<i4") for name in ("seq", "query_row", "first_position", "num_rows", "begin", "end", "partial_row", "_")]
)


class HkCache(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("dtype", "layout", "num_layers", "num_kv_heads", "head_dim", "block_size")),
        ("split_block", c_int32),
        ("chunk_bytes", c_int64),
        ("device", c_void_p),
        ("num_device_blocks", c_int64),
        ("host", c_void_p),
        ("num_host_blocks", c_int64),
    )


class HkBatch(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("num_seqs", "num_q_heads", "split_tokens", "first_host_block")),
        *((name, c_void_p) for name in ("query_lens", "context_lens", "blocks", "indptr")),
        ("row_stride", c_int64),
        ("block_on_host", c_void_p),
        ("num_flags", c_int64),
    )


def compile_host_kernels(target: Path, *flags: str) -> Path:
    command = ["g++", "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *flags]
    include = ROOT / "cuda_ext" / "include"
    subprocess.run([*command, f"-I{include}", str(SOURCE), "-o", str(target)], check=True)
    return target


def load(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    cache, batch = POINTER(HkCache), POINTER(HkBatch)
    lib.hk_check.argtypes = [cache, c_char_p]
    lib.hk_slot.argtypes = [cache, *[c_int] * 5, POINTER(c_int)]
    lib.hk_slot.restype = c_int64
    lib.hk_to_float.argtypes = lib.hk_from_float.argtypes = [c_int, c_void_p, c_void_p, c_int64]
    lib.hk_count_plan.argtypes = [cache, batch, c_void_p, c_char_p]
    lib.hk_fill_plan.argtypes = [cache, batch, c_void_p, c_void_p, c_int64, c_char_p]
    lib.hk_attention.argtypes = [
        *(cache, batch, c_void_p, c_int, ctypes.c_float, c_void_p, c_void_p, c_int64, c_int, c_int, c_char_p)
    ]
    lib.hk_append.argtypes = [cache, batch, c_int, c_int32, *[c_void_p] * 4, c_int64, c_int64]
    lib.hk_merge.argtypes = [c_void_p, c_void_p, c_int, c_int, c_void_p, c_void_p]
    return lib


def pointer(array: Array | None) -> int | None:
    return None if array is None else array.ctypes.data


# ---- what is stored: float32 as such, the others as their bits


def to_storage(lib: ctypes.CDLL, dtype: int, values: Array) -> Array:
    values = np.ascontiguousarray(values, np.float32)
    if dtype == FP32:
        return values
    out = np.empty(values.shape, np.uint16)
    lib.hk_from_float(dtype, pointer(values), pointer(out), values.size)
    return out


def from_storage(lib: ctypes.CDLL, dtype: int, stored: Array) -> Array:
    if dtype == FP32:
        return stored.astype(np.float64)
    stored = np.ascontiguousarray(stored)
    out = np.empty(stored.shape, np.float32)
    lib.hk_to_float(dtype, pointer(stored), pointer(out), stored.size)
    with np.errstate(invalid="ignore"):  # numpy minds signalling NaN
        return out.astype(np.float64)


# ---- a cache and a batch over it


@dataclass(frozen=True)
class Geometry:
    dtype: int = FP32
    layout: int = LAYER_MAJOR
    num_layers: int = 2
    num_kv_heads: int = 2
    num_q_heads: int = 4
    head_dim: int = 64
    block_size: int = 16
    chunk_bytes: int = 0
    split_tokens: int = 128

    @property
    def element_bytes(self) -> int:
        return {FP16: 2, BF16: 2, FP32: 4}.get(self.dtype, 1)

    @property
    def layer_block_bytes(self) -> int:
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * self.element_bytes

    def slab_bytes(self, num_blocks: int) -> int:
        """Whole chunks for every layer, or for every block."""
        if not self.chunk_bytes:
            return num_blocks * self.num_layers * self.layer_block_bytes
        layer_major = self.layout == LAYER_MAJOR
        piece = self.layer_block_bytes * (1 if layer_major else self.num_layers)
        groups = -(-num_blocks // max(1, self.chunk_bytes // piece)) * -(-piece // self.chunk_bytes)
        return groups * self.chunk_bytes * (self.num_layers if layer_major else 1)


@dataclass
class Case:
    """Sequences with their new tokens and their blocks; blocks from `num_device` on lie in the host slab."""

    geometry: Geometry
    query_lens: Array
    context_lens: Array
    tables: list[Array]
    num_blocks: int
    num_device: int
    csr: bool = False
    one_range: bool = False
    """Managed or vmm memory: one slab, tiers known to the plan alone."""
    flags: Array | None = None
    keys: list[Array] = field(default_factory=list)
    """Per sequence [token, kv_head, dim], what the storage type holds."""
    values: list[Array] = field(default_factory=list)
    query: Array = field(default_factory=lambda: np.empty(0))
    device: Array = field(default_factory=lambda: np.empty(0, np.uint8))
    host: Array = field(default_factory=lambda: np.empty(0, np.uint8))
    indptr: Array = field(default_factory=lambda: np.empty(0))
    blocks: Array = field(default_factory=lambda: np.empty(0))

    def cache(self) -> HkCache:
        g = self.geometry
        one = self.one_range
        return HkCache(
            *(g.dtype, g.layout, g.num_layers, g.num_kv_heads, g.head_dim, g.block_size),
            *(NO_SPLIT if one else self.num_device, g.chunk_bytes),
            *(pointer(self.device), self.num_blocks if one else self.num_device),
            *(None if one else pointer(self.host), 0 if one else self.num_blocks - self.num_device),
        )

    def batch(self) -> HkBatch:
        g = self.geometry
        self._lay_tables()
        return HkBatch(
            *(len(self.tables), g.num_q_heads, g.split_tokens),
            NO_SPLIT if self.flags is not None else self.num_device,
            *(pointer(self.query_lens), pointer(self.context_lens), pointer(self.blocks)),
            pointer(self.indptr) if self.csr else None,
            0 if self.csr else self.blocks.shape[1],
            *(pointer(self.flags), 0 if self.flags is None else len(self.flags)),
        )

    def _lay_tables(self) -> None:
        if self.csr:
            self.indptr = np.cumsum([0, *map(len, self.tables)]).astype(np.int32)
            self.blocks = np.concatenate([*self.tables, np.empty(0, np.int32)]).astype(np.int32)
            return
        self.blocks = np.full((len(self.tables), 1 + max(map(len, self.tables))), -7, np.int32)
        for row, table in zip(self.blocks, self.tables, strict=True):
            row[: len(table)] = table

    def fill_slabs(self) -> None:
        """Both slabs as NaN: all bits set, in every dtype."""
        g = self.geometry
        num_device = self.num_blocks if self.one_range else self.num_device
        self.device = np.full(max(16, g.slab_bytes(num_device)), 0xFF, np.uint8)
        self.host = np.full(max(16, g.slab_bytes(self.num_blocks - num_device)), 0xFF, np.uint8)


def make_case(
    rng: np.random.Generator,
    geometry: Geometry,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    *,
    host_share: float = 0.4,
    **options: Any,
) -> Case:
    counts = [-(-n // geometry.block_size) for n in context_lens]
    num_blocks = sum(counts) + 3
    ids = rng.permutation(num_blocks).astype(np.int32)
    tables = np.split(ids[: sum(counts)], np.cumsum(counts)[:-1])
    num_device = round(num_blocks * (1 - host_share))
    lens = (np.asarray(query_lens, np.int32), np.asarray(context_lens, np.int32))
    return Case(geometry, *lens, list(tables), num_blocks, num_device, **options)


def fill(lib: ctypes.CDLL, case: Case, rng: np.random.Generator, *, layer: int = 1, scale: float = 1.0) -> None:
    """Random K and V through the append kernel's code; the rest of the slabs is NaN."""
    g = case.geometry
    case.fill_slabs()
    batch = case.batch()
    total = int(case.context_lens.sum())
    # Rows as they come out of a fused projection: K and V side by side, further apart than they are long.
    rows = to_storage(lib, g.dtype, rng.standard_normal((total, 2, g.num_kv_heads, g.head_dim)) * scale)
    seqs = np.repeat(np.arange(len(case.tables), dtype=np.int32), case.context_lens)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in case.context_lens])
    order = rng.permutation(total)
    shuffled = np.ascontiguousarray(rows[order])
    seqs_in, positions_in = np.ascontiguousarray(seqs[order]), np.ascontiguousarray(positions[order])
    stride = shuffled.strides[0]
    key, value = pointer(shuffled), shuffled.ctypes.data + shuffled.strides[1]
    lib.hk_append(
        *(byref(case.cache()), byref(batch), layer, total, pointer(seqs_in), pointer(positions_in)),
        *(key, value, stride, stride),
    )
    stored = from_storage(lib, g.dtype, rows)
    ends = np.cumsum(case.context_lens)
    case.keys = [stored[e - n : e, 0] for n, e in zip(case.context_lens, ends, strict=True)]
    case.values = [stored[e - n : e, 1] for n, e in zip(case.context_lens, ends, strict=True)]
    shape = (int(case.query_lens.sum()), g.num_q_heads, g.head_dim)
    case.query = to_storage(lib, g.dtype, rng.standard_normal(shape) * scale)


def count(lib: ctypes.CDLL, case: Case) -> Array:
    """Narrow items, wide items, merges, rows of partials, bytes of the plan."""
    counts, text = np.zeros(5, np.int64), ctypes.create_string_buffer(240)
    assert lib.hk_count_plan(byref(case.cache()), byref(case.batch()), pointer(counts), text) == OK, text.value
    return counts


def run(
    lib: ctypes.CDLL,
    case: Case,
    *,
    layer: int = 1,
    num_ctas: int = 1,
    num_host_workers: int = 1,
    counts: Array | None = None,
) -> Array:
    g = case.geometry
    counts = count(lib, case) if counts is None else counts
    out = np.full(case.query.shape, 0xFFFF if case.query.dtype == np.uint16 else np.nan, case.query.dtype)
    text = ctypes.create_string_buffer(240)
    code = lib.hk_attention(
        *(byref(case.cache()), byref(case.batch()), pointer(counts), layer, g.head_dim**-0.5),
        *(pointer(case.query), pointer(out)),
        *(g.num_q_heads * g.head_dim * g.element_bytes, num_ctas, num_host_workers, text),
    )
    assert code == OK, text.value
    return out


def reference(lib: ctypes.CDLL, case: Case) -> Array:
    """float64, dense, causal by position."""
    g = case.geometry
    query = from_storage(lib, g.dtype, case.query)
    out, start = np.zeros(query.shape), 0
    for num_new, total, keys, values in zip(case.query_lens, case.context_lens, case.keys, case.values, strict=True):
        heads = np.arange(g.num_q_heads) // (g.num_q_heads // g.num_kv_heads)
        q = query[start : start + num_new]
        scores = np.einsum("thd,jhd->thj", q, keys[:, heads]) * g.head_dim**-0.5
        position = np.arange(total - num_new, total)[:, None, None]
        scores = np.where(np.arange(total) <= position, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[start : start + num_new] = np.einsum("thj,jhd->thd", weights, values[:, heads])
        start += num_new
    return out


TOLERANCE = {FP16: 6e-4, BF16: 5e-3, FP32: 2e-6}
"""Norm of the error over the norm of the result: half a unit in the last place of the stored output, and a little."""


def error_of(lib: ctypes.CDLL, case: Case, out: Array) -> float:
    expected = reference(lib, case)
    got = from_storage(lib, case.geometry.dtype, out)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def random_case(rng: np.random.Generator, geometry: Geometry, *, num_seqs: int = 4, most: int = 500) -> Case:
    """Decode, speculative and prefill rows in one ragged batch, one sequence resting."""
    contexts = rng.integers(1, most, num_seqs)
    contexts[0] = 1
    query_lens = [int(rng.choice([1, 1, 2, 5, 16, 17, 40])) for _ in contexts]
    query_lens = [min(q, int(n)) for q, n in zip(query_lens, contexts, strict=True)]
    if num_seqs > 2:
        query_lens[2] = 0
    return make_case(
        *(rng, geometry, query_lens, [int(n) for n in contexts]),
        csr=bool(rng.integers(2)),
        one_range=bool(rng.integers(2)),
        host_share=float(rng.choice([0.0, 0.4, 1.0])),
    )


SHAPES = (
    # dtype, head_dim, query heads, KV heads, block size, layout, chunk bytes
    (FP16, 128, 2, 2, 16, LAYER_MAJOR, 0),
    (FP16, 128, 8, 2, 16, BLOCK_MAJOR, 0),
    (FP16, 128, 16, 2, 32, LAYER_MAJOR, CHUNK_BYTES),
    (FP16, 64, 2, 2, 8, BLOCK_MAJOR, CHUNK_BYTES),
    (FP16, 64, 6, 2, 128, LAYER_MAJOR, 0),
    (FP16, 80, 2, 2, 16, LAYER_MAJOR, CHUNK_BYTES // 32),
    (FP16, 96, 8, 2, 64, BLOCK_MAJOR, CHUNK_BYTES // 8),
    (FP16, 256, 4, 1, 16, LAYER_MAJOR, 0),
    (BF16, 128, 8, 2, 16, LAYER_MAJOR, 0),
    (BF16, 64, 14, 2, 16, BLOCK_MAJOR, 0),
    (BF16, 80, 12, 2, 8, LAYER_MAJOR, 0),
    (BF16, 128, 40, 1, 16, LAYER_MAJOR, 0),
    (FP32, 128, 3, 3, 16, BLOCK_MAJOR, 0),
    (FP32, 64, 8, 2, 16, LAYER_MAJOR, 0),
    (FP32, 80, 4, 2, 16, BLOCK_MAJOR, 0),
    (FP32, 96, 2, 1, 8, LAYER_MAJOR, 0),
    (FP32, 256, 8, 2, 16, BLOCK_MAJOR, CHUNK_BYTES // 16),
    (FP32, 64, 71, 1, 32, LAYER_MAJOR, 0),
)


def geometry_of(shape: tuple[int, ...]) -> Geometry:
    dtype, head_dim, num_q_heads, num_kv_heads, block_size, layout, chunk_bytes = shape
    return Geometry(dtype, layout, 2, num_kv_heads, num_q_heads, head_dim, block_size, chunk_bytes)


def check_shape(lib: ctypes.CDLL, shape: tuple[int, ...], seed: int, most: int = 400) -> None:
    rng = np.random.default_rng(seed)
    case = random_case(rng, geometry_of(shape), most=most)
    fill(lib, case, rng)
    num_ctas = int(rng.integers(1, 3))
    error = error_of(lib, case, run(lib, case, num_ctas=num_ctas, num_host_workers=int(rng.integers(0, 6))))
    assert error < TOLERANCE[case.geometry.dtype], (shape, seed, error)


# ---- plans


@dataclass
class Plan:
    header: Array
    items: list[Array]
    merges: Array
    counts: Array


def plan_of(lib: ctypes.CDLL, case: Case, counts: Array | None = None) -> Plan:
    text = ctypes.create_string_buffer(240)
    counts = count(lib, case) if counts is None else counts
    cache, batch = case.cache(), case.batch()
    buffer = np.full(int(counts[4]), 0xFF, np.uint8)
    code = lib.hk_fill_plan(byref(cache), byref(batch), pointer(counts), pointer(buffer), len(buffer), text)
    assert code == OK, text.value
    header = buffer[:64].view(np.int32)
    ends = 64 + np.cumsum([0, counts[0] * 32, counts[1] * 32, counts[2] * 16])
    narrow, wide, merges = (buffer[a:b] for a, b in itertools.pairwise(ends))
    items = [x.view(WORK_ITEM)[: header[2 + p]] for p, x in enumerate((narrow, wide))]
    return Plan(header, items, merges.view(np.int32).reshape(-1, 4)[: header[4]], counts)


def ranges(items: Array) -> list[tuple[int, ...]]:
    """What an item computes, without its place in the workspace."""
    fields = ("seq", "query_row", "first_position", "num_rows", "begin", "end")
    return [tuple(int(item[f]) for f in fields) for item in items]


# ---- the sanitized run: this file as a script


def sanitized_main(path: str) -> None:
    """One small case of each kind, without pytest: an error of ASan or UBSan ends the process."""
    lib = load(Path(path))
    for seed, shape in enumerate(SHAPES):
        check_shape(lib, shape, seed, most=150)
    rng = np.random.default_rng(0)
    plan_of(lib, random_case(rng, Geometry(), num_seqs=12))
    print("clean")


if __name__ == "__main__":
    sanitized_main(sys.argv[1])
    sys.exit(0)


# ---- the tests; a script has no use for pytest

import pytest  # noqa: E402

from uvm_kv.kvcache.spec import KVCacheSpec  # noqa: E402
from uvm_kv.types import Layout  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here: the host kernels cannot be compiled")


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load(compile_host_kernels(tmp_path_factory.mktemp("host_kernels") / "host_kernels.so"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_every_fp16_and_bf16_converts_as_numpy_says(lib: ctypes.CDLL) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        halves = bits.view(np.float16).astype(np.float64)
        wide = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    np.testing.assert_array_equal(from_storage(lib, FP16, bits), halves)
    np.testing.assert_array_equal(from_storage(lib, BF16, bits), wide)


def test_rounding_to_fp16_and_bf16_is_to_nearest_even(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    values = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    ties = (np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float64)[:-1024]).astype(np.float32)
    middle = ((ties[:-1].astype(np.float64) + ties[1:]) / 2).astype(np.float32)
    values = np.concatenate((values, ties, middle, -middle, np.float32([65519.9, 65520, 1e-9, 3e-8, -0.0])))
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    got = to_storage(lib, FP16, values).view(np.float16)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(got[number].view(np.uint16), expected[number].view(np.uint16))

    finite = values[np.isfinite(values) & (np.abs(values) < 3e38)]
    exact = from_storage(lib, BF16, to_storage(lib, BF16, finite))
    below = (finite.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
    above = ((finite.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32).astype(np.float64)
    nearest = np.minimum(np.abs(below - finite), np.abs(above - finite))
    np.testing.assert_array_equal(np.abs(exact - finite), nearest)


@pytest.mark.parametrize("layout", [LAYER_MAJOR, BLOCK_MAJOR])
@pytest.mark.parametrize(
    ("head_dim", "block_size", "chunk_bytes"),
    [(128, 16, 0), (128, 16, CHUNK_BYTES), (80, 16, CHUNK_BYTES), (256, 128, CHUNK_BYTES), (96, 8, CHUNK_BYTES)],
)
def test_slots_lie_as_the_spec_says(
    lib: ctypes.CDLL, layout: int, head_dim: int, block_size: int, chunk_bytes: int
) -> None:
    """All slots of a slab are distinct, no piece straddles a chunk, and the slab is as large as KVCacheSpec says."""
    geometry = Geometry(FP16, layout, 3, 8, 32, head_dim, block_size, chunk_bytes)
    spec = KVCacheSpec(3, 8, head_dim, 2, block_size, (Layout.LAYER_MAJOR, Layout.BLOCK_MAJOR)[layout])
    num_blocks, num_device = 70, 30
    case = Case(geometry, np.zeros(0), np.zeros(0), [], num_blocks, num_device, device=np.zeros(16), host=np.zeros(16))
    on_host = c_int()
    seen: tuple[list[int], list[int]] = ([], [])
    for block in range(num_blocks):
        for layer in range(3):
            first = lib.hk_slot(byref(case.cache()), layer, block, 0, 0, 0, byref(on_host))
            assert on_host.value == (block >= num_device)
            seen[on_host.value].append(first)
            for which, head, slot in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 7, block_size - 1)):
                row = (which * 8 + head) * block_size + slot
                at = lib.hk_slot(byref(case.cache()), layer, block, which, head, slot, byref(on_host))
                assert at == first + row * head_dim * 2
    for starts, count in zip(seen, (num_device, num_blocks - num_device), strict=True):
        ordered = np.sort(starts)
        assert (np.diff(ordered) >= spec.layer_block_bytes).all()
        size = spec.num_chunks(count) * CHUNK_BYTES if chunk_bytes else count * spec.block_bytes
        assert ordered[0] == 0
        assert ordered[-1] + spec.layer_block_bytes <= size == geometry.slab_bytes(count)
        if chunk_bytes and spec.piece_bytes <= CHUNK_BYTES:
            first, last = ordered, ordered + spec.layer_block_bytes - 1
            assert (first // CHUNK_BYTES == last // CHUNK_BYTES).all()


@pytest.mark.parametrize("layout", [LAYER_MAJOR, BLOCK_MAJOR])
def test_slots_far_beyond_4_gib_and_2_to_the_31_elements(lib: ctypes.CDLL, layout: int) -> None:
    geometry = Geometry(FP16, layout, 80, 8, 64, 128, 16, CHUNK_BYTES)
    piece, num_blocks = geometry.layer_block_bytes, 100_000
    empty = np.zeros(0, np.int32)
    case = Case(geometry, empty, empty, [], num_blocks, num_blocks, device=np.zeros(16), host=np.zeros(16))
    on_host = c_int()
    for layer, block in ((79, 99_999), (79, 0), (0, 99_999), (40, 65_536)):
        # 32 pieces of a layer to a chunk; a block of all layers takes 2.5 chunks, so it starts at every third.
        start = (
            layer * num_blocks * piece + block * piece
            if layout == LAYER_MAJOR
            else block * 3 * CHUNK_BYTES + layer * piece
        )
        at = lib.hk_slot(byref(case.cache()), layer, block, 1, 7, 15, byref(on_host))
        assert (at, on_host.value) == (start + ((8 + 7) * 16 + 15) * 256, 0)


@pytest.mark.parametrize("layout", [LAYER_MAJOR, BLOCK_MAJOR])
def test_append_writes_its_slots_and_nothing_else(lib: ctypes.CDLL, rng: np.random.Generator, layout: int) -> None:
    geometry = Geometry(FP16, layout, 3, 2, 2, 80, 8, CHUNK_BYTES // 64)
    case = make_case(rng, geometry, [1, 1, 1], [20, 1, 9])
    fill(lib, case, rng, layer=2)
    on_host, written = c_int(), [np.zeros(len(s), bool) for s in (case.device, case.host)]
    for seq, table in enumerate(case.tables):
        for position in range(case.context_lens[seq]):
            for which, rows in enumerate((case.keys[seq], case.values[seq])):
                for head in range(2):
                    block, slot = int(table[position // 8]), position % 8
                    at = lib.hk_slot(byref(case.cache()), 2, block, which, head, slot, byref(on_host))
                    slab = case.host if on_host.value else case.device
                    got = from_storage(lib, FP16, slab[at : at + 160].view(np.uint16))
                    np.testing.assert_array_equal(got, rows[position, head])
                    written[on_host.value][at : at + 160] = True
    for slab, mask in zip((case.device, case.host), written, strict=True):
        assert (slab[~mask] == 0xFF).all()


def test_append_skips_tokens_without_a_sequence(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    case = make_case(rng, Geometry(FP32), [1], [16])
    case.fill_slabs()
    seqs, positions = np.int32([-1, -1]), np.int32([3, 4])
    rows = rng.standard_normal((2, 2, 64)).astype(np.float32)
    stride = rows.strides[0]
    arguments = (2, pointer(seqs), pointer(positions), pointer(rows), pointer(rows), stride, stride)
    lib.hk_append(byref(case.cache()), byref(case.batch()), 0, *arguments)
    assert (case.device == 0xFF).all()
    assert (case.host == 0xFF).all()


@pytest.mark.parametrize("seed", range(12))
def test_a_plan_covers_each_context_once(lib: ctypes.CDLL, seed: int) -> None:
    rng = np.random.default_rng(seed)
    heads, kv_heads = [(8, 8), (8, 2), (16, 2), (32, 2), (71, 1)][seed % 5]
    geometry = Geometry(num_q_heads=heads, num_kv_heads=kv_heads, split_tokens=128 * (1 + seed % 3))
    case = random_case(rng, geometry, num_seqs=9, most=2000)
    plan = plan_of(lib, case)
    group, split = heads // kv_heads, geometry.split_tokens
    starts = np.cumsum(case.query_lens) - case.query_lens
    pieces: dict[tuple[int, int], list[tuple[int, int]]] = {}
    partials: list[int] = []
    for number, items in enumerate(plan.items):
        for i, item in enumerate(items):
            seq = int(item["seq"])
            position = int(case.context_lens[seq] - case.query_lens[seq] + item["query_row"] - starts[seq])
            assert item["first_position"] == position
            assert 1 <= item["num_rows"] <= max(32, group)
            tokens = item["num_rows"] // group
            pieces.setdefault((seq, int(item["query_row"])), []).append((int(item["begin"]), int(item["end"])))
            assert item["end"] <= position + tokens
            if case.query_lens[seq] <= 16:
                assert item["begin"] % split == 0
                assert item["end"] - item["begin"] <= split
            if item["partial_row"] >= 0:
                partials.extend(range(item["partial_row"], item["partial_row"] + kv_heads * item["num_rows"]))
            blocks = case.tables[seq][item["begin"] // 16 : -(-int(item["end"]) // 16)]
            assert (blocks >= case.num_device).any() == (i < plan.header[number])
    covered = set()
    for (seq, query_row), found in pieces.items():
        covered.add((seq, query_row))
        found.sort()
        assert found[0][0] == 0
        assert all(a[1] == b[0] for a, b in itertools.pairwise(found))
    assert sorted(partials) == list(range(int(plan.counts[3])))
    assert {seq for seq, _ in covered} == {s for s, q in enumerate(case.query_lens) if q}
    rows = sum(int(i["num_rows"]) // group for items in plan.items for i in items if i["begin"] == 0)
    assert rows == case.query_lens.sum()


def test_splits_do_not_depend_on_place_or_company(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    case = random_case(rng, Geometry(), num_seqs=8, most=3000)
    flags = rng.integers(0, 2, case.num_blocks).astype(np.uint8)
    plans = [plan_of(lib, replace(case, num_device=n)) for n in (0, 10, case.num_blocks)]
    plans.append(plan_of(lib, replace(case, flags=flags)))
    for number in range(2):
        assert len({tuple(sorted(ranges(plan.items[number]))) for plan in plans}) == 1
        assert plans[0].header[number] == len(plans[0].items[number])
        assert plans[2].header[number] == 0
        assert ranges(plans[2].items[number]) == sorted(ranges(plans[2].items[number]))
    alone = replace(
        *(case,), query_lens=case.query_lens[4:5], context_lens=case.context_lens[4:5], tables=case.tables[4:5]
    )
    first_row = int(case.query_lens[:4].sum())
    together = [r for items in plans[2].items for r in ranges(items) if r[0] == 4]
    assert [(r[0] + 4, r[1] + first_row, *r[2:]) for items in plan_of(lib, alone).items for r in ranges(items)] == (
        together
    )


def test_pieces_on_the_link_come_first(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    """Blocks 4, 5 and 6 of which 5 is the first on the host; then by flags, which decide alone."""
    case = make_case(rng, Geometry(), [1, 1, 1], [16, 16, 16])
    case = replace(case, tables=[np.int32([b]) for b in (4, 5, 6)], num_device=5)
    plan = plan_of(lib, case)
    assert list(plan.header[:4]) == [2, 0, 3, 0]
    assert [r[0] for r in ranges(plan.items[0])] == [1, 2, 0]
    flags = np.zeros(8, np.uint8)
    flags[6] = 1
    plan = plan_of(lib, replace(case, flags=flags))
    assert plan.header[0] == 1
    assert [r[0] for r in ranges(plan.items[0])] == [2, 0, 1]


def test_a_plan_fits_a_larger_buffer_and_no_smaller_one(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    case = random_case(rng, Geometry(), num_seqs=8, most=3000)
    plan = plan_of(lib, case)
    larger = plan.counts + np.array([3, 5, 7, 9, 0])
    larger[4] = 64 + 32 * (larger[0] + larger[1]) + 16 * larger[2]
    again = plan_of(lib, case, larger)
    assert [ranges(i) for i in again.items] == [ranges(i) for i in plan.items]
    np.testing.assert_array_equal(again.merges, plan.merges)
    text = ctypes.create_string_buffer(240)
    for i in range(4):
        smaller = plan.counts.copy()
        smaller[i] -= 1
        buffer = np.zeros(int(plan.counts[4]), np.uint8)
        arguments = (pointer(smaller), pointer(buffer), len(buffer), text)
        assert lib.hk_fill_plan(byref(case.cache()), byref(case.batch()), *arguments) == INVALID
        assert b"capacity" in text.value


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"num_q_heads": 5}, INVALID, b"num_q_heads=5, num_kv_heads=2"),
        ({"block_size": 24}, UNSUPPORTED, b"block_size=24"),
        ({"block_size": 4}, UNSUPPORTED, b"block_size=4"),
        ({"split_tokens": 100}, INVALID, b"split_tokens=100"),
    ],
)
def test_a_plan_refuses_what_it_cannot_do(
    lib: ctypes.CDLL, rng: np.random.Generator, change: dict[str, int], code: int, words: bytes
) -> None:
    case = make_case(rng, replace(Geometry(), **change), [1], [40])
    text, counts = ctypes.create_string_buffer(240), np.zeros(5, np.int64)
    assert lib.hk_count_plan(byref(case.cache()), byref(case.batch()), pointer(counts), text) == code
    assert words in text.value


def test_a_plan_refuses_more_new_tokens_than_tokens(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    case = make_case(rng, Geometry(), [1, 41], [40, 40])
    text, counts = ctypes.create_string_buffer(240), np.zeros(5, np.int64)
    assert lib.hk_count_plan(byref(case.cache()), byref(case.batch()), pointer(counts), text) == INVALID
    assert b"sequence 1: query_len=41, context_len=40" in text.value


def test_a_view_refuses_what_the_kernels_cannot_read(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    case = make_case(rng, Geometry(), [1], [40])
    case.fill_slabs()
    text = ctypes.create_string_buffer(240)
    assert lib.hk_check(byref(case.cache()), text) == OK
    cache = case.cache()
    cache.device += 4
    assert lib.hk_check(byref(cache), text) == INVALID
    assert b"device slab" in text.value
    cache = case.cache()
    cache.block_size = 12
    assert lib.hk_check(byref(cache), text) == UNSUPPORTED
    cache = case.cache()
    cache.head_dim = 3
    assert lib.hk_check(byref(cache), text) == INVALID


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 64, 513])
def test_merging_partial_softmax_is_exact(lib: ctypes.CDLL, count: int) -> None:
    """Partials of random size, some of them empty, against float64: one after the other, and in parts."""
    rng = np.random.default_rng(count)
    dim = 8
    logits = rng.standard_normal((count, 5)) * 20
    values = rng.standard_normal((count, 5, dim))
    empty = rng.random(count) < 0.3
    empty[count // 2] = False
    m = np.where(empty, -1e30, logits.max(1))
    weights = np.where(empty[:, None], 0, np.exp2(logits - logits.max(1, keepdims=True)))
    stats = np.stack((m, weights.sum(1)), 1).astype(np.float32)
    acc = np.einsum("cj,cjd->cd", weights, values).astype(np.float32)
    folded, merged = np.empty(dim, np.float32), np.empty(dim, np.float32)
    lib.hk_merge(pointer(stats), pointer(acc), count, dim, pointer(folded), pointer(merged))
    stats, acc = stats.astype(np.float64), acc.astype(np.float64)
    share = np.exp2(stats[:, 0] - stats[:, 0].max())
    expected = share @ acc / (share @ stats[:, 1])
    np.testing.assert_allclose(folded, expected, rtol=0, atol=2e-6 * np.abs(expected).max() * np.sqrt(count))
    np.testing.assert_allclose(merged, expected, rtol=0, atol=2e-6 * np.abs(expected).max() * np.sqrt(count))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_attention_matches_float64(lib: ctypes.CDLL, shape: tuple[int, ...], seed: int) -> None:
    check_shape(lib, shape, seed)


def test_a_graph_may_be_replayed_with_smaller_plans(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    """One capacity: both passes and merges, a pass without items, no merges, a table of a resting sequence that says
    nothing, and no sequence at all."""
    both = make_case(rng, Geometry(FP16, num_q_heads=8), [1, 20, 1, 3], [400, 90, 60, 300])
    fill(lib, both, rng)
    counts = count(lib, both) + np.array([2, 1, 3, 40, 0])
    for query_lens in ([1, 20, 1, 3], [1, 0, 1, 0], [0, 20, 0, 3], [0, 0, 1, 0], [0, 0, 0, 0]):
        rows = np.repeat(query_lens, both.query_lens) > 0
        step = replace(
            *(both,),
            query_lens=np.int32(query_lens),
            tables=[t if q else np.full_like(t, -7) for t, q in zip(both.tables, query_lens, strict=True)],
            query=np.ascontiguousarray(both.query[rows]),
        )
        out = run(lib, step, counts=counts, num_ctas=2)
        if any(query_lens):
            assert error_of(lib, step, out) < TOLERANCE[FP16]


def test_large_scores_do_not_overflow(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    case = random_case(rng, Geometry(FP32))
    fill(lib, case, rng, scale=30.0)
    # Scores of thousands: their own float32 rounding is what remains.
    assert error_of(lib, case, run(lib, case)) < 2e-3


def test_128_ki_tokens(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    geometry = Geometry(FP16, num_kv_heads=1, num_q_heads=1, num_layers=1, block_size=128, split_tokens=0)
    case = make_case(rng, geometry, [1, 1], [131072, 5])
    fill(lib, case, rng, layer=0)
    assert plan_of(lib, case).counts[0] == 131072 // 512 + 1
    assert error_of(lib, case, run(lib, case, layer=0)) < TOLERANCE[FP16]


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[13]], ids=lambda s: "-".join(map(str, s)))
def test_output_bits_do_not_depend_on_where_blocks_lie(lib: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    """One batch: other blocks, other tiers, other layout, other table form, other workers, other company."""
    query_lens, context_lens = [1, 3, 20, 1], [300, 290, 70, 129]
    outputs = []
    for variant in range(6):
        rng = np.random.default_rng(1)
        geometry = geometry_of(shape)
        if variant >= 3:
            geometry = replace(geometry, layout=1 - geometry.layout, chunk_bytes=0)
        share = [0.0, 1.0, 0.5, 0.3, 0.7, 0.5][variant]
        case = make_case(
            *(np.random.default_rng(variant), geometry, query_lens, context_lens),
            host_share=share,
            csr=variant % 2 == 1,
            one_range=variant in (2, 4),
        )
        fill(lib, case, rng)
        outputs.append(run(lib, case, num_ctas=1 + variant % 3, num_host_workers=variant).tobytes())
    assert len(set(outputs)) == 1


def test_output_bits_do_not_depend_on_the_batch(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    case = make_case(rng, Geometry(FP16, num_q_heads=8), [1, 7, 1, 30], [400, 260, 33, 200])
    fill(lib, case, rng)
    together, start = run(lib, case), 0
    for s in range(4):
        rows = slice(start, start + int(case.query_lens[s]))
        only = slice(s, s + 1)
        lens = {"query_lens": case.query_lens[only].copy(), "context_lens": case.context_lens[only].copy()}
        alone = replace(case, **lens, tables=case.tables[only], query=case.query[rows].copy())
        np.testing.assert_array_equal(run(lib, alone), together[rows])
        start = rows.stop


def test_decode_and_chunk_give_the_same_token_the_same_bits(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    """Narrow and wide kernels split short query runs alike, and round alike."""
    geometry = Geometry(FP32, num_q_heads=8)
    chunk = make_case(rng, geometry, [9], [300])
    fill(lib, chunk, rng)
    out = run(lib, chunk)
    for t in (0, 3, 8):
        one = replace(
            *(chunk,),
            query_lens=np.int32([1]),
            context_lens=np.int32([292 + t]),
            query=np.ascontiguousarray(chunk.query[t : t + 1]),
        )
        assert plan_of(lib, one).counts[0] == 3
        np.testing.assert_array_equal(run(lib, one)[0], out[t])


def test_clean_under_asan_and_ubsan(tmp_path: Path) -> None:
    # Without -O: the sanitizers' checks are compiled in a fifth of the time.
    flags = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
    library = compile_host_kernels(tmp_path / "sanitized.so", *flags)
    preload = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    environment = {**os.environ, **options, "LD_PRELOAD": " ".join(preload), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, __file__, str(library)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip() == "clean"
