"""The report: written from run directories alone, complete, and the same twice."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from tests.jobs import run
from uvm_kv.cli import main
from uvm_kv.report.load import find_runs
from uvm_kv.report.write import write_report
from uvm_kv.store.records import Record


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    for mechanism in ("device_resident", "device_recompute", "pinned_balanced", "vmm_balanced"):
        for batch in (2, 4):
            run(folder, f"mechanism={mechanism}", f"batch_size={batch}", "workload.output_tokens=32")
    return folder


def test_report_files_and_content(results: Path, tmp_path: Path) -> None:
    report = write_report(find_runs(results)[0], tmp_path / "out")
    assert [p.suffix for p in report.figure] == [".png", ".pdf"]
    assert report.figure[0].read_bytes().startswith(b"\x89PNG")
    assert report.figure[1].read_bytes().startswith(b"%PDF")
    page = report.page.read_text()
    assert "Verdict: llama_7b, fixed 512+32, on a simulated rtx3090" in page
    assert "data:image/png;base64," in page
    assert "http://" not in page.split("base64,")[0]
    assert "src=" in page
    assert "KV budget" in page
    for mechanism in ("device_resident", "vmm_balanced"):
        assert mechanism in page


def test_the_report_is_rebuilt_identically(results: Path, tmp_path: Path) -> None:
    first, second = (write_report(find_runs(results)[0], tmp_path / name) for name in "ab")
    assert first.figure[0].read_bytes() == second.figure[0].read_bytes()
    assert first.figure[1].read_bytes() == second.figure[1].read_bytes()
    assert first.page.read_bytes() == second.page.read_bytes()
    assert first.table.read_bytes() == second.table.read_bytes()


def test_report_command(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(results), "--out", str(tmp_path / "r")]) == 0
    out = capsys.readouterr().out
    assert any(line.startswith("Verdict:") for line in out.splitlines())
    assert (tmp_path / "r" / "report.html").is_file()


def test_report_of_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "no finished run there" in capsys.readouterr().err


def test_a_damaged_run_is_named_and_left_out(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "runs")
    broken = tmp_path / "runs" / "broken"
    broken.mkdir()
    (broken / "summary.json").write_text("{")
    records, left_out = find_runs(tmp_path / "runs")
    report = write_report(records, tmp_path / "out", (), left_out)
    assert report.warnings[0].startswith(f"left out: {broken}: ")
    assert report.verdicts == write_report(find_runs(results)[0], tmp_path / "same").verdicts


def as_if_measured(record: Record, factor: float) -> Record:
    """The same point as runner=cuda would leave it, on a card of its own, at another speed."""
    summary = record.summary | {"origin": "measured", "runner": "cuda", "hardware": "NVIDIA GeForce RTX 3090"}
    for name in ("output_tokens_per_s", "output_tokens_per_s_whole_run"):
        summary[name] = None if summary[name] is None else summary[name] * factor
    setting = summary["setting"] | {"runner": "cuda"}
    return replace(record, id=f"f{record.id[1:]}", summary=summary | {"setting": setting})


def test_measured_runs_stand_beside_simulated_ones_and_are_never_put_together(results: Path, tmp_path: Path) -> None:
    """results/measured/<gpu>/ and simulated runs of one folder: a comparison, verdict and table of each, by name."""
    simulated = find_runs(results)[0]
    measured = [as_if_measured(record, 0.5) for record in simulated]
    alone = write_report(simulated, tmp_path / "alone")
    both = write_report([*simulated, *measured], tmp_path / "both")
    titles = list(both.best)
    assert [("simulated rtx3090" in t, "measured NVIDIA GeForce RTX 3090" in t) for t in sorted(titles)] == [
        (False, True),
        (True, False),
    ]
    of = {next(word for word in ("measured", "simulated") if word in v.title): v for v in both.verdicts}
    (expected,) = alone.verdicts
    assert of["simulated"] == expected, "the measured runs changed what is said of the simulated ones"
    assert of["measured"].baseline is not None and expected.baseline is not None
    assert of["measured"].baseline.throughput == pytest.approx(expected.baseline.throughput / 2)
    page = both.page.read_text()
    assert "runs: measured, simulated." in page
    table = pd.read_csv(both.table)
    assert len(table) == 2 * len(pd.read_csv(alone.table))
    assert table.groupby("title")["origin"].nunique().eq(1).all()


def by_other_code(record: Record) -> Record:
    return replace(record, manifest=record.manifest | {"code_sha256": "0" * 64})


def test_runs_of_two_versions_of_the_code_share_no_table_and_no_verdict(results: Path, tmp_path: Path) -> None:
    records = find_runs(results)[0]
    mixed = [by_other_code(r) if r.summary["mechanism"] == "device_resident" else r for r in records]
    report = write_report(mixed, tmp_path / "mixed")
    assert len(report.verdicts) == len(report.best) == 2
    assert sorted("code=000000000000" in title for title in report.best) == [False, True]
    (line,) = [text for text in report.warnings if "versions of the code" in text]
    assert "(6 by " in line and "2 by 000000000000)" in line and "rerun=changed" in line
    assert "versions of the code" in report.page.read_text()
    same = write_report([by_other_code(r) for r in records], tmp_path / "same")
    assert len(same.verdicts) == 1 and not any("code" in text for text in (*same.best, *same.warnings))


def test_runs_of_one_draw_count_once(results: Path, tmp_path: Path) -> None:
    """Nothing is drawn in these, so that seeds change nothing; measured ones are known by their seed and repeat."""
    records = find_runs(results)[0]
    again = [replace(r, id=f"{r.id}x", summary=r.summary | {"seed": 1}) for r in records]
    report = write_report([*records, *again], tmp_path / "simulated")
    assert set(pd.read_csv(report.table)["num_runs"]) == {1}
    assert any(f"{len(records)} runs have the draw of another" in text for text in report.warnings)

    def measured(seed: int, repeat: int, drawn: int) -> list[Record]:
        told = {"origin": "measured", "seed": seed, "repeat": repeat}
        manifest = {"seed": drawn, "repeat": repeat}
        return [
            replace(r, id=f"{r.id}{seed}{repeat}", summary=r.summary | told, manifest=r.manifest | manifest)
            for r in records
        ]

    grid = [(seed, repeat) for seed in range(3) for repeat in range(3)]
    for number, older in ((9, 0), (5, 1)):  # Older versions drew from the sum.
        runs = [record for s, r in grid for record in measured(s, r, s + older * r)]
        report = write_report(runs, tmp_path / str(number))
        assert set(pd.read_csv(report.table)["num_runs"]) == {number}
