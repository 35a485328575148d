"""The compiled half, imported on first use."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

MODULE = "uvm_kv.memory._C"


class ExtensionMissingError(ImportError):
    """The C++/CUDA extension is not built, or does not load."""


@cache
def extension() -> Any:
    """The module `uvm_kv.memory._C`. Typed by the stub beside it where it is built, which is not everywhere."""
    try:
        return importlib.import_module(MODULE)
    except ModuleNotFoundError as missing:
        if missing.name != MODULE:
            raise
        why = "the CUDA extension is not built: pip install -e . without UVM_KV_NO_CUDA=1"
    except ImportError as broken:
        why = f"the CUDA extension does not load: {broken}"
    raise ExtensionMissingError(why)


class BuildInfo(NamedTuple):
    cuda_version: str
    """CUDA version of the runtime that is linked in."""
    architectures: str
    """As CMake was told: 86 is machine code and PTX, 86-real is machine code only."""


def build_info() -> BuildInfo:
    module = extension()
    return BuildInfo(f"{module.cuda_version // 1000}.{module.cuda_version % 1000 // 10}", module.cuda_architectures)


def sources_sha256() -> str:
    """Hash of the C++ and CUDA sources that the extension was built of."""
    try:
        built: str = extension().sources_sha256
    except AttributeError:
        raise ExtensionMissingError(
            "the CUDA extension is older than this package: build it again, pip install -e ."
        ) from None
    return built
