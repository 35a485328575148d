"""The build backend's decisions: which nvcc, which architectures, which requirements."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.helpers import REPOSITORY

SETTINGS = ("UVM_KV_NO_CUDA", "UVM_KV_CUDA_ARCHITECTURES", "UVM_KV_CUDA_TOOLKIT", "CUDACXX")
HOOKS = ("build_wheel", "build_editable", "get_requires_for_build_wheel", "get_requires_for_build_editable")
REST = ("build_sdist", "get_requires_for_build_sdist")
METADATA = ("prepare_metadata_for_build_wheel", "prepare_metadata_for_build_editable")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The backend with a stand-in for scikit-build-core, and with no nvcc and no GPU on the PATH."""
    played = ModuleType("scikit_build_core")
    names = (*HOOKS, *REST, *METADATA)
    hooks = {name: lambda *_: ["cmake"] for name in names}
    hooks["build_wheel"] = lambda *arguments: arguments
    played.build = SimpleNamespace(**hooks)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "scikit_build_core", played)
    nanobind = ModuleType("nanobind")
    nanobind.cmake_dir = lambda: "somewhere"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nanobind", nanobind)
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    path = REPOSITORY / "cuda_ext" / "build_backend" / "uvm_kv_build.py"
    spec = importlib.util.spec_from_file_location("uvm_kv_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tool(folder: Path, name: str, says: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def test_it_passes_every_hook_on(backend: Any) -> None:
    for hook in (*HOOKS, *REST, *METADATA):
        assert callable(getattr(backend, hook)), hook


@pytest.mark.parametrize(("value", "without"), [("1", True), ("true", True), ("0", False), ("", False), ("no", False)])
def test_without_cuda_nothing_more_is_required(
    backend: Any, monkeypatch: pytest.MonkeyPatch, value: str, without: bool
) -> None:
    monkeypatch.setenv("UVM_KV_NO_CUDA", value)
    assert (backend.get_requires_for_build_editable() == ["cmake"]) is without


def test_the_machines_nvcc_is_taken_where_it_is_of_cuda_13(
    backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = tool(tmp_path, "nvcc", "Cuda compilation tools, release 12.8, V12.8.1")
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        assert backend.machine_nvcc() is None
    new = tool(tmp_path, "nvcc-13", "Cuda compilation tools, release 13.0, V13.0.88")
    monkeypatch.setenv("CUDACXX", str(new))
    assert backend.machine_nvcc() == new
    assert backend.get_requires_for_build_wheel() == ["cmake", backend.NANOBIND]
    assert old.exists()


def test_nvidias_wheels_serve_where_there_is_no_nvcc(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UVM_KV_CUDA_TOOLKIT", "wheels")
    required = backend.get_requires_for_build_wheel()
    assert [name for name in required if name.startswith("nvidia-")] == list(backend.TOOLKIT_WHEELS)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(RuntimeError, match="UVM_KV_NO_CUDA=1 installs without the extension"):
        backend.build_wheel("dist")


def test_architectures(backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert backend.architectures() == "86", "with no GPU: the RTX 3090, and PTX"
    tool(tmp_path, "nvidia-smi", "9.0\n8.6\n9.0")
    assert backend.architectures() == "86-real;90-real"
    monkeypatch.setenv("UVM_KV_CUDA_ARCHITECTURES", "86;90")
    assert backend.architectures() == "86;90"
    monkeypatch.setenv("UVM_KV_CUDA_ARCHITECTURES", "wheel")
    assert backend.architectures() == "75-real;80-real;86-real;89-real;90"


def test_what_the_user_says_to_cmake_stays(backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDACXX", str(tool(tmp_path, "nvcc", "release 13.0, V13.0.88")))
    given = {"cmake.define.CMAKE_CUDA_ARCHITECTURES": "89"}
    _, settings, _ = backend.build_wheel("dist", given)
    assert settings["cmake.define.CMAKE_CUDA_ARCHITECTURES"] == "89"
    assert settings["cmake.define.CMAKE_CUDA_COMPILER"] == str(tmp_path / "nvcc")
    assert given == {"cmake.define.CMAKE_CUDA_ARCHITECTURES": "89"}
