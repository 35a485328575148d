"""The GPU tests without a GPU: on the extension's own objects and a CUDA runtime in host memory. And that runtime
itself: a missing event, a copy over the seam, a use after free and a leak are seen.

It proves nothing about the driver or the hardware (cuda_ext/tests/host_runtime.cpp).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from ctypes import POINTER, byref, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests import host_runtime
from uvm_kv.types import MIB

SUITE = Path("tests/cuda")
LEAST = {"test_attention.py": 95, "test_copies.py": 200, "test_runner.py": 32, "test_jobs.py": 24, "": 100}
"""Tests that must run, so that a suite that skips itself is seen; '' is all other files."""
MAY_SKIP = ("torch", "cupy", "CUPTI", "NVML", "layer_major")

INVALID_VALUE, ILLEGAL_ADDRESS, STREAM_CAPTURE_UNSUPPORTED = 1, 700, 900
NON_BLOCKING, DISABLE_TIMING, DEFAULT = 1, 2, 4


@pytest.fixture(scope="module")
def module() -> Path:
    try:
        return host_runtime.build()
    except host_runtime.CannotBuildError as why:
        pytest.skip(str(why))


def run(module: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, host_runtime.VARIABLE: str(module), **variables}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=host_runtime.ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("files", "order"),
    [
        ("test_attention.py", "needed"),
        ("test_copies.py", "needed"),
        ("test_runner.py", "needed"),
        ("test_runner.py", "others"),
        ("test_jobs.py", "needed"),
        ("", "needed"),
        ("", "others"),
    ],
)
def test_the_gpu_tests_pass(module: Path, files: str, order: str, tmp_path: Path) -> None:
    """`order`: which streams run first where something waits for one."""
    paths = [str(SUITE / files)] if files else [str(SUITE), *(f"--ignore={SUITE / name}" for name in LEAST if name)]
    report = tmp_path / "report.xml"
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-s", f"--junitxml={report}"]
    variables = {"UVM_KV_HOST_RUNTIME_ORDER": order}
    if files in ("test_runner.py", "test_jobs.py"):  # The kernels reach torch's tensors on the CPU.
        variables["UVM_KV_HOST_RUNTIME_PAGEABLE"] = "1"
    done = run(module, "-m", "pytest", *options, *paths, **variables)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "host runtime:" not in done.stderr, done.stderr[-2000:]
    cases = list(ElementTree.parse(report).iter("testcase"))
    reasons = [skipped.get("message", "") for case in cases for skipped in case.iter("skipped")]
    assert all(any(word in reason for word in MAY_SKIP) for reason in reasons), reasons
    assert len(cases) - len(reasons) >= LEAST[files]


# ---- the runtime itself, by its C interface


@pytest.fixture(scope="module")
def cuda(module: Path) -> Any:
    return load(module)


def load(module: Path) -> Any:
    library = ctypes.CDLL(str(module))
    size, pointer = c_size_t, c_void_p
    library.cudaMalloc.argtypes = [POINTER(pointer), size]
    library.cudaMemsetAsync.argtypes = [pointer, c_int, size, pointer]
    library.cudaMemcpyAsync.argtypes = [pointer, pointer, size, c_int, pointer]
    library.cudaHostRegister.argtypes = [pointer, size, c_uint]
    for name in ("cudaFree", "cudaStreamSynchronize", "cudaStreamDestroy", "cudaEventDestroy", "cudaHostUnregister"):
        getattr(library, name).argtypes = [pointer]
    library.cudaStreamCreateWithFlags.argtypes = library.cudaEventCreateWithFlags.argtypes = [POINTER(pointer), c_uint]
    library.cudaEventRecordWithFlags.argtypes = [pointer, pointer, c_uint]
    library.cudaStreamWaitEvent.argtypes = [pointer, pointer, c_uint]
    library.cudaStreamBeginCapture.argtypes = [pointer, c_int]
    library.cudaStreamEndCapture.argtypes = [pointer, POINTER(pointer)]
    library.cudaGetDriverEntryPointByVersion.argtypes = [
        *(ctypes.c_char_p, POINTER(pointer), c_uint, c_ulonglong, POINTER(c_int))
    ]
    return library


def make(create: Any, *arguments: Any) -> c_void_p:
    made = c_void_p()
    assert create(byref(made), *arguments) == 0
    return made


class Host:
    """Registered host memory: one page."""

    def __init__(self, cuda: Any) -> None:
        self.cuda, self.buffer = cuda, ctypes.create_string_buffer(4096)
        assert cuda.cudaHostRegister(self.buffer, 4096, 2) == 0

    def close(self) -> None:
        assert self.cuda.cudaHostUnregister(self.buffer) == 0


@pytest.mark.parametrize("with_event", [False, True])
def test_a_missing_event_is_seen(cuda: Any, with_event: bool) -> None:
    """A fill on one stream, a copy out on another."""
    data, host = make(cuda.cudaMalloc, 4096), Host(cuda)
    first, second = (make(cuda.cudaStreamCreateWithFlags, NON_BLOCKING) for _ in range(2))
    event = make(cuda.cudaEventCreateWithFlags, DISABLE_TIMING)
    assert cuda.cudaMemsetAsync(data, 7, 4096, first) == 0
    assert cuda.cudaEventRecordWithFlags(event, first, 0) == 0
    if with_event:
        assert cuda.cudaStreamWaitEvent(second, event, 0) == 0
    assert cuda.cudaMemcpyAsync(host.buffer, data, 4096, DEFAULT, second) == 0
    assert host.buffer.raw == bytes(4096), "nothing runs before something waits"
    assert cuda.cudaStreamSynchronize(second) == 0
    assert host.buffer.raw == (b"\x07" if with_event else b"\xcd") * 4096
    assert cuda.cudaFree(data) == cuda.cudaEventDestroy(event) == 0
    assert cuda.cudaStreamDestroy(first) == cuda.cudaStreamDestroy(second) == 0
    host.close()


def test_copies_stay_in_one_live_allocation(cuda: Any) -> None:
    data, stream, host = make(cuda.cudaMalloc, 4096), make(cuda.cudaStreamCreateWithFlags, NON_BLOCKING), Host(cuda)
    copy = cuda.cudaMemcpyAsync
    assert copy(data, host.buffer, 4096, DEFAULT, stream) == 0
    assert copy(data, host.buffer, 4097, DEFAULT, stream) == INVALID_VALUE
    assert copy(data, ctypes.create_string_buffer(16), 16, DEFAULT, stream) == INVALID_VALUE
    assert copy(data, host.buffer, 4096, 2, stream) == 21, "device to host, the wrong way round"
    assert cuda.cudaStreamSynchronize(stream) == cuda.cudaFree(data) == 0
    assert copy(data, host.buffer, 16, DEFAULT, stream) == INVALID_VALUE
    assert cuda.cudaFree(data) == INVALID_VALUE
    assert cuda.cudaStreamDestroy(stream) == 0
    host.close()


class Location(ctypes.Structure):
    _fields_ = (("type", c_int), ("id", c_int))


class Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (("type", c_int), ("handles", c_int), ("location", Location), ("rest", ctypes.c_byte * 16))


class Access(ctypes.Structure):
    _fields_ = (("location", Location), ("flags", c_int))


def driver(cuda: Any, name: str, *types: Any) -> Any:
    found, result = c_void_p(), c_int(-1)
    assert cuda.cudaGetDriverEntryPointByVersion(name.encode(), byref(found), 10020, 0, byref(result)) == 0
    assert result.value == 0
    return ctypes.CFUNCTYPE(c_int, *types)(found.value)


def test_no_copy_crosses_the_seam(cuda: Any) -> None:
    """Device memory, then host memory, in one reserved range."""
    size, handle, flags = c_size_t, c_ulonglong, c_ulonglong
    reserve = driver(cuda, "cuMemAddressReserve", POINTER(handle), size, size, handle, flags)
    create = driver(cuda, "cuMemCreate", POINTER(handle), size, POINTER(Properties), flags)
    release = driver(cuda, "cuMemRelease", handle)
    map_memory = driver(cuda, "cuMemMap", handle, size, size, handle, flags)
    allow = driver(cuda, "cuMemSetAccess", handle, size, POINTER(Access), size)
    unmap, free = (driver(cuda, name, handle, size) for name in ("cuMemUnmap", "cuMemAddressFree"))
    assert cuda.cudaSetDevice(0) == 0
    part, at = 2 * MIB, handle()
    assert reserve(byref(at), 2 * part, 0, 0, 0) == 0
    for index, kind in enumerate((1, 3)):  # a device, a NUMA node
        made, begin = handle(), at.value + index * part
        assert create(byref(made), part, byref(Properties(type=1, location=Location(kind, 0))), 0) == 0
        assert map_memory(begin, part, 0, made.value, 0) == release(made.value) == 0
        assert allow(begin, part, byref(Access(Location(1, 0), 3)), 1) == 0
    data, stream = make(cuda.cudaMalloc, part), make(cuda.cudaStreamCreateWithFlags, NON_BLOCKING)
    for offset, fits in ((0, True), (part, True), (part // 2, False)):
        want = 0 if fits else INVALID_VALUE
        assert cuda.cudaMemcpyAsync(data, at.value + offset, part, DEFAULT, stream) == want
        assert cuda.cudaMemsetAsync(at.value + offset, 1, part, stream) == want
    assert free(at.value, 2 * part) == 1, "it is still mapped"
    assert cuda.cudaStreamSynchronize(stream) == cuda.cudaFree(data) == cuda.cudaStreamDestroy(stream) == 0
    assert [unmap(at.value + index * part, part) for index in range(2)] == [0, 0]
    assert free(at.value, 2 * part) == 0


def test_a_capture_takes_no_synchronize_and_is_lost(cuda: Any) -> None:
    stream = make(cuda.cudaStreamCreateWithFlags, NON_BLOCKING)
    assert cuda.cudaStreamBeginCapture(stream, 2) == 0
    assert cuda.cudaStreamSynchronize(stream) == STREAM_CAPTURE_UNSUPPORTED
    assert cuda.cudaStreamEndCapture(stream, byref(c_void_p())) == STREAM_CAPTURE_UNSUPPORTED + 1
    assert cuda.cudaStreamDestroy(stream) == 0


USE_AFTER_FREE = """
    cuda.cudaFree(data)
    ctypes.string_at(data.value, 1)
"""
COPY_AFTER_UNREGISTER = """
    cuda.cudaMemcpyAsync(host.buffer, data, 16, 4, stream)
    host.close()
    print(cuda.cudaStreamSynchronize(stream))
"""
LEAK = "    print('end')"


@pytest.mark.parametrize(
    ("body", "returned", "printed", "said"),
    [
        (USE_AFTER_FREE, -11, "", ""),
        (COPY_AFTER_UNREGISTER, 0, str(ILLEGAL_ADDRESS), "a copy of memory that has been freed"),
        (LEAK, 0, "end", "never freed: 4096 B"),
    ],
)
def test_what_a_process_does_not_survive(module: Path, body: str, returned: int, printed: str, said: str) -> None:
    head = f"""
if True:
    import ctypes
    from pathlib import Path
    from tests.memory.test_on_host_runtime import Host, load, make
    cuda = load(Path({str(module)!r}))
    data, host = make(cuda.cudaMalloc, 4096), Host(cuda)
    stream = make(cuda.cudaStreamCreateWithFlags, 1)
"""
    done = run(module, "-c", head + body)
    assert done.returncode == returned, done.stderr
    assert done.stdout.strip() == printed
    assert said in done.stderr
