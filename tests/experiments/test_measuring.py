"""The measured sweeps as commands: what they take of a machine, what they need, and that the program accepts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.gpu_kit import gpu_check, parts
from experiments.gpu_kit.measure_operators import main as measure_operators
from experiments.gpu_kit.parts import CHECK, MEASURE, OWN, PARTS, SWEEPS, NotPossibleError, managed_fits, parts_of
from tests import jobs
from tests.config.curves import curves_of
from tests.helpers import REPOSITORY
from uvm_kv.calibrate.curves import OPERATORS, read_curves
from uvm_kv.calibrate.profile_file import load_profile
from uvm_kv.types import GIB

CARD = {"name": "NVIDIA H100 80GB HBM3", "uuid": "GPU-0", "driver": "580.0"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "gpu", lambda: CARD)
    monkeypatch.setattr(parts, "free_card_bytes", lambda: 80 * 10**9)
    monkeypatch.setattr(parts, "available_host_bytes", lambda: 100 * GIB)


def with_profile(output: Path) -> Path:
    file = output / "calibrate" / "conf" / "hardware" / "measured_h100.yaml"
    file.parent.mkdir(parents=True)
    text = (REPOSITORY / "conf" / "hardware" / "h100.yaml").read_text()
    file.write_text(text.replace("name: h100", "name: measured_h100"))
    return output


def test_parts_fit_their_calls_and_25_minutes_together() -> None:
    build, *measured = parts_of(MEASURE)
    assert build.name == "build" and len({part.name for part in PARTS}) == len(PARTS)
    assert all(part.limit_s <= gpu_check.SECONDS[MEASURE] <= 540 for part in measured)
    assert sum(part.limit_s for part in measured) <= 25 * 60
    assert [p.name for p in parts_of(CHECK, ["validate", "tests"])] == ["tests", "validate"]


def test_each_command_has_its_parts_most_valuable_first() -> None:
    names = {command: " ".join(part.name for part in parts_of(command)) for command in (CHECK, MEASURE, OWN)}
    assert names[CHECK] == "build tests microbench sanitizer ladder doctor"
    sweeps = "sweep_llama_7b sweep_llama3_8b repeats"
    after = "peers decode_step validate"
    assert names[MEASURE] == f"build operators calibrate predict {sweeps} {after} speed"
    assert names[OWN] == (
        f"microbench doctor operators calibrate predict predict_published {sweeps} oversubscribed_llama_7b "
        f"oversubscribed_llama3_8b {after} validate_published speed report"
    )


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.name)
def test_sizes_here_are_those_of_the_experiment(sweep: parts.Sweep) -> None:
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
        parts.calibrate(tmp_path)
    with pytest.raises(NotPossibleError, match="there is no calibrated profile"):
        parts.predict(tmp_path)
    with pytest.raises(NotPossibleError, match=r"there is no predictions.json; the part predict makes it"):
        parts.validate(tmp_path)
    assert parts.profile_if_any(tmp_path) == []
    monkeypatch.setattr(parts, "available_host_bytes", lambda: 19 * GIB)
    with pytest.raises(NotPossibleError, match=r"at most half of free host memory, and 19\.0 GiB are free"):
        parts.measure(tmp_path, SWEEPS[0])
    monkeypatch.setattr(parts, "gpu", lambda: CARD | {"name": "NVIDIA T4"})
    with pytest.raises(NotPossibleError, match="does not know NVIDIA T4"):
        parts.operators(tmp_path)


@pytest.mark.usefixtures("machine")
def test_managed_mechanisms_are_left_out_where_they_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(word for command in parts.measure(tmp_path, SWEEPS[0]) for word in command)
    assert "managed_demand_capped" in text and "mechanism=managed_demand batch_size=8,16" in text
    monkeypatch.setattr(parts, "free_card_bytes", lambda: 24 * 10**9)
    text = " ".join(word for command in parts.measure(tmp_path, SWEEPS[0]) for word in command)
    assert "managed_" not in text.replace(str(tmp_path), "") and "vmm_balanced" in text
    assert "allow_oversubscription" not in text


@pytest.mark.usefixtures("machine")
def test_every_command_is_one_that_the_program_accepts(tmp_path: Path) -> None:
    """Each as it is, with runner=sim where it measures: its jobs are listed, and none is refused."""
    output = with_profile(tmp_path)
    commands = [*parts.predict(output), *parts.repeats(output)]
    commands += [c for sweep in SWEEPS for c in parts.measure(output, sweep)]
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

    measured = [c for sweep in SWEEPS for c in parts.measure(output, sweep)]
    assert bare(parts.predict(output)) == bare(measured + parts.repeats(output))


@pytest.mark.usefixtures("machine")
def test_a_part_that_cannot_be_run_is_no_failure(tmp_path: Path) -> None:
    (calibrate,) = parts_of(MEASURE, ["calibrate"])
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
