"""Rules of the codebase that lint does not see."""

from __future__ import annotations

from tests.helpers import REPOSITORY

CORE = ("kvcache", "sched", "placement", "engine")


def test_the_plain_core_stays_small() -> None:
    """About 1,500 lines: an engine that reads in an hour."""
    files = [file for room in CORE for file in (REPOSITORY / "uvm_kv" / room).rglob("*.py")]
    assert sum(len(file.read_text().splitlines()) for file in files) < 1700


def test_every_module_says_what_it_is_for() -> None:
    for folder in ("uvm_kv", "experiments", "tests"):
        for file in (REPOSITORY / folder).rglob("*.py"):
            text = file.read_text()
            assert not text or text.startswith('"""'), file


def test_placement_policies_stay_short() -> None:
    for file in (REPOSITORY / "uvm_kv" / "placement").glob("*.py"):
        if file.stem not in ("__init__", "base", "registry"):
            assert len(file.read_text().splitlines()) <= 150, file
