"""The command: simulated runs recorded with another profile, recordings of other kinds, and its errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from tests.helpers import vouch
from uvm_kv.commands import validate
from uvm_kv.store.directories import read_table
from uvm_kv.store.whole import completed_runs

SMALL = ("model=llama3_8b", "mechanism=device_recompute", "batch_size=16", "workload.prompt_tokens=256")
POISSON = ("workload.arrival=poisson", "workload.request_rate=6", "workload.output_tokens=64", *SMALL)


def record(folder: Path, *overrides: str) -> Path:
    """A simulated run; its directory."""
    job = jobs.job(folder / "recorded", *overrides)
    jobs.run_any_job(job, argv=["test"])
    return job.directory


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command in this process, its results in tmp_path / "out"; exit status, and what it printed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["validate", f"out={tmp_path / 'out'}", *arguments])
        status = validate.main()
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def table_of(tmp_path: Path, name: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """comparison.json, and its rows by metric."""
    content = json.loads((tmp_path / "out" / "validation" / name / "comparison.json").read_text())
    return content, {row["metric"]: row for row in content["metrics"]}


@pytest.mark.parametrize(
    "overrides",
    [
        POISSON,
        (*SMALL, "workload.num_requests=40", "seed=3", "num_repeats=1"),
        (*SMALL, "workload.arrival=all_at_once", "scheduler=dynamic"),
        ("mechanism=pinned_swap", "batch_size=24", "workload=azure_conv", "workload.num_requests=48"),
        ("mechanism=pinned_balanced", "batch_size=20", "workload.num_requests=40"),
    ],
)
def test_the_same_profile_gives_no_error_at_all(tmp_path: Path, command: Any, overrides: tuple[str, ...]) -> None:
    """Open and closed loops, random lengths, preemption, host memory: the simulation serves the very same work."""
    directory = record(tmp_path, *overrides)
    status, out, err = command(f"recorded={directory}")
    assert (status, err) == (0, "")
    content, rows = table_of(tmp_path, directory.name)
    assert {row["verdict"] for row in rows.values()} == {"SAME"}
    assert max(abs(row["error"]) for row in rows.values()) < 1e-9
    assert content["recorded"][0]["run"] == directory.name
    assert f"Validation: {len(rows)} SAME" in out
    for ending in ("png", "pdf"):
        assert (tmp_path / "out" / "figures" / f"validate_{directory.name}.{ending}").stat().st_size > 10_000


STEADY = ("workload.start=steady", "model.weights=random", "batch_size=12", "workload.output_tokens=128")


@pytest.mark.parametrize("stop", ["max_steps=24", "max_seconds=0.4"])
@pytest.mark.parametrize("mechanism", ["device_resident", "device_recompute", "pinned_swap"])
def test_a_steady_start_that_was_stopped_is_simulated_step_for_step(
    mechanism: str, stop: str, tmp_path: Path, command: Any
) -> None:
    """Steady runs like those of the measured sweeps, whether or not a request has ended and whatever stopped them."""
    directory = record(tmp_path, "model=llama3_8b", f"mechanism={mechanism}", stop, *STEADY)
    status, _, err = command(f"recorded={directory}", "hardware=rtx4090")
    assert (status, err) == (0, "")
    _, rows = table_of(tmp_path, directory.name)
    assert rows["num_steps"]["verdict"] == rows["running_batch_mean"]["verdict"] == "SAME"
    assert rows["num_steps"]["recorded"] > 8
    assert rows["decode_step_s.p50"]["error"] < 0 and rows["output_tokens_per_s"]["error"] > 0
    assert not {"ttft_s.mean", "e2e_s.mean"} & set(rows), "nothing is prefilled"


def test_what_only_a_real_model_has_is_reset(tmp_path: Path, command: Any) -> None:
    """On the CPU: random weights, a compiled model's config, and a peer beside it, which is left out of a folder."""
    pytest.importorskip("torch")
    small = ("runner=cpu", "model=smollm2_135m", "model.weights=random", "model.num_layers=2", "batch_size=3")
    small += ("workload.prompt_tokens=16", "workload.output_tokens=12", "max_seconds=60")
    directory = record(tmp_path, *small, "workload.start=steady", "watchdog_s=100")
    config = directory / "config.yaml"
    text = config.read_text()
    assert "compile: false" in text and "allow_oversubscription: false" in text
    text = text.replace("compile: false", "compile: true").replace("cuda_graphs: true", "cuda_graphs: false")
    config.write_text(text.replace("allow_oversubscription: false", "allow_oversubscription: true"))
    vouch(directory)
    peer = record(tmp_path, *small, "engine=hf_generate")
    status, out, err = command(f"recorded={tmp_path / 'recorded'}")
    assert (status, err) == (0, "")
    assert out.count("Validation: ") == 1
    assert table_of(tmp_path, directory.name)[1]["num_steps"]["verdict"] == "SAME"
    status, _, err = command(f"recorded={peer}")
    assert status == 2
    assert "runs of hf_generate, which the simulator does not play" in err and len(err.splitlines()) == 1


