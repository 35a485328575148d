"""The Python face of the extension where there is no extension, no GPU and no meter."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from tests.helpers import REPOSITORY
from uvm_kv.cli.cuda_report import kernels_for, nvcc
from uvm_kv.memory import ExtensionMissingError, Slab, copies, new_stream, stream_handle
from uvm_kv.memory import extension as load
from uvm_kv.memory.capabilities import kernel_pcie_link, num_devices, pcie_link
from uvm_kv.memory.counters import Nvml, UnifiedMemoryCounters, total, unified_memory_trace
from uvm_kv.types import MIB


def test_importing_loads_neither_the_extension_nor_the_driver() -> None:
    code = (
        "import sys, uvm_kv, uvm_kv.memory, pathlib\n"
        "assert 'uvm_kv.memory._C' not in sys.modules\n"
        "maps = pathlib.Path('/proc/self/maps')\n"
        "assert not maps.exists() or 'libcuda' not in maps.read_text()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, timeout=120)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ModuleNotFoundError("no", name="uvm_kv.memory._C"),
            "^the CUDA extension is not built: pip install -e . without UVM_KV_NO_CUDA=1$",
        ),
        (ImportError("GLIBCXX_3.4.99 not found"), "^the CUDA extension does not load: GLIBCXX_3.4.99 not found$"),
    ],
)
def test_use_without_the_extension_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: ImportError, said: str
) -> None:
    def fail(_: str) -> None:
        raise error

    load.cache_clear()
    monkeypatch.setattr(importlib, "import_module", fail)
    for use in (new_stream, lambda: Slab.device(2 * MIB), copies.TransferCounters):
        with pytest.raises(ExtensionMissingError, match=said):
            use()
    load.cache_clear()


@pytest.mark.parametrize(
    "stream",
    [
        7,
        SimpleNamespace(cuda_stream=7),
        SimpleNamespace(ptr=7),
        SimpleNamespace(handle=7),
        SimpleNamespace(__cuda_stream__=lambda: (0, 7)),
    ],
)
def test_streams_of_every_library(stream: object) -> None:
    assert stream_handle(stream) == 7


@pytest.mark.parametrize("stream", [None, True, "7", 7.0])
def test_what_is_no_stream_is_refused(stream: object) -> None:
    with pytest.raises(TypeError, match="is no CUDA stream"):
        stream_handle(stream)


def test_pcie_link_as_the_kernel_prints_it(tmp_path: Path) -> None:
    folder = tmp_path / "0000:65:00.0"
    folder.mkdir()
    for name, text in {
        "current_link_speed": "2.5 GT/s PCIe\n",
        "current_link_width": "16\n",
        "max_link_speed": "16.0 GT/s PCIe\n",
        "max_link_width": "16\n",
    }.items():
        (folder / name).write_text(text)
    assert kernel_pcie_link("0000:65:00.0", devices=tmp_path) == (1, 16)
    assert kernel_pcie_link("0000:65:00.0", devices=tmp_path, maximum=True) == (4, 16)
    assert kernel_pcie_link("0000:66:00.0", devices=tmp_path) == (None, None)


class _Driver:
    """An extension whose driver cannot be used."""

    class CudaError(RuntimeError):
        pass

    def __init__(self, version: int, code: str) -> None:
        self._version, self._code = version, code

    def driver_version(self) -> int:
        return self._version

    def num_devices(self) -> int:
        raise self.CudaError(f"cudaGetDeviceCount(&count): {self._code}, so it says")


@pytest.mark.parametrize(
    ("version", "code", "found"),
    [
        (0, "cudaErrorInsufficientDriver", 0),
        (13000, "cudaErrorNoDevice", 0),
        (12080, "cudaErrorInsufficientDriver", None),
        (13000, "cudaErrorSystemNotReady", None),
    ],
)
def test_a_driver_that_is_too_old_is_an_error_and_not_no_gpu(
    monkeypatch: pytest.MonkeyPatch, version: int, code: str, found: int | None
) -> None:
    module = sys.modules["uvm_kv.memory.capabilities"]  # By name: the package has a function of that name.
    monkeypatch.setattr(module, "extension", lambda: _Driver(version, code))
    if found is not None:
        assert num_devices() == found
        return
    with pytest.raises(RuntimeError, match=code):
        num_devices()


@pytest.mark.parametrize(
    ("architectures", "card", "how"),
    [
        ("86", "8.6", "machine code of sm_86"),
        ("86-real,90-real", "8.9", "machine code of sm_86"),
        ("86", "9.0", "PTX of compute_86"),
        ("86-real", "9.0", None),
        ("90", "8.6", None),
        ("75-real,80-real,86-real,89-real,90", "12.0", "PTX of compute_90"),
        ("native", "9.0", "as CMake resolved native"),
    ],
)
def test_doctor_knows_whether_the_kernels_run(architectures: str, card: str, how: str | None) -> None:
    said = kernels_for(architectures, card)
    assert said is None if how is None else said is not None and said.startswith(how)


def test_doctor_finds_the_nvcc_that_the_build_would(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, release in (("nvcc-13", "13.0"), ("nvcc-12", "12.8")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc-13"))
    assert nvcc() == f"{tmp_path / 'nvcc-13'}, 13.0"
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc-12"))
    assert str(nvcc()).endswith("12.8; the build asks for CUDA 13 and takes NVIDIA wheels instead")


def test_unified_memory_records_are_summed_by_cause() -> None:
    records = [(1, 4096, 2), (1, 65536, 3), (1, 4096, 2), (2, 2 * MIB, 4), (4, 3, 1), (4, 2, 1), (3, 0xDEAD, 0)]
    records += [(5, 4096, 0), (7, 8192, 3), (1, 10, 99)]
    assert total(records) == UnifiedMemoryCounters(
        h2d_bytes={"coherence": 8192, "prefetch": 65536, "unknown": 10},
        d2h_bytes={"eviction": 2 * MIB},
        gpu_fault_groups=5,
        cpu_faults=1,
        num_thrashing=1,
        num_throttling=0,
        remote_mapped_bytes=8192,
    )


def test_no_cupti_no_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupti.cupti", None)
    with unified_memory_trace() as trace:
        assert trace is None


def test_no_nvml_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Nvml.open("0000:65:00.0") is None


class _Nvml:
    """One card, at 0000:65:00.0, with an energy meter and no PCIe counter."""

    ANSWERS: ClassVar = {
        "nvmlDeviceGetTotalEnergyConsumption": 1500,
        "nvmlDeviceGetPowerUsage": 250_000,
        "nvmlDeviceGetCurrPcieLinkGeneration": 1,
        "nvmlDeviceGetMaxPcieLinkGeneration": 5,
        "nvmlDeviceGetCurrPcieLinkWidth": 16,
        "nvmlDeviceGetMaxPcieLinkWidth": 16,
    }

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.num_open = 0

    def nvmlInit(self) -> None:
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> str:
        if bus_id != "0000:65:00.0":
            raise self.NVMLError
        return bus_id

    def nvmlDeviceGetPcieThroughput(self, *_: Any) -> Any:
        raise self.NVMLError

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.ANSWERS[name]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> _Nvml:
    played = _Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", played)  # type: ignore[arg-type]
    return played


def test_a_meter_that_fails_is_none_and_not_zero(nvml: _Nvml) -> None:
    meter = Nvml.open("0000:65:00.0")
    assert meter is not None
    assert meter.read() == (1.5, 250.0, None, None)
    meter.close()
    assert nvml.num_open == 0


def test_energy_is_read_without_the_windows_of_the_other_meters(nvml: _Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(_Nvml, "nvmlDeviceGetPcieThroughput", lambda *_: asked.append("PCIe"))
    with Nvml.opened("0000:65:00.0") as meter:
        assert meter is not None
        assert meter.energy_j() == 1.5
    assert not asked


def test_a_card_that_nvml_does_not_know_leaves_nothing_open(nvml: _Nvml) -> None:
    assert Nvml.open("0000:66:00.0") is None
    assert nvml.num_open == 0


def test_the_card_itself_is_asked_for_its_link_first(nvml: _Nvml) -> None:
    """In a virtual machine the kernel knows the virtual slot only."""
    assert pcie_link("0000:65:00.0") == (1, 16)
    assert pcie_link("0000:65:00.0", maximum=True) == (5, 16)
    assert pcie_link("0000:66:00.0") == (None, None)
    assert nvml.num_open == 0
