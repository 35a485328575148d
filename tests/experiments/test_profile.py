"""The profile command: its trace, table and commands, and its answers to bad input."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from experiments.gpu_kit import profile
from tests.runner.torch_cpu.models import save_model

SMALL = ("workload.prompt_tokens=8", "workload.output_tokens=6", "workload.num_requests=8", "batch_size=2")


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that bad input is answered with."""
    assert profile.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"model.path={save_model(tmp_path_factory.mktemp('profile') / 'model')}"


def cpu_job(model: str, tmp_path: Path, *more: str) -> list[str]:
    return ["runner=cpu", "model=hf", model, *SMALL, f"results_dir={tmp_path}", *more]


def ranges_of(folder: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for event in json.loads((folder / "trace.json").read_text())["traceEvents"]:
        if event.get("cat") == "user_annotation":
            counts[event["name"]] = counts.get(event["name"], 0) + 1
    return counts


def test_the_steps_after_the_warm_up_are_recorded(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "profile"
    overrides = cpu_job(model, tmp_path, "mechanism=pinned_prefetch_ahead", "memory.device_kv_bytes=4194304")
    overrides += ["memory.host_kv_bytes=4194304", "placement.num_layers_ahead=1"]
    assert profile.main(["--steps", "5", "--warmup", "3", "--output", str(folder), *overrides]) == 0
    out, _ = capsys.readouterr()
    counts = ranges_of(folder)
    assert counts["execute"] == counts["sample"] == 5
    assert counts["schedule"] in (4, 5), "the one that is open at the end is cut off or left out"
    assert {name: counts[name] for name in counts if name.startswith("layer")} == {f"layer {i}": 5 for i in range(4)}
    assert counts["append"] == counts["attention"] == 5 * 4
    table = (folder / "table.txt").read_text()
    assert table in out
    assert "runner=cpu: 5 steps after 3" in table
    rows = {line.split()[0] for line in table.splitlines()}
    assert {"schedule", "model", "attention", "append", "sample", "step"} <= rows
    assert "on a machine with a GPU, with runner=cuda" in out
    assert not list(tmp_path.glob("*/*/summary.json")), "a profile is no run"


def test_the_commands_repeat_the_job_under_the_tools(model: str, tmp_path: Path) -> None:
    overrides = cpu_job(model, tmp_path, "mechanism=managed_demand", "memory.host_kv_bytes=4194304")
    job = profile.job_of(overrides)
    commands = profile.commands(job, overrides, Path("out dir"), num_steps=5, warmup=3)
    nsys, ncu = (shlex.split(commands[name]) for name in ("timeline", "our kernels"))
    for command in (nsys, ncu):
        begin = command.index("-m") + 1
        assert command[begin] == "experiments.profile"
        again = profile.parse(command[begin + 1 :])
        assert (again.plain, again.steps, again.warmup) == (True, 5, 3)
        assert again.overrides == ["runner=cuda", *overrides[1:]]
    assert "--cuda-um-gpu-page-faults=true" in nsys
    assert {"--capture-range=cudaProfilerApi", "--trace=cuda,nvtx,osrt", "out dir/nsys"} <= set(nsys)
    assert ncu[ncu.index("--profile-from-start") + 1] == "off"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runner=sim"], "runner=sim runs no model"),
        (["engine=hf_generate", "runner=cpu"], "engine=hf_generate: its steps are transformers' own"),
        (["batch_size=1,2"], "2 jobs are asked for; a profile is of one"),
        (["experiment=batch_sweep"], "jobs are asked for; a profile is of one"),
        (["batch_sise=2"], "batch_sise"),
        (["--steps", "0"], "--steps 0; it must be at least 1"),
        (["--stepz", "3"], "--stepz"),
        (["--steps", "many"], "invalid int value"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert said in error(capsys, f"results_dir={tmp_path}", *arguments)


def test_a_job_that_ends_in_its_warm_up_is_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = error(capsys, "--warmup", "500", "--output", str(tmp_path / "out"), *cpu_job(model, tmp_path))
    assert "in its warm-up; lower --warmup" in said


def test_plain_is_for_the_gpu_tools(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "it needs runner=cuda" in error(capsys, "--plain", *cpu_job(model, tmp_path))


def test_without_torch_the_extra_is_named(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec

    def find(name: str, *rest: Any) -> Any:
        return None if name in ("torch", "transformers") else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert "the extra 'torch'" in error(capsys, *cpu_job(model, tmp_path))
