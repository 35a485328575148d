"""Where commands write: the folder that they are typed in, and a line that names the option where they cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import jobs
from uvm_kv.commands import figures, study
from uvm_kv.commands.run import main as run_main
from uvm_kv.sweep.listing import estimate_s


@pytest.mark.parametrize(
    ("command", "option"), [(figures.main, "--output"), (study.main, "--results")], ids=["figures", "study"]
)
def test_a_folder_that_cannot_be_written_is_a_line(
    capsys: pytest.CaptureFixture[str], command: object, option: str
) -> None:
    assert callable(command)
    assert command(["energy", option, "/dev/null/there"]) == 2
    said = f"error: {option} /dev/null/there cannot be written (Not a directory); give another: {option} DIR\n"
    assert capsys.readouterr() == ("", said)


def test_figures_go_to_the_working_directory_as_runs_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures come from the checkout's reference set, wherever it is; of the study's runs the default is as
    relative."""
    monkeypatch.chdir(tmp_path)
    assert figures.main(["energy"]) == 0
    assert {"energy.pdf", "energy.csv", "report.html"} <= {f.name for f in (tmp_path / "results" / "figures").iterdir()}
    assert Path("results/study") == study.RUNS


@pytest.mark.parametrize("arguments", [["batch_size=-4"], ["dtype=fp16"], ["batch_size=abc"], ["cuda_graphs=false"]])
def test_a_mistake_in_a_command_for_one_job_is_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["run", f"results_dir={tmp_path}", *arguments])
    assert run_main() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err.splitlines()) == 1


def test_a_job_that_does_not_fit_is_a_finding_and_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run", f"results_dir={tmp_path}", "memory.device_kv_bytes=500000000"])
    assert run_main() == 1
    assert list(tmp_path.glob("adhoc/*.failed.json"))


def test_paging_and_copies_ahead_are_estimated_to_take_longer(tmp_path: Path) -> None:
    """In the reference set they take 2 and 4 times as long as a placement that reads in place."""

    def estimate(mechanism: str, batch: int) -> float:
        return estimate_s(jobs.job(tmp_path, f"mechanism={mechanism}", f"batch_size={batch}"))

    for mechanism in ("managed_demand", "managed_by_tier", "pinned_prefetch_ahead"):
        assert estimate(mechanism, 32) > 2 * estimate("pinned_zero_copy", 32)
    assert estimate("managed_prefetch_ahead", 32) > estimate("managed_by_tier", 32)
    assert estimate("pinned_prefetch_ahead", 8) == estimate("pinned_zero_copy", 8) < estimate("managed_by_tier", 8)
