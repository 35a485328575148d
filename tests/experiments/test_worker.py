"""One worker at a time: what ends it, what it takes with it, and that jobs come out as they do without it."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from tests.experiments.fake_jobs import CudaError, Fake, FakeTask, OutOfMemoryError
from tests.helpers import REPOSITORY
from uvm_kv.commands.run import preflight
from uvm_kv.job.build import Job
from uvm_kv.store.directories import read_json
from uvm_kv.store.records import read_failures
from uvm_kv.store.whole import completed_runs
from uvm_kv.sweep import worker as worker_module
from uvm_kv.sweep.worker import OneWorker, Outcome, Reach, Worker, explain, in_order, mechanism, process, reach_of

SMALL = ("workload.prompt_tokens=32", "workload.output_tokens=16")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"


def ends(pid: int, within_s: float = 20) -> bool:
    deadline = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def outcomes(jobs_: list[Fake]) -> list[Outcome | tuple[str, str]]:
    """For each job its outcome, or (the job that ended its mechanism, its error)."""
    found: list[Outcome | tuple[str, str]] = []
    with OneWorker(FakeTask, lambda job: job.mechanism) as worker:
        for job in jobs_:
            before = worker.given_up(job)
            found.append(worker.run(job, ["typed"]) if before is None else (before[0].name, before[1]))
    return found


@pytest.fixture(scope="module")
def mixed() -> dict[str, Any]:
    """One sweep in which about everything happens, by the jobs' names."""
    sweep = [
        *(Fake("one", "a"), Fake("two", "a"), Fake("refused", "a", "refused"), Fake("bug", "a", "bug")),
        *(Fake("full", "a", "full"), Fake("after_full", "a")),
        *(Fake("good", "b"), Fake("segfault", "b", "segfault"), Fake("left_1", "b"), Fake("left_2", "b")),
        *(Fake("cuda", "c", "cuda"), Fake("left_3", "c")),
        Fake("last", "d"),
    ]
    return dict(zip((job.name for job in sweep), outcomes(sweep), strict=True))


def test_one_process_runs_the_jobs_of_a_mechanism(mixed: dict[str, Any]) -> None:
    assert mixed["one"].summary | {"pid": 0} == {"name": "one", "argv": ["typed"], "pid": 0, "nth": 1}
    assert (mixed["two"].summary["nth"], mixed["two"].summary["pid"]) == (2, mixed["one"].summary["pid"])
    assert mixed["one"].summary["pid"] != os.getpid()


def test_the_worker_is_replaced_when_the_mechanism_changes(mixed: dict[str, Any]) -> None:
    assert mixed["good"].summary["nth"] == 1
    assert mixed["good"].summary["pid"] not in {mixed["one"].summary["pid"], mixed["last"].summary["pid"]}


def test_a_job_that_is_refused_or_a_bug_fails_alone(mixed: dict[str, Any]) -> None:
    assert (mixed["refused"].error, mixed["refused"].reach) == ("batch_size=0", Reach.JOB)
    assert mixed["bug"].error.startswith("this is a bug in uvm-kv:\nTraceback")
    assert mixed["bug"].reach is Reach.JOB


def test_out_of_memory_fails_the_job_and_renews_the_worker(mixed: dict[str, Any]) -> None:
    assert mixed["full"].error == (
        "out of GPU memory (cudaMalloc of 2147483648 bytes, 1073741824 are free); lower memory.device_kv_bytes or "
        "batch_size"
    )
    after = mixed["after_full"].summary
    assert after["nth"] == 1
    assert after["pid"] != mixed["one"].summary["pid"]


def test_a_dead_worker_ends_its_mechanism_and_the_sweep_goes_on(mixed: dict[str, Any]) -> None:
    assert mixed["segfault"].error == "the worker process was killed by SIGSEGV"
    assert mixed["left_1"] == mixed["left_2"] == ("segfault", mixed["segfault"].error)
    assert mixed["good"].error is None
    assert mixed["last"].summary["nth"] == 1


def test_a_cuda_error_ends_its_mechanism(mixed: dict[str, Any]) -> None:
    assert mixed["cuda"].error == "cudaErrorIllegalAddress in attention.cu:12"
    assert mixed["left_3"] == ("cuda", mixed["cuda"].error)


