"""The command itself, in processes of its own: errors, sweeps, interruption, resumption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests import jobs
from tests.helpers import REPOSITORY
from uvm_kv.config.names import groups
from uvm_kv.store.directories import read_json
from uvm_kv.store.failures import reason
from uvm_kv.store.records import read_failures
from uvm_kv.store.whole import completed_runs
from uvm_kv.sweep.progress import ENVIRONMENT, Event, SweepEnd, SweepLog, report_event

COMMAND = [sys.executable, "-m", "experiments.run"]
QUICK = ("workload.prompt_tokens=32", "workload.output_tokens=16")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=240,
    )


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """For each finished run the inode of its directory and the time of its summary."""
    return {r.name: (r.stat().st_ino, (r / "summary.json").stat().st_mtime_ns) for r in completed_runs(folder)}


def test_a_single_run_prints_the_memory_account_and_its_numbers(tmp_path: Path) -> None:
    done = run("mechanism=pinned_balanced", "batch_size=4", *QUICK, f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    for text in ("KV budget", "weights", "activation peak", "output tokens/s", "TPOT p99", f"run: {tmp_path}/adhoc/"):
        assert text in done.stdout
    again = run("mechanism=pinned_balanced", "batch_size=4", *QUICK, f"results_dir={tmp_path}")
    assert again.returncode == 0
    assert "complete already" in again.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["model=lama_7b"],
        ["batch_size=zero"],
        ["batch_size=0"],
        ["experiment=nothing"],
        ["experiment=demo"],
        ["mechanism=pinned_swap", "memory=device"],
        ["workload=trace", "workload.path=/no/such/trace.csv"],
        ["runner=cuda"],
        ["results_dir=/dev/null/results"],
    ],
)
def test_errors_are_short_and_without_a_traceback(tmp_path: Path, arguments: list[str]) -> None:
    where = [] if any(a.startswith("results_dir") for a in arguments) else [f"results_dir={tmp_path}"]
    failed = run(*where, *arguments)
    assert failed.returncode in (1, 2)
    assert failed.stderr.startswith("error: ")
    assert len(failed.stderr.splitlines()) <= 3
    assert "Traceback" not in failed.stdout + failed.stderr
    assert completed_runs(tmp_path) == []


def test_a_sweep_reports_skips_and_survives_a_bad_job(tmp_path: Path) -> None:
    """Batch 0 fails, the other jobs finish; the second start runs nothing again."""
    sweep = ["-m", "mechanism=device_resident,pinned_balanced", "batch_size=0,2,4", *QUICK, f"results_dir={tmp_path}"]
    sweep += ["name=it"]
    first = run(*sweep)
    assert first.returncode == 1
    assert first.stderr.count("batch_size=0; it must be at least 1") == 2
    assert "4 of 6 runs are complete, 2 failed." in first.stderr
    assert SweepEnd.read(tmp_path / "adhoc" / "reports" / "it") == SweepEnd(jobs=6, complete=4, failed=2, unrecorded=2)
    lines = first.stdout.splitlines()
    assert any(line.startswith("Verdict: ") for line in lines)
    assert any(line.startswith("report: ") and line.endswith("report.html") for line in lines)
    before = stamps(tmp_path)
    assert len(before) == 4
    second = run(*sweep)
    assert "(4 were complete already)" in second.stderr
    assert stamps(tmp_path) == before


def test_a_sweep_says_what_other_code_made_and_mends_what_is_damaged(tmp_path: Path) -> None:
    sweep = ["-m", "batch_size=1,2,3,4", *QUICK, f"results_dir={tmp_path}"]
    assert run(*sweep).returncode == 0
    older, empty, cut, _ = completed_runs(tmp_path)
    manifest = read_json(older / "manifest.json")
    (older / "manifest.json").write_text(json.dumps(manifest | {"code_sha256": "0" * 64}))
    (empty / "summary.json").write_bytes(b"")
    (cut / "steps.parquet").write_bytes((cut / "steps.parquet").read_bytes()[:-10])
    before = stamps(tmp_path)
    again = run(*sweep)
    assert again.returncode == 0, again.stderr
    assert "4 of 4 runs are complete (2 were complete already), 0 failed." in again.stderr
    for directory in (empty, cut):
        assert f"{directory} was set aside as {directory.name}.damaged, and is run again: " in again.stderr
        assert directory.with_name(f"{directory.name}.damaged").is_dir()
    assert "1 of 4 runs were made by other code than the present (000000000000)" in again.stderr
    assert "code=000000000000" in again.stdout
    after = stamps(tmp_path)
    assert {name: after[name] for name in before} == before
    changed = run(*sweep, "rerun=changed")
    assert "(3 were complete already)" in changed.stderr and "other code" not in changed.stderr
    assert {name for name in after if stamps(tmp_path)[name] != after[name]} == {older.name}


def test_workers_record_the_command_that_was_typed(tmp_path: Path) -> None:
    assert run("-m", "batch_size=1,2", *QUICK, f"results_dir={tmp_path}").returncode == 0
    for directory in completed_runs(tmp_path):
        assert read_json(directory / "manifest.json")["argv"][:4] == ["python", "-m", "experiments.run", "-m"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_sweep_keeps_what_is_finished_and_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    sweep = ["-m", "batch_size=1,2,3,4,5,6,7,8", "workload.prompt_tokens=512", f"results_dir={tmp_path}", "name=it"]
    process = subprocess.Popen(
        [*COMMAND, *sweep], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(completed_runs(tmp_path)) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    # Ctrl-C reaches the whole group; a time limit or a batch system tells the process that it started.
    (os.kill if number is signal.SIGTERM else os.killpg)(process.pid, number)
    output, _ = process.communicate(timeout=60)
    before = stamps(tmp_path)
    assert len(before) >= 2
    if len(before) < 8:
        assert SweepEnd.read(tmp_path / "adhoc" / "reports" / "it") is None
    if number is not signal.SIGKILL and len(before) < 8:
        assert process.returncode == 130
        assert "interrupted:" in output
        assert "Traceback" not in output
    again = run(*sweep)
    assert again.returncode == 0, again.stderr
    assert SweepEnd.read(tmp_path / "adhoc" / "reports" / "it") == SweepEnd(jobs=8, complete=8, failed=0, unrecorded=0)
    after = stamps(tmp_path)
    assert len(after) == 8
    assert {name: after[name] for name in before} == before
    assert not list(tmp_path.rglob(".tmp-*"))


def test_two_sweeps_into_one_folder_at_once(tmp_path: Path) -> None:
    command = [*COMMAND, "-m", "batch_size=1,2,3,4", *QUICK, f"results_dir={tmp_path}"]
    both = [
        subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert len(completed_runs(tmp_path)) == 4


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="needs to mount a small tmpfs")
def test_a_full_disk_is_said_and_nothing_half_written_stays(tmp_path: Path) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("this machine may not mount a tmpfs")
    try:
        failed = run("-m", "batch_size=1,2,3,4", f"results_dir={tmp_path}")
        assert failed.returncode == 1
        assert "no space is left" in failed.stderr
        assert "Traceback" not in failed.stderr
        for directory in completed_runs(tmp_path):
            assert read_json(directory / "summary.json")["num_steps"] > 0
        assert not list(tmp_path.rglob(".tmp-*"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


SWEEPS = {
    "batch_sweep": "model=llama_7b batch_size=8,32",
    "demo": "batch_size=8,32",
    "allocation": "workload.num_requests=20",
    "gpu_sweep_llama_7b": "batch_size=20 runner=sim hardware=h100",
    "gpu_sweep_llama3_8b": "batch_size=40 runner=sim hardware=h100",
}
"""Experiments, each with its sweep cut to one or two batch sizes that are among its own."""
PEERS = ("gpu_peers_llama_7b", "gpu_peers_llama3_8b")


def twins_are_full(experiments: Iterable[str]) -> list[Any]:
    """Mark the Llama-3-8B file of each pair that differs in the model only as full: make test runs the LLaMA-7B one."""
    return [pytest.param(name, marks=pytest.mark.full if name.endswith("_llama3_8b") else ()) for name in experiments]


STUDY = (
    "attention_variants",
    "batch_sweep_drawn",
    "batching",
    "does_it_help_my_box",
    "energy",
    "hints",
    "hints_demand",
    "long_context",
    "long_context_cold",
    "oversubscription",
    "oversubscription_hints",
    "phase_diagram",
    "phase_diagram_cold",
    "phase_diagram_link",
    "phase_diagram_link_far",
    "preemption",
)
"""Sweeps of hundreds of points: their first and their last."""


def test_every_experiment_file_is_tested() -> None:
    """Sweeps and peers below, models in tests/runner/torch_cpu/test_torch_serving.py."""
    assert set(groups()["experiment"]) == {*SWEEPS, *PEERS, *STUDY, "cpu_generate"}


@pytest.mark.parametrize("experiment", STUDY)
def test_the_first_and_the_last_point_of_a_sweep_run(tmp_path: Path, experiment: str) -> None:
    file = REPOSITORY / "conf" / "experiment" / f"{experiment}.yaml"
    said = " ".join(line for line in file.read_text().splitlines() if line.startswith("# "))
    assert f"python -m experiments.run -m experiment={experiment}" in said
    swept = {key: str(values).split(",") for key, values in OmegaConf.load(file).hydra.sweeper.params.items()}
    for point in (0, -1):
        given = [f"{key}={values[point]}" for key, values in swept.items()]
        summary = jobs.run(tmp_path, f"experiment={experiment}", *given, "max_steps=3")
        assert summary["num_steps"] == 3
        assert summary["num_output_tokens"] > 0 or experiment.endswith("_cold"), "three steps of a prefill"
        if "working_set_ratio" in swept:
            rounding = 0.5 / summary["offered_batch"]
            assert abs(summary["working_set_ratio"] / float(swept["working_set_ratio"][point]) - 1) <= 2 * rounding


def test_a_sequence_that_does_not_fit_is_a_finding_of_long_context(tmp_path: Path) -> None:
    """It is recorded with its reason, and the mechanisms with a host tier serve it."""
    given = ("workload.prompt_tokens=131008", "batch_size=1", "max_steps=2", f"results_dir={tmp_path}")
    done = run("-m", "experiment=long_context", "mechanism=device_resident,pinned_balanced", *given)
    assert done.returncode == 1
    assert "1 of 2 runs are complete, 1 failed." in done.stderr
    (record,) = read_failures(tmp_path)[0].values()
    assert record["refused"] is True
    assert (record["mechanism"], record["prompt_tokens"], record["model"]) == ("device_resident", 131008, "llama3_1_8b")
    assert "the longest request of 131072 tokens needs 1024 (17.18 GB)" in reason(record)


@pytest.mark.parametrize("experiment", twins_are_full(SWEEPS))
def test_every_experiment_runs_for_a_few_steps(tmp_path: Path, experiment: str) -> None:
    given = (f"experiment={experiment}", "max_steps=3", *SWEEPS[experiment].split(), f"results_dir={tmp_path}")
    done = run("-m", *given)
    assert done.returncode == 0, done.stderr
    assert "Verdict: " in done.stdout
    assert len(completed_runs(tmp_path / experiment)) >= 10


@pytest.mark.parametrize("experiment", twins_are_full(PEERS))
def test_the_experiments_with_peers_run_a_small_model_on_the_cpu(tmp_path: Path, experiment: str) -> None:
    """A peer that needs no GPU, and ours beside it: the file itself, but for the model's size."""
    shape = ("num_layers=1", "hidden_size=64", "intermediate_size=64", "num_heads=2", "num_kv_heads=1", "head_dim=32")
    small = [f"model.{part}" for part in (*shape, "vocab_size=128")]
    # Not stopped by the clock: both are to serve all of it, on however busy a machine.
    given = (f"experiment={experiment}", "runner=cpu", *small, "memory.device_kv_bytes=4194304", "batch_size=2",
             "max_seconds=600")  # fmt: skip
    assert run(*given, "engine=hf_generate", f"results_dir={tmp_path}").returncode == 0
    assert run(*given, "engine=uvm_kv", "mechanism=device_resident", f"results_dir={tmp_path}").returncode == 0
    peer, ours = sorted((read_json(r / "summary.json") for r in completed_runs(tmp_path)), key=lambda s: s["engine"])
    assert (peer["engine"], ours["engine"]) == ("hf_generate", "uvm_kv")
    assert peer["num_output_tokens"] == ours["num_output_tokens"] > 0


