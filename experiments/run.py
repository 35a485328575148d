"""Run one job, or with -m a sweep of jobs and the report of its results.

    python -m experiments.run mechanism=pinned_balanced batch_size=24
    python -m experiments.run -m experiment=batch_sweep
    python -m experiments.run -m experiment=batch_sweep --dry-run      (its jobs, and about how long they take)

A sweep that was stopped goes on where it was: what is complete is skipped. A job that fails does not stop the others.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments.listing import list_jobs
from experiments.progress import Event, report_event, sweep_log
from experiments.track import mirror_all
from uvm_kv.config.build import Job, is_done, jobs_of, run_job
from uvm_kv.config.names import CONF_DIR, check_overrides, mark_given, parse_overrides, with_implied
from uvm_kv.config.recording import with_recorded_config
from uvm_kv.config.resolve import resolve
from uvm_kv.config.schema import register
from uvm_kv.runner.replay import PlanMismatch
from uvm_kv.telemetry.provenance import git_state
from uvm_kv.telemetry.store import completed_runs, read_json, read_outputs

ARGV = "UVM_KV_ARGV"
"""Carries the command that was typed into the worker processes."""
MAIN_PID = "UVM_KV_MAIN_PID"
SWEEP_FLAGS = {"-m", "--multirun"}
DRY_RUN = "--dry-run"
SHOWING_FLAGS = {
    *("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "-p", "--package", "--resolve", "-i", "--info"),
    *("-sc", "--shell-completion"),
}
EXPERIMENT_WITHOUT_FILE = "adhoc"
SHOW_EVERY_STEPS = 200


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    experiment: str
    results_dir: Path
    num_jobs: int
    overrides: list[Any]
    """Parsed, those of the experiment's sweep included."""


def preflight(arguments: list[str]) -> Request:
    """Check names, and that results can be written, before Hydra composes anything; ValueError if not."""
    overrides = parse_overrides([a for a in arguments if not a.startswith("-")])
    check_overrides(overrides)
    by_key = {o.key_or_group: o for o in overrides}
    experiment = None
    if "experiment" in by_key:
        if by_key["experiment"].is_sweep_override():
            raise ValueError("experiment takes one name; sweep its parts instead, or start it once a name")
        experiment = by_key["experiment"].value()
    if experiment is not None:
        file = OmegaConf.load(CONF_DIR / "experiment" / f"{experiment}.yaml")
        params = OmegaConf.select(file, "hydra.sweeper.params") or {}
        swept = parse_overrides([f"{key}={value}" for key, value in params.items()])
        check_overrides(swept)
        by_key = {o.key_or_group: o for o in swept} | by_key
    if any(key.startswith("workload.lengths.") for key in by_key) and not {"workload", "experiment"} & set(by_key):
        raise ValueError("workload.lengths belongs to workload=azure_conv, azure_code or sharegpt; give one of them")
    sweeps = [o for o in by_key.values() if o.is_sweep_override() and o.is_discrete_sweep()]
    num_jobs = prod(len(list(o.sweep_string_iterator())) for o in sweeps)
    results_dir = by_key["results_dir"].value() if "results_dir" in by_key else "results/runs"
    folder = Path(str(results_dir))
    _check_writable(folder)
    return Request(experiment or EXPERIMENT_WITHOUT_FILE, folder, num_jobs, list(by_key.values()))


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise ValueError(
            f"results_dir={folder} cannot be written ({error.strerror or error}); give another: results_dir=DIR"
        ) from None


def _label(composed: DictConfig) -> str:
    return f"{composed.model.name} {composed.workload.name} {composed.mechanism} batch {composed.batch_size}"


def _message(error: Exception) -> str:
    """A line for what a user can mend; the traceback only for what is our fault."""
    if isinstance(error, ValueError | PlanMismatch):
        return str(error)
    if not isinstance(error, OSError):
        return "this is a bug in uvm-kv:\n" + "".join(traceback.format_exception(error))
    if error.errno == errno.ENOSPC:
        return (
            "no space is left for the results; free some and start again (what is finished stays), or give results_dir"
        )
    return f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")  # type: ignore[untyped-decorator]
def _task(composed: DictConfig) -> None:
    """One job of Hydra's, in this process or in a worker. Failures are reported, never raised: see `main`."""
    label = _label(composed)
    if os.getpid() != int(os.environ[MAIN_PID]):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent hears Ctrl-C and ends its workers.
    try:
        experiment = HydraConfig.get().runtime.choices.get("experiment") or EXPERIMENT_WITHOUT_FILE
        given = HydraConfig.get().overrides.task
        mark_given(composed.hardware.sources, parse_overrides(list(given)))
        composed = with_recorded_config(composed, given)
        jobs = jobs_of(resolve(composed), experiment)
    except Exception as error:
        report_event(Event("failed", label, error=_message(error)))
        return
    for job in jobs:
        name = f"{label} repeat {job.repeat}" if len(jobs) > 1 else label
        tracking = None
        if job.resolved.config.tracking.name == "wandb":
            tracking = {"project": job.resolved.config.tracking.project, "mode": job.resolved.config.tracking.mode}
        if is_done(job):
            report_event(Event("skipped", name, str(job.directory), tracking=tracking))
            continue
        report_event(Event("started", name, str(job.directory)))
        try:
            _run(job, alone=not _in_sweep())
        except Exception as error:
            report_event(Event("failed", name, str(job.directory), _message(error)))
        else:
            report_event(Event("done", name, str(job.directory), tracking=tracking))


