"""The Python face of the extension where there is no extension, no GPU and no meter."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers import REPOSITORY
from uvm_kv.memory import ExtensionMissingError, Slab, copies, new_stream, pcie_link, stream_handle
from uvm_kv.memory import extension as load
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
    assert pcie_link("0000:65:00.0", devices=tmp_path) == (1, 16)
    assert pcie_link("0000:65:00.0", devices=tmp_path, maximum=True) == (4, 16)
    assert pcie_link("0000:66:00.0", devices=tmp_path) == (None, None)


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
    assert Nvml.open() is None


class _Nvml:
    """A card with an energy meter and no PCIe counter."""

    class NVMLError(Exception):
        pass

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> Any:
            if name == "nvmlDeviceGetPcieThroughput":
                raise self.NVMLError
            return {"nvmlDeviceGetTotalEnergyConsumption": 1500, "nvmlDeviceGetPowerUsage": 250_000}.get(name, 1)

        return call


def test_a_meter_that_fails_is_none_and_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _Nvml())  # type: ignore[arg-type]
    meter = Nvml.open()
    assert meter is not None
    assert meter.read() == (1.5, 250.0, None, None)