def test_another_profile_is_told_and_stays_simulated(tmp_path: Path, command: Any) -> None:
    """A faster card was recorded: the simulation of a 3090 is slower throughout, and nothing is called measured."""
    directory = record(tmp_path, "hardware=rtx4090", *POISSON)
    status, out, _ = command(f"recorded={directory}", "hardware=rtx3090", "name=cross")
    assert status == 0
    content, rows = table_of(tmp_path, "cross")
    assert rows["tpot_s.mean"]["verdict"] == rows["prefill_step_s.mean"]["verdict"] == "SLOW"
    assert rows["tpot_s.mean"]["error"] > 0.05
    assert [content[side][0]["origin"] for side in ("recorded", "simulated")] == ["simulated", "simulated"]
    assert [content[side][0]["hardware"] for side in ("recorded", "simulated")] == ["rtx4090", "rtx3090"]
    assert "recorded (simulated, rtx4090, 1 run) against simulated (rtx3090)" in out
    assert "measured" not in out
    back = record(tmp_path, "hardware=rtx3090", *POISSON)
    command(f"recorded={back}", "hardware=rtx4090", "name=back")
    assert table_of(tmp_path, "back")[1]["tpot_s.mean"]["verdict"] == "FAST"


def test_a_single_key_changes_the_simulation(tmp_path: Path, command: Any) -> None:
    """Half the link: swapping moves the same bytes in twice the time, and only the link's metrics say so."""
    swap = ("mechanism=pinned_swap", "batch_size=32", "workload.num_requests=64", "hardware.link.h2d_gb_per_s=24")
    directory = record(tmp_path, *swap)
    assert command(f"recorded={directory}", "hardware.link.h2d_gb_per_s=12", "name=link")[0] == 0
    content, rows = table_of(tmp_path, "link")
    assert content["argv"][-3:-1] == [f"recorded={directory}", "hardware.link.h2d_gb_per_s=12"]
    assert rows["stall_s"]["verdict"] == "SLOW"
    assert rows["h2d_copy_bytes"]["recorded"] > 0
    assert rows["h2d_copy_bytes"]["verdict"] == rows["decode_step_s.p50"]["verdict"] == "SAME"


def test_repeats_of_one_config_give_the_noise(tmp_path: Path, command: Any) -> None:
    random = ("workload=azure_conv", "workload.num_requests=24", "model=llama3_8b", "batch_size=4")
    runs = [record(tmp_path, "hardware=rtx4090", *random, f"seed={seed}") for seed in range(3)]
    listed = ",".join(map(str, runs))
    status, out, _ = command(f"recorded=[{listed}]", "hardware=rtx3090", "name=repeats")
    assert status == 0
    content, rows = table_of(tmp_path, "repeats")
    assert [side["seed"] for side in content["recorded"]] == [0, 1, 2]
    assert all(row["noise"] is not None for row in rows.values())
    assert rows["decode_step_s.p50"]["noise"] > 0
    assert "3 runs" in out and "noise" in out


def test_runs_of_several_configs_are_validated_one_by_one(tmp_path: Path, command: Any) -> None:
    runs = [record(tmp_path, *SMALL, f"workload.output_tokens={n}") for n in (16, 24)]
    assert command(f"recorded={tmp_path / 'recorded'}")[0] == 0
    for run in runs:
        assert len(table_of(tmp_path, run.name)[0]["recorded"]) == 1


