"""The build backend: scikit-build-core, told where nvcc is and for which architectures to compile.

    UVM_KV_NO_CUDA=1              pure Python, no compiler needed
    UVM_KV_CUDA_ARCHITECTURES     CMake's list ("86;90"), not the visible GPU's; "wheel": all supported
    UVM_KV_CUDA_TOOLKIT=wheels    NVIDIA's wheels also where the machine has an nvcc
    CUDACXX                       this nvcc instead of the one on the PATH

nvcc is the machine's if it has one of CUDA 13; else NVIDIA's own wheels serve, asked for as build requirements. They
unpack to nvidia/cu13/{bin,include,lib,nvvm}, which is a toolkit but for the name of its lib folder.

An editable install finds the package through a hook that scikit-build-core asks before it asks sys.path. Then a second
checkout that shares the environment would run the first one's code. Here the hook is asked last: the current folder of
`python -m` comes first, then the checkout of the install, and the hook serves what neither has, the extension.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from scikit_build_core import build as backend

NANOBIND = "nanobind>=2.9,<4"
TOOLKIT_WHEELS = tuple(
    f"{name}==13.0.*"
    for name in ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl", "nvidia-cuda-runtime")
)
DEFAULT_ARCHITECTURES = "86"
"""With no GPU visible: machine code for the RTX 3090, and PTX that newer cards compile."""

WHEEL_ARCHITECTURES = "75-real;80-real;86-real;89-real;90"
"""Machine code for each supported card, and PTX for later ones."""

HOOK = "_editable_skbc_uvm_kv.py"
ASK_LAST = """

def _ask_last():
    ours = [finder for finder in sys.meta_path if "uvm_kv" in getattr(finder, "known_source_files", ())]
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in ours] + ours


if "entrypoint" in globals():  # Called later, from Python 3.15 on.
    _install = entrypoint

    def entrypoint():
        _install()
        _ask_last()
else:
    _ask_last()
"""

Settings = dict[str, "list[str] | str"]

build_sdist = backend.build_sdist
get_requires_for_build_sdist = backend.get_requires_for_build_sdist
prepare_metadata_for_build_editable = backend.prepare_metadata_for_build_editable
prepare_metadata_for_build_wheel = backend.prepare_metadata_for_build_wheel


def get_requires_for_build_wheel(config_settings: Settings | None = None) -> list[str]:
    return backend.get_requires_for_build_wheel(config_settings) + _toolkit_requirements()


def get_requires_for_build_editable(config_settings: Settings | None = None) -> list[str]:
    return backend.get_requires_for_build_editable(config_settings) + _toolkit_requirements()


def build_wheel(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    return backend.build_wheel(wheel_directory, _with_cuda(config_settings), metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    name = backend.build_editable(wheel_directory, _with_cuda(config_settings), metadata_directory)
    ask_hook_last(Path(wheel_directory) / name)
    return name


def ask_hook_last(wheel: Path) -> None:
    """Add ASK_LAST to the hook of an editable wheel, and the hook's new hash to its RECORD."""
    with zipfile.ZipFile(wheel) as archive:
        files = {info: archive.read(info) for info in archive.infolist()}
    hook, record = (next(i for i in files if i.filename.endswith(end)) for end in (HOOK, ".dist-info/RECORD"))
    files[hook] += ASK_LAST.encode()
    digest = base64.urlsafe_b64encode(hashlib.sha256(files[hook]).digest()).rstrip(b"=").decode()
    line = f"{HOOK},sha256={digest},{len(files[hook])}"
    files[record] = re.sub(rf"^{HOOK},.*$", line, files[record].decode(), flags=re.MULTILINE).encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, content in files.items():
            archive.writestr(info, content)


def without_cuda() -> bool:
    """Set to anything but 0, false, no, off or nothing. scikit-build-core's override reads it the same way."""
    return os.environ.get("UVM_KV_NO_CUDA", "").strip().lower() not in ("", "0", "false", "no", "off", "n", "f")


def _toolkit_requirements() -> list[str]:
    if without_cuda():
        return []
    return [NANOBIND, *(() if machine_nvcc() else TOOLKIT_WHEELS)]


def _with_cuda(config_settings: Settings | None) -> Settings:
    """The settings with CMake's definitions added; one that the user gave stays."""
    settings: Settings = dict(config_settings or {})
    if without_cuda():
        return settings
    machine = machine_nvcc()
    nvcc = machine or wheels_nvcc()
    print(f"uvm-kv: {nvcc}, CUDA architectures {architectures()}", file=sys.stderr)
    settings.setdefault("cmake.define.nanobind_DIR", importlib.import_module("nanobind").cmake_dir())
    settings.setdefault("cmake.define.CMAKE_CUDA_COMPILER", str(nvcc))
    settings.setdefault("cmake.define.CMAKE_CUDA_ARCHITECTURES", architectures())
    if machine is None:
        _use_wheels(nvcc.parent.parent)
    return settings


def machine_nvcc() -> Path | None:
    """CUDACXX, the PATH, the usual place; of CUDA 13, for which the sources are written."""
    if os.environ.get("UVM_KV_CUDA_TOOLKIT") == "wheels":
        return None
    for candidate in (os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if candidate and (path := shutil.which(candidate)) and _release(path) == 13:
            return Path(path)
    return None


def _release(nvcc: str) -> int | None:
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release (\d+)\.", said)
    return int(found[1]) if found else None


def wheels_nvcc() -> Path:
    """In the build environment, where the requirements above were installed."""
    for folder in map(Path, sys.path):
        nvcc = folder / "nvidia" / "cu13" / "bin" / "nvcc"
        if nvcc.is_file():
            return nvcc
    raise RuntimeError(
        f"no nvcc of CUDA 13 on this machine, and none in the build environment ({', '.join(TOOLKIT_WHEELS)}); "
        "UVM_KV_NO_CUDA=1 installs without the extension"
    )


def _use_wheels(toolkit: Path) -> None:
    """nvcc looks for libraries in lib64, where a toolkit has them and the wheels do not."""
    libraries = str(toolkit / "lib")
    os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, (libraries, os.environ.get("LIBRARY_PATH"))))
    os.environ["NVCC_APPEND_FLAGS"] = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -L{libraries}".strip()


def architectures() -> str:
    """What the user said, else the visible GPUs', else DEFAULT_ARCHITECTURES."""
    if given := os.environ.get("UVM_KV_CUDA_ARCHITECTURES"):
        return WHEEL_ARCHITECTURES if given == "wheel" else given
    return ";".join(f"{arch}-real" for arch in visible_architectures()) or DEFAULT_ARCHITECTURES


def visible_architectures() -> list[str]:
    """Compute capabilities without the dot, each once; none where nvidia-smi is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = re.findall(r"^\s*(\d+)\.(\d+)\s*$", done.stdout, re.MULTILINE) if done.returncode == 0 else []
    return sorted({major + minor for major, minor in found})
