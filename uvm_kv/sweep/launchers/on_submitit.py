"""Hydra's submitit launchers, whose jobs answer however they end, and end when the sweep is interrupted."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import submitit
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher, SlurmLauncher

from uvm_kv.sweep.launchers import Outliving, last_line, lose


class _Answering:
    """A submitted job. Its result is None where it ended without one."""

    def __init__(self, job: Any, overrides: Sequence[str]) -> None:
        self.job, self._overrides = job, overrides

    def results(self) -> list[JobReturn | None]:
        try:
            returned: list[JobReturn | None] = self.job.results()
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
            lose(self._overrides, f"{self._end(error)}; its log: {self.job.paths.stderr}")
            return [None]
        return returned

    def _end(self, error: Exception) -> str:
        if isinstance(error, submitit.core.utils.FailedJobError):
            return f"its worker failed ({last_line(error)})"
        return f"its worker ended without a result ({self.job.state})"


@contextmanager
def _answering(job_overrides: Sequence[Sequence[str]]) -> Iterator[list[_Answering]]:
    """Hydra's launchers submit through `submitit.AutoExecutor`, and ask each job for its results in turn."""
    submitted: list[_Answering] = []

    class Executor(submitit.AutoExecutor):  # type: ignore[misc]
        def map_array(self, function: Any, *arguments: Any) -> list[_Answering]:
            # Only the parent receives Ctrl-C: a process inherits the blocked signals.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                jobs = super().map_array(function, *arguments)
                submitted.extend(_Answering(job, o) for job, o in zip(jobs, job_overrides, strict=True))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            return submitted

    original = submitit.AutoExecutor
    submitit.AutoExecutor = Executor
    try:
        yield submitted
    finally:
        submitit.AutoExecutor = original


class Slurm(Outliving, SlurmLauncher):  # type: ignore[misc]
    def run_all(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn | None]:
        with _answering(job_overrides) as submitted:
            try:
                return SlurmLauncher.launch(self, job_overrides, initial_job_idx)  # type: ignore[no-any-return]
            except KeyboardInterrupt:
                for each in submitted:
                    each.job.cancel(check=False)
                raise


class Local(Outliving, LocalLauncher):  # type: ignore[misc]
    def run_all(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn | None]:
        """Run as many jobs at once as there are cores; submitit would start them all."""
        at_once = max(1, len(os.sched_getaffinity(0)) // (self.params["cpus_per_task"] or 1))
        returns: list[JobReturn | None] = []
        for first in range(0, len(job_overrides), at_once):
            some = job_overrides[first : first + at_once]
            with _answering(some) as submitted:
                try:
                    returns += LocalLauncher.launch(self, some, initial_job_idx + first)
                except KeyboardInterrupt:
                    for each in submitted:
                        with suppress(ProcessLookupError):
                            os.kill(int(each.job.job_id), signal.SIGKILL)  # Its task ends with it.
                    raise
        return returns
