"""Tests that need a GPU. Where there is none, or no extension, each is skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from uvm_kv.memory import ExtensionMissingError, extension, new_stream, num_devices


@cache
def missing() -> str | None:
    try:
        return None if num_devices() > 0 else "no NVIDIA GPU"
    except ExtensionMissingError as error:
        return str(error)


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if (reason := missing()) is not None:
        pytest.skip(reason)


@pytest.fixture
def c() -> Any:
    return extension()


@pytest.fixture
def stream() -> Iterator[Any]:
    made = new_stream()
    yield made
    made.synchronize()