def test_no_worker_of_a_sweep_is_left(mixed: dict[str, Any]) -> None:
    pids = {o.summary["pid"] for o in mixed.values() if isinstance(o, Outcome) and o.summary is not None}
    assert len(pids) == 4
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(
    ("does", "error", "reach"),
    [
        ("killed", "the worker process was killed by SIGKILL; the system does that when host memory", Reach.MECHANISM),
        ("exit", "the worker process ended by itself, with status 3", Reach.MECHANISM),
        ("wrapped", "Llama cannot be served (cudaErrorIllegalAddress in attention.cu:12)", Reach.MECHANISM),
        ("torch", "CUDA error: unspecified launch failure", Reach.MECHANISM),
        ("full_and_said", "KV needs 2 GB, 1 GB is free; lower memory.device_kv_bytes", Reach.WORKER),
        (
            "wrapped_full",
            "Llama cannot be served (cudaMalloc); lower memory.device_kv_bytes or batch_size",
            Reach.WORKER,
        ),
        ("cleaned_up", "cudaErrorIllegalAddress in attention.cu:12", Reach.MECHANISM),
        ("cleaned_up_full", "out of GPU memory (cudaMalloc); lower memory.device_kv_bytes or batch_size", Reach.WORKER),
        ("host_full", "out of host memory (MemoryError); lower memory.host_kv_bytes or batch_size", Reach.WORKER),
    ],
)
def test_what_an_error_ends_and_says(does: str, error: str, reach: Reach) -> None:
    (outcome,) = outcomes([Fake("job", does=does)])
    assert isinstance(outcome, Outcome)
    assert outcome.error is not None
    assert outcome.error.startswith(error)
    assert len(outcome.error.splitlines()) == 1
    assert outcome.reach is reach


