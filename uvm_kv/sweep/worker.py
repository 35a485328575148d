"""One worker process at a time, which owns the GPU and runs jobs one after another.

The worker keeps the loaded model from job to job; the KV memory is each job's own. It is replaced when the mechanism
changes, after a job ran out of memory, and when it dies, a CUDA error is raised in it or its job is past its time; the
last three also fail what is left of the mechanism, which is not tried. The process that starts it makes no CUDA
context and outlives all of this.

    parent -> worker   (job, argv)
    worker -> parent   Progress, ... and one Outcome
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from enum import Enum
from multiprocessing import connection, get_context, resource_tracker
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from uvm_kv.job.build import Job
from uvm_kv.job.models import ModelCache
from uvm_kv.peers.job import run_any_job
from uvm_kv.runner.replay import PlanMismatch
from uvm_kv.store.family import end_children_with_me

PROGRESS_EVERY_S = 0.2
PATIENCE_S = 5.0
"""Seconds that a worker may take to end before it is killed."""
WATCHDOG = "watchdog"
"""How the error of a job begins that was stopped at its time."""
LOWER = "lower"
"""An error of too little memory with this word names the setting itself."""
_PR_SET_PDEATHSIG = 1

T = TypeVar("T")
OnStep = Callable[[int, int, int], None]


class Reach(Enum):
    """The scope of an error: what it ends."""

    JOB = "job"
    WORKER = "worker"
    """The job, and the process that it ran in."""
    MECHANISM = "mechanism"
    """The process, and the jobs of the mechanism that are left."""


class Progress(NamedTuple):
    steps: int
    done: int
    total: int


@dataclass(frozen=True)
class Outcome:
    """Outcome of one job: a summary, or an error with the scope of what it ends."""

    summary: dict[str, Any] | None = None
    error: str | None = None
    reach: Reach = Reach.JOB


class ContextLostError(RuntimeError):
    """The CUDA context no longer answers."""


class Task(Protocol):
    """Runs jobs within the worker."""

    def __call__(self, job: Any, argv: list[str], on_step: OnStep) -> dict[str, Any]: ...


# ---- errors


def _chain(error: BaseException) -> list[BaseException]:
    """The error, outermost first, and what it came from: what a runner makes of a CUDA error still is one."""
    found: list[BaseException] = []
    now: BaseException | None = error
    while now is not None and now not in found:
        found.append(now)
        now = now.__cause__ or (None if now.__suppress_context__ else now.__context__)
    return found


def _is_out_of_memory(error: BaseException) -> bool:
    """By name: torch's and the extension's are there only where their packages are."""
    return isinstance(error, MemoryError) or "OutOfMemoryError" in {kind.__name__ for kind in type(error).__mro__}


def _is_cuda_error(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"CudaError", "AcceleratorError", "ContextLostError"}:
        return True
    says = ("CUDA error", "CUDA driver error", "CUBLAS_STATUS_", "CUDNN_STATUS_", "device-side assert")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in says)


def reach_of(error: BaseException) -> Reach:
    for cause in _chain(error):
        if _is_out_of_memory(cause):
            return Reach.WORKER  # What it had taken when it ran out should not be missing to the next job.
        if _is_cuda_error(cause):
            return Reach.MECHANISM
    return Reach.JOB


def explain(error: BaseException) -> str:
    """The error for the user: one line where the user or the machine caused it, a traceback where it is our fault."""
    if isinstance(error, ValueError | PlanMismatch):
        if (reach := reach_of(error)) is Reach.JOB:
            return str(error)
        text = _first_line(error)
        return (
            text
            if reach is Reach.MECHANISM or LOWER in text
            else f"{text}; {LOWER} memory.device_kv_bytes or batch_size"
        )
    for cause in _chain(error):
        if _is_out_of_memory(cause):
            return _out_of_memory(cause)
        if _is_cuda_error(cause) and not isinstance(cause, ContextLostError):
            return _first_line(cause)
    if isinstance(error, ContextLostError):
        return f"{error} after {_first_line(error.__cause__ or error)}"
    if not isinstance(error, OSError):
        return "this is a bug in uvm-kv:\n" + "".join(traceback.format_exception(error))
    if error.errno == errno.ENOSPC:
        return (
            "no space is left for the results; free some and start again (what is finished stays), or give results_dir"
        )
    return f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _out_of_memory(error: BaseException) -> str:
    text = _first_line(error)
    if LOWER in text:
        return text
    what = "host memory" if isinstance(error, MemoryError) else "GPU memory"
    setting = "memory.host_kv_bytes" if isinstance(error, MemoryError) else "memory.device_kv_bytes"
    return f"out of {what} ({text}); {LOWER} {setting} or batch_size"


def death(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"the worker process ended by itself, with status {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = ""
    if -exit_code == signal.SIGKILL:
        hint = "; the system does that when host memory runs out: lower memory.host_kv_bytes or batch_size"
    return f"the worker process was killed by {name}{hint}"


# ---- in the worker


class RealJobs:
    """`run_any_job`, with the model kept from job to job."""

    def __init__(self) -> None:
        self.models = ModelCache()

    def __call__(self, job: Job, argv: list[str], on_step: OnStep) -> dict[str, Any]:
        if job.resolved.serving is None:
            return run_any_job(job, argv=argv, on_step=on_step)
        from uvm_kv.runner.torch.context import context_answers, release_memory

        release_memory()
        try:
            return run_any_job(job, argv=argv, on_step=on_step, load=self.models)
        except Exception as error:
            if not context_answers():
                raise ContextLostError("the GPU no longer answers this process") from error
            raise


def end_with_parent() -> None:
    """Ask Linux to end this process with the one that started it. Other systems cannot do this."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(pipe: connection.Connection, parent_pid: int, make_task: Callable[[], Task]) -> None:
    """Run what comes over the pipe until it is closed. Whatever happens to the parent, this process ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent hears Ctrl-C and ends its worker.
    end_with_parent()
    if os.getppid() != parent_pid:
        return
    task = make_task()
    while True:
        try:
            job, argv = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(task, job, argv, pipe))


def _answer(task: Task, job: Any, argv: list[str], pipe: connection.Connection) -> Outcome:
    said = time.monotonic()

    def on_step(steps: int, done: int, total: int) -> None:
        nonlocal said
        if (now := time.monotonic()) - said >= PROGRESS_EVERY_S:
            said = now
            pipe.send(Progress(steps, done, total))

    try:
        return Outcome(task(job, argv, on_step))
    except Exception as error:
        return Outcome(error=explain(error), reach=reach_of(error))


# ---- in the parent


class Worker:
    """The process, from its start to `close`."""

    def __init__(self, make_task: Callable[[], Task]) -> None:
        end_children_with_me()
        context = get_context("spawn")
        resource_tracker.ensure_running()  # It would unblock what is blocked below.
        self._pipe, its_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(its_end, os.getpid(), make_task))
        # A Ctrl-C while the worker starts is the parent's alone: a process inherits what is blocked.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            its_end.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def run(self, job: Any, argv: list[str], on_step: OnStep | None = None, limit_s: float | None = None) -> Outcome:
        """`limit_s`: of the wall clock, from now on. A job past it is killed with its process, mid-step."""
        end = None if limit_s is None else time.monotonic() + limit_s
        steps = 0
        try:
            self._pipe.send((job, argv))
            while True:
                if end is not None and not self._pipe.poll(max(0.0, end - time.monotonic())):
                    return self._stop(limit_s, steps)
                if isinstance(said := self._pipe.recv(), Outcome):
                    break
                steps = said.steps
                if on_step is not None:
                    on_step(*said)
        except (EOFError, OSError):  # The other end is gone.
            self._process.join(PATIENCE_S)
            return Outcome(error=death(self._process.exitcode), reach=Reach.MECHANISM)
        return said

    def _stop(self, limit_s: float | None, steps: int) -> Outcome:
        self._process.kill()
        self._process.join(PATIENCE_S)
        done = f"after {steps} steps or more" if steps else "before a step was reported"
        return Outcome(
            error=f"{WATCHDOG}: stopped {done}, at its limit of {limit_s:g} s (watchdog_s); it may have been thrashing",
            reach=Reach.MECHANISM,
        )

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._pipe.close()
        self._process.terminate()
        self._process.join(PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


class OneWorker:
    """Runs jobs in one worker at a time, and gives up on a mechanism whose worker died or raised a CUDA error."""

    def __init__(
        self,
        make_task: Callable[[], Task] = RealJobs,
        mechanism_of: Callable[[Any], Hashable] | None = None,
    ) -> None:
        """`mechanism_of` also decides who shares a process; by default `process` does."""
        self._make_task, self._mechanism_of = make_task, mechanism_of or mechanism
        self._process_of = mechanism_of or process
        self._worker: Worker | None = None
        self._process: Hashable = None
        self._given_up: dict[Hashable, tuple[Any, str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_worker()

    def given_up(self, job: Any) -> tuple[Any, str] | None:
        """The earlier job whose failure ended this one's mechanism, and its error; such a job is not to be run."""
        return self._given_up.get(self._mechanism_of(job))

    def run(self, job: Any, argv: list[str], on_step: OnStep | None = None, limit_s: float | None = None) -> Outcome:
        assert self.given_up(job) is None
        now = self._process_of(job)
        if self._worker is not None and now != self._process:
            self._end_worker()
        if self._worker is None:
            self._worker, self._process = Worker(self._make_task), now
        outcome = self._worker.run(job, argv, on_step, limit_s)
        if outcome.reach is not Reach.JOB:
            self._end_worker()
        if outcome.reach is Reach.MECHANISM:
            assert outcome.error is not None
            self._given_up[self._mechanism_of(job)] = job, outcome.error
        return outcome

    def _end_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()


def mechanism(job: Job) -> Hashable:
    """The mechanism that a worker serves. `custom` stands for many mechanisms, which their axes distinguish."""
    config = job.resolved.config
    axes = (config.memory.kind, config.memory.pageable, config.placement.name, *dataclasses.astuple(config.hints))
    return (
        config.runner,
        config.engine,
        config.mechanism,
        *axes,
        config.scheduler.admission,
        config.scheduler.preemption,
    )


def process(job: Job) -> Hashable:
    """Whose jobs share a worker: a mechanism's, but each repeat has a fresh one, so that repeats share no state."""
    return mechanism(job), job.repeat


def in_order(jobs: Iterable[T], process_of: Callable[[T], Hashable]) -> list[T]:
    """Process by process, in the order in which they first come; the given order otherwise."""
    ranks: dict[Hashable, int] = {}
    return sorted(jobs, key=lambda job: ranks.setdefault(process_of(job), len(ranks)))
