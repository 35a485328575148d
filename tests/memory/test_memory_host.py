"""Host logic of the memory half (runs of blocks, guard, argument checks), compiled by g++ and called by ctypes.

`test_under_sanitizers` runs this file once more in a process of its own, compiled with ASan and UBSan.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import REPOSITORY
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.memory.layout import LayoutFields, layout_fields
from uvm_kv.types import CHUNK_BYTES, MIB, Layout

SOURCE = REPOSITORY / "cuda_ext" / "tests" / "host_memory.cpp"
SANITIZED = "UVM_KV_TEST_SANITIZED"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
MAX = 2**64 - 1

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

Size = ctypes.c_size_t


class CLayout(ctypes.Structure):
    _fields_ = [
        ("num_blocks", Size),
        ("num_layers", Size),
        ("layer_block_bytes", Size),
        ("layer_major", ctypes.c_bool),
        ("pieces_per_group", Size),
        ("group_bytes", Size),
        ("base_bytes", Size),
    ]


class Pair(ctypes.Structure):
    _fields_ = [("source", Size), ("target", Size)]


class Layers(ctypes.Structure):
    _fields_ = [("first", Size), ("last", Size)]


class Run(ctypes.Structure):
    _fields_ = [("source", Size), ("target", Size), ("bytes", Size)]


class Range(ctypes.Structure):
    _fields_ = [("offset", Size), ("bytes", Size)]


class Host:
    """The compiled logic; a check that fails raises ValueError with the text that C++ gave."""

    def __init__(self, library: Path) -> None:
        self._lib = ctypes.CDLL(str(library))
        self._lib.host_ledger.restype = ctypes.c_void_p
        self._lib.host_ledger_held.restype = Size

    def check(self, name: str, *arguments: Any) -> None:
        call = getattr(self._lib, f"host_{name}")
        call.restype = ctypes.c_char_p
        if said := call(*arguments):
            raise ValueError(said.decode())

    def sizes(self, name: str, *values: int) -> None:
        self.check(name, *map(Size, values))

    def copy_runs(
        self,
        source: CLayout,
        target: CLayout,
        pairs: Sequence[tuple[int, int]],
        layers: tuple[int, int],
        target_layer: int | None = None,
    ) -> list[tuple[int, int, int]]:
        given_pairs = (Pair * len(pairs))(*(Pair(*pair) for pair in pairs))
        out = (Run * (max(1, len(pairs)) * source.num_layers))()
        count = Size(0)
        both = ctypes.byref(source), ctypes.byref(target)
        to = Size(layers[0] if target_layer is None else target_layer)
        self.check("copy_runs", *both, given_pairs, Size(len(pairs)), Layers(*layers), to, out, ctypes.byref(count))
        return [(run.source, run.target, run.bytes) for run in out[: count.value]]

    def block_ranges(self, layout: CLayout, blocks: Sequence[int], layers: tuple[int, int]) -> list[tuple[int, int]]:
        given_blocks = (Size * len(blocks))(*blocks)
        out = (Range * (max(1, len(blocks)) * layout.num_layers))()
        count = Size(0)
        rest = Size(len(blocks)), Layers(*layers), out, ctypes.byref(count)
        self.check("block_ranges", ctypes.byref(layout), given_blocks, *rest)
        return [(piece.offset, piece.bytes) for piece in out[: count.value]]

    def independent(self, runs: Sequence[tuple[int, int, int]], source: int, target: int) -> None:
        self.check(
            "independent", (Run * len(runs))(*(Run(*run) for run in runs)), *map(Size, (len(runs), source, target))
        )

    def cut(self, runs: Sequence[tuple[int, int, int]], source_at: int, target_at: int) -> list[tuple[int, int, int]]:
        given_runs = (Run * len(runs))(*(Run(*run) for run in runs))
        out, count = (Run * (3 * len(runs)))(), Size(0)
        self.check("cut", given_runs, *map(Size, (len(runs), source_at, target_at)), out, ctypes.byref(count))
        return [(run.source, run.target, run.bytes) for run in out[: count.value]]

    def ledger(self) -> Ledger:
        return Ledger(self, ctypes.c_void_p(self._lib.host_ledger()))


class Ledger:
    def __init__(self, host: Host, pointer: ctypes.c_void_p) -> None:
        self._host, self._pointer = host, pointer

    def book(self, bytes_: int, *, free: int, reserve: int = 0, allow: bool = False) -> None:
        self._host.check("ledger_book", self._pointer, Size(bytes_), Size(free), Size(reserve), ctypes.c_bool(allow))

    def release(self, bytes_: int) -> None:
        self._host._lib.host_ledger_release(self._pointer, Size(bytes_))

    def held(self) -> int:
        return int(self._host._lib.host_ledger_held(self._pointer))

    def end(self) -> None:
        self._host._lib.host_ledger_end(self._pointer)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    library = tmp_path_factory.mktemp("host") / "host_memory.so"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    flags += SANITIZE if os.environ.get(SANITIZED) else []
    include = f"-I{REPOSITORY / 'cuda_ext' / 'include'}"
    subprocess.run(["g++", *flags, include, str(SOURCE), "-o", str(library)], check=True, timeout=300)
    return Host(library)


def c_layout(fields: LayoutFields) -> CLayout:
    return CLayout(**fields)


def spec_of(layout: Layout, *, heads: int = 4, num_layers: int = 3, block_size: int = 16) -> KVCacheSpec:
    return KVCacheSpec(num_layers, heads, 64, 2, block_size, layout)


# ---- the sanitizers


@pytest.mark.skipif(bool(os.environ.get(SANITIZED)), reason="already under the sanitizers")
def test_under_sanitizers() -> None:
    # libstdc++ too: ASan looks for its __cxa_throw at the start, before the library that needs it is loaded.
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(library).is_absolute() for library in found):
        pytest.skip("this g++ has no libasan")
    env = {**os.environ, SANITIZED: "1", "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-s", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- where blocks lie, and runs


def test_blocks_lie_where_the_spec_packs_them() -> None:
    """Eight pieces of 256 KiB fill a chunk; the ninth opens the next one."""
    fields = layout_fields(spec_of(Layout.LAYER_MAJOR, heads=64), num_blocks=9)
    assert (fields["pieces_per_group"], fields["group_bytes"]) == (8, CHUNK_BYTES)


@pytest.mark.parametrize("layout", list(Layout))
def test_neighbours_become_one_run(host: Host, layout: Layout) -> None:
    both = c_layout(layout_fields(spec_of(layout), num_blocks=64))
    runs = host.copy_runs(both, both, [(b, b + 32) for b in range(8)], (0, 3))
    assert len(runs) == (3 if layout is Layout.LAYER_MAJOR else 1)
    assert sum(run[2] for run in runs) == 8 * both.num_layers * both.layer_block_bytes


def test_what_is_not_neighbour_in_both_slabs_stays_apart(host: Host) -> None:
    both = c_layout(layout_fields(spec_of(Layout.BLOCK_MAJOR), num_blocks=64))
    assert len(host.copy_runs(both, both, [(0, 40), (1, 42), (2, 43)], (0, 3))) == 2


def test_runs_stop_at_the_loss_at_the_end_of_a_chunk(host: Host) -> None:
    """Pieces of 768 KiB: two to a chunk, and 512 KiB of it lie idle."""
    spec = KVCacheSpec(1, 12, 64, 2, 256, Layout.LAYER_MAJOR)
    both = c_layout(layout_fields(spec, num_blocks=8))
    assert both.layer_block_bytes == 768 * 1024
    runs = host.copy_runs(both, both, [(b, b) for b in range(4)], (0, 1))
    assert runs == [(0, 0, 2 * 768 * 1024), (CHUNK_BYTES, CHUNK_BYTES, 2 * 768 * 1024)]


def expected_bytes(layout: CLayout, block: int, layer: int) -> int:
    """Offset of one block in one layer, by the picture in block_runs.hpp."""
    group, slot = divmod(block, layout.pieces_per_group)
    if layout.layer_major:
        groups = -(-layout.num_blocks // layout.pieces_per_group)
        return int(layout.base_bytes + (layer * groups + group) * layout.group_bytes + slot * layout.layer_block_bytes)
    piece = layout.layer_block_bytes * layout.num_layers
    return int(layout.base_bytes + group * layout.group_bytes + slot * piece + layer * layout.layer_block_bytes)


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from(list(Layout)), st.sampled_from(list(Layout)))
def test_runs_copy_every_byte_once_to_its_place(host: Host, seed: int, of: Layout, to: Layout) -> None:
    rng = random.Random(seed)
    shape = {"heads": rng.choice([1, 4, 12, 40]), "num_layers": rng.randint(1, 4), "block_size": rng.choice([8, 16])}
    source = c_layout(layout_fields(spec_of(of, **shape), num_blocks=rng.randint(1, 40)))
    base = rng.choice([0, CHUNK_BYTES])
    ring = shape | {"num_layers": rng.randint(1, 4)}
    target = c_layout(layout_fields(spec_of(to, **ring), num_blocks=rng.randint(1, 40), base_bytes=base))
    count = rng.randint(0, min(source.num_blocks, target.num_blocks))
    pairs = list(
        zip(rng.sample(range(source.num_blocks), count), rng.sample(range(target.num_blocks), count), strict=True)
    )
    first = rng.randrange(shape["num_layers"])
    layers = (first, rng.randint(first + 1, min(shape["num_layers"], first + ring["num_layers"])))
    into = rng.randint(0, ring["num_layers"] - (layers[1] - layers[0]))
    runs = host.copy_runs(source, target, pairs, layers, into)
    unit = source.layer_block_bytes
    said = set()
    for begin, at, length in runs:
        assert length % unit == 0
        said |= {(begin + i, at + i) for i in range(0, length, unit)}
    want = {
        (expected_bytes(source, a, layer), expected_bytes(target, b, into + layer - first))
        for a, b in pairs
        for layer in range(*layers)
    }
    assert said == want
    assert sum(run[2] for run in runs) == len(want) * unit
    if pairs:
        host.independent(runs, 0, 1 << 40)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from(list(Layout)))
def test_ranges_cover_the_blocks_and_nothing_else(host: Host, seed: int, kind: Layout) -> None:
    rng = random.Random(seed)
    layout = c_layout(layout_fields(spec_of(kind, heads=rng.choice([1, 12])), num_blocks=30))
    blocks = [rng.randrange(30) for _ in range(rng.randint(1, 20))]
    ranges = host.block_ranges(layout, blocks, (1, 3))
    unit = layout.layer_block_bytes
    covered = [offset + i for offset, length in ranges for i in range(0, length, unit)]
    assert sorted(covered) == sorted({expected_bytes(layout, b, layer) for b in blocks for layer in (1, 2)})
    assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(ranges)), "neighbours must be joined"


@pytest.mark.parametrize(
    ("pairs", "layers", "said"),
    [
        ([(64, 0)], (0, 3), "block 64 of a slab of 64 blocks"),
        ([(0, 64)], (0, 3), "block 64 of a slab of 64 blocks"),
        ([(0, 1)], (0, 4), r"layers \[0, 4\) of 3"),
        ([(0, 1)], (2, 2), r"layers \[2, 2\) of 3"),
        ([(0, 1)], (0, 2), r"layers \[2, 4\) of 3"),
    ],
)
def test_blocks_and_layers_outside_are_refused(
    host: Host, pairs: list[tuple[int, int]], layers: tuple[int, int], said: str
) -> None:
    both = c_layout(layout_fields(spec_of(Layout.LAYER_MAJOR), num_blocks=64))
    with pytest.raises(ValueError, match=said):
        host.copy_runs(both, both, pairs, layers, 2 if layers == (0, 2) else None)


def test_slabs_of_different_blocks_are_refused(host: Host) -> None:
    one = c_layout(layout_fields(spec_of(Layout.LAYER_MAJOR), num_blocks=4))
    other = c_layout(layout_fields(spec_of(Layout.LAYER_MAJOR, heads=8), num_blocks=4))
    with pytest.raises(ValueError, match="slabs of different blocks"):
        host.copy_runs(one, other, [(0, 0)], (0, 3))


def test_groups_too_small_for_their_pieces_are_refused(host: Host) -> None:
    fields = layout_fields(spec_of(Layout.LAYER_MAJOR), num_blocks=4)
    layout = c_layout({**fields, "group_bytes": fields["layer_block_bytes"]})
    with pytest.raises(ValueError, match="cannot hold"):
        host.block_ranges(layout, [0], (0, 3))


@pytest.mark.parametrize(
    ("runs", "target", "fine"),
    [
        pytest.param([(0, 0, 8), (8, 8, 8)], 100, True, id="other memory"),
        pytest.param([(0, 16, 8), (8, 24, 8)], 0, True, id="one slab, other places"),
        pytest.param([(0, 8, 8), (8, 16, 8)], 0, False, id="a target is a source"),
        pytest.param([(0, 100, 8), (16, 104, 8)], 0, False, id="a target twice"),
        pytest.param([(0, 0, 8)], 0, False, id="onto itself"),
        pytest.param([(0, 100, 64), (8, 200, 8)], 0, True, id="a source twice is read twice"),
        pytest.param([(0, 200, 64), (64, 300, 4), (8, 20, 4)], 0, False, id="inside a long source"),
    ],
)
def test_copies_of_one_call_must_not_meet(
    host: Host, runs: list[tuple[int, int, int]], target: int, fine: bool
) -> None:
    if fine:
        host.independent(runs, 0, target)
        return
    with pytest.raises(ValueError, match="overlap"):
        host.independent(runs, 0, target)


@pytest.mark.parametrize(
    ("source_at", "target_at", "wanted"),
    [
        (0, 0, [(0, 100, 16), (20, 120, 4)]),
        (8, 0, [(0, 100, 8), (8, 108, 8), (20, 120, 4)]),
        (0, 108, [(0, 100, 8), (8, 108, 8), (20, 120, 4)]),
        (4, 112, [(0, 100, 4), (4, 104, 8), (12, 112, 4), (20, 120, 4)]),
        (16, 100, [(0, 100, 16), (20, 120, 4)]),
    ],
)
def test_runs_are_cut_where_two_kinds_of_memory_meet(
    host: Host, source_at: int, target_at: int, wanted: list[tuple[int, int, int]]
) -> None:
    assert host.cut([(0, 100, 16), (20, 120, 4)], source_at, target_at) == wanted


# ---- the guard


@settings(max_examples=200)
@given(*[st.sampled_from([0, 1, MIB, 10 * MIB, 2**40, MAX - 1, MAX])] * 4)
def test_guard_is_the_inequality_at_any_size(host: Host, held: int, asked: int, free: int, reserve: int) -> None:
    """held + asked <= free - reserve, in whole numbers that do not wrap."""
    ledger = host.ledger()
    ledger.book(held, free=0, allow=True)
    if held + asked <= max(0, free - reserve):
        ledger.book(asked, free=free, reserve=reserve)
        assert ledger.held() == held + asked
    else:
        with pytest.raises(ValueError, match="refused"):
            ledger.book(asked, free=free, reserve=reserve)
        assert ledger.held() == held, "a refusal leaves the ledger as it was"
    ledger.end()


def test_guard_names_both_numbers(host: Host) -> None:
    ledger = host.ledger()
    ledger.book(6 * MIB, free=100 * MIB)
    with pytest.raises(ValueError, match="refused") as caught:
        ledger.book(8 * MIB, free=14 * MIB, reserve=2 * MIB)
    for number in (6 * MIB, 8 * MIB, 12 * MIB, 14 * MIB, 2 * MIB):
        assert f"{number} B" in str(caught.value)
    assert "allow_oversubscription=true" in str(caught.value)
    ledger.book(8 * MIB, free=14 * MIB, reserve=2 * MIB, allow=True)
    ledger.release(14 * MIB)
    assert ledger.held() == 0
    ledger.end()


def test_guard_counts_all_pools_and_threads(host: Host) -> None:
    """A hundred askers, room for forty: forty get it."""
    ledger = host.ledger()

    def ask(_: int) -> bool:
        try:
            ledger.book(MIB, free=41 * MIB, reserve=MIB)
        except ValueError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(100))) == 40
    assert ledger.held() == 40 * MIB
    ledger.end()


def test_bookings_are_held_as_long_as_they_live(host: Host) -> None:
    ledger, held = host.ledger(), (Size * 4)()
    with pytest.raises(ValueError, match="40 B held in all pools and 61 B asked exceed 100 B"):
        host.check("bookings", ledger._pointer, held)
    assert list(held) == [60, 60, 0, 40]
    assert ledger.held() == 40, "a refused booking leaves the ledger as it was"
    ledger.end()


# ---- slabs and host pages


def test_a_slab_ends_once_with_its_last_view_and_never_in_a_forked_child(host: Host) -> None:
    counts = (ctypes.c_int * 4)()
    host._lib.host_slab_ends(counts)
    assert list(counts) == [1, 0, 1, 0]


def test_pinned_pages_are_aligned_and_not_copied_on_fork(host: Host) -> None:
    """A copy-on-write would leave the device with one copy of a page and the process with the other."""
    host._lib.host_pages.restype = ctypes.c_void_p
    host._lib.host_pages_address.restype = Size
    pages = ctypes.c_void_p(host._lib.host_pages(Size(2 * CHUNK_BYTES)))
    address = host._lib.host_pages_address(pages)
    assert address % CHUNK_BYTES == 0
    flags = smaps_flags(address)
    host._lib.host_pages_end(pages)
    if flags is None:
        pytest.skip("this kernel prints no VmFlags")
    assert "dc" in flags


def smaps_flags(address: int) -> list[str] | None:
    """VmFlags of the mapping at `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    return None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("MemTotal:  9 kB\nMemFree: 1 kB\nMemAvailable:    7 kB\nHugePages_Total:  0\n", 7 * 1024),
        ("MemTotal:  9 kB\n", MAX),
    ],
)
def test_available_host_memory(host: Host, tmp_path: Path, text: str, wanted: int) -> None:
    (tmp_path / "meminfo").write_text(text)
    host._lib.host_available_bytes.restype = Size
    assert host._lib.host_available_bytes(str(tmp_path / "meminfo").encode()) == wanted
    assert host._lib.host_available_bytes(b"/no/such/file") == MAX


# ---- arguments


@pytest.mark.parametrize(
    ("shape", "item_bytes", "wanted"),
    [
        ((), 4, 4),
        ((3, 5), 2, 30),
        ((0, MAX), 8, 0),
        ((2**62, 4), 1, None),
        ((MAX,), 2, None),
        ((2**32, 2**32), 1, None),
    ],
)
def test_shapes_do_not_wrap(host: Host, shape: tuple[int, ...], item_bytes: int, wanted: int | None) -> None:
    out = Size(1)
    arguments = (Size * len(shape))(*shape), Size(len(shape)), Size(item_bytes), ctypes.byref(out)
    if wanted is not None:
        host.check("array_bytes", *arguments)
        assert out.value == wanted
        return
    with pytest.raises(ValueError, match="more bytes than any slab"):
        host.check("array_bytes", *arguments)


def test_the_legacy_stream_is_refused_with_torch_in_mind(host: Host) -> None:
    """torch.cuda.current_stream().cuda_stream is 0 until another stream is entered."""
    with pytest.raises(ValueError, match=r"torch's current one too.*new_stream\(\) or torch.cuda.Stream\(\)"):
        host.sizes("stream", 0)


@pytest.mark.parametrize(
    ("check", "values", "said"),
    [
        ("slab_bytes", (CHUNK_BYTES,), None),
        ("slab_bytes", (0,), "positive multiple of 2097152 B"),
        ("slab_bytes", (CHUNK_BYTES + 1,), "a slab of 2097153 B"),
        ("aligned", (3 * CHUNK_BYTES, CHUNK_BYTES), None),
        ("aligned", (CHUNK_BYTES + 4096, CHUNK_BYTES), "not aligned to 2097152 B"),
        ("range", (0, CHUNK_BYTES, CHUNK_BYTES), None),
        ("range", (1, CHUNK_BYTES, CHUNK_BYTES), "leaves its slab of 2097152 B"),
        ("range", (0, 0, CHUNK_BYTES), "at least one byte"),
        ("range", (MAX, 2, CHUNK_BYTES), "leaves its slab"),
        ("range", (2, MAX, CHUNK_BYTES), "leaves its slab"),
        ("whole_pages", (8192, 4096), None),
        ("whole_pages", (8192, 4097), "cuts a page"),
        ("whole_pages", (100, 4096), "cuts a page"),
        ("stream", (2**40,), None),
        ("stream", (0,), "legacy default stream"),
        ("stream", (1,), "legacy default stream"),
        ("parts", (CHUNK_BYTES, 4 * CHUNK_BYTES, CHUNK_BYTES), None),
        ("parts", (0, CHUNK_BYTES, CHUNK_BYTES), None),
        ("parts", (2 * CHUNK_BYTES, CHUNK_BYTES, CHUNK_BYTES), "cannot be the larger"),
        ("parts", (CHUNK_BYTES, 3 * CHUNK_BYTES, 2 * CHUNK_BYTES), "granularity of 4194304 B"),
    ],
)
def test_sizes_are_checked(host: Host, check: str, values: tuple[int, ...], said: str | None) -> None:
    if said is None:
        host.sizes(check, *values)
        return
    with pytest.raises(ValueError, match=said):
        host.sizes(check, *values)


@pytest.mark.parametrize("value", range(-1, 9))
def test_only_known_advice(host: Host, value: int) -> None:
    if 1 <= value <= 6:
        host.check("advice", value)
        return
    with pytest.raises(ValueError, match=f"advice {value}; it is one of 1 to 6"):
        host.check("advice", value)


@pytest.mark.parametrize(
    ("type_", "id_", "said"),
    [
        (1, 0, None),
        (1, 1, "there are 1 devices"),
        (1, -1, "there are 1 devices"),
        (2, 0, None),
        (2, 3, "the id must be 0"),
        (3, 1, None),
        (3, 2, "there are 2 NUMA nodes"),
        (4, 0, None),
        (0, 0, "one of 1 to 4"),
        (5, 0, "one of 1 to 4"),
    ],
)
def test_only_places_that_exist(host: Host, type_: int, id_: int, said: str | None) -> None:
    if said is None:
        host.check("location", type_, id_, 1, 2)
        return
    with pytest.raises(ValueError, match=said):
        host.check("location", type_, id_, 1, 2)


def test_accessed_by_takes_no_numa_node(host: Host) -> None:
    host.check("advice_location", 5, 1)
    host.check("advice_location", 3, 3)
    with pytest.raises(ValueError, match="not a NUMA node"):
        host.check("advice_location", 5, 3)


def test_runs_must_stay_inside_both_slabs(host: Host) -> None:
    runs = (Run * 1)(Run(0, 8, 8))
    host.check("runs_inside", runs, Size(1), Size(8), Size(16))
    with pytest.raises(ValueError, match="leaves its slab of 15 B"):
        host.check("runs_inside", runs, Size(1), Size(8), Size(15))
