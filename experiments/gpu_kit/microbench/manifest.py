"""On what a microbenchmark was taken: card, driver, link, code, packages. The host's name is left out."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.gpu_kit.microbench.limits import Limits
from experiments.gpu_kit.microbench.nominal import Prediction, card_of
from experiments.gpu_kit.microbench.record import FORMAT, SCHEMA_VERSION
from uvm_kv.memory import build_info, capabilities
from uvm_kv.memory.extension import extension
from uvm_kv.store import provenance

PACKAGES = ("torch", "cupy-cuda13x", "cuda-core", "cuda-bindings", "nvidia-ml-py", "numpy")
STATE = (
    "clocks.sm",
    "clocks.mem",
    "temperature.gpu",
    "power.draw",
    "power.limit",
    "ecc.mode.current",
    "mig.mode.current",
)
UVM_PARAMETERS = Path("/sys/module/nvidia_uvm/parameters")
UVM_NAMES = ("uvm_perf_prefetch_enable", "uvm_perf_prefetch_threshold", "uvm_perf_fault_batch_count")


def ask_card(bus_id: str, names: Sequence[str]) -> list[str] | None:
    """nvidia-smi's answers about the card at `bus_id`; None where it gives none. Nothing is ever set."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "-i", bus_id, f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    cells = [cell.strip() for cell in done.stdout.strip().split(",")]
    return cells if done.returncode == 0 and len(cells) == len(names) else None


def gpu_facts(device: int = 0) -> dict[str, Any]:
    c = extension()
    found = capabilities(device)
    bus_id = c.pci_bus_id(device)
    uuid, driver_name = ask_card(bus_id, ("uuid", "driver_version")) or (None, None)
    driver = int(c.driver_version())
    return {
        "name": found.name,
        "uuid": uuid,
        "driver": driver_name,
        "memory_bytes": found.total_bytes,
        "free_bytes": found.free_bytes,
        "compute_capability": found.compute_capability,
        "num_multiprocessors": c.num_multiprocessors(device),
        "l2_bytes": c.l2_bytes(device),
        "cuda_driver": f"{driver // 1000}.{driver % 1000 // 10}",
        "cuda_runtime": build_info().cuda_version,
        "built_for": build_info().architectures,
        "pcie_now": list(found.link),
        "pcie_most": list(found.max_link),
        "state": dict(zip(STATE, ask_card(bus_id, STATE) or (), strict=False)),
        "num_numa_nodes": c.num_numa_nodes(),
        "host_numa_node": found.host_numa_node,
        "concurrent_managed_access": found.concurrent_managed_access,
        "pageable_memory_access": found.pageable_memory_access,
        "host_virtual_memory": found.host_virtual_memory,
        "batch_copy": found.batch_copy,
        "batch_prefetch": found.batch_prefetch,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def uvm_parameters(folder: Path = UVM_PARAMETERS) -> dict[str, str]:
    """The readable parameters of the driver's module."""
    found = {}
    for name in UVM_NAMES:
        try:
            found[name] = (folder / name).read_text().strip()
        except OSError:
            continue
    return found


def manifest(
    gpu: dict[str, Any],
    limits: Limits,
    prediction: Prediction,
    *,
    argv: Sequence[str],
    date: str,
    commit: str | None,
) -> dict[str, Any]:
    """`commit`: as the command was told, for a copy without its repository."""
    git = provenance.git_state()
    machine = {name: value for name, value in provenance.machine().items() if name != "host"}
    card = card_of(gpu["name"])
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "date": date,
        "argv": list(argv),
        "git_sha": git["git_sha"] or commit,
        "git_dirty": git["git_dirty"],
        "versions": {**provenance.versions(), **{name: _version(name) for name in PACKAGES}},
        "machine": machine,
        "gpu": gpu,
        "uvm_parameters": uvm_parameters(),
        "limits_bytes": limits._asdict(),
        "nominal": None if card is None else card._asdict(),
        "predicted": prediction._asdict(),
    }