def _in_sweep() -> bool:
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def _run(job: Job, *, alone: bool) -> None:
    argv = json.loads(os.environ[ARGV])
    if not alone:
        run_job(job, argv=argv)
        return
    from rich.progress import Progress

    from uvm_kv.analysis.terminal import print_memory

    console = Console(stderr=True)
    resolved = job.resolved
    where = resolved.profile.name if resolved.serving is None else "the CPU"
    title = f"{resolved.model.name} in {resolved.config.dtype} on {where}"
    print_memory(title, resolved.memory_account, Console())
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("requests served", total=None)

        def on_step(steps: int, done: int, total: int) -> None:
            if steps % SHOW_EVERY_STEPS == 0:
                progress.update(bar, completed=done, total=total)

        run_job(job, argv=argv, on_step=on_step if console.is_terminal else None)


def _print_outcome(request: Request, events: list[Event], *, sweep: bool) -> int:
    """Tables, verdict, failures; the exit status."""
    from uvm_kv.analysis.terminal import print_outputs, print_report, print_summary

    console = Console()
    finished = [Path(e.directory) for e in events if e.directory is not None and e.status != "failed"]
    failed = [e for e in events if e.status == "failed"]
    on_cpu = sum(bool(read_json(d / "summary.json")["memory_emulated"]) for d in finished)
    if sweep and on_cpu:
        print(f"{on_cpu} runs on the CPU say nothing about memory kinds and are in no figure.", file=sys.stderr)
    if sweep and len(finished) > on_cpu:
        from uvm_kv.analysis.report import write_report  # pandas and matplotlib: a single run does without

        print_report(write_report(finished, request.results_dir / request.experiment / "report"), console)
    elif finished:
        for directory in finished:
            print_summary(read_json(directory / "summary.json"), console)
            print_outputs(read_outputs(directory), console)
            console.print(f"run: {directory}", markup=False, highlight=False, soft_wrap=True)
        if any(e.status == "skipped" for e in events):
            print("it was complete already; rerun=true runs it again", file=sys.stderr)
    for event in failed:
        where = f"{event.label}: " if sweep else ""
        print(f"error: {where}{event.error}", file=sys.stderr)
    if sweep:
        skipped = [e for e in events if e.status == "skipped"]
        note = f" ({len(skipped)} were complete already)" if skipped else ""
        total = max(request.num_jobs, len(events))  # A job with repeats is several runs.
        print(f"{len(finished)} of {total} runs are complete{note}, {len(failed)} failed.", file=sys.stderr)
        _warn_of_other_commits(skipped)
    return 1 if failed or not finished else 0


def _warn_of_other_commits(skipped: list[Event]) -> None:
    now = git_state()["git_sha"]
    others = [e for e in skipped if read_json(Path(str(e.directory)) / "manifest.json")["git_sha"] != now]
    if others:
        print(
            f"warning: {len(others)} of them were made by another commit; rerun=true runs them again", file=sys.stderr
        )


def main() -> int:
    flags = [a for a in sys.argv[1:] if a.startswith("-")]
    overrides = [a for a in sys.argv[1:] if not a.startswith("-")]
    register()
    os.environ[MAIN_PID] = str(os.getpid())
    sweep = bool(SWEEP_FLAGS & set(flags))
    shows = any(flag.partition("=")[0] in SHOWING_FLAGS for flag in flags)
    if shows:
        _task()  # Hydra shows something and ends: --help, --cfg job, --info, --shell-completion ...
        return 0
    if unknown_flags := set(flags) - SWEEP_FLAGS - {DRY_RUN}:
        print(
            f"error: {min(unknown_flags)} is not an option; -m sweeps, --dry-run lists, --help shows the rest",
            file=sys.stderr,
        )
        return 2
    try:
        arguments = [*flags, *with_implied(overrides)]
        sys.argv[1:] = arguments
        request = preflight(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if DRY_RUN in flags:
        return list_jobs(request.overrides, request.experiment)
    if not sweep and request.num_jobs > 1:
        print(f"error: {request.num_jobs} jobs are asked for; a sweep needs -m", file=sys.stderr)
        return 2
    os.environ[ARGV] = json.dumps(["python", "-m", "experiments.run", *arguments])
    try:
        with sweep_log(request.num_jobs, request.experiment if sweep else "") as log:
            _task()
    except KeyboardInterrupt:
        _stop_workers()
        folder = request.results_dir / request.experiment
        print(
            f"\ninterrupted: {len(completed_runs(folder))} finished runs stay in {folder}; the same command goes on "
            f"from there",
            file=sys.stderr,
        )
        return 130
    try:
        mirror_all(log.events)
        return _print_outcome(request, log.events, sweep=sweep)
    except OSError as error:
        print(f"error: the report cannot be written: {_message(error)}", file=sys.stderr)
        return 1


def _stop_workers() -> None:
    from joblib.externals.loky import get_reusable_executor

    executor: Any = get_reusable_executor()
    executor.shutdown(wait=False, kill_workers=True)


if __name__ == "__main__":
    sys.exit(main())
