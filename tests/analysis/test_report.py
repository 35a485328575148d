"""The report: written from run directories alone, complete, and the same twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.jobs import run
from uvm_kv.analysis.load import find_runs
from uvm_kv.analysis.report import write_report
from uvm_kv.cli import main


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
