"""Settings of the whole suite, and the integrity check that no scheduler test can forget."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests import helpers

settings.register_profile("uvm_kv", derandomize=True, database=None, deadline=None)
settings.load_profile("uvm_kv")


@pytest.fixture(autouse=True)
def _integrity() -> Iterator[None]:
    """Every scheduler that a test built through `helpers.make_scheduler` is sound when the test ends."""
    helpers.built_schedulers.clear()
    yield
    for scheduler in helpers.built_schedulers:
        scheduler.check_integrity()
