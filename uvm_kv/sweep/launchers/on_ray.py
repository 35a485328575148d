"""Hydra's Ray launcher, whose tasks answer however they end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import ray
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_ray_launcher import _core
from hydra_plugins.hydra_ray_launcher.ray_launcher import RayLauncher
from ray.exceptions import RayError

from uvm_kv.sweep.launchers import Outliving, last_line, lose

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report each use over the network.
HERE = {"address": "local", "include_dashboard": False}
"""Settings of a cluster that is started for the sweep and ends with it."""
QUIET = {"log_to_driver": False, "logging_level": "warning"}


def _set_defaults(config: Any) -> None:
    """What the command does not say; a cluster that is there already has its sizes."""
    init = config.init
    for key, value in QUIET.items():
        init.setdefault(key, value)
    if init.get("address") is None and "RAY_ADDRESS" not in os.environ:
        init.update({key: init.get(key) or value for key, value in HERE.items()})
    elif init.get("address") != "local":
        init.setdefault("object_store_memory", None)  # Hydra's launcher sets one else, which Ray refuses there.
    config.remote.setdefault("max_retries", 0)  # As with the other launchers: the same command tries it again.


@contextmanager
def _answering(get: Callable[[Any], JobReturn | None]) -> Iterator[None]:
    _core.ray = SimpleNamespace(get=get)
    try:
        yield
    finally:
        _core.ray = ray


class Ray(Outliving, RayLauncher):  # type: ignore[misc]
    def run_all(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn | None]:
        _set_defaults(self.ray_cfg)
        overrides = iter(job_overrides)

        def get(run: Any) -> JobReturn | None:
            """Hydra's launcher asks for the runs in turn."""
            job = next(overrides)
            try:
                returned: JobReturn = ray.get(run)
            except RayError as error:
                lose(job, f"its worker ended without a result ({type(error).__name__}: {last_line(error)})")
                return None
            return returned

        try:
            with _answering(get):
                return RayLauncher.launch(self, job_overrides, initial_job_idx)  # type: ignore[no-any-return]
        except KeyboardInterrupt:
            ray.shutdown()
            raise
