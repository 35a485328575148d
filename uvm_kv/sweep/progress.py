"""Progress of a sweep: its workers write lines into a folder of the sweep's, the parent shows and collects them.

<folder>/command.json                   what was typed, and where
<folder>/<pid>@<machine>.jsonl          events; one file per process, because the lines of two machines would mix
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from uvm_kv.store.checks import COUNT, check_fields, parse_json
from uvm_kv.store.directories import machine, remove_abandoned, temporary_path, written_whole
from uvm_kv.store.scratch import scratch_folder

SWEEP_END = "sweep.json"
ENVIRONMENT = "UVM_KV_SWEEP"
"""Names the folder to whoever works for the sweep. Hydra sets it in workers on other machines (hydra.job.env_set)."""
POLL_S = 0.2
PLAIN_EVERY_S = 10.0


@dataclass(frozen=True)
class Event:
    """A run has started, or how it ended: done, skipped (it was complete), or failed with an error of a few lines."""

    status: str
    label: str
    directory: str | None = None
    error: str | None = None
    not_tried_after: str | None = None
    """Label of the job whose error this is; this one was not tried."""
    tracking: dict[str, str] | None = None
    """Project and mode, where the run is to be mirrored to wandb."""
    overrides: list[str] | None = None
    """Hydra's overrides of a run that has started, by which its launcher knows the job."""
    identity: dict[str, Any] | None = None
    """Identity of a run that has started, with which a record of its failure begins."""
    num_runs: int = 1
    """Repeats that a job asked for which failed before it was a run: none of them will come."""
    note: str | None = None
    """A line for the user about a run that has started, such as what was set aside for it."""


def report_event(event: Event) -> None:
    """Called in a job, and by the parent of a job that can say no more: one line, appended in one write."""
    folder = os.environ.get(ENVIRONMENT)
    if folder is not None:
        with (Path(folder) / f"{os.getpid()}@{machine()}.jsonl").open("a") as log:
            log.write(json.dumps(asdict(event)) + "\n")


@dataclass(frozen=True)
class Command:
    """What was typed, and in which folder."""

    argv: list[str]
    folder: str


def read_command() -> Command:
    """The command of the sweep that this process works for; ValueError where its folder cannot be read from here."""
    file = Path(os.environ[ENVIRONMENT]) / "command.json"
    try:
        return Command(**json.loads(file.read_text()))
    except FileNotFoundError:
        raise ValueError(
            f"{file.parent} is not there on {platform.node()}: the sweep has ended, or results_dir is not on a file "
            f"system that all machines share under this path"
        ) from None


@dataclass(frozen=True)
class SweepEnd:
    """How the jobs of a sweep ended: <results_dir>/<experiment>/sweep.json. It does not exist while a sweep
    runs, nor after one that was stopped or died."""

    jobs: int
    """Runs that were asked for, each repeat of a job being one."""
    complete: int
    failed: int
    """Refused ones too."""
    unrecorded: int
    """Failed runs that left no record, because they had not started as a run."""

    @classmethod
    def of(cls, num_runs: int, events: Sequence[Event]) -> SweepEnd:
        """From the events by which runs ended; `num_runs` were asked for."""
        failed = [e for e in events if e.status == "failed"]
        num_failed, num_complete = sum(e.num_runs for e in failed), len(events) - len(failed)
        unrecorded = sum(e.num_runs for e in failed if e.directory is None)
        return cls(max(num_runs, num_complete + num_failed), num_complete, num_failed, unrecorded)

    def write(self, folder: Path) -> None:
        with written_whole(folder) as staging:
            (staging / SWEEP_END).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def clear(folder: Path) -> None:
        (folder / SWEEP_END).unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path) -> SweepEnd | None:
        """None where there is none. ValueError where it is damaged."""
        file = folder / SWEEP_END
        if not file.is_file():
            return None
        names = [field.name for field in fields(cls)]
        end = check_fields(parse_json(file.read_bytes()), dict.fromkeys(names, COUNT), names, str(file))
        return cls(**{name: end[name] for name in names})


