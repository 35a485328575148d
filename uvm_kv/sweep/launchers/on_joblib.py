"""Hydra's joblib launcher over pools of one process each: loky gives up a whole pool when a process of it dies."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Sequence

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, setup_globals
from hydra_plugins.hydra_joblib_launcher._core import execute_job
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
from joblib import cpu_count, effective_n_jobs
from joblib.externals.loky import BrokenProcessPool, ProcessPoolExecutor
from joblib.externals.loky.backend.resource_tracker import ensure_running

from uvm_kv.sweep.launchers import Outliving, lose
from uvm_kv.sweep.worker import death

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


class Joblib(Outliving, JoblibLauncher):  # type: ignore[misc]
    def run_all(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn | None]:
        setup_globals()
        pools = _Pools(min(effective_n_jobs(self.joblib["n_jobs"]), len(job_overrides)))
        returns: list[JobReturn | None] = [None] * len(job_overrides)
        numbers, state = iter(range(len(job_overrides))), Singleton.get_state()
        turn = threading.Lock()
        errors: list[Exception] = []

        def serve() -> None:
            # The parent alone hears Ctrl-C: a process inherits what is blocked in the thread that starts it.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            while not pools.stopped and not errors:
                with turn:
                    number = next(numbers, None)
                if number is None:
                    return
                overrides = job_overrides[number]
                job = (initial_job_idx + number, overrides, self.hydra_context, self.config, self.task_function, state)
                try:
                    returns[number] = pools.mine().submit(execute_job, *job).result()
                except BrokenProcessPool as error:
                    pools.drop()
                    if not pools.stopped:
                        lose(overrides, _death(error))
                except Exception as error:
                    errors.append(error)

        ensure_running()  # Started later it would unblock what is blocked.
        threads = [threading.Thread(target=serve, daemon=True) for _ in range(pools.num_workers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            pools.stop()
        if errors:
            raise errors[0]
        return returns


def _death(error: BrokenProcessPool) -> str:
    code = re.search(r"\((-?\d+)\)", str(error))  # "... exit codes of the workers are {SIGKILL(-9)}"
    return death(int(code[1])) if code else "the worker process died"


class _Pools:
    """One process per thread."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers, self.stopped = num_workers, False
        threads = str(max(1, cpu_count() // num_workers))  # As joblib does: together they use the cores once.
        self._env = {name: os.environ.get(name, threads) for name in THREADS}
        self._pools: dict[int, ProcessPoolExecutor] = {}

    def mine(self) -> ProcessPoolExecutor:
        thread = threading.get_ident()
        if thread not in self._pools:
            self._pools[thread] = ProcessPoolExecutor(max_workers=1, env=self._env)
        return self._pools[thread]

    def drop(self) -> None:
        self._pools.pop(threading.get_ident()).shutdown(wait=False)

    def stop(self) -> None:
        """End every process, whatever it is doing."""
        self.stopped = True
        for pool in list(self._pools.values()):
            pool.shutdown(wait=False, kill_workers=True)
