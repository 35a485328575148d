"""Run one job, or with -m a sweep of jobs and the report of its results.

    python -m experiments.run mechanism=pinned_balanced batch_size=24
    python -m experiments.run -m experiment=batch_sweep
    python -m experiments.run -m experiment=batch_sweep --dry-run      (its jobs, and about how long they take)
    python -m experiments.run -m batch_size=8,16 name=small            (its report: <results_dir>/adhoc/reports/small)

With --json one object is printed in place of tables: runs (id, place, summary), failed (job, place, error), report.

A sweep that was stopped goes on where it was: what is complete is skipped. A job that fails does not stop the others.
Hydra's launchers run the jobs: hydra/launcher=joblib (the default), submitit_slurm, submitit_local or ray
(`uvm_kv.sweep.launchers`). With runner=cuda, or hydra/launcher=basic, Hydra only collects the jobs; then one worker
process at a time runs them, mechanism by mechanism (`uvm_kv.sweep.worker`).
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from uvm_kv.config.command import compose_config
from uvm_kv.config.grammar import take_json
from uvm_kv.config.ignored import check_command
from uvm_kv.config.names import (
    CONF_DIR,
    check_overrides,
    find_option,
    folders_of,
    groups,
    length_workloads,
    parse_overrides,
    values_of,
    with_implied,
)
from uvm_kv.config.option_file import check_files, mark_sources
from uvm_kv.config.schema import register
from uvm_kv.config.shipped import another_copy
from uvm_kv.job.build import Job, check_fits, identity, is_done, repeats_of
from uvm_kv.job.card import ask_card
from uvm_kv.job.recording import with_recorded_config
from uvm_kv.job.resolve import resolve
from uvm_kv.peers.job import run_any_job
from uvm_kv.store.code import code_files, is_of_other_code
from uvm_kv.store.directories import check_writable, read_outputs
from uvm_kv.store.failures import clear_failure, write_failure
from uvm_kv.store.family import end_children_with_me
from uvm_kv.store.provenance import git_state
from uvm_kv.store.records import Record, read_directories, read_failures
from uvm_kv.store.whole import completed_runs, is_complete, set_aside
from uvm_kv.sweep import launchers
from uvm_kv.sweep.listing import list_jobs
from uvm_kv.sweep.progress import (
    ENVIRONMENT,
    Event,
    SweepEnd,
    SweepLog,
    read_command,
    report_event,
    sweep_log,
    tracked,
)
from uvm_kv.sweep.refine import refine
from uvm_kv.sweep.sweep_report import SweepReport, place_of, take_name
from uvm_kv.sweep.worker import OneWorker, OnStep, end_with_parent, explain, in_order, process
from uvm_kv.tracking.track import mirror_all
from uvm_kv.types import GIB, OUR_ENGINE

SWEEP_FLAGS = {"-m", "--multirun"}
DRY_RUN = "--dry-run"
SHOWING_FLAGS = {
    *("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "-p", "--package", "--resolve", "-i", "--info"),
    *("-sc", "--shell-completion"),
}
EXPERIMENT_WITHOUT_FILE = "adhoc"
DEFAULT_LAUNCHER = "joblib"
"""As in conf/config.yaml."""
SHOW_EVERY_STEPS = 200


@dataclass(frozen=True)
class SweepRequest:
    """What the command line asks for."""

    experiment: str
    results_dir: Path
    num_jobs: int
    num_runs: int
    """Each repeat of a job is one."""
    overrides: list[Any]
    """Parsed, those of the experiment's sweep included."""
    given: list[Any]
    """The overrides of the command line, without those of the experiment's file."""
    on_gpu: bool
    """Some job has runner=cuda."""
    refine: bool
    """Search best points after the sweep."""
    launcher: str | None
    """As given; None: the default."""


@dataclass(frozen=True)
class NamedJob:
    """A run, and what a user knows it by."""

    job: Job
    name: str
    tracking: dict[str, str] | None
    overrides: list[str]


@dataclass
class Parent:
    """What the process knows in which the command was typed."""

    sweep: bool
    collected: list[NamedJob] | None
    """Where Hydra's jobs are left for one worker process; None: they run as Hydra launches them."""
    as_json: bool
    """Print results as one JSON object and nothing else on stdout."""


_parent: Parent | None = None
"""None in a worker, wherever it is: Hydra's launchers start it anew."""


