"""Finished runs to wandb: at the end of a sweep with tracking=wandb, and by `python -m experiments.publish`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from uvm_kv.store.checks import visible
from uvm_kv.store.directories import read_table
from uvm_kv.store.records import Record, read_directories
from uvm_kv.store.scratch import scratch_folder
from uvm_kv.tracking.wandb_sink import (
    OFFLINE,
    ONLINE,
    Address,
    Content,
    address_of,
    check_settings,
    content_of,
    is_sent,
    one_line,
    send,
    server_problem,
    title_of,
)


@dataclass
class Outcome:
    num_sent: int = 0
    num_there: int = 0
    """Number of runs that had been sent before."""
    problems: list[str] = field(default_factory=list)
    """One line per problem."""


def mirror_all(finished: Iterable[tuple[Path, dict[str, str]]]) -> None:
    """Mirror each run directory with its tracking settings (`project`, `mode`), unless it is there. Problems are
    warnings: the runs are finished and the report is written, whatever a tracker raises."""
    wanted: dict[tuple[str, str], list[Path]] = {}
    for directory, tracking in finished:
        wanted.setdefault((tracking["project"], tracking["mode"]), []).append(directory)
    for (project, mode), directories in wanted.items():
        records, left_out = read_directories(directories)
        try:
            problems = send_runs(records, project, mode).problems
        except (Exception, SystemExit) as error:
            problems = [f"tracking=wandb failed: {one_line(error)}"]
        for problem in [*map(str, left_out), *problems]:
            print(f"warning: {visible(problem)}", file=sys.stderr)


def usable_mode(mode: str) -> tuple[str, str | None]:
    """`mode`, or offline and why where no server can be reached: mirrors are then written and wait. ValueError where
    wandb refuses its settings (WANDB_BASE_URL and the like), so that it can write no mirror either."""
    check_settings()
    problem = server_problem() if mode == ONLINE else None
    if problem is None:
        return mode, None
    return OFFLINE, f"nothing is sent now: {problem}; mirrors are written, python -m experiments.publish sends them"


def send_runs(records: Sequence[Record], project: str, mode: str) -> Outcome:
    """Each run that is not there yet. One that fails costs only itself."""
    outcome = Outcome()
    pending = []
    for record in records:
        if is_sent(address := address_of(record, project), mode):
            outcome.num_there += 1
        else:
            pending.append((record, address))
    if not pending:
        return outcome
    try:
        mode, problem = usable_mode(mode)
    except ImportError as error:
        outcome.problems.append(f"tracking=wandb failed: {error}; pip install wandb")
        return outcome
    except ValueError as error:
        outcome.problems.append(f"tracking=wandb failed: {error}")
        return outcome
    outcome.problems += [] if problem is None else [problem]
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for record, address in progress.track(pending, description="wandb"):
            with scratch_folder() as folder:
                failure = _send_run(record, address, mode, folder)
            if failure is not None:
                outcome.problems.append(failure)
                mode, gone = usable_mode(mode)  # A server that is gone is not waited for again.
                outcome.problems += [] if gone is None else [gone]
                problem = problem or gone
            elif problem is None:
                outcome.num_sent += 1
    return outcome


def _send_run(record: Record, address: Address, mode: str, folder: Path) -> str | None:
    try:
        content = _content(record, folder)
    except (ValueError, OSError, ImportError) as error:
        return f"tracking=wandb failed for {record.id}: {error}"
    return send(address, content, mode)


def _content(record: Record, folder: Path) -> Content:
    """With the run's figure, drawn into `folder`."""
    if not record.place.is_dir():
        return content_of(record, None, None)
    from uvm_kv.report.figures import run_figure
    from uvm_kv.report.style import save_figure

    steps = read_table(record.place, "steps")
    picture, _ = save_figure(run_figure(steps, title_of(record.summary)), folder / "figure")
    return content_of(record, steps, picture)