class SweepLog:
    """The parent's end: how every run ended so far, and which are running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[Event] = []
        """The events by which runs ended."""
        self.running: dict[str, Event] = {}
        """Start events of the running runs, by run directory."""
        self.notes: list[str] = []
        self.current = ""
        """Label of the run that a worker started last."""
        self._read: dict[Path, int] = {}
        self._lock = threading.Lock()

    def poll(self) -> None:
        with self._lock:
            # An NFS client looks anew at a folder that it has changed itself.
            (self.folder / "read").touch()
            for file in sorted(self.folder.glob("*.jsonl")):
                with file.open("rb") as log:
                    log.seek(self._read.get(file, 0))
                    lines = log.read()
                whole = lines[: lines.rfind(b"\n") + 1]
                self._read[file] = self._read.get(file, 0) + len(whole)
                for line in whole.splitlines():
                    self._take(Event(**json.loads(line)))

    def _take(self, event: Event) -> None:
        if event.note is not None:
            self.notes.append(event.note)
        if event.status == "started":
            self.running[str(event.directory)] = event
        else:
            self.events.append(event)
            self.running.pop(str(event.directory), None)

    def count(self, status: str) -> int:
        return sum(e.status == status for e in self.events)

    def num_ended(self) -> int:
        """Runs that ended or will not come, repeats counted one by one."""
        return sum(e.num_runs for e in self.events)


@contextmanager
def sweep_log(num_runs: int, name: str, argv: list[str], shared: Path | None = None) -> Iterator[SweepLog]:
    """Show progress on stderr while a sweep runs: a bar on a terminal, a line now and then elsewhere.

    `num_runs`: how many will end, each repeat of a job being one.
    `shared`: a folder that workers on other machines see; without one they are all on this machine.
    """
    with _folder(shared) as folder:
        command = Command(argv, str(Path.cwd()))
        (folder / "command.json").write_text(json.dumps(asdict(command)))
        os.environ[ENVIRONMENT] = str(folder)
        log, stop = SweepLog(folder), threading.Event()
        thread = threading.Thread(target=_show, args=(log, num_runs, name, stop), daemon=True)
        thread.start()
        try:
            yield log
        finally:
            stop.set()
            thread.join()
            log.poll()
            del os.environ[ENVIRONMENT]


@contextmanager
def _folder(shared: Path | None) -> Iterator[Path]:
    if shared is None:
        with scratch_folder() as folder:
            yield folder
        return
    folder = temporary_path(shared.absolute() / "sweep")
    remove_abandoned(folder.with_name("sweep"))
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _show(log: SweepLog, num_runs: int, name: str, stop: threading.Event) -> None:
    console = Console(stderr=True)
    if not console.is_terminal:
        first, said = 0.0, time.monotonic()
        while not stop.wait(POLL_S):
            log.poll()
            first = first or (time.monotonic() if log.events else 0.0)
            if time.monotonic() - said >= PLAIN_EVERY_S and len(log.events) > 1:
                said = time.monotonic()
                print(f"{name}: {progress_line(log, num_runs, said - first)}", file=sys.stderr, flush=True)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[counts]}", markup=False),
    )
    with Progress(*columns, console=console, transient=False) as progress:
        task = progress.add_task(name, total=num_runs, counts="")
        while True:
            ended = stop.wait(POLL_S)
            log.poll()
            progress.update(task, completed=min(log.num_ended(), num_runs), counts=_counts(log))
            if ended:
                return


def progress_line(log: SweepLog, num_runs: int, since_first_s: float) -> str:
    """`2 done, 1 running of 9 runs, about 12 s left`. `since_first_s`: seconds since the first run ended."""
    ended = log.num_ended()
    total = max(num_runs, ended)  # What a launcher loses may be counted twice.
    if ended < 2 or ended == total:
        return f"{_counts(log)} of {total} runs"
    return f"{_counts(log)} of {total} runs, about {since_first_s / (ended - 1) * (total - ended):.0f} s left"


def _counts(log: SweepLog) -> str:
    counts = [(log.count(s), s) for s in ("done", "skipped", "failed")]
    counts.insert(1, (len(log.running), "running"))
    text = ", ".join(f"{count} {what}" for count, what in counts if what == "done" or count)
    return f"{text} ({log.current})" if log.current else text


def tracked(events: Iterable[Event]) -> Iterator[tuple[Path, dict[str, str]]]:
    """The finished run directories that asked for tracking, with its settings."""
    for event in events:
        if event.status != "failed" and event.directory is not None and event.tracking is not None:
            yield Path(event.directory), event.tracking