def preflight(arguments: list[str]) -> SweepRequest:
    """Check names, and that results can be written, before Hydra composes anything; ValueError if not."""
    overrides = parse_overrides([a for a in arguments if not a.startswith("-")])
    check_overrides(overrides)
    folders = folders_of(overrides)
    check_files(overrides, folders)
    by_key = given = {o.key_or_group: o for o in overrides}
    if "batch_size" in by_key and "working_set_ratio" in by_key and by_key["working_set_ratio"].value() is not None:
        raise ValueError("batch_size and working_set_ratio each say how many clients there are; drop one of the two")
    experiment = file = None
    if "experiment" in by_key:
        if by_key["experiment"].is_sweep_override():
            raise ValueError("experiment takes one name; sweep its parts instead, or start it once a name")
        experiment = by_key["experiment"].value()
    if experiment is not None:
        path = find_option("experiment", experiment, folders)
        assert path is not None  # Its name is checked.
        file = OmegaConf.load(path)
        params = OmegaConf.select(file, "hydra.sweeper.params") or {}
        swept = parse_overrides([f"{key}={value}" for key, value in params.items()])
        check_overrides(swept, folders=folders)
        check_files(swept, folders)
        by_key = {o.key_or_group: o for o in swept} | by_key
    drawn = "experiment" in by_key or (
        "workload" in by_key and {*values_of(by_key["workload"])} <= {*length_workloads(folders)}
    )
    if any(key.startswith("workload.lengths.") for key in by_key) and not drawn:
        allowed = " or ".join(length_workloads(folders))
        raise ValueError(f"workload.lengths belongs to workload={allowed}; give one of them")
    sweeps = [o for o in by_key.values() if o.is_sweep_override() and o.is_discrete_sweep()]
    num_jobs = prod(len(list(o.sweep_string_iterator())) for o in sweeps)
    results_dir = by_key["results_dir"].value() if "results_dir" in by_key else "results/runs"
    if not str(results_dir).strip():
        raise ValueError("results_dir= names no folder; give one, results_dir=DIR, or results_dir=. for this one")
    folder = Path(str(results_dir))
    on_gpu = _on_gpu(by_key, file)
    launcher = by_key["hydra/launcher"].value() if "hydra/launcher" in by_key else None
    tuned = [key for key in by_key if key.startswith("hydra.launcher.")]
    if on_gpu and (launcher not in (None, "basic") or tuned):
        raise ValueError(
            f"runner=cuda with {f'hydra/launcher={launcher}' if launcher else tuned[0]}: one process at a time owns "
            f"the GPU, so that jobs run one after another; drop it"
        )
    launchers.check(launcher or DEFAULT_LAUNCHER, tuned)
    worked = on_gpu or (bool(SWEEP_FLAGS & set(arguments)) and launcher == launchers.BASIC)
    check_command(given, by_key, file, has_worker=worked, folders=folders)
    check_writable(folder, "results_dir=")
    _check_composes(list(by_key.values()), folders)
    refined = _refines(given, file, sweeps=bool(SWEEP_FLAGS & set(arguments)), on_gpu=on_gpu)
    return SweepRequest(
        experiment or EXPERIMENT_WITHOUT_FILE,
        folder,
        num_jobs,
        _num_runs(num_jobs, by_key, file),
        list(by_key.values()),
        list(given.values()),
        on_gpu,
        refined,
        launcher,
    )


def _num_runs(num_jobs: int, by_key: dict[str, Any], file: Any) -> int:
    if (given := by_key.get("num_repeats")) is None:
        return num_jobs * int((file is not None and OmegaConf.select(file, "num_repeats")) or 1)
    repeats = [max(1, int(value)) for value in values_of(given)]  # Where it is none, the job fails, which is one event.
    return num_jobs // len(repeats) * sum(repeats)


def _refines(given: Mapping[str, Any], file: Any, *, sweeps: bool, on_gpu: bool) -> bool:
    """Whether the sweep is refined; ValueError where that is asked for and cannot be."""
    asked = "refine" in given and given["refine"].value() is True
    if asked and not sweeps:
        raise ValueError("refine=true searches around the batch sizes of a sweep; add -m, or drop it")
    if asked and on_gpu:
        raise ValueError(
            "refine=true with runner=cuda: only simulated points are searched; give the batch sizes to try"
        )
    if "refine" in given:
        return asked
    return sweeps and not on_gpu and file is not None and bool(OmegaConf.select(file, "refine"))


