"""The doctor's CUDA half: toolkit, extension, capabilities, limits, and what follows. Every probe is guarded."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from uvm_kv.hw.host import available_host_bytes
from uvm_kv.memory import Capabilities, ExtensionMissingError, PcieLink, build_info, capabilities, num_devices
from uvm_kv.memory.capabilities import driver_version
from uvm_kv.types import GIB

PACKAGES = ("cuda-bindings", "cupti-python", "cupy-cuda13x", "nvidia-ml-py")


class CudaReport(NamedTuple):
    extension: str | None
    """How it was built; None: it is not there, and `extension_missing` says why."""
    extension_missing: str
    found: Capabilities | None
    """Capabilities of device 0."""
    found_missing: str
    architectures: str = ""
    """Architectures that the extension was built for, in CMake's notation."""
    driver: str | None = None
    """The newest CUDA that the driver knows."""


def probe() -> CudaReport:
    try:
        built = build_info()
    except ExtensionMissingError as error:
        return CudaReport(None, str(error), None, "not asked: only the extension asks the driver")
    extension = f"CUDA {built.cuda_version}, architectures {built.architectures}"
    driver, found, why = driver_version(), None, ""
    try:
        if num_devices() > 0:
            found = capabilities()
        else:
            why = "no NVIDIA GPU"
    except RuntimeError as error:  # CudaError: a driver that answers, and not well.
        why = f"{error}; the driver knows CUDA {driver}, the extension is of CUDA {built.cuda_version}"
    return CudaReport(extension, "", found, why, built.architectures, driver)


def lines(report: CudaReport) -> list[str]:
    """The section `CUDA`: what the machine has, without the conclusions."""
    packages = ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name)))
    out = [
        "CUDA",
        f"  extension: {report.extension or report.extension_missing}",
        f"  driver: {f'knows CUDA {report.driver}' if report.driver else 'none, or nobody to ask it'}",
        f"  nvcc: {nvcc() or 'none found; the build takes NVIDIA wheels instead'}",
        f"  packages: {packages or 'none of ' + ', '.join(PACKAGES)}",
        f"  pinned memory: {_pinned_limit()}",
        f"  NUMA: {num_numa_nodes()} node(s)",
    ]
    found = report.found
    if found is None:
        return [*out, f"  GPU: {report.found_missing}"]
    return [
        *out,
        f"  GPU: {found.name}, compute capability {found.compute_capability}",
        f"  memory: {found.free_bytes / GIB:.1f} GiB free of {found.total_bytes / GIB:.1f} GiB",
        f"  PCIe: {_link(found.link)} now, {_link(found.max_link)} at most",
        f"  nearest NUMA node: {found.host_numa_node if found.host_numa_node >= 0 else 'the system names none'}",
        f"  the GPU reads plain host memory: {'yes' if found.pageable_memory_access else 'no'}",
    ]


def kernels_for(architectures: str, compute_capability: str) -> str | None:
    """How kernels built for `architectures` (86 is machine code and PTX) run on a card of 8.9; None: not at all."""
    major, minor = map(int, compute_capability.split("."))
    card, best = 10 * major + minor, None
    for entry in re.split("[,;]", architectures):
        number, _, kind = entry.partition("-")
        if not number.isdigit():
            return f"as CMake resolved {entry}"
        built = int(number)
        if kind != "virtual" and built // 10 == major and built <= card:
            return f"machine code of sm_{built}"
        if kind != "real" and built <= card:
            best = f"PTX of compute_{built}, which the driver compiles at first use"
    return best


def abilities(report: CudaReport) -> list[tuple[bool, str, str]]:
    """(works, what, why) for each memory kind and hint on this machine."""
    checks = [(report.extension is not None, "the CUDA extension", report.extension or report.extension_missing)]
    found = report.found
    if found is None:
        kinds = "memory=device, pinned, managed, vmm on a GPU"
        return [*checks, (False, kinds, report.found_missing)]
    managed = "concurrent managed access" if found.concurrent_managed_access else "no concurrent managed access"
    how = kernels_for(report.architectures, found.compute_capability) if report.architectures else None
    if report.architectures:
        why = how or f"built for {report.architectures}: install again on this machine"
        checks.append((how is not None, "kernels on this GPU", why))
    vmm = found.virtual_memory_management and found.host_virtual_memory
    batch = "CUDA 13.0 and concurrent managed access" if found.batch_prefetch else "needs both of them"
    return [
        *checks,
        (True, "memory=device on this GPU", found.name),
        (found.mapped_host_memory, "memory=pinned on this GPU", "mapped host memory, one address on both sides"),
        (found.concurrent_managed_access, "memory=managed on this GPU", managed),
        (vmm, "memory=vmm on this GPU", "virtual memory management of device and host memory"),
        (found.batch_copy, "batched copies", "cudaMemcpyBatchAsync, CUDA 12.8"),
        (found.batch_prefetch, "batched prefetch and discard", batch),
    ]


def nvcc() -> str | None:
    """Path and release of the nvcc that a build would find: by CUDACXX, on the PATH, in the usual place."""
    given = (os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc")
    path = next((found for name in given if name and (found := shutil.which(name))), None)
    if path is None:
        return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return path
    release = re.search(r"release (\d+)([\d.]*)", said)
    if release is None:
        return path
    unfit = "" if release[1] == "13" else "; the build asks for CUDA 13 and takes NVIDIA wheels instead"
    return f"{path}, {release[1]}{release[2]}{unfit}"


def num_numa_nodes(root: Path = Path("/sys/devices/system/node")) -> int:
    """At least one, as a system without NUMA has."""
    return max(1, len(list(root.glob("node[0-9]*"))))


def _pinned_limit() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:.0f} MiB"
    available = available_host_bytes()
    room = "not told by this system" if available is None else f"{available / GIB:.1f} GiB available"
    return f"ulimit -l is {limit} (it binds mlock; the NVIDIA driver pins by itself, up to the free memory: {room})"


def _link(link: PcieLink) -> str:
    if link.generation is None or link.width is None:
        return "not told by this system"
    return f"{link.generation}.0 x{link.width}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
