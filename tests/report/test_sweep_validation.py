"""Measured points held against predictions: pairing, intervals, verdicts, and what was written first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from uvm_kv.commands.validate_sweep import main
from uvm_kv.validate.sweep_validation import (
    IDENTITY,
    SweepPoint,
    compare_sweeps,
    lines,
    read_points,
    read_written,
    write_points,
)

EARLY, LATE = "2026-01-01T10:00:00+00:00", "2026-01-01T12:00:00+00:00"


def point(step_s: float | None, *, batch: int = 8, repeat: int = 0, started: str = LATE) -> SweepPoint:
    values = dict.fromkeys(IDENTITY, "x") | {"offered_batch": batch, "mechanism": "pinned_balanced"}
    speed = None if step_s is None else batch / step_s
    return SweepPoint(tuple(values[name] for name in IDENTITY), repeat, step_s, speed, 64, "steps", started)


def verdicts(measured: list[SweepPoint], predicted: list[SweepPoint], written: str = EARLY) -> list[tuple[str, str]]:
    return [(row.metric, row.verdict) for row in compare_sweeps(measured, predicted, written)]


def test_one_run_is_judged_by_its_error_and_has_no_interval() -> None:
    (step, speed) = compare_sweeps([point(0.010)], [point(0.0105)], EARLY)
    assert (step.verdict, speed.verdict) == ("SAME", "SAME")
    assert step.noise is None
    assert step.error == pytest.approx(0.05)
    assert " - " in lines([step])[1]
    assert verdicts([point(0.010)], [point(0.012)]) == [("step_s", "SLOW"), ("output_tokens_per_s", "SLOW")]
    assert verdicts([point(0.010)], [point(0.008)]) == [("step_s", "FAST"), ("output_tokens_per_s", "FAST")]


def test_repeats_are_paired_and_give_an_interval() -> None:
    measured = [point(0.010 * (1 + 0.01 * r), repeat=r) for r in range(5)]
    (step, _) = compare_sweeps(measured, [point(0.010 * (1 + 0.01 * r), repeat=r) for r in range(5)], EARLY)
    assert (step.num_runs, step.error, step.noise, step.verdict) == (5, 0.0, 0.0, "SAME")
    (step, _) = compare_sweeps(
        measured, [point(0.0112)], EARLY
    )  # A repeat without a prediction takes that of repeat 0.
    assert step.noise is not None and step.noise > 0.01
    assert step.verdict == "AMBIGUOUS"


def test_a_point_without_prediction_or_observation_has_no_verdict() -> None:
    assert {v for _, v in verdicts([point(0.010)], [point(0.010, batch=9)])} == {"not observed"}
    assert {v for _, v in verdicts([point(None)], [point(0.010)])} == {"not observed"}


def test_a_prediction_that_came_later_is_told() -> None:
    measured = [point(0.010)]
    assert [row.predicted_first for row in compare_sweeps(measured, measured, EARLY)] == [True, True]
    after = compare_sweeps([point(0.010, started=EARLY)], measured, LATE)
    assert [row.predicted_first for row in after] == [False, False]
    assert "(predicted afterwards)" in lines(after)[1]
    assert compare_sweeps(measured, [], EARLY)[0].predicted_first is None


def test_points_survive_their_file(tmp_path: Path) -> None:
    points = [point(0.010), point(None, batch=3)]
    write_points(tmp_path / "p.json", points, {"hardware": "x"})
    assert read_written(tmp_path / "p.json")[0] == points
    for text in ("{}", "[1]", "no json", '{"format": "uvm-kv sweep points", "points": [{}], "written": "x"}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="is not a file of predictions"):
            read_written(tmp_path / "bad.json")


def test_the_command_from_runs_to_a_table(tmp_path: Path, capsys: Any) -> None:
    """A sweep of one card stands in for the measured one: the same profile has no error, another one has."""
    small = ("model=llama3_8b", "workload.prompt_tokens=64", "workload.output_tokens=32", "workload.start=steady")
    small = (*small, "memory.device_kv_bytes=1073741824")
    for name, hardware in (("predicted", "h100"), ("measured", "h100"), ("other", "rtx3090")):
        for batch in (2, 4):
            jobs.run(tmp_path / name, *small, f"hardware={hardware}", f"batch_size={batch}", "max_steps=8")
    predictions = tmp_path / "predictions.json"
    assert main(["predict", "--runs", str(tmp_path / "predicted"), "--output", str(predictions)]) == 0
    for name, expected in (("measured", {"SAME"}), ("other", {"FAST"})):
        out = tmp_path / f"to-{name}"
        assert main(
            ["compare", "--runs", str(tmp_path / name), "--predictions", str(predictions), "--output", str(out)]
        ) == 0  # fmt: skip
        content = json.loads((out / "validation.json").read_text())
        assert {row["verdict"] for row in content["rows"]} == expected
        assert len(content["rows"]) == len((out / "validation.csv").read_text().splitlines()) - 1 == 4
        assert "points within 10%" in capsys.readouterr().out
    assert [p.step_s for p in read_points(tmp_path / "measured")[0]] == [
        p.step_s for p in read_points(tmp_path / "predicted")[0]
    ]
    assert main(["predict", "--runs", str(tmp_path / "none"), "--output", str(predictions)]) == 2
    assert "no finished run there" in capsys.readouterr().err