@pytest.mark.parametrize(("experiment", "batches"), [("llama_7b", (8, 16, 32)), ("llama3_8b", (16, 32, 64))])
def test_the_measured_sweeps_cross_their_budget_from_half_to_twice(experiment: str, batches: tuple[int, ...]) -> None:
    """The middle batch fills the device to the last block, and twice as many leave the host tier room for more."""
    for batch in batches:
        for mechanism in ("device_resident", "pinned_prefetch_ahead", "managed_by_tier"):
            found = jobs.resolved(
                f"experiment=gpu_sweep_{experiment}", "runner=sim", f"mechanism={mechanism}", f"batch_size={batch}"
            )
            workload, capacity = found.config.workload, found.capacity
            assert workload.prompt_tokens is not None and workload.output_tokens is not None
            blocks = batch * found.spec.num_blocks(workload.prompt_tokens + workload.output_tokens)
            assert blocks / capacity.num_device_blocks == batch / batches[1]
            if mechanism == "device_resident":
                assert capacity.num_host_blocks == 0
            else:
                assert blocks < sum(capacity)
                assert sum(capacity) * found.spec.block_bytes < 24e9  # What managed memory may take in all.


def test_random_weights_are_nothing_to_the_simulator(tmp_path: Path) -> None:
    """One file serves a real runner and its prediction: there are no weights, whichever are named."""
    one, other = (jobs.job(tmp_path, f"model.weights={weights}") for weights in ("file", "random"))
    assert one.directory == other.directory