def _check_composes(overrides: list[Any], folders: list[Path]) -> None:
    """ValueError for an option in a folder of the user's own with which Hydra composes no job."""
    rest = [o for o in overrides if not o.key_or_group.startswith("hydra") or o.key_or_group == "hydra.searchpath"]
    first = {o.key_or_group: f"{o.key_or_group}={values_of(o)[0]}" for o in rest if o.is_sweep_override()}
    first = {o.key_or_group: o.input_line for o in rest} | first
    for override in overrides:
        for value in values_of(override) if override.key_or_group in groups() else []:
            file = find_option(override.key_or_group, value, folders)
            if file is not None and not file.is_relative_to(CONF_DIR):
                choice = {override.key_or_group: f"{override.key_or_group}={value}"}
                compose_config(list((first | choice).values()))


def _on_gpu(by_key: dict[str, Any], file: Any) -> bool:
    given = by_key.get("runner")
    if given is None:
        return file is not None and OmegaConf.select(file, "runner") == "cuda"
    return "cuda" in (list(given.sweep_string_iterator()) if given.is_sweep_override() else [given.value()])


def _label(composed: DictConfig) -> str:
    what = composed.mechanism if composed.engine == OUR_ENGINE else composed.engine
    ratio = composed.working_set_ratio
    size = f"batch {composed.batch_size}" if ratio is None else f"working set {ratio}"
    return f"{composed.model.name} {composed.workload.name} {what} {size}"


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")  # type: ignore[untyped-decorator]
def _task(composed: DictConfig) -> None:
    """One job of Hydra's, in this process or in a worker. Hydra pickles this function with all that it names, and so
    it names one thing."""
    run_hydra_job(composed)


def run_hydra_job(composed: DictConfig) -> None:
    """Failures of the job are reported, never raised. ValueError in a worker that the sweep cannot be worked for."""
    if _parent is None:
        _join_sweep()
    label = _label(composed)
    given = list(HydraConfig.get().overrides.task)
    try:
        experiment = HydraConfig.get().runtime.choices.get("experiment") or EXPERIMENT_WITHOUT_FILE
        overrides, folders = parse_overrides(given), _own_folders()
        mark_sources(composed.hardware, overrides, choices=HydraConfig.get().runtime.choices, folders=folders)
        composed = with_recorded_config(composed, given)
        jobs = repeats_of(resolve(composed, folders), experiment)
    except Exception as error:
        report_event(Event("failed", label, error=explain(error), num_runs=max(1, composed.num_repeats)))
        return
    for job in jobs:
        name = f"{label} repeat {job.repeat}" if len(jobs) > 1 else label
        tracking = None
        if job.resolved.config.tracking.name == "wandb":
            tracking = {"project": job.resolved.config.tracking.project, "mode": job.resolved.config.tracking.mode}
        named = NamedJob(job, name, tracking, given)
        if (refusal := _refusal(job)) is not None:
            # A finding of its own, such as that a sequence is too long for the device.
            _failed(named, refusal, refused=True)
        elif _parent is not None and _parent.collected is not None:
            _parent.collected.append(named)
        elif _begin(named):
            _run_here(named, alone=_parent is not None and not _parent.sweep)


def _own_folders() -> list[Path]:
    """The user's own folders of options, as Hydra found them."""
    sources = HydraConfig.get().runtime.config_sources
    return [Path(s.path) for s in sources if s.schema == "file" and s.provider.startswith("hydra.searchpath")]


def _join_sweep() -> None:
    """Be where the command was typed, as its paths may be relative, and end when the launcher's process here does."""
    end_with_parent()
    code_files()
    command = read_command()
    try:
        os.chdir(command.folder)
    except OSError as error:
        raise ValueError(
            f"{command.folder}, where the sweep was started, cannot be entered on {platform.node()} "
            f"({error.strerror}); start it in a folder that all machines share under one path"
        ) from None


def _refusal(job: Job) -> str | None:
    try:
        check_fits(job)
    except ValueError as error:
        return explain(error)
    return None


def _begin(named: NamedJob) -> bool:
    """False for a run that is complete already. What is in its place and is no whole run is set aside."""
    directory = str(named.job.directory)
    if is_done(named.job):
        report_event(Event("skipped", named.name, directory, tracking=named.tracking, overrides=named.overrides))
        return False
    try:
        note = set_aside(named.job.directory)
    except OSError as error:
        _failed(named, explain(error))
        return False
    told = identity(named.job)
    report_event(Event("started", named.name, directory, overrides=named.overrides, identity=told, note=note))
    return True


