"""The uvm-kv command."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY
from tests.jobs import run
from uvm_kv.cli import COMMANDS, cuda_report, main
from uvm_kv.cli.doctor import doctor
from uvm_kv.memory import Capabilities, PcieLink
from uvm_kv.store import provenance
from uvm_kv.store.whole import completed_runs

SMALL = ("workload.prompt_tokens=64", "workload.output_tokens=16")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for mechanism in ("device_resident", "pinned_swap"):
        run(folder, f"mechanism={mechanism}", "batch_size=2", *SMALL)
    return folder


def test_doctor_says_first_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvm_kv.cli.doctor.gpu", lambda: None)
    lines = doctor()
    assert lines[0] == "no NVIDIA GPU"
    assert any("no   runner=cuda: no NVIDIA GPU" in line for line in lines)
    assert any("yes  runner=sim" in line for line in lines)


def test_doctor_names_the_gpu_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"name": "NVIDIA GeForce RTX 3090", "uuid": "GPU-1", "driver": "595.45"}
    monkeypatch.setattr("uvm_kv.cli.doctor.gpu", lambda: card)
    assert doctor()[0].startswith("NVIDIA GeForce RTX 3090, driver 595.45")


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvm_kv.cli.doctor.find_spec", lambda _: None)
    text = "\n".join(doctor())
    assert "no   runner=cpu: torch and transformers missing: pip install -e '.[torch]'" in text
    assert "no   tracking=wandb: wandb is missing" in text


def test_doctor_reports_cuda_on_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = cuda_report.CudaReport(None, "the CUDA extension is not built", None, "not asked")
    monkeypatch.setattr(cuda_report, "probe", lambda: missing)
    text = "\n".join(doctor())
    for said in ("extension: the CUDA extension is not built", "  nvcc: ", "ulimit -l is", "NUMA: ", "GPU: not asked"):
        assert said in text
    assert "no   the CUDA extension: the CUDA extension is not built" in text


def test_doctor_says_what_follows_from_the_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card under WSL2: no concurrent managed access, and no host memory in a virtual range."""
    links = PcieLink(1, 16), PcieLink(4, 16)
    card = Capabilities(
        "RTX 3090", "8.6", False, False, True, True, False, True, False, -1, 20 * 2**30, 24 * 2**30, *links
    )
    monkeypatch.setattr(cuda_report, "probe", lambda: cuda_report.CudaReport("CUDA 13.0", "", card, ""))
    text = "\n".join(doctor())
    assert "GPU: RTX 3090, compute capability 8.6" in text
    assert "memory: 20.0 GiB free of 24.0 GiB" in text
    assert "PCIe: 1.0 x16 now, 4.0 x16 at most" in text
    assert "yes  memory=pinned on this GPU" in text
    assert "no   memory=managed on this GPU: no concurrent managed access" in text
    assert "no   memory=vmm on this GPU" in text
    assert "no   batched prefetch and discard" in text


def test_probes_that_fail_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance.shutil, "which", lambda _: None)
    provenance.gpu.cache_clear()
    provenance.git_state.cache_clear()
    assert provenance.gpu() is None
    assert provenance.git_state() == {"git_sha": None, "git_dirty": None}
    monkeypatch.undo()
    provenance.gpu.cache_clear()
    provenance.git_state.cache_clear()


def test_runs_are_listed_and_filtered(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--folder", str(results)]) == 0
    out = capsys.readouterr().out
    assert "2 runs in" in out
    for directory in completed_runs(results):
        assert directory.name in out
    both = ["--where", "mechanism=pinned_swap", "--where", "offered_batch=2"]
    assert main(["runs", "--folder", str(results), *both]) == 0
    out = capsys.readouterr().out
    assert "1 runs in" in out
    assert "pinned_swap" in out
    assert "device_resident" not in out


def test_one_run_is_shown_by_the_beginning_of_its_id(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = completed_runs(results)[0]
    assert main(["runs", directory.name[:6], "--folder", str(results)]) == 0
    out = capsys.readouterr().out
    assert f"run: {directory}" in out
    assert "git_sha" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["zzz"], "zzz: no such run in "),
        (["results/runs/demo"], "a folder goes with --folder"),
        (["--where", "mechanism"], "write FIELD=VALUE"),
        (["--where", "mechanis=x"], "did you mean mechanism"),
    ],
)
def test_bad_questions_get_an_answer(
    results: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["runs", *arguments, "--folder", str(results)]) == 2
    assert said in capsys.readouterr().err


def test_a_beginning_that_several_runs_have_names_them(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "", "--folder", str(results)]) == 2
    err = capsys.readouterr().err
    assert "fits 2 runs" in err
    assert all(directory.name in err for directory in completed_runs(results))


def test_a_report_that_cannot_be_written_names_the_option(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(results), "--out", "/dev/null/report"]) == 2
    said = "error: --out /dev/null/report cannot be written (Not a directory); give another: --out DIR\n"
    assert capsys.readouterr().err == said


def test_no_runs_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--folder", str(tmp_path)]) == 2
    assert "no finished run there" in capsys.readouterr().err


def test_every_entry_point_but_the_kit_s_is_a_command() -> None:
    names = {file.stem for file in (REPOSITORY / "experiments").glob("[!_]*.py")}
    kit = {n for n in names if "experiments.gpu_kit" in (REPOSITORY / "experiments" / f"{n}.py").read_text()}
    commands = {name.replace("-", "_") for name in COMMANDS} | {"uvm_replay"}
    assert names - kit <= commands
    for module, _ in COMMANDS.values():
        assert callable(import_module(module).main)


def test_help_waits_for_no_import() -> None:
    code = "import sys; from uvm_kv.cli import main; main(['--help']);"
    code += "print(*{'hydra', 'pandas', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "" and all(any(line.startswith(f"  {name} ") for line in lines) for name in COMMANDS)


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figure"]) == 2
    assert capsys.readouterr().err.startswith("error: figure is no command; did you mean figures? there are run, ")


def test_options_are_written_key_value_too(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", f"folder={results}", "where=mechanism=pinned_swap", "json=true"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert found["summary"]["mechanism"] == "pinned_swap" and Path(found["place"]).name == found["id"]
    assert main(["runs", found["id"], "--folder", str(results), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["argv"] == ["test"]
    with pytest.raises(SystemExit, match="2"):
        main(["runs", "json=maybe"])
    assert "json=maybe is not of the right type; it must be true or false" in capsys.readouterr().err


def test_a_report_as_json_names_its_files(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(results), f"out={tmp_path}", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {Path(file).name for file in told["files"]} == {"figure.png", "figure.pdf", "points.csv", "report.html"}
    assert all(Path(file).is_file() for file in told["files"]) and told["verdicts"]


def test_doctor_says_when_the_current_folder_has_another_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "uvm_kv").mkdir()
    (tmp_path / "uvm_kv" / "__init__.py").touch()
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warning"] is None
    monkeypatch.chdir(tmp_path)
    assert "  warning: this runs " in "\n".join(doctor())
