"""Settings by declaration: the table of defaults, ids that new options do not change, and the page of the docs."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from tests.helpers import REPOSITORY
from tests.jobs import resolved
from uvm_kv.config import settings as declared
from uvm_kv.config.settings import Setting, settings
from uvm_kv.setting import Role, Rule
from uvm_kv.store.directories import run_id
from uvm_kv.telemetry.summary import SCHEMA_VERSION

DEFAULTS = Path(__file__).with_name("defaults.json")
"""The defaults that ids of this schema version rest on."""


def id_of(*overrides: str) -> str:
    return run_id(resolved(*overrides).determining(), 0)


def test_a_changed_default_raises_the_schema_version() -> None:
    """An id leaves out what is at its default, so with another default it would name other results. Then raise
    SCHEMA_VERSION and write the table anew."""
    table = json.loads(DEFAULTS.read_text())
    now = {path: it.default for path, it in settings().items()}
    assert table["schema_version"] == SCHEMA_VERSION
    assert {path: now.get(path, "gone") for path in table["defaults"]} == table["defaults"]


@pytest.mark.parametrize("mechanism", ["custom", "pinned_balanced", "managed_demand"])
def test_a_new_option_changes_no_id_until_it_is_given(monkeypatch: pytest.MonkeyPatch, mechanism: str) -> None:
    job = resolved(f"mechanism={mechanism}", "batch_size=24")
    values, before = job.settings(), job.determining()
    new = Setting("placement.window", 4, Rule(heeded={"placement.name": ("bandwidth_balanced",)}, role=Role.VARIANT))
    known = MappingProxyType({**settings(), new.path: new})
    monkeypatch.setattr(declared, "settings", lambda: known)

    def determining(window: int) -> dict[str, Any]:
        kept = declared.without_defaults(declared.heeded(values | {new.path: window}))
        return kept | {"schema_version": SCHEMA_VERSION}

    assert determining(4) == before
    assert (determining(5) != before) is (mechanism == "pinned_balanced"), "only that placement heeds it"


def test_an_id_counts_what_is_heeded_alone() -> None:
    assert id_of("mechanism=pinned_swap") == id_of("mechanism=pinned_swap", "driver.prefetcher=none"), "no faults there"
    assert id_of("mechanism=managed_demand") != id_of("mechanism=managed_demand", "driver.prefetcher=none")
    assert id_of("mechanism=pinned_swap") == id_of("mechanism=pinned_swap", "hardware.managed.fault_batch_us=9")
    assert id_of("mechanism=managed_demand") != id_of("mechanism=managed_demand", "hardware.managed.fault_batch_us=9")
    assert id_of("batch_size=16") == id_of() != id_of("batch_size=17")


def test_every_default_is_allowed() -> None:
    for it in settings().values():
        if it.default is not None and it.default != "???":
            assert not it.rule.allowed or it.default in it.rule.allowed, it.path
            assert it.rule.bounds() is None or it.rule.admits(it.default), it.path
        for other in it.rule.heeded:
            known = settings()[other].rule.allowed
            assert not known or set(it.rule.heeded[other]) <= {str(value) for value in known}, it.path


def test_the_page_of_the_docs_is_the_table() -> None:
    assert declared.table() in (REPOSITORY / "docs" / "settings.md").read_text()