def test_a_profile_in_a_folder_of_ones_own_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "conf" / "hardware"
    folder.mkdir(parents=True)
    text = (REPOSITORY / "conf" / "hardware" / "h100.yaml").read_text()
    (folder / "mine.yaml").write_text(text.replace("name: h100", "name: mine"))
    given = ("hardware=mine", "batch_size=2,3", "max_steps=3", f"results_dir={tmp_path / 'runs'}")
    path = f"hydra.searchpath=[file://{tmp_path / 'conf'}]"
    done = run("-m", *given, path)
    assert done.returncode == 0, done.stderr
    assert {read_json(r / "summary.json")["hardware"] for r in completed_runs(tmp_path / "runs")} == {"mine"}
    assert "2 runs complete" in run("-m", "--dry-run", *given, path).stdout
    refused = run("-m", *given)
    assert refused.returncode == 2
    assert "hardware 'mine' is unknown" in refused.stderr


def test_it_runs_where_wandb_is_not_installed(tmp_path: Path) -> None:
    """As on a machine with a GPU that packages are carried to: runs need it only where tracking=wandb is asked for."""
    code = (
        "import sys; sys.modules['wandb'] = None; sys.argv = ['run', '-m', 'hydra/launcher=basic', 'batch_size=2,3', "
        "'max_steps=3', *sys.argv[1:], 'results_dir=" + str(tmp_path) + "'];"
        "from experiments.run import main; sys.exit(main())"
    )
    for more, said in ((), "2 of 2 runs are complete"), (("tracking=wandb",), "tracking=wandb failed"):
        done = subprocess.run([sys.executable, "-c", code, *more], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert said in done.stderr


def test_a_recorded_run_replays_to_the_same_numbers(tmp_path: Path) -> None:
    """runner=replay re-executes the plans of a run and refuses a config that plans otherwise."""
    base = (
        "mechanism=device_recompute",
        "memory.device_kv_bytes=1073741824",
        "batch_size=8",
        f"results_dir={tmp_path}",
    )
    assert run(*base, "workload.arrival=all_at_once", "record_plans=true").returncode == 0
    (recorded,) = completed_runs(tmp_path)
    replay = ("runner=replay", f"replay.path={recorded}", f"results_dir={tmp_path}")
    done = run(*replay)
    assert done.returncode == 0, done.stderr
    (replayed,) = (r for r in completed_runs(tmp_path) if r != recorded)
    one, two = (read_json(r / "summary.json") for r in (recorded, replayed))
    assert two["origin"] == "replayed"
    assert one["output_tokens_per_s_whole_run"] == two["output_tokens_per_s_whole_run"]
    assert one["preemptions"] == two["preemptions"] > 0
    other = run(*replay, "workload.output_tokens=500")
    assert other.returncode == 1
    assert "step " in other.stderr
    assert "recorded " in other.stderr
    assert "Traceback" not in other.stderr
    refused = run(*replay, "mechanism=device_resident")
    assert "takes its config from the recording" in refused.stderr


def test_the_simulated_path_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['run', 'batch_size=2', 'max_steps=3', 'results_dir=" + str(tmp_path) + "'];"
        "from experiments.run import main; assert main() == 0;"
        "assert not {'torch', 'transformers', 'matplotlib', 'wandb'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dry_run_lists_jobs_and_runs_none(tmp_path: Path) -> None:
    command = ["-m", "batch_size=0,2,4", *QUICK, f"results_dir={tmp_path}"]
    listed = run("--dry-run", *command)
    assert listed.returncode == 1
    assert "3 jobs, 0 runs complete, 1 jobs refused" in listed.stdout
    assert "batch_size=0; it must be at least 1" in listed.stdout
    assert completed_runs(tmp_path) == []
    assert run(*command).returncode == 1
    assert "3 jobs, 2 runs complete" in run("--dry-run", *command).stdout


@pytest.mark.parametrize("flag", ["--config-name=other", "--nonsense"])
def test_unknown_options_are_refused(flag: str) -> None:
    refused = run(flag)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {flag} is not an option")


def test_options_may_stand_anywhere(tmp_path: Path) -> None:
    assert run("batch_size=1,2", "-m", *QUICK, f"results_dir={tmp_path}").returncode == 0
    assert len(completed_runs(tmp_path)) == 2


def test_a_sweep_over_the_link_reports_each_setting(tmp_path: Path) -> None:
    done = run(
        "-m", "mechanism=device_resident,pinned_balanced", "hardware.link.h2d_gb_per_s=5,25", "batch_size=4", *QUICK,
        f"results_dir={tmp_path}",
    )  # fmt: skip
    titles = [line for line in done.stdout.splitlines() if line.startswith("Verdict: ")]
    assert len(titles) == 2
    assert "hardware.link.h2d_gb_per_s=5.0" in titles[0]
    assert "hardware.link.h2d_gb_per_s=25.0" in titles[1]
    assert done.stdout.count("Best point tried of each mechanism") == 2


def test_hydra_completes_names_in_a_shell() -> None:
    """What `eval "$(uvm-kv-run -sc install=bash)"` asks at a Tab."""
    typed = "uvm-kv-run mechanism=pinned_"
    asked = os.environ | {"COMP_LINE": typed, "COMP_POINT": str(len(typed)), "COMP_TYPE": "9"}
    command = [sys.executable, "-m", "experiments.run", "-sc", "query=bash"]
    done = subprocess.run(command, env=asked, capture_output=True, text=True, cwd=REPOSITORY)
    assert "mechanism=pinned_swap" in done.stdout.split(), done.stderr


def test_a_sweep_of_a_real_model_alone_has_no_report_and_says_why(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="a real model is served by torch")
    from tests.runner.torch_cpu.models import save_model

    sizes = ("workload.prompt_tokens=8", "workload.output_tokens=2", "batch_size=1,2", "workload.num_requests=2")
    model = save_model(tmp_path / "model")
    done = run("-m", "runner=cpu", "model=hf", f"model.path={model}", *sizes, f"results_dir={tmp_path}/runs")
    assert done.returncode == 0, done.stderr
    assert "2 runs on the CPU say nothing about memory kinds and are in no figure" in done.stderr
    assert "2 of 2 runs are complete" in done.stderr


def test_progress_counts_what_is_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    for event in (
        Event("started", "a", "runs/a"),
        Event("started", "b", "runs/b"),
        Event("skipped", "c", "runs/c"),
        Event("failed", "d", error="refused before it started"),
        Event("done", "a", "runs/a"),
    ):
        report_event(event)
    log = SweepLog(tmp_path)
    log.poll()
    assert (log.count("done"), len(log.running), log.count("skipped"), log.count("failed")) == (1, 1, 1, 1)
