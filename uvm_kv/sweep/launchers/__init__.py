"""Hydra's launchers, made to outlive their workers: only the job whose worker dies is lost, and the others continue.

Each is Hydra's own with its settings (`hydra.launcher.*`); `use` puts the class of ours in the place of Hydra's.

    joblib                              processes of this machine
    submitit_slurm, submitit_local      a job of a SLURM array each; or a process of this machine
    ray                                 tasks of a Ray cluster, or of one started here
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec

from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper

from uvm_kv.config.names import unknown
from uvm_kv.store.family import end_children_with_me
from uvm_kv.sweep.worker import explain

LAUNCHERS = {
    "joblib": ("uvm_kv.sweep.launchers.on_joblib", "Joblib"),
    "submitit_local": ("uvm_kv.sweep.launchers.on_submitit", "Local"),
    "submitit_slurm": ("uvm_kv.sweep.launchers.on_submitit", "Slurm"),
    "ray": ("uvm_kv.sweep.launchers.on_ray", "Ray"),
}
BASIC = "basic"
"""Hydra's own; it only collects the jobs (`experiments.run`)."""
NEEDS = {
    "submitit_local": ("slurm", ("submitit", "hydra_plugins.hydra_submitit_launcher")),
    "submitit_slurm": ("slurm", ("submitit", "hydra_plugins.hydra_submitit_launcher")),
    "ray": ("ray", ("ray", "hydra_plugins.hydra_ray_launcher")),
}
"""The extra that brings a launcher, and the modules it consists of."""
SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
PAST_ONE_MACHINE = ("submitit_slurm", "ray")

N_JOBS = "hydra.launcher.n_jobs"

OnLost = Callable[[Sequence[str], str], None]
"""Gets the overrides of a job whose worker died, and what is known of its end."""

_on_lost: OnLost
problems: list[str] = []
"""Reasons why a launcher could not continue, for the user."""


def check(name: str, tuned: Sequence[str]) -> None:
    """ValueError where there is no such launcher, it is not installed, or `tuned`, keys of it, would be ignored."""
    if name not in (*LAUNCHERS, BASIC):
        raise unknown("hydra/launcher", name, (*LAUNCHERS, BASIC))
    extra, modules = NEEDS.get(name, ("", ()))
    if missing := [module.rpartition(".")[2] for module in modules if not _is_there(module)]:
        raise ValueError(
            f"hydra/launcher={name} needs {' and '.join(missing)}, not installed here: pip install -e '.[{extra}]'"
        )
    ignored = [key for key in tuned if name == "joblib" and key != N_JOBS]
    if ignored:
        raise ValueError(f"{ignored[0]} would be ignored; of hydra/launcher=joblib hydra.launcher.n_jobs can be set")


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # The package that it is in.
        return False


def use(name: str, on_lost: OnLost) -> None:
    """Let Hydra take our launcher of this name, in this process."""
    global _on_lost
    _on_lost = on_lost
    end_children_with_me()
    module, kind = LAUNCHERS[name]
    ours = getattr(importlib.import_module(module), kind)
    _, hydras = ours.__bases__
    plugins = Plugins.instance().class_name_to_class
    plugins[f"{hydras.__module__}.{hydras.__name__}"] = ours
    plugins[SWEEPER].validate_batch_is_legal = _leave_to_the_workers


def _leave_to_the_workers(sweeper: Sweeper, batch: Sequence[Sequence[str]]) -> None:
    """Hydra would compose every job in the parent before the first begins, to find mistakes early: a tenth of a second
    each, and its worker composes it again. Names and types are checked already (`uvm_kv.config.names`)."""


def lose(overrides: Sequence[str], why: str) -> None:
    _on_lost(overrides, why)


class Outliving(Launcher):  # type: ignore[misc]
    """Comes before Hydra's launcher among the base classes."""

    @abstractmethod
    def run_all(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn | None]:
        """One return per job, in order; None for a job that is lost, which `lose` has reported."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        try:
            returns = self.run_all(job_overrides, initial_job_idx)
        except Exception as error:  # The launcher's own: no cluster there, a setting it refuses.
            problems.append(_line(error))
            return []
        whole = []
        for overrides, done in zip(job_overrides, returns, strict=True):
            if done is not None and done.status is JobStatus.FAILED:
                lose(overrides, explain(done._return_value))  # The property would raise it.
            elif done is not None:
                whole.append(done)
        return whole


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def last_line(error: BaseException) -> str:
    """The last line of an error that holds a traceback, which names the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def num_workers(overrides: Iterable[Override]) -> int:
    """Processes at once on this machine: as many as hydra.launcher.n_jobs says, or as there are cores."""
    from joblib import effective_n_jobs

    given = [override.value() for override in overrides if override.key_or_group == N_JOBS]
    return int(effective_n_jobs(given[-1] if given else -1))