def write_csv(path: Path, directory: Path) -> Path:
    """A run's requests as another system would report them."""
    requests = read_table(directory, "requests")
    lines = ["arrival_s,prompt_tokens,output_tokens,ttft_s,e2e_s,server"]
    columns = ("arrival_ns", "prompt_tokens", "output_tokens", "first_token_ns", "finish_ns")
    for arrival, prompt, output, first, finish in zip(*(requests[name] for name in columns), strict=True):
        assert arrival is not None and first is not None and finish is not None
        times = [f"{(t - start) / 1e9:.9f}" for t, start in ((arrival, 0), (first, arrival), (finish, arrival))]
        lines.append(f"{times[0]},{prompt},{output},{times[1]},{times[2]},vllm")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_file_of_requests_is_served_as_vllm_would(tmp_path: Path, command: Any) -> None:
    """device_recompute without a watermark unless said otherwise, the same arrivals and lengths: no error at all."""
    directory = record(tmp_path, *POISSON, "scheduler.watermark=0")
    file = write_csv(tmp_path / "vllm_run.csv", directory)
    status, out, err = command(f"recorded={file}", "model=llama3_8b", "batch_size=16")
    assert (status, err) == (0, "")
    content, rows = table_of(tmp_path, "vllm_run")
    observed = {name: row for name, row in rows.items() if row["recorded"] is not None}
    assert {row["verdict"] for row in observed.values()} == {"SAME"}
    assert max(abs(row["error"]) for row in observed.values()) < 1e-9
    assert {"ttft_s.p99", "tpot_s.mean", "e2e_s.p50", "output_tokens_per_s_whole_run"} <= set(observed)
    assert rows["decode_step_s.mean"]["verdict"] == "not observed"
    assert content["recorded"][0]["origin"] == "external"
    assert "the file does not say how its times were measured" in out
    other = command(f"recorded={file}", "model=llama3_8b", "batch_size=16", "hardware=rtx4090", "name=other")
    assert other[0] == 0
    assert table_of(tmp_path, "other")[1]["e2e_s.mean"]["verdict"] == "FAST"


