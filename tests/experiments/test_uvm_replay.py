"""The study of an A30, replayed: what the constants were fitted to, and what follows from the mechanism."""

from __future__ import annotations

import json
from typing import Any

import pytest

from uvm_kv.commands import uvm_replay

HALF_BYTES = 1946 * 2**21  # 0.95 of 8,589,344,768 bytes in two halves of whole blocks


def replay(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert uvm_replay.main(["json=true", *arguments]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["passes"]
    return found


@pytest.mark.parametrize(
    ("prefetcher", "first_touches_ms"),
    [("tree", (1335.8, 1332.9)), ("none", (17435.0, 17330.0)), ("block", (468.4, 465.7))],
)
def test_first_touches_are_those_of_the_study(
    prefetcher: str, first_touches_ms: tuple[float, float], capsys: pytest.CaptureFixture[str]
) -> None:
    passes = replay(capsys, f"prefetcher={prefetcher}")
    assert [p["name"] for p in passes] == ["A", "B", "A", "B"]
    assert [p["milliseconds"] for p in passes[:2]] == pytest.approx(first_touches_ms, rel=0.01)
    assert [p["published_milliseconds"] for p in passes] == [*first_touches_ms, None, None]
    assert [p["h2d_bytes"] for p in passes] == [HALF_BYTES, HALF_BYTES, 0, 0]
    # All fits: the second time around only the memory of the GPU is busy.
    assert passes[2]["milliseconds"] < 12 and passes[2]["fault_groups"] == 0
    if prefetcher == "tree":
        assert passes[0]["fault_groups"] == passes[0]["migrations"] == 6 * 1946


def test_beyond_capacity_every_pass_misses_and_an_eviction_costs_what_was_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    passes = replay(capsys, "working_set_ratio=1.25", "prefetcher=block")
    num_blocks = passes[0]["fault_groups"]
    assert [p["fault_groups"] for p in passes] == [num_blocks] * 4
    assert passes[0]["evicted_chunks"] == 0
    assert passes[2]["evicted_chunks"] == passes[3]["evicted_chunks"] == num_blocks
    assert passes[2]["d2h_bytes"] == passes[2]["h2d_bytes"] == num_blocks * 2**21
    # 137 us per evicted 2 MiB (facts of the study), on top of the fetch.
    with_evictions = (passes[1]["milliseconds"] - passes[0]["milliseconds"]) / passes[1]["evicted_chunks"] * 1e3
    assert with_evictions == pytest.approx(137, rel=0.02)
    # What was evicted comes back more cheaply than what the CPU had mapped.
    returned = passes[2]["milliseconds"] - 137e-3 * num_blocks
    assert returned < 0.95 * passes[0]["milliseconds"]


def test_advice_decides_who_moves(capsys: pytest.CaptureFixture[str]) -> None:
    def last(*arguments: str) -> dict[str, Any]:
        return replay(capsys, "capacity_bytes=268435456", *arguments)[-1]

    for advice in ("preferred_host", "preferred_host_accessed_by", "accessed_by"):
        remote = last(f"advice={advice}", "operation=read")
        assert remote["h2d_bytes"] == remote["fault_groups"] == 0
        assert remote["remote_read_bytes"] > 0 and remote["remote_write_bytes"] == 0
    assert last("advice=read_mostly", "operation=read", "working_set_ratio=2")["d2h_bytes"] == 0
    assert last("operation=read", "working_set_ratio=2")["d2h_bytes"] > 0
    assert last("advice=accessed_by")["remote_write_bytes"] > 0


def test_a_prefetch_takes_the_place_of_the_faults(capsys: pytest.CaptureFixture[str]) -> None:
    faulted, prefetched = (replay(capsys, f"prefetch={on}")[0] for on in ("false", "true"))
    assert prefetched["fault_groups"] == 0
    assert prefetched["h2d_bytes"] == faulted["h2d_bytes"]
    assert prefetched["published_milliseconds"] is None
    assert 4 * prefetched["milliseconds"] < faulted["milliseconds"]


def test_without_concurrent_access_all_moves_before_the_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    first, _, again, _ = replay(capsys, "concurrent_managed_access=false")
    assert first["fault_groups"] == 0 and first["h2d_bytes"] == HALF_BYTES
    assert again["h2d_bytes"] == 0 and again["milliseconds"] < 12


def test_where_the_data_starts(capsys: pytest.CaptureFixture[str]) -> None:
    first = {
        where: replay(capsys, "capacity_bytes=268435456", f"initial_location={where}")[0]
        for where in ("host", "none", "device")
    }
    assert first["host"]["h2d_bytes"] > 0
    assert first["none"]["h2d_bytes"] == 0 and first["none"]["fault_groups"] > 0
    assert first["device"]["fault_groups"] == 0
    assert first["host"]["milliseconds"] > first["none"]["milliseconds"] > first["device"]["milliseconds"]


def test_random_access_takes_more_and_smaller_migrations(capsys: pytest.CaptureFixture[str]) -> None:
    small = "capacity_bytes=4294967296"
    stream, scattered = (replay(capsys, small, f"access={access}")[0] for access in ("stream", "random"))
    assert scattered["h2d_bytes"] == stream["h2d_bytes"]
    assert 2 * stream["migrations"] < scattered["migrations"] < 15 * stream["migrations"] / 6
    assert replay(capsys, small, "access=random", "seed=1")[0] != scattered
    assert replay(capsys, small, "access=random")[0] == scattered


def test_the_table_shows_the_published_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert uvm_replay.main(["capacity_bytes=8589344768"]) == 0
    assert "1335.8" in capsys.readouterr().out
    assert uvm_replay.main(["capacity_bytes=268435456"]) == 0
    assert "1335.8" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["hardware=a31"], "hardware 'a31' is unknown; did you mean a30"),
        (["capacity_bytes=1000"], "capacity_bytes=1000; the card must hold at least one chunk"),
        (["working_set_ratio=0"], "working_set_ratio=0.0; it must be a positive number"),
        (["working_set_ratio=nan"], "working_set_ratio=nan"),
        (["working_set_ratio=1e9"], "allowed are 4096 to"),
        (["passes=[A,C]"], "it is a list of A and B"),
        (["passes=[]"], "it is a list of A and B"),
        (["prefetcher=forest"], "prefetcher=forest is unknown; allowed: tree, none, block"),
        (["prefetch_threshold_percent=101"], "from 1 to 100"),
        (["access=zigzag"], "access=zigzag is unknown; allowed: stream, random"),
        (["operation=write"], "operation=write is unknown; allowed: update, read"),
        (["advice=hope"], "advice=hope is unknown; allowed: none, preferred_device"),
        (["initial_location=moon"], "initial_location=moon is unknown"),
        (["concurrent_managed_access=false", "working_set_ratio=1.5"], "concurrent_managed_access=false"),
        (["concurrent_managed_access=false", "advice=read_mostly"], "cudaMemAdvise and cudaMemPrefetchAsync fail"),
        (["hardware.link.h2d_gb_per_s=0"], "hardware.link.h2d_gb_per_s=0.0; it must be a positive number"),
        (["ratio=2"], "key 'ratio' is unknown"),
        (["capacity_bytes=lots"], "capacity_bytes=lots is not of the right type"),
        (["--fast"], "--fast is not an option"),
        (["seed=1,2"], "several values"),
    ],
)
def test_bad_input(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert uvm_replay.main(arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert len(error.splitlines()) == 1
