"""The error table of a validation: verdicts and their noise, what each metric is, recordings from files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from uvm_kv.telemetry.recorder import REQUEST_COLUMNS, STEP_COLUMNS, Table
from uvm_kv.validate.comparison import (
    METRICS,
    NOT_OBSERVED,
    Better,
    Comparison,
    compare,
    interval,
    judge,
    observe,
    relative_error,
    write_comparison,
)
from uvm_kv.validate.recorded import Recording, load_file

MS = 1_000_000


def make_recording(
    *, scale: float = 1.0, num: int = 200, steps: list[dict[str, Any]] | None = None, ttft: bool = True
) -> Recording:
    """`num` requests of 11 output tokens, one every 10 ms; 5 ms to the first token and 25 ms in all, times `scale`."""
    rows = [
        {
            "request_id": i,
            "prompt_tokens": 4,
            "output_tokens": 11,
            "arrival_ns": 10 * MS * i,
            "admitted_ns": 10 * MS * i,
            "first_token_ns": 10 * MS * i + round(5 * MS * scale) if ttft else None,
            "finish_ns": 10 * MS * i + round(25 * MS * scale),
            "num_preemptions": 0,
            "measured": True,
        }
        for i in range(num)
    ]
    requests: Table = {name: [row[name] for row in rows] for name in REQUEST_COLUMNS}
    table: Table | None = None
    if steps is not None:
        table = {name: [step.get(name, 0) for step in steps] for name in STEP_COLUMNS}
    return Recording("made-up", "simulated", "card", requests, table, {"git_sha": None})


def row_of(rows: list[Comparison], metric: str) -> Comparison:
    (row,) = [row for row in rows if row.metric == metric]
    return row


@pytest.mark.parametrize(
    ("error", "noise", "better", "verdict"),
    [
        (0.04, None, "lower", "SAME"),
        (-0.05, None, "lower", "SAME"),
        (0.06, None, "lower", "SLOW"),
        (-0.06, None, "lower", "FAST"),
        (0.06, None, "higher", "FAST"),
        (-0.06, None, "higher", "SLOW"),
        (0.06, None, None, "MORE"),
        (-0.06, None, None, "LESS"),
        (math.inf, None, None, "MORE"),
        (0.02, 0.02, "lower", "SAME"),
        (0.04, 0.02, "lower", "AMBIGUOUS"),
        (0.06, 0.02, "lower", "AMBIGUOUS"),
        (0.08, 0.02, "lower", "SLOW"),
        (0.0, 0.5, "lower", "AMBIGUOUS"),
        (0.5, math.nan, "lower", "AMBIGUOUS"),
        (0.0, math.nan, "lower", "AMBIGUOUS"),
    ],
)
def test_the_verdict_is_a_test_of_equivalence(error: float, noise: float | None, better: Better, verdict: str) -> None:
    """Intervals lie within 5 %, beyond it, or across it. Noise never makes two sides the same."""
    assert judge(error, noise, 0.05, better) == verdict


def test_noise_is_the_95_percent_interval_of_the_mean_error() -> None:
    assert interval([0.1]) == (0.1, None)
    mean, noise = interval([0.1, 0.2, 0.3])
    assert (mean, noise) == (pytest.approx(0.2), pytest.approx(4.30 * 0.1 / math.sqrt(3)))
    assert interval([0.1] * 30)[1] == pytest.approx(0)
    assert interval([math.inf, math.inf]) == (math.inf, None)
    mean, noise = interval([0.1, math.inf])
    assert mean == math.inf
    assert noise is not None and math.isnan(noise)


def test_the_error_of_nothing() -> None:
    assert relative_error(0, 0) == 0
    assert relative_error(0, 3) == math.inf
    assert relative_error(4, 0) == -1
    assert relative_error(4, 5) == 0.25


def test_latencies_and_throughput_from_requests() -> None:
    found = observe(make_recording())
    assert found["ttft_s.p99"] == (pytest.approx(0.005), 200)
    assert found["tpot_s.mean"] == (pytest.approx(0.002), 200)
    assert found["e2e_s.p50"] == (pytest.approx(0.025), 200)
    # From the first arrival to the last finish.
    assert found["output_tokens_per_s_whole_run"].value == pytest.approx(2200 / (1.99 + 0.025))
    for name in ("decode_step_s.mean", "running_batch_mean", "output_tokens_per_s", "stall_s", "h2d_copy_bytes"):
        assert found[name].value is None, "there are no steps to see it in"
    assert set(found) == set(METRICS)


def test_steps_with_and_without_prefill_are_told_apart() -> None:
    """A step in which every sequence takes one token is a decode step. An unobserved counter stays unobserved."""
    steps = [
        {"start_ns": 0, "end_ns": 40 * MS, "num_running": 2, "num_scheduled_tokens": 8, "h2d_copy_bytes": None},
        {"start_ns": 40 * MS, "end_ns": 50 * MS, "num_running": 2, "num_scheduled_tokens": 2, "h2d_copy_bytes": 7},
        {"start_ns": 60 * MS, "end_ns": 90 * MS, "num_running": 2, "num_scheduled_tokens": 2, "d2h_copy_bytes": 5},
    ]
    found = observe(make_recording(steps=steps))
    assert found["prefill_step_s.mean"] == (pytest.approx(0.04), 1)
    assert found["decode_step_s.mean"] == (pytest.approx(0.02), 2)
    assert found["h2d_copy_bytes"].value is None
    assert found["d2h_copy_bytes"].value == 5
    assert found["num_steps"].value == 3


def test_a_run_is_the_same_as_itself_whatever_its_size() -> None:
    for num in (1, 2, 200):
        rows = compare([(make_recording(num=num), make_recording(num=num))])
        assert rows
        assert {row.verdict for row in rows} == {"SAME"}
        assert {row.error for row in rows} == {0.0}


def test_a_slower_simulation_is_slow_and_a_faster_one_fast() -> None:
    for scale, word in ((1.2, "SLOW"), (0.8, "FAST")):
        rows = compare([(make_recording(), make_recording(scale=scale))])
        row = row_of(rows, "tpot_s.mean")
        assert (row.verdict, row.error, row.noise) == (word, pytest.approx(scale - 1), None)


def test_a_tail_of_too_few_samples_is_ambiguous() -> None:
    rows = compare([(make_recording(num=99), make_recording(num=99, scale=2.0))])
    assert row_of(rows, "e2e_s.p99").verdict == "AMBIGUOUS"
    assert row_of(rows, "e2e_s.p50").verdict == "SLOW"
    rows = compare([(make_recording(num=100), make_recording(num=100, scale=2.0))])
    assert row_of(rows, "e2e_s.p99").verdict == "SLOW"


def test_repeats_that_scatter_more_than_the_difference_are_ambiguous() -> None:
    pairs = [(make_recording(scale=scale), make_recording()) for scale in (0.9, 1.0, 1.1)]
    row = row_of(compare(pairs), "e2e_s.mean")
    assert row.noise is not None and row.noise > 0.05
    assert row.verdict == "AMBIGUOUS"
    calm = [(make_recording(scale=scale), make_recording()) for scale in (0.799, 0.8, 0.801)]
    assert row_of(compare(calm), "e2e_s.mean").verdict == "SLOW"


def test_what_one_side_did_not_observe_has_no_verdict() -> None:
    rows = compare([(make_recording(ttft=False), make_recording())])
    row = row_of(rows, "ttft_s.mean")
    assert (row.recorded, row.error, row.verdict) == (None, None, NOT_OBSERVED)
    assert row.simulated == pytest.approx(0.005)
    assert row_of(rows, "e2e_s.mean").verdict == "SAME"
    assert "preemptions" not in {row.metric for row in rows}, "neither side saw one"


def test_what_was_only_simulated_is_more_and_has_no_error() -> None:
    step = {"start_ns": 0, "end_ns": 40 * MS, "num_running": 2, "num_scheduled_tokens": 8}
    pair = (make_recording(steps=[step]), make_recording(steps=[step | {"h2d_copy_bytes": 7}]))
    row = row_of(compare([pair]), "h2d_copy_bytes")
    assert (row.recorded, row.simulated, row.error, row.verdict) == (0, 7, None, "MORE")


def test_files_hold_what_is_shown(tmp_path: Path) -> None:
    pair = (make_recording(), make_recording(scale=2.0, ttft=False))
    rows = compare([pair, pair], 0.1)
    paths = write_comparison(tmp_path, rows, [pair, pair], tolerance=0.1, argv=["validate"])
    content = json.loads(paths[0].read_text())
    assert content["tolerance"] == 0.1
    assert [side["origin"] for side in content["recorded"]] == ["simulated", "simulated"]
    assert [entry["metric"] for entry in content["metrics"]] == [row.metric for row in rows]
    with paths[1].open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [entry["verdict"] for entry in table] == [row.verdict for row in rows]
    assert next(entry for entry in table if entry["metric"] == "ttft_s.mean")["simulated"] == ""


HEADER = "arrival_s,prompt_tokens,output_tokens,ttft_s,e2e_s"


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_file_of_requests(tmp_path: Path) -> None:
    """Requests are read in order of arrival, with the first at 0; seconds since 1970 keep their differences."""
    file = write(tmp_path / "vllm.csv", HEADER + ",model", "1700000002.5,7,3,0.25,1.25,x", "1700000000,5,2,0.5,0.75,x")
    run = load_file(file)
    assert (run.name, run.origin, run.where, run.steps) == ("vllm", "external", "vllm.csv", None)
    assert run.requests["prompt_tokens"] == [5, 7]
    assert run.requests["arrival_ns"] == [0, 2_500 * MS]
    assert run.requests["first_token_ns"] == [500 * MS, 2_750 * MS]
    assert run.requests["finish_ns"] == [750 * MS, 3_750 * MS]
    assert observe(run)["preemptions"].value is None
    rows = [
        {"arrival_s": 2.5, "prompt_tokens": 7, "output_tokens": 3, "ttft_s": 0.25, "e2e_s": 1.25},
        {"arrival_s": 0, "prompt_tokens": 5, "output_tokens": 2, "ttft_s": 0.5, "e2e_s": 0.75},
    ]
    lines = load_file(write(tmp_path / "vllm.jsonl", *map(json.dumps, rows)))
    assert lines.requests == run.requests


def test_optional_columns(tmp_path: Path) -> None:
    run = load_file(
        write(
            tmp_path / "a.csv", "arrival_s,prompt_tokens,output_tokens,e2e_s,num_preemptions", "0,5,2,1,0", "1,5,2,1,2"
        )
    )
    found = observe(run)
    assert found["ttft_s.mean"].value is found["tpot_s.mean"].value is None
    assert found["preemptions"].value == 2
    assert found["e2e_s.mean"].value == 1


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.csv", ["arrival_s,prompt_tokens,output", "0,1,2"], "line 1: output_tokens, e2e_s missing among"),
        ("a.csv", [], "line 1: arrival_s, prompt_tokens, output_tokens, e2e_s missing among no columns"),
        ("a.csv", [HEADER], "it has no requests"),
        ("a.csv", [HEADER, "0,5,2,0.5,1", "0,5,2,1"], "line 3: 4 cells where the header has 5"),
        ("a.csv", [HEADER, "0,5,2,0.5,1", "", "0,5,2.5,0.5,1"], "line 4: output_tokens is '2.5'; it must be a whole"),
        ("a.csv", [HEADER, "0,5,inf,0.5,1"], "line 2: output_tokens is 'inf'; it must be a whole"),
        ("a.csv", [HEADER, "0,0,2,0.5,1"], "line 2: prompt_tokens is '0'; it must be a whole number, at least 1"),
        ("a.csv", [HEADER, "then,5,2,0.5,1"], "line 2: arrival_s is 'then'; it must be seconds"),
        ("a.csv", [HEADER, "0,5,2,0.5,nan"], "line 2: e2e_s is 'nan'; it must be seconds"),
        ("a.csv", [HEADER, "0,5,2,0.5,"], "line 2: e2e_s is None; it must be seconds"),
        ("a.csv", [HEADER, "0,5,2,2,1"], "line 2: ttft_s=2.0, e2e_s=1.0; both are seconds from arrival"),
        ("a.csv", [HEADER, "0,5,2,0,0"], "leave failed requests out"),
        ("a.jsonl", ['{"arrival_s": 0}'], "line 1: prompt_tokens, output_tokens, e2e_s missing among arrival_s"),
        ("a.jsonl", ["", "{"], "line 2: not JSON"),
        ("a.jsonl", ["[1]"], "line 1: '[1]' is not an object"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=r"recorded=.*a\.(csv|jsonl)") as caught:
        load_file(write(tmp_path / name, *lines))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
