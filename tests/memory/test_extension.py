"""The built extension on a machine with or without a GPU: it imports, says what it was built for, and checks."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import REPOSITORY
from tests.memory.fatbin import architectures
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.memory import ExtensionMissingError, build_info, extension, num_devices, slab_layout
from uvm_kv.types import CHUNK_BYTES, GIB, Layout

SPEC = KVCacheSpec(2, 8, 128, 2, 16, Layout.LAYER_MAJOR)


@pytest.fixture(scope="module")
def built() -> Any:
    try:
        return extension()
    except ExtensionMissingError as missing:
        if os.environ.get("CI") and not os.environ.get("UVM_KV_NO_CUDA"):
            raise
        pytest.skip(str(missing))


def test_importing_it_does_not_load_the_driver(built: Any) -> None:
    code = (
        "import pathlib, uvm_kv.memory as m; m.extension(); maps = pathlib.Path('/proc/self/maps').read_text()\n"
        "assert 'libcuda.so' not in maps and 'libcudart' not in maps, maps"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, timeout=120)


def test_the_binary_holds_the_architectures_it_was_built_for(built: Any) -> None:
    """86 is machine code and PTX, 86-real machine code only, 86-virtual PTX only."""
    wanted = set()
    for entry in build_info().architectures.split(","):
        number, _, kind = entry.partition("-")
        if not number.isdigit():
            pytest.skip(f"built for {entry}, which CMake resolves by itself")
        wanted |= {f"sm_{number}"} if kind != "virtual" else set()
        wanted |= {f"compute_{number}"} if kind != "real" else set()
    assert architectures(Path(built.__file__)) == wanted
    if given := os.environ.get("UVM_KV_CUDA_ARCHITECTURES"):
        assert build_info().architectures == given.replace(";", ",")
    assert build_info().cuda_version.startswith("13.")


def test_the_binary_does_not_tell_where_it_was_built(built: Any) -> None:
    assert str(REPOSITORY).encode() not in Path(built.__file__).read_bytes()


def test_streams_are_mandatory_and_by_keyword(built: Any) -> None:
    stub = ast.parse(next(Path(built.__file__).parent.glob("_C.pyi")).read_text())
    with_stream = 0
    for node in ast.walk(stub):
        if isinstance(node, ast.FunctionDef):
            assert "stream" not in [argument.arg for argument in node.args.args], node.name
            for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
                if argument.arg == "stream":
                    assert default is None, f"{node.name} has a default stream"
                    with_stream += 1
    assert with_stream >= 10


def test_no_device_is_zero_and_a_failing_call_tells_all(built: Any) -> None:
    if num_devices() > 0:
        pytest.skip("there is a GPU here: tests/cuda")
    with pytest.raises(built.CudaError, match=r"cudaGetDevice\(.*: cudaError\w+, .* \(device\.hpp:\d+\)"):
        built.free_bytes(0)


def test_the_guard_names_both_numbers(built: Any) -> None:
    room = {"free_bytes": 8 * GIB, "reserve_bytes": GIB}
    built.require_fits(held_bytes=3 * GIB, asked_bytes=4 * GIB, **room)
    with pytest.raises(built.OversubscriptionError, match=rf"{3 * GIB} B held .* {5 * GIB} B asked exceed {7 * GIB} B"):
        built.require_fits(held_bytes=3 * GIB, asked_bytes=5 * GIB, **room)
    built.require_fits(held_bytes=3 * GIB, asked_bytes=5 * GIB, **room, allow_oversubscription=True)


def test_layouts_ranges_and_runs(built: Any) -> None:
    """Pieces of 64 KiB, 32 to a chunk."""
    layout = slab_layout(SPEC, num_blocks=40)
    assert layout.end_bytes == SPEC.num_chunks(40) * CHUNK_BYTES
    assert layout.offset(33, 1) == 3 * CHUNK_BYTES + SPEC.layer_block_bytes
    parts = layout.ranges([31, 32, 33, 31], layers=(0, 1))
    piece = SPEC.layer_block_bytes
    assert parts.as_list() == [(31 * piece, 3 * piece)], "the chunk is full, so the next one goes on without a gap"
    assert (len(parts), parts.num_bytes) == (1, 3 * piece)
    runs = built.copy_runs(source=layout, target=layout, blocks=[(0, 8), (1, 9)], layers=(1, 2))
    assert runs.as_list() == [(layout.offset(0, 1), layout.offset(8, 1), 2 * piece)]
    with pytest.raises(ValueError, match="block 40 of a slab of 40 blocks"):
        layout.ranges([40], layers=(0, 1))
    with pytest.raises(ValueError, match=r"layers \[0, 3\) of 2"):
        layout.ranges([0], layers=(0, 3))