def _done(named: NamedJob) -> None:
    clear_failure(named.job.directory)
    directory = str(named.job.directory)
    report_event(Event("done", named.name, directory, tracking=named.tracking, overrides=named.overrides))


def _failed(named: NamedJob, error: str, *, not_tried_after: str | None = None, refused: bool = False) -> None:
    write_failure(
        named.job.directory,
        identity=identity(named.job),
        error=error,
        tried=not_tried_after is None,
        argv=_argv(),
        git_sha=git_state()["git_sha"],
        refused=refused,
    )
    report_event(Event("failed", named.name, str(named.job.directory), error, not_tried_after))


def _argv() -> list[str]:
    return read_command().argv


def _run_here(named: NamedJob, *, alone: bool) -> None:
    try:
        if alone:
            with _bar(named.job) as show:
                run_any_job(named.job, argv=_argv(), on_step=show and _now_and_then(show))
        else:
            run_any_job(named.job, argv=_argv())
    except Exception as error:
        _failed(named, explain(error))
    else:
        _done(named)


def _now_and_then(show: OnStep) -> OnStep:
    def on_step(steps: int, done: int, total: int) -> None:
        if steps % SHOW_EVERY_STEPS == 0:
            show(steps, done, total)

    return on_step


def _run_in_worker(jobs: list[NamedJob], log: SweepLog, *, sweep: bool) -> None:
    """All of them, mechanism by mechanism. Nothing of the worker is left, however this ends."""
    names = {id(named.job): named.name for named in jobs}
    with OneWorker() as worker:
        for named in in_order(jobs, lambda named: process(named.job)):
            if is_done(named.job):
                _begin(named)
                continue
            if (after := worker.given_up(named.job)) is not None:
                first, error = after
                _failed(named, error, not_tried_after=names[id(first)])
                continue
            if not _begin(named):
                continue
            with _line(log, named.name) if sweep else _bar(named.job) as on_step:
                outcome = worker.run(named.job, _argv(), on_step, named.job.resolved.config.watchdog_s)
            if outcome.error is None:
                _done(named)
            else:
                _failed(named, outcome.error)


@contextmanager
def _line(log: SweepLog, name: str) -> Iterator[OnStep]:
    """What runs now, beside the progress of the sweep."""
    log.current = name
    try:
        yield lambda _, done, total: setattr(log, "current", f"{name}, {done} of {total} requests")
    finally:
        log.current = ""