def test_torchs_own_errors_are_known() -> None:
    torch = pytest.importorskip("torch")
    assert reach_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")) is Reach.WORKER
    filled = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 MiB free.\nMore lines")
    assert explain(filled) == (
        "out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 MiB free.); lower "
        "memory.device_kv_bytes or batch_size"
    )
    assert reach_of(torch.AcceleratorError("CUDA error: an illegal memory access")) is Reach.MECHANISM
    assert reach_of(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling")) is Reach.MECHANISM
    assert reach_of(ValueError("request 3: its logits are NaN")) is Reach.JOB


def test_the_extensions_own_errors_are_known() -> None:
    module = pytest.importorskip("uvm_kv.memory._C", reason="the extension is not built")
    assert reach_of(module.OutOfMemoryError("cudaMalloc")) is Reach.WORKER
    assert reach_of(module.CudaError("cudaErrorIllegalAddress")) is Reach.MECHANISM


def test_a_context_that_no_longer_answers_is_said_with_what_came_before() -> None:
    lost = worker_module.ContextLostError("the GPU no longer answers this process")
    lost.__cause__ = ValueError("batch_size")
    assert reach_of(lost) is Reach.MECHANISM
    assert explain(lost) == "the GPU no longer answers this process after batch_size"
    lost.__cause__ = CudaError("cudaErrorIllegalAddress\nmore")
    assert explain(lost) == "cudaErrorIllegalAddress"
    lost.__cause__ = OutOfMemoryError("cudaMalloc")
    assert reach_of(lost) is Reach.MECHANISM


def test_a_full_disk_and_a_foreign_file_are_a_line() -> None:
    assert explain(OSError(errno.ENOSPC, "No space left")).startswith("no space is left for the results")
    assert explain(FileNotFoundError(errno.ENOENT, "No such file", "/x")) == "/x: No such file"


def test_progress_comes_over_the_pipe() -> None:
    seen: list[tuple[int, int, int]] = []
    with OneWorker(FakeTask, lambda job: job.mechanism) as worker:
        outcome = worker.run(Fake("job", does="slow"), [], lambda *said: seen.append(said))
    assert outcome.error is None
    assert seen
    assert seen == sorted(seen)
    assert all(total == 10 and done == steps for steps, done, total in seen)


def test_a_worker_that_was_killed_between_two_jobs_is_noticed() -> None:
    with OneWorker(FakeTask, lambda job: job.mechanism) as worker:
        first = worker.run(Fake("one"), [])
        assert first.summary is not None
        os.kill(first.summary["pid"], signal.SIGKILL)
        assert ends(first.summary["pid"])
        outcome = worker.run(Fake("two"), [])
    assert outcome.reach is Reach.MECHANISM
    assert outcome.error is not None
    assert "SIGKILL" in outcome.error


def test_a_worker_that_does_not_want_to_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C does: the parent is interrupted while it waits; the worker hears neither that nor SIGTERM."""
    monkeypatch.setattr(worker_module, "PATIENCE_S", 0.2)
    monkeypatch.setattr(worker_module, "PROGRESS_EVERY_S", 0.0)
    worker = Worker(FakeTask)
    pid = worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGINT)
    worker._pipe.send((Fake("job", does="hang"), []))
    time.sleep(1.5)
    os.kill(pid, signal.SIGINT)
    assert alive(pid)
    worker.close()
    assert not alive(pid)


def test_a_job_past_its_time_is_stopped_and_ends_its_mechanism() -> None:
    with OneWorker(FakeTask, lambda job: job.mechanism) as worker:
        stopped = worker.run(Fake("job", does="hang"), [], limit_s=3)
        assert stopped.error is not None
        assert stopped.error.startswith("watchdog: stopped ")
        assert "at its limit of 3 s (watchdog_s); it may have been thrashing" in stopped.error
        assert stopped.reach is Reach.MECHANISM
        assert worker.given_up(Fake("next")) is not None
        assert worker.run(Fake("other", mechanism="b"), [], limit_s=60).error is None


def test_the_watchdog_does_not_make_another_run(tmp_path: Path) -> None:
    assert jobs.job(tmp_path).directory == jobs.job(tmp_path, "watchdog_s=100").directory


def test_the_worker_ends_with_its_parent() -> None:
    """Even if the parent is killed while a job runs, and the job never looks at the pipe."""
    code = (
        "from uvm_kv.sweep.worker import Worker\n"
        "from tests.experiments.fake_jobs import Fake, FakeTask\n"
        "worker = Worker(FakeTask)\n"
        "worker.run(Fake('first'), [])\n"
        "print(worker.pid, flush=True)\n"
        "worker.run(Fake('job', does='hang'), [])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    assert alive(pid)
    parent.kill()
    parent.communicate()
    assert ends(pid)


def test_jobs_are_ordered_by_mechanism_and_else_as_given() -> None:
    given = [("b", 2), ("a", 2), ("b", 1), ("c", 9), ("a", 1)]
    assert in_order(given, lambda job: job[0]) == [("b", 2), ("b", 1), ("a", 2), ("a", 1), ("c", 9)]


def test_custom_mechanisms_are_told_apart_by_their_axes(tmp_path: Path) -> None:
    axes = ((), ("memory=pinned", "placement=static_split"), ("layout=block_major",), ("batch_size=3",))
    keys = [mechanism(jobs.job(tmp_path, *SMALL, *own)) for own in axes]
    assert keys[0] == keys[2] == keys[3] != keys[1]
    assert mechanism(jobs.job(tmp_path, *SMALL, "mechanism=device_resident")) != keys[0]


def test_each_repeat_has_a_process_of_its_own_and_a_mechanism_is_given_up_as_a_whole(tmp_path: Path) -> None:
    job = jobs.job(tmp_path, *SMALL, "mechanism=device_resident", "num_repeats=2")
    first, second = job, dataclasses.replace(job, repeat=1)
    again = jobs.job(tmp_path, *SMALL, "mechanism=device_resident", "batch_size=3")
    assert process(first) == process(again) != process(second)
    assert mechanism(first) == mechanism(second)
    assert in_order([first, second, again], process) == [first, again, second]


# ---- real jobs


def files(directory: Path) -> dict[str, bytes]:
    """Every file of a run that holds no wall clock."""
    names = ("config.yaml", "summary.json", "plans.jsonl.gz", "steps.parquet", "requests.parquet", "outputs.jsonl")
    found = {n: (directory / n).read_bytes() for n in names if (directory / n).is_file()}
    found["config.yaml"] = found["config.yaml"].replace(bytes(directory.parents[1]), b"")
    return found


def test_simulated_jobs_are_byte_identical_through_the_worker(tmp_path: Path) -> None:
    overrides = ("mechanism=pinned_swap", "batch_size=6", "record_plans=true", *SMALL)
    here, there = (jobs.job(tmp_path / name, *overrides) for name in ("here", "there"))
    summary = jobs.run_any_job(here, argv=["test"])
    with OneWorker() as worker:
        outcome = worker.run(there, ["test"])
    assert (outcome.error, outcome.summary) == (None, summary)
    assert files(here.directory) == files(there.directory)
    assert read_json(there.directory / "manifest.json")["argv"] == ["test"]


def served(folder: Path, model: Path, *overrides: str) -> Job:
    return jobs.job(
        folder,
        *("runner=cpu", "model=hf", f"model.path={model}", "dtype=float32", "block_size=4"),
        *("workload.arrival=all_at_once", "workload.num_requests=6", "workload.prompt_tokens=24"),
        *("workload.output_tokens=12", "record_plans=true"),
        *overrides,
    )  # fmt: skip


def plans(directory: Path) -> list[str]:
    """What was planned in every step, without how long it took."""
    with gzip.open(directory / "plans.jsonl.gz", "rt") as lines:
        return [json.dumps(json.loads(line)[0]) for line in lines]


def timeless(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without what a clock says."""
    clocks = ("_s", "per_s", "per_s_whole_run", "_share")
    return {
        key: timeless(value) if isinstance(value, dict) else value
        for key, value in summary.items()
        if not key.endswith(clocks) and not isinstance(value, float)
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="a real model is served by torch")
    from tests.runner.torch_cpu.models import save_model

    return save_model(tmp_path_factory.mktemp("served") / "model")


def test_a_real_model_serves_the_same_through_the_worker(tmp_path: Path, model: Path) -> None:
    for name in ("device_recompute", "pinned_prefetch_ahead"):
        sizes = (f"mechanism={name}", "batch_size=4", "memory.device_kv_bytes=40000")
        here, there = (served(tmp_path / where, model, *sizes) for where in ("here", "there"))
        summary = jobs.run_any_job(here, argv=["test"])
        with OneWorker() as worker:
            outcome = worker.run(there, ["test"])
        assert outcome.error is None
        assert outcome.summary is not None
        assert timeless(outcome.summary) == timeless(summary)
        assert plans(here.directory) == plans(there.directory)
        assert (here.directory / "outputs.jsonl").read_bytes() == (there.directory / "outputs.jsonl").read_bytes()


class CountedJobs(worker_module.RealJobs):
    """Says beside the summary how often a model was loaded by its process."""

    def __call__(self, job: Job, argv: list[str], on_step: Any) -> dict[str, Any]:
        return super().__call__(job, argv, on_step) | {"num_loads": self.models.num_loads, "pid": os.getpid()}


def test_the_model_is_loaded_once_a_mechanism_and_anew_for_other_weights(tmp_path: Path, model: Path) -> None:
    from tests.runner.torch_cpu.models import save_model

    other = save_model(tmp_path / "other", seed=7)
    sweep = [
        served(tmp_path, model, "mechanism=device_resident", "batch_size=2"),
        served(tmp_path, model, "mechanism=device_resident", "batch_size=3"),
        served(tmp_path, other, "mechanism=device_resident", "batch_size=3"),
        served(tmp_path, other, "mechanism=device_resident", "batch_size=3", "dtype=bfloat16"),
        served(tmp_path, model, "mechanism=pinned_zero_copy", "batch_size=2"),
    ]
    with OneWorker(CountedJobs) as worker:
        found = [worker.run(job, ["test"]) for job in sweep]
    assert [o.error for o in found] == [None] * len(sweep)
    summaries = [o.summary for o in found if o.summary is not None]
    assert [s["num_loads"] for s in summaries] == [1, 1, 2, 3, 1]
    assert len({s["pid"] for s in summaries}) == 2


def test_weights_that_change_on_disk_are_loaded_anew(tmp_path: Path, model: Path) -> None:
    import shutil

    from tests.runner.torch_cpu.models import save_model
    from uvm_kv.job.models import ModelCache

    folder = Path(shutil.copytree(model, tmp_path / "model"))
    cache = ModelCache()
    resolved = served(tmp_path, folder, "batch_size=2").resolved
    first = cache(resolved)
    assert cache(resolved) is first
    save_model(folder, seed=7)
    assert cache(resolved) is not first
    assert cache.num_loads == 2


# ---- the command


COMMAND = [sys.executable, "-m", "experiments.run", "-m", "hydra/launcher=basic"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=240)


def children(pid: int) -> list[int]:
    """The workers of a sweep, without the tracker and the watcher."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    told = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in found}
    return [child for child, line in told.items() if b"resource_tracker" not in line and b"family" not in line]


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A sweep of two mechanisms whose first has one quick job and some long ones; its process, and its worker's id once
    the first job is done."""
    arguments = [
        *("mechanism=managed_demand,device_resident", "batch_size=1,64,65,66", "max_steps=3000"),
        *("workload.num_requests=700", f"results_dir={tmp_path}"),
    ]  # fmt: skip
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not completed_runs(tmp_path) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    (worker,) = children(process.pid)
    yield process, worker
    if process.poll() is None:
        process.kill()
        process.communicate()


def test_a_killed_worker_costs_its_mechanism_only(
    tmp_path: Path, sweep: tuple[subprocess.Popen[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    from uvm_kv.cli import main

    process, worker = sweep
    os.kill(worker, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.count("the worker process was killed by SIGKILL") == 1
    assert "more of this mechanism were not tried)" in err
    assert "Traceback" not in err
    gap = next(line for line in out.splitlines() if line.startswith("not measured: "))
    assert gap.startswith("not measured: llama_7b, managed_demand, batch ")
    assert "SIGKILL" in gap
    assert (
        gap.removeprefix("not measured: ").split(":")[0] in (tmp_path / "adhoc/reports/latest/report.html").read_text()
    )
    records = read_failures(tmp_path)[0]
    assert {r["mechanism"] for r in records.values()} == {"managed_demand"}
    assert [r["tried"] for r in records.values()].count(True) == 1
    assert len(records) + len(completed_runs(tmp_path)) == 8
    failed = next(name for name, record in records.items() if record["tried"])
    assert main(["runs", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("failed: ") == len(records)
    assert main(["runs", "--folder", str(tmp_path), "--where", "mechanism=device_resident"]) == 0
    assert "failed: " not in capsys.readouterr().out
    assert main(["runs", failed, "--folder", str(tmp_path)]) == 0
    assert "SIGKILL" in capsys.readouterr().out


def test_ctrl_c_ends_the_worker_and_the_sweep_goes_on_later(
    tmp_path: Path, sweep: tuple[subprocess.Popen[str], int]
) -> None:
    process, worker = sweep
    before = completed_runs(tmp_path)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted:" in err
    assert "Traceback" not in err
    assert not alive(worker)
    assert read_failures(tmp_path)[0] == {}
    assert set(before) <= set(completed_runs(tmp_path))


def test_a_failed_job_is_tried_again_and_its_record_goes(tmp_path: Path) -> None:
    """A watchdog that ends every job at once fails them."""
    arguments = (*SMALL, f"results_dir={tmp_path}")
    assert run("batch_size=1", *arguments).returncode == 0
    first = run("batch_size=1,2", "watchdog_s=0.000001", *arguments)
    assert first.returncode == 1
    assert "1 of 2 runs are complete (1 were complete already), 1 failed." in first.stderr
    assert list(read_failures(tmp_path)[0]) == [jobs.job(tmp_path, "batch_size=2", *SMALL).directory.name]
    second = run("batch_size=1,2", *arguments)
    assert second.returncode == 0, second.stderr
    assert "(1 were complete already)" in second.stderr
    assert read_failures(tmp_path)[0] == {}
    assert not list(tmp_path.rglob("*.failed.json"))


def test_hydras_job_numbers_and_order_of_results_do_not_matter(tmp_path: Path) -> None:
    """The same sweep with joblib and with one worker: the same run directories, byte by byte."""
    arguments = ("batch_size=1,2", "mechanism=device_resident,pinned_swap", *SMALL)
    one = run(*arguments, f"results_dir={tmp_path / 'one'}")
    many = run(*arguments, "hydra/launcher=joblib", f"results_dir={tmp_path / 'many'}")
    assert (one.returncode, many.returncode) == (0, 0), one.stderr + many.stderr
    found = [{d.name: files(d) for d in completed_runs(tmp_path / name)} for name in ("one", "many")]
    assert found[0] == found[1]
    assert len(found[0]) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runner=cuda", "hydra/launcher=joblib"], "runner=cuda with hydra/launcher=joblib: one process at a time"),
        (["runner=sim,cuda", "hydra/launcher=joblib"], "drop it"),
        (["runner=cuda", "hydra.launcher.n_jobs=2"], "runner=cuda with hydra.launcher.n_jobs: one process"),
    ],
)
def test_other_launchers_are_refused_on_a_gpu(tmp_path: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        preflight([*arguments, f"results_dir={tmp_path}"])


@pytest.mark.parametrize("runner", ["cuda", "sim,cuda", "cuda,cpu"])
def test_a_gpu_sweep_is_one_worker_at_a_time(tmp_path: Path, runner: str) -> None:
    request = preflight([f"runner={runner}", f"results_dir={tmp_path}"])
    assert (request.on_gpu, request.launcher) == (True, None)
    assert not preflight([f"results_dir={tmp_path}"]).on_gpu
    assert preflight(["hydra/launcher=basic", f"results_dir={tmp_path}"]).launcher == "basic"
