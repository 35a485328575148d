"""The reference set is compared by what its points are, and the quick part of the study agrees with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from uvm_kv.commands import figures, study
from uvm_kv.store.records import Record

QUICK = ("roofline", "attention_variants", "long_context_cold")
"""A minute together."""


def point(id_: str, batch: int, *, rate: float = 1.0, repeat: int = 0, **setting: Any) -> Record:
    summary = {
        "schema_version": 2,
        "origin": "simulated",
        "hardware": "a_card",
        "model": "m",
        "mechanism": "device_resident",
        "offered_batch": batch,
        "seed": 0,
        "repeat": repeat,
        "setting": {"hardware.gpu.hbm_gb_per_s": 936.0, **setting},
        "variant": {},
        "output_tokens_per_s": rate,
    }
    return Record(id_, Path("runs.jsonl.gz"), summary, {}, f"hash of {summary}")


REFERENCE = [point("a", 8), point("b", 16, rate=2.0), point("c", 16, rate=3.0, repeat=1)]


def test_a_setting_that_was_added_changes_ids_and_no_point() -> None:
    added = {"hardware.gpu.float32_tflop_per_s": 35.5}
    fresh = [point("x", 16, rate=3.0, repeat=1, **added), point("y", 8, **added), point("z", 16, rate=2.0, **added)]
    found = study.compare(fresh, REFERENCE)
    assert found.holds and found.worst == 0
    fresh[1].summary["output_tokens_per_s"] = 1.5
    (line,) = study.compare(fresh, REFERENCE).differing
    assert line == "m device_resident 8 (y): output_tokens_per_s 1.5 instead of 1.0"


def test_a_setting_that_changed_is_told_at_its_points() -> None:
    fresh = [point("x", 8, **{"hardware.gpu.hbm_gb_per_s": 900.0})]
    found = study.compare(fresh, REFERENCE[:1])
    assert (found.missing, found.extra) == ([], [])
    assert "hbm_gb_per_s 900.0 instead of 936.0" in found.differing[0]


def test_points_of_one_side_alone_are_missing_or_new() -> None:
    found = study.compare([REFERENCE[0], point("d", 32)], REFERENCE[:2])
    assert found.missing == ["m device_resident 16 (b)"] and found.extra == ["m device_resident 32 (d)"]


def test_points_that_nothing_tells_apart_are_an_error() -> None:
    """Two points with equal settings, such as runs of an earlier version in the same folder."""
    with pytest.raises(ValueError, match=r"\(a\) and m device_resident 8 \(twin\) differ in nothing"):
        study.compare([*REFERENCE, point("twin", 8)], REFERENCE)
    assert study.compare([], []).holds


def test_failures_are_known_by_their_points_too() -> None:
    def failure(record: Record, error: str) -> dict[str, Any]:
        return {**record.summary, "error": error, "tried": False, "refused": True, "failed": "today", "argv": []}

    mine = {"x": failure(point("x", 8, added=1), "no room")}
    assert study.compare_failures(mine, {"a": failure(REFERENCE[0], "no room")}) == []
    (line,) = study.compare_failures(mine, {"a": failure(REFERENCE[0], "no memory")})
    assert line.endswith("refused or failed, no room; in the reference refused or failed, no memory")


def test_an_edited_checkout_begins_each_experiment_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[bool] = []

    def run_experiment(name: str, folder: Path) -> int:
        left.append((folder / name / "of_an_earlier_edit").exists())
        (folder / name / "of_an_earlier_edit").mkdir(parents=True, exist_ok=True)
        return 0

    monkeypatch.setattr(study, "run_experiment", run_experiment)
    for dirty in (True, True, False, False):
        monkeypatch.setattr(study, "git_state", lambda dirty=dirty: {"git_sha": "0" * 40, "git_dirty": dirty})
        study.main(["batch_sweep", "--results", str(tmp_path)])
    assert left[:2] == [False, False] and left[-1]


def test_the_quick_part_of_the_study_agrees_with_the_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fails when the reference set is stale."""
    if not figures.REFERENCE.is_dir():
        pytest.skip("no reference set in this checkout")
    status = study.main([*QUICK, "--results", str(tmp_path)])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert said.out.count("points agree with the reference") == len(QUICK)
