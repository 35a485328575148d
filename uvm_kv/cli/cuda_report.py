"""The doctor's CUDA half: toolkit, extension, capabilities, limits, and what follows. Every probe is guarded."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from uvm_kv.memory import Capabilities, ExtensionMissingError, PcieLink, build_info, capabilities, num_devices

PACKAGES = ("cuda-bindings", "cupti-python", "cupy-cuda13x", "nvidia-ml-py")


class CudaReport(NamedTuple):
    extension: str | None
    """How it was built; None: it is not there, and `extension_missing` says why."""
    extension_missing: str
    found: Capabilities | None
    found_missing: str


def probe() -> CudaReport:
    try:
        built = build_info()
    except ExtensionMissingError as error:
        return CudaReport(None, str(error), None, "not asked: only the extension asks the driver")
    extension = f"CUDA {built.cuda_version}, architectures {built.architectures}"
    try:
        if num_devices() == 0:
            return CudaReport(extension, "", None, "no NVIDIA GPU")
        return CudaReport(extension, "", capabilities(), "")
    except RuntimeError as error:  # CudaError: a driver that answers, and not well.
        return CudaReport(extension, "", None, str(error))


def lines(report: CudaReport) -> list[str]:
    """The section `CUDA`: what there is, not yet what it is good for."""
    packages = ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name)))
    out = [
        "CUDA",
        f"  extension: {report.extension or report.extension_missing}",
        f"  nvcc: {nvcc() or 'none on the PATH; the build takes NVIDIA wheels instead'}",
        f"  packages: {packages or 'none of ' + ', '.join(PACKAGES)}",
        f"  pinned memory: {_pinned_limit()}",
        f"  NUMA: {num_numa_nodes()} node(s)",
    ]
    found = report.found
    if found is None:
        return [*out, f"  GPU: {report.found_missing}"]
    gib = 2**30
    return [
        *out,
        f"  GPU: {found.name}, compute capability {found.compute_capability}",
        f"  memory: {found.free_bytes / gib:.1f} GiB free of {found.total_bytes / gib:.1f} GiB",
        f"  PCIe: {_link(found.link)} now, {_link(found.max_link)} at most",
        f"  nearest NUMA node: {found.host_numa_node if found.host_numa_node >= 0 else 'the system names none'}",
        f"  the GPU reads plain host memory: {'yes' if found.pageable_memory_access else 'no'}",
    ]


def abilities(report: CudaReport) -> list[tuple[bool, str, str]]:
    """(works, what, why) for each memory kind and hint on this machine."""
    checks = [(report.extension is not None, "the CUDA extension", report.extension or report.extension_missing)]
    found = report.found
    if found is None:
        kinds = "memory=device, pinned, managed, vmm on a GPU"
        return [*checks, (False, kinds, report.found_missing)]
    managed = "concurrent managed access" if found.concurrent_managed_access else "no concurrent managed access"
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
    """Path and release of the nvcc on the PATH."""
    path = shutil.which("nvcc")
    if path is None:
        return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return path
    release = re.search(r"release ([\d.]+)", said)
    return f"{path}, {release[1]}" if release else path


def num_numa_nodes(root: Path = Path("/sys/devices/system/node")) -> int:
    """At least one, as a system without NUMA has."""
    return max(1, len(list(root.glob("node[0-9]*"))))


def _pinned_limit() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:.0f} MiB"
    return f"ulimit -l is {limit} (it binds mlock; the NVIDIA driver pins by itself, up to the free memory)"


def _link(link: PcieLink) -> str:
    if link.generation is None or link.width is None:
        return "not told by this system"
    return f"{link.generation}.0 x{link.width}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