@contextmanager
def _bar(job: Job) -> Iterator[OnStep | None]:
    """Memory account and progress bar of a run that is alone."""
    from rich.progress import Progress

    from uvm_kv.report.terminal import plain_console, print_memory

    console = Console(stderr=True)
    resolved = job.resolved
    where = "the CPU" if resolved.config.runner == "cpu" else identity(job)["hardware"]
    title = f"{resolved.model.name} in {resolved.config.dtype} on {where}"
    if _parent is None or not _parent.as_json:
        print_memory(title, resolved.memory_account, plain_console(), notes=resolved.notes())
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("requests served", total=None)

        def show(_: int, done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        yield show if console.is_terminal else None


def _print_outcome(
    request: SweepRequest, log: SweepLog, place: SweepReport | None, argv: list[str], *, as_json: bool
) -> int:
    """Tables, verdict, failures; the exit status: 2 where the job, asked for alone, was refused for what it says.
    `place`: of a sweep, where its report goes."""
    from uvm_kv.report.terminal import plain_console, print_outputs, print_report, print_summary

    console, sweep, events = plain_console(), place is not None, log.events
    finished = [Path(e.directory) for e in events if e.directory is not None and e.status != "failed"]
    failed = [e for e in events if e.status == "failed"]
    runs, left_out = read_directories(finished)  # What is said to be complete is what the report has.
    told: dict[str, Any] = {
        "runs": [{"id": record.id, "place": str(record.place), "summary": record.summary} for record in runs],
        "failed": [{"job": event.label, "place": event.directory, "error": event.error} for event in failed],
        "report": None,
    }
    on_cpu = sum(record.summary["memory_emulated"] for record in runs)
    if sweep and on_cpu:
        print(f"{on_cpu} runs on the CPU say nothing about memory kinds and are in no figure.", file=sys.stderr)
    if place is not None and len(runs) > on_cpu:
        from uvm_kv.commands.report import as_json as report_as_json
        from uvm_kv.report.write import write_report

        missing = {Path(e.directory).name for e in failed if e.directory is not None}
        failures, more = read_failures(request.results_dir / request.experiment)
        records = [record for name, record in failures.items() if name in missing]
        report = write_report(runs, place.folder, records, [*left_out, *more], argv)
        place.write_runs(argv, [record.id for record in runs], missing)
        if as_json:
            told["report"] = report_as_json(report)
        else:
            print_report(report, console)
    elif not sweep:
        for record in [] if as_json else runs:
            print_summary(record.summary, console)
            print_outputs(read_outputs(record.place), console)
            console.print(f"run: {record.place}", highlight=False, soft_wrap=True)
        if any(e.status == "skipped" for e in events):
            print("it was complete already; rerun=true runs it again", file=sys.stderr)
    if as_json:
        print(json.dumps(told, indent=1))
    for note in log.notes:
        print(f"warning: {note}", file=sys.stderr)
    for it in left_out:
        print(f"error: not complete: {it}", file=sys.stderr)
    for event in failed:
        if event.not_tried_after is not None:
            continue
        where = f"{event.label}: " if sweep else ""
        left = sum(e.not_tried_after == event.label for e in failed)
        rest = f" ({left} more of this mechanism were not tried)" if left else ""
        print(f"error: {where}{event.error}{rest}", file=sys.stderr)
    if sweep:
        skipped = [e for e in events if e.status == "skipped"]
        note = f" ({len(skipped)} were complete already)" if skipped else ""
        total = max(request.num_runs, len(events))
        complete = len(finished) - len(left_out)
        print(f"{complete} of {total} runs are complete{note}, {len(failed)} failed.", file=sys.stderr)
    _warn_of_other_code(runs)
    if not sweep and failed and all(event.directory is None for event in failed):
        return 2
    return 1 if failed or left_out or not finished else 0


def _warn_of_other_code(runs: Sequence[Record]) -> None:
    others = [run for run in runs if is_of_other_code(run.manifest, run.summary["runner"])]
    if others:
        names = ", ".join(sorted({str(run.code) for run in others}))
        print(
            f"warning: {len(others)} of {len(runs)} runs were made by other code than the present ({names}); they are "
            f"kept, and in no table with others; rerun=changed runs them again",
            file=sys.stderr,
        )


def main() -> int:
    sys.argv[1:], as_json = take_json(sys.argv[1:])
    flags = [a for a in sys.argv[1:] if a.startswith("-")]
    overrides = [a for a in sys.argv[1:] if not a.startswith("-")]
    register()
    global _parent
    sweep = bool(SWEEP_FLAGS & set(flags))
    _parent = Parent(sweep, None, as_json)
    shows = any(flag.partition("=")[0] in SHOWING_FLAGS for flag in flags)
    if shows:
        _task()  # Hydra shows something and ends: --help, --cfg job, --info, --shell-completion ...
        return 0
    if unknown_flags := set(flags) - SWEEP_FLAGS - {DRY_RUN}:
        print(
            f"error: {min(unknown_flags)} is not an option; -m sweeps, --dry-run lists, --json prints JSON, "
            f"--help shows the rest",
            file=sys.stderr,
        )
        return 2
    if as_json and DRY_RUN in flags:
        print("error: --json is for results, which --dry-run has none of; drop one of them", file=sys.stderr)
        return 2
    if (other := another_copy()) is not None:
        print(f"warning: {other}", file=sys.stderr)
    code_files()
    try:
        name, overrides = take_name(overrides)
        if name is not None and not sweep:
            raise ValueError(f"name={name} names a sweep, which needs -m")
        arguments = [*flags, *with_implied(overrides)]
        sys.argv[1:] = arguments
        request = preflight(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if DRY_RUN in flags:
        status = list_jobs(request.overrides, request.experiment)
        if request.refine:
            print("refine=true adds the runs of a search, ten to twenty for each mechanism of each comparison")
        return status
    if not sweep and request.num_jobs > 1:
        print(f"error: {request.num_jobs} jobs are asked for; a sweep needs -m", file=sys.stderr)
        return 2
    launcher = request.launcher or (launchers.BASIC if request.on_gpu else DEFAULT_LAUNCHER)
    if request.on_gpu or (sweep and launcher == launchers.BASIC):
        _parent.collected = []
    if request.on_gpu:
        sys.argv += ["hydra/launcher=basic"] if request.launcher is None else []
    argv = ["python", "-m", "experiments.run", *arguments, *([] if name is None else [f"name={name}"])]
    experiment = request.results_dir / request.experiment
    place = None
    lost: str | None = None
    shared = request.results_dir if sweep and launcher in launchers.PAST_ONE_MACHINE else None
    end_children_with_me()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # As a time limit or a batch system sends it: the same as Ctrl-C.
    try:
        if request.on_gpu:
            _say_what_is_free()
        if sweep:
            published = request.experiment != EXPERIMENT_WITHOUT_FILE
            place = place_of(experiment, name, request.given, published=published)
            SweepEnd.clear(place.end)
        with sweep_log(request.num_runs, request.experiment if sweep else "", argv, shared) as log:
            if sweep and launcher != launchers.BASIC:
                launchers.use(launcher, partial(_lose, log))
                sys.argv.append(f"++hydra.job.env_set.{ENVIRONMENT}={_quoted(str(log.folder))}")
            if shared is not None:  # Workers elsewhere may start in another folder.
                sys.argv.append(f"hydra.sweep.dir={_quoted(str(shared.absolute()))}")
            _task()
            if _parent.collected is not None:
                _run_in_worker(_parent.collected, log, sweep=sweep)
            if request.refine and not launchers.problems:
                log.poll()
                log.current = "searching the best batch sizes"
                search_path = (o.input_line for o in request.overrides if o.key_or_group == "hydra.searchpath")
                num_workers = launchers.num_workers(request.overrides)
                try:
                    refine(log.events, request.experiment, tuple(search_path), num_workers)
                except Exception as error:  # What is finished is reported all the same.
                    lost = explain(error)
    except KeyboardInterrupt:
        if place is not None:
            place.discard_empty()
        print(
            f"\ninterrupted: {len(completed_runs(experiment))} finished runs stay in {experiment}; the "
            f"same command resumes the sweep",
            file=sys.stderr,
        )
        return 130
    for problem in launchers.problems:
        print(f"error: hydra/launcher={launcher} cannot continue: {problem}", file=sys.stderr)
    if lost is not None:
        print(f"error: the search for the best batch sizes broke off: {lost}", file=sys.stderr)
    try:
        if place is not None and not launchers.problems and lost is None:
            SweepEnd.of(request.num_runs, log.events).write(place.end)
        status = _print_outcome(request, log, place, argv, as_json=as_json)
    except (OSError, ValueError) as error:
        print(f"error: the report cannot be written: {explain(error)}", file=sys.stderr)
        status = 1
    try:
        mirror_all(tracked(log.events))
    except KeyboardInterrupt:
        print("\ninterrupted: python -m experiments.publish sends the rest", file=sys.stderr)
        return 130
    return 1 if launchers.problems or lost is not None else status


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _quoted(value: str) -> str:
    """As Hydra's grammar of overrides reads it back."""
    return "'" + value.replace("'", "\\'") + "'"


def _lose(log: SweepLog, overrides: Sequence[str], why: str) -> None:
    """Record the end of a job that cannot say it itself."""
    log.poll()
    running = [event for event in log.running.values() if event.overrides == list(overrides)]
    for event in running:
        assert event.directory is not None
        assert event.identity is not None
        directory = Path(event.directory)
        if is_complete(directory):
            clear_failure(directory)
            report_event(
                Event("done", event.label, event.directory, tracking=event.tracking, overrides=event.overrides)
            )
            continue
        write_failure(
            directory,
            identity=event.identity,
            error=why,
            tried=True,
            argv=_argv(),
            git_sha=git_state()["git_sha"],
        )
        report_event(Event("failed", event.label, event.directory, why))
    if not running:  # It ended before it began.
        report_event(Event("failed", " ".join(overrides), error=why))


def _say_what_is_free() -> None:
    """Who holds the rest of a card, and who will, is not knowable; what is missing later is one job's error."""
    try:
        card = ask_card()
    except (RuntimeError, ImportError):
        return  # The jobs say it.
    print(
        f"{card.name}: {card.free_bytes / GIB:.1f} of {card.total_bytes / GIB:.1f} GiB are free; who holds the rest is "
        f"not knowable, and a job that finds too little later fails by itself",
        file=sys.stderr,
    )
