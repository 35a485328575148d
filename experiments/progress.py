"""Progress of a sweep: jobs append one line each to a shared file, the parent shows and collects them."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ENVIRONMENT = "UVM_KV_SWEEP_LOG"
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


def report_event(event: Event) -> None:
    """Called in a job: one line, appended in one write so that jobs do not mix theirs."""
    path = os.environ.get(ENVIRONMENT)
    if path is not None:
        with Path(path).open("a") as log:
            log.write(json.dumps(asdict(event)) + "\n")


class SweepLog:
    """The parent's end: how every run ended so far, and how many are running."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.events: list[Event] = []
        self.num_running = 0
        self.current = ""
        """What one worker process is at."""

    def poll(self) -> None:
        said = [Event(**json.loads(line)) for line in self._path.read_text().splitlines()]
        self.events = [event for event in said if event.status != "started"]
        # What failed before it had a directory, or was not tried, never started.
        ended = sum(
            e.status in ("done", "failed") and e.directory is not None and e.not_tried_after is None
            for e in self.events
        )
        self.num_running = len(said) - len(self.events) - ended

    def count(self, status: str) -> int:
        return sum(e.status == status for e in self.events)


@contextmanager
def sweep_log(num_jobs: int, name: str) -> Iterator[SweepLog]:
    """Show progress on stderr while a sweep runs: a bar on a terminal, a line now and then elsewhere."""
    with tempfile.TemporaryDirectory(prefix="uvm-kv-") as folder:
        path = Path(folder) / "events.jsonl"
        path.touch()
        os.environ[ENVIRONMENT] = str(path)
        log, stop = SweepLog(path), threading.Event()
        thread = threading.Thread(target=_show, args=(log, num_jobs, name, stop), daemon=True)
        thread.start()
        try:
            yield log
        finally:
            stop.set()
            thread.join()
            log.poll()
            del os.environ[ENVIRONMENT]


def _show(log: SweepLog, num_jobs: int, name: str, stop: threading.Event) -> None:
    console = Console(stderr=True)
    if not console.is_terminal:
        first, said = 0.0, time.monotonic()
        while not stop.wait(POLL_S):
            log.poll()
            ended = len(log.events)
            first = first or (time.monotonic() if ended else 0.0)
            if time.monotonic() - said >= PLAIN_EVERY_S and ended > 1:
                said = time.monotonic()
                left = (said - first) / (ended - 1) * (num_jobs - ended)
                print(
                    f"{name}: {_counts(log)} of {num_jobs} jobs, about {left:.0f} s left", file=sys.stderr, flush=True
                )
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[counts]}"),
    )
    with Progress(*columns, console=console, transient=False) as progress:
        task = progress.add_task(name, total=num_jobs, counts="")
        while True:
            ended = stop.wait(POLL_S)
            log.poll()
            progress.update(task, completed=len(log.events), counts=_counts(log))
            if ended:
                return


def _counts(log: SweepLog) -> str:
    counts = [(log.count(s), s) for s in ("done", "skipped", "failed")]
    counts.insert(1, (log.num_running, "running"))
    text = ", ".join(f"{count} {what}" for count, what in counts if what == "done" or count)
    return f"{text} ({log.current})" if log.current else text
