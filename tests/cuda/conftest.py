"""Tests that need a GPU. Where there is none, or no extension, each is skipped with the reason.

They run one at a time, also under `pytest -n auto` and beside another checkout: the guard knows only its own process,
and tests that look at free memory must not see each other's.

With UVM_KV_TEST_EXTENSION they run on the module it names: tests/memory/test_on_host_runtime.py does so.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import host_runtime
from uvm_kv.memory import ExtensionMissingError, extension, new_stream, num_devices

NAMED = os.environ.get(host_runtime.VARIABLE)
if NAMED:
    host_runtime.use(Path(NAMED))


@cache
def missing() -> str | None:
    try:
        return None if num_devices() > 0 else "no NVIDIA GPU"
    except ExtensionMissingError as error:
        return str(error)
    except RuntimeError as error:
        if "cudaErrorInsufficientDriver" in str(error):
            return str(error)
        raise


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    if (reason := missing()) is not None:
        # Where a GPU was promised (make gpu-check), tests that all skip must not look like a success.
        (pytest.fail if os.environ.get("UVM_KV_REQUIRE_GPU") else pytest.skip)(reason)
    if NAMED:  # Each process has a card of its own.
        yield
        return
    with (Path(tempfile.gettempdir()) / f"uvm-kv-gpu-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Closing the file gives it back.
        yield


@pytest.fixture
def c() -> Any:
    return extension()


@pytest.fixture
def stream() -> Iterator[Any]:
    made = new_stream()
    yield made
    made.synchronize()
