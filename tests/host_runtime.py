"""The extension's own objects, linked against a CUDA runtime in host memory instead of NVIDIA's: no GPU is needed.

It shows that bindings, offsets, plans, graphs and the GPU tests themselves hold together. It shows nothing about the
driver or the hardware, and no number from it is a measurement (cuda_ext/tests/host_runtime.cpp says what is played).

    python -m tests.host_runtime MODULE [ARGUMENT ...]      runs a module as `python -m` does, on that runtime
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.machinery
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULE = "uvm_kv.memory._C"
VARIABLE = "UVM_KV_TEST_EXTENSION"
"""The module to load as MODULE: what the GPU tests look for."""

EXTENSION = ROOT / "cuda_ext"
SOURCES = EXTENSION / "tests"
INCLUDE = EXTENSION / "include" / "uvm_kv"
COMPILE = ["g++", "-std=c++20", "-O2", "-march=native", "-fPIC", "-Wall", "-Wextra", "-Werror"]
LINK = ["g++", "-shared", "-fPIC", "-Wl,-Bsymbolic"]
"""-Bsymbolic: a real CUDA runtime in the same process, torch's, must not be taken for ours."""


class CannotBuildError(RuntimeError):
    """There is nothing to link, or nothing to link it with."""


def build_folder() -> Path:
    """Folder in which `pip install -e .` left the objects of the extension for this Python."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    built = [p for p in ROOT.glob("build/*/_C.*") if any(p.name == f"_C{suffix}" for suffix in suffixes)]
    if not built:
        raise CannotBuildError("the extension was not built in this folder: pip install -e . without UVM_KV_NO_CUDA=1")
    module = max(built, key=lambda path: path.stat().st_mtime)
    sources = [p for name in ("bindings", "src", "include/uvm_kv") for p in (EXTENSION / name).iterdir()]
    if _older(module, sources):
        raise CannotBuildError("the built extension is older than its sources: make .venv/.installed-extension")
    return module.parent


def cuda_headers(folder: Path) -> Path:
    """The CUDA headers that the objects were compiled with."""
    named = map(Path, set(re.findall(r"-isystem (\S+)", (folder / "build.ninja").read_text())))
    for include in named:
        if (include / "cuda_runtime_api.h").is_file():
            return include
    raise CannotBuildError("the headers of CUDA that the extension was built with are gone")


def build(folder: Path | None = None) -> Path:
    """Compiles the runtime, links it with the objects and answers the module; only what is out of date."""
    folder = folder or build_folder()
    objects = sorted((folder / "CMakeFiles" / "_C.dir").rglob("*.o"))
    own = [*SOURCES.glob("host_*.*pp"), *INCLUDE.iterdir()]
    newest = max(own, key=lambda path: path.stat().st_mtime)
    out = folder / "host_runtime"
    out.mkdir(exist_ok=True)
    runtime, module = out / "host_runtime.o", out / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _older(runtime, [newest]):
            include = [f"-I{INCLUDE.parent}", "-isystem", str(cuda_headers(folder))]
            _run([*COMPILE, *include, "-c", str(SOURCES / "host_runtime.cpp"), "-o", str(runtime)])
        if _older(module, [runtime, *objects]):
            parts = map(str, [*objects, runtime, *folder.glob("libnanobind-static*.a")])
            _run([*LINK, *parts, "-lpthread", "-ldl", "-o", str(module)])
    return module


def _older(target: Path, sources: list[Path]) -> bool:
    return not target.exists() or any(target.stat().st_mtime < source.stat().st_mtime for source in sources)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def use(module: Path) -> None:
    """Make the module the only extension of this process."""
    if MODULE in sys.modules:
        raise AssertionError(f"{MODULE} is loaded already")
    spec = importlib.util.spec_from_file_location(MODULE, module)
    if spec is None or spec.loader is None:
        raise AssertionError(f"{module} is no extension module")
    sys.modules[MODULE] = made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)


if __name__ == "__main__":
    use(Path(os.environ[VARIABLE]) if VARIABLE in os.environ else build())
    print("On a CUDA runtime in host memory: no number below is a measurement.", file=sys.stderr)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
