"""The measured sweeps as commands: what they take of a machine, what they need, and that the program accepts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.gpu_kit import gpu_check, measuring
from experiments.gpu_kit.gpu_check import MEASURE_PARTS, PARTS, chosen_parts
from experiments.gpu_kit.measure_operators import main as measure_operators
from experiments.gpu_kit.measuring import SWEEPS, NotPossibleError, managed_fits
from tests import jobs
from tests.config.curves import curves_of
from tests.helpers import REPOSITORY
from uvm_kv.calibrate.curves import OPERATORS, read_curves
from uvm_kv.calibrate.profile_file import load_profile
from uvm_kv.types import GIB

CARD = {"name": "NVIDIA H100 80GB HBM3", "uuid": "GPU-0", "driver": "580.0"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "gpu", lambda: CARD)
    monkeypatch.setattr(measuring, "free_card_bytes", lambda: 80 * 10**9)
    monkeypatch.setattr(measuring, "available_host_bytes", lambda: 100 * GIB)


def with_profile(output: Path) -> Path:
    file = output / "calibrate" / "conf" / "hardware" / "measured_h100.yaml"
    file.parent.mkdir(parents=True)
    text = (REPOSITORY / "conf" / "hardware" / "h100.yaml").read_text()
    file.write_text(text.replace("name: h100", "name: measured_h100"))
    return output


def test_parts_fit_their_calls_and_25_minutes_together() -> None:
    assert all(part.limit_s <= gpu_check.MEASURE_SECONDS <= 540 for part in MEASURE_PARTS)
    assert sum(part.limit_s for part in MEASURE_PARTS) <= 25 * 60
    assert len({part.name for part in (*PARTS, *MEASURE_PARTS)}) == len(PARTS) + len(MEASURE_PARTS)
    assert [p.name for p in chosen_parts(None, measure=True)] == ["build", *(p.name for p in MEASURE_PARTS)]
    assert [p.name for p in chosen_parts(["validate", "tests"])] == ["tests", "validate"]


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.name)
def test_sizes_here_are_those_of_the_experiment(sweep: measuring.Sweep) -> None:
    found = jobs.resolved(
        f"experiment=gpu_sweep_{sweep.name}", "runner=sim", "mechanism=managed_by_tier", f"batch_size={sweep.within[0]}"
    )
    assert (sweep.device_kv_bytes, sweep.host_kv_bytes) == (
        found.config.memory.device_kv_bytes,
        found.config.memory.host_kv_bytes,
    )
    assert dict(found.memory_account)["weights"] == pytest.approx(-sweep.weights_bytes, rel=0.01)
    tokens = (found.config.workload.prompt_tokens or 0) + (found.config.workload.output_tokens or 0)
    fit = found.capacity.num_device_blocks // found.spec.num_blocks(tokens)
    assert max(sweep.within) == fit < min(sweep.beyond)


def test_managed_memory_is_at_most_24_gb_and_half_of_what_is_free() -> None:
    seven, eight = SWEEPS
    assert all(sweep.managed_bytes <= 24e9 for sweep in SWEEPS)
    assert managed_fits(seven, 80 * 10**9)
    assert not managed_fits(seven, 24 * 10**9)  # A 3090: more than half of what the weights leave.
    assert managed_fits(eight, 24 * 10**9)
    assert not managed_fits(seven, None)


@pytest.mark.usefixtures("machine")
def test_what_is_not_there_keeps_a_part_from_being_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotPossibleError, match="there are no curves"):
        measuring.calibrate_commands(tmp_path)
    with pytest.raises(NotPossibleError, match="there is no calibrated profile"):
        measuring.predict_commands(tmp_path)
    with pytest.raises(NotPossibleError, match=r"there is no predictions.json; the part predict makes it"):
        measuring.validate_commands(tmp_path)
    assert measuring.profile_if_any(tmp_path) == []
    monkeypatch.setattr(measuring, "available_host_bytes", lambda: 19 * GIB)
    with pytest.raises(NotPossibleError, match=r"at most half of free host memory, and 19\.0 GiB are free"):
        measuring.measure_commands(SWEEPS[0], tmp_path)
    monkeypatch.setattr(measuring, "gpu", lambda: CARD | {"name": "NVIDIA T4"})
    with pytest.raises(NotPossibleError, match="does not know NVIDIA T4"):
        measuring.operator_commands(tmp_path)


@pytest.mark.usefixtures("machine")
def test_managed_mechanisms_are_left_out_where_they_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(word for command in measuring.measure_commands(SWEEPS[0], tmp_path) for word in command)
    assert "managed_demand_capped" in text and "mechanism=managed_demand batch_size=8,16" in text
    monkeypatch.setattr(measuring, "free_card_bytes", lambda: 24 * 10**9)
    text = " ".join(word for command in measuring.measure_commands(SWEEPS[0], tmp_path) for word in command)
    assert "managed_" not in text.replace(str(tmp_path), "") and "vmm_balanced" in text
    assert "allow_oversubscription" not in text


@pytest.mark.usefixtures("machine")
def test_every_command_is_one_that_the_program_accepts(tmp_path: Path) -> None:
    """Each as it is, with runner=sim where it measures: its jobs are listed, and none is refused."""
    output = with_profile(tmp_path)
    commands = [*measuring.predict_commands(output), *measuring.repeat_commands(output)]
    commands += [c for sweep in SWEEPS for c in measuring.measure_commands(sweep, output)]
    sweeps = {json.dumps(c): c for c in commands if "experiments.run" in c}.values()
    assert len(sweeps) == 12
    code = "import sys; from experiments.run import main; sys.exit(main())"
    asked = ["batch_size=16", "num_repeats=1"]  # One of each is enough: they are told apart by mechanism.
    for command in list(sweeps)[-3:]:
        words = [word for word in command[3:] if not word.startswith(("batch_size=", "num_repeats="))]
        done = subprocess.run(
            [sys.executable, "-c", code, *words, *asked, "runner=sim", "--dry-run"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "0 jobs refused" in done.stdout
        assert "hardware=measured_h100" in done.stdout


@pytest.mark.usefixtures("machine")
def test_predictions_are_of_the_points_that_are_measured(tmp_path: Path) -> None:
    """The commands differ in the runner and the folder only."""
    output = with_profile(tmp_path)

    def bare(commands: list[list[str]]) -> set[str]:
        kept = ("experiment=", "mechanism=", "batch_size=", "num_repeats=")
        return {" ".join(w for w in c if w.startswith(kept)) for c in commands if "experiments.run" in c}

    measured = [c for sweep in SWEEPS for c in measuring.measure_commands(sweep, output)]
    assert bare(measuring.predict_commands(output)) == bare(measured + measuring.repeat_commands(output))


@pytest.mark.usefixtures("machine")
def test_a_part_that_cannot_be_run_is_no_failure(tmp_path: Path) -> None:
    calibrate = next(part for part in MEASURE_PARTS if part.name == "calibrate")
    outcome = gpu_check.run_part(calibrate, tmp_path, 10, "x")
    assert (outcome.status, outcome.reason[:20]) == ("not run", "there are no curves;")


def test_operators_are_measured_into_curves_that_calibrate_reads(tmp_path: Path) -> None:
    """Measured on the CPU, whose times say nothing; the test is about the points, their names and the file."""
    curves, output = tmp_path / "curves.json", tmp_path / "out" / "curves.json"
    curves.write_text(json.dumps(curves_of(load_profile("a30"), ("link", "copy", "hbm"))))
    small = ["--model", "smollm2_135m", "--dtype", "float32", "--device", "cpu", "--tokens", "1", "2", "4"]
    assert measure_operators(["--curves", str(curves), "--output", str(output), *small]) == 0
    found = read_curves(output)
    assert {p.at["layer_name"] for p in found.curves["operators"]} == set(OPERATORS)
    assert {p.at["tokens"] for p in found.curves["operators"]} == {1, 2, 4}
    assert found.model is not None and found.model.name == "smollm2_135m"


def test_a_curves_file_that_is_not_there_is_a_line(tmp_path: Path, capsys: Any) -> None:
    assert measure_operators(["--curves", str(tmp_path / "no.json"), "--output", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