def test_a_run_of_a_real_model_is_simulated_on_its_own_requests(tmp_path: Path, command: Any) -> None:
    """Prompts that end at a stop token, on the CPU: lengths as they came out; counters were not observed."""
    pytest.importorskip("torch")
    from tests.runner.torch_cpu.models import ragged, save_model

    folder, prompts = save_model(tmp_path / "my_model"), tmp_path / "prompts.jsonl"
    lines = [{"prompt_ids": list(r.prompt_ids or ()), "output_tokens": r.output_tokens} for r in ragged(12)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    directory = record(
        tmp_path, "runner=cpu", "model=hf", f"model.path={folder}", "dtype=float32", "batch_size=8",
        "mechanism=pinned_swap", f"prompts={prompts}",
    )  # fmt: skip
    status, out, err = command(f"recorded={directory}", "name=cpu")
    assert (status, err) == (0, "")
    content, rows = table_of(tmp_path, "cpu")
    assert "recorded (measured, CPU, 1 run) against simulated (rtx3090)" in out
    assert (content["recorded"][0]["origin"], content["recorded"][0]["hardware"]) == ("measured", None)
    # The same scheduler on the same requests, all there at the start: the same steps.
    assert rows["num_steps"]["verdict"] == "SAME"
    assert rows["ttft_s.mean"]["verdict"] == "FAST"
    assert "stall_s" not in rows or rows["stall_s"]["verdict"] == "not observed"


def test_a_recording_of_another_version_needs_its_hardware_named(tmp_path: Path, command: Any) -> None:
    directory = record(tmp_path, *SMALL, "workload.output_tokens=16")
    config = directory / "config.yaml"
    config.write_text(config.read_text().replace("hardware:\n", "hardware:\n  warp_drive: 9\n", 1))
    vouch(directory)
    status, _, err = command(f"recorded={directory}")
    assert status == 2
    assert "not a config of this version" in err and "hardware=NAME" in err
    assert len(err.splitlines()) == 1
    assert command(f"recorded={directory}", "hardware=rtx3090")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give what was recorded: recorded=RUN_DIR"),
        (["recorded="], "give what was recorded"),
        (["recorded=no/such/run"], "recorded=no/such/run: there is no such directory or file"),
        (["recorded={tmp}"], "it is neither a finished run directory"),
        (["recorded={run}", "hardware=rtx3091"], "did you mean rtx3090"),
        (["recorded={run}", "hardware=rtx3090,rtx4090"], "one value a key"),
        (["recorded={run}", "model=opt_13b"], "a recorded run directory brings its own config"),
        (["recorded={run}", "workload.output_tokens=5"], "the simulation serves what was recorded"),
        (["recorded={run}", "seed=5"], "the simulation serves what was recorded"),
        (["recorded={run}", "results_dir=x"], "in a place of its own"),
        (["recorded={run}", "batch_size=zero"], "is not of the right type"),
        (["recorded={run}", "block_sizes=8"], "key 'block_sizes' is unknown; did you mean block_size"),
        (["recorded={run}", "tolerance=5"], "tolerance=5; it is a relative error, above 0 and below 1"),
        (["recorded={run}", "tolerance=low"], "tolerance=low"),
        (["recorded={run}", "--fast"], "--fast is not an option"),
        (["recorded={run}", "memory.device_kv_bytes=1000000"], "memory.device_kv_bytes=1000000 holds no KV"),
        (["recorded={run}", "dtype=float32"], "does not fit rtx3090"),
        (["recorded={csv}"], "give model=... and batch_size=..."),
        (["recorded={csv}", "model=llama3_8b"], "give batch_size=..."),
        (["recorded={csv}", "model=llama3_8b", "batch_size=4", "workload.path=x"], "serves what was recorded"),
        (
            ["recorded={csv}", "model=llama3_8b", "dtype=float32", "batch_size=4"],
            "llama3_8b leaves no KV memory on rtx3090",
        ),
        (["recorded={csv}", "model=llama_7b", "batch_size=4"], "a request of 5010 tokens exceeds the 2048 of llama_7b"),
        (["recorded={bad}", "model=llama_7b", "batch_size=4"], "bad.csv, line 3: e2e_s is 'soon'"),
        (["recorded={cut}"], "stopped by max_steps"),
        (["recorded={none}"], "no request was finished"),
    ],
)
def test_errors_are_a_line_that_says_how_to_mend_it(
    arguments: list[str], message: str, tmp_path: Path, command: Any
) -> None:
    places = {"tmp": tmp_path / "empty", "csv": tmp_path / "long.csv", "bad": tmp_path / "bad.csv"}
    places["tmp"].mkdir()
    header = "arrival_s,prompt_tokens,output_tokens,ttft_s,e2e_s"
    places["csv"].write_text(f"{header}\n0,5000,10,1,2\n")
    places["bad"].write_text(f"{header}\n0,50,10,1,2\n1,50,10,1,soon\n")
    text = " ".join(arguments)
    short = (*SMALL, "workload.output_tokens=16")
    for name, overrides in (
        ("run", short), ("cut", (*short, "max_steps=30")), ("none", (*POISSON, "max_steps=2"))
    ):  # fmt: skip
        if f"{{{name}}}" in text:
            places[name] = record(tmp_path, *overrides)
    status, out, err = command(*(argument.format(**places) for argument in arguments))
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) <= 2
    assert out == ""
    assert completed_runs(tmp_path / "out") == []


def test_an_output_that_cannot_be_written_is_said(tmp_path: Path, command: Any) -> None:
    directory = record(tmp_path, *SMALL, "workload.output_tokens=16")
    status, _, err = command(f"recorded={directory}", "out=/dev/null/results")
    assert status == 2
    assert err == "error: out=/dev/null/results cannot be written (Not a directory); give another: out=DIR\n"
    status, _, err = command(f"recorded={directory}", "out=")
    assert (status, len(err.splitlines())) == (2, 1)
    assert err.startswith("error: out= names no folder")


def test_help(command: Any) -> None:
    status, out, _ = command("--help")
    assert status == 0
    assert "recorded=RUN_DIR" in out
