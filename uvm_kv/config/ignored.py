"""Settings that a job, or every job of a command, would ignore: refused in a line rather than dropped without a word.

What belongs to one placement, memory kind or peer is refused where those are checked (resolve.py, cuda.py, peers.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from uvm_kv.config.names import values_of
from uvm_kv.config.option_file import axes_of
from uvm_kv.config.schema import ConfigSchema, DriverSchema, MemorySchema, SamplingSchema, SchedulerSchema

REAL = ("cpu", "cuda")


def check_heeded(config: ConfigSchema) -> None:
    """ValueError for a setting of another runner or scheduler than the job's. A replayed job is of its recording's."""
    runner = config.replay.recorded_runner or config.runner
    default = DriverSchema()
    mine: list[tuple[str, Any, Any, tuple[str, ...]]] = [
        ("sampling.temperature", config.sampling.temperature, SamplingSchema.temperature, REAL),
        ("cuda_graphs", config.cuda_graphs, ConfigSchema.cuda_graphs, ("cuda",)),
        (
            "memory.allow_oversubscription",
            config.memory.allow_oversubscription,
            MemorySchema.allow_oversubscription,
            ("cuda",),
        ),
        *(
            (f"driver.{it.name}", getattr(config.driver, it.name), getattr(default, it.name), ("sim",))
            for it in fields(default)
        ),
    ]
    for path, given, usual, users in mine:
        if given != usual and runner not in users:
            raise _meaningless(path, given, f"runner={runner}", f"runner={' or '.join(users)}")
    scheduler = config.scheduler
    if scheduler.window_s != SchedulerSchema.window_s and scheduler.name != "dynamic":
        raise _meaningless(
            "scheduler.window_s", scheduler.window_s, f"scheduler={scheduler.name}", "scheduler=dynamic, which waits"
        )


def check_command(
    given: Mapping[str, Override],
    by_key: Mapping[str, Override],
    file: Any,
    *,
    has_worker: bool,
    folders: Sequence[Path] = (),
) -> None:
    """ValueError for a setting that no job of the command heeds. One that is meant for some of a sweep's jobs is not
    refused, and what an experiment's file says serves a real run and its prediction alike.

    `given`: the command line's; `by_key`: with the sweep of the experiment's `file`. `has_worker`: jobs run in a
    process that can be stopped. `folders`: the user's own.
    """
    runners = _values(by_key, file, "runner") or ["sim"]
    if "sim" in runners and (_values(by_key, file, "prompts") or ["null"]) != ["null"]:
        runners = [*runners, "cpu"]
    if "replay" in runners:
        return
    only = f"runner={' and '.join(runners)}"
    weights = given.get("model.weights")
    if weights is not None and "random" in values_of(weights) and not set(REAL) & set(runners):
        raise _meaningless("model.weights", "random", only, f"runner={' or '.join(REAL)}")
    watchdog = given.get("watchdog_s")
    if watchdog is not None and set(values_of(watchdog)) != {"null"} and not has_worker:
        raise _meaningless(
            "watchdog_s", values_of(watchdog)[0], only, "runner=cuda, or a sweep with hydra/launcher=basic"
        )
    if "sim" in runners and "managed" not in (kinds := _memory_kinds(by_key, file, folders)):
        for it in fields(DriverSchema):
            override, usual = given.get(f"driver.{it.name}"), _text(getattr(DriverSchema(), it.name))
            if override is not None and (other := [v for v in map(str.lower, values_of(override)) if v != usual]):
                memory = f"memory={' and '.join(sorted(kinds))}"
                raise _meaningless(f"driver.{it.name}", other[0], memory, "memory=managed or a mechanism that has it")


def _meaningless(path: str, given: Any, what: str, users: str) -> ValueError:
    return ValueError(f"{path}={_text(given)} has no meaning for {what}; it belongs to {users}; drop it")


def _text(value: Any) -> str:
    """As it is typed."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _values(by_key: Mapping[str, Override], file: Any, key: str) -> list[str]:
    """What the command gives a key or a group, or its experiment does; empty where neither does."""
    if key in by_key:
        return values_of(by_key[key])
    if file is None:
        return []
    value = _chosen(file).get(key, OmegaConf.select(file, key))
    return [] if value is None or isinstance(value, DictConfig) else [_text(value)]


def _chosen(file: Any) -> dict[str, str]:
    """Options by group of a defaults list."""
    entries = [entry for entry in file.get("defaults") or [] if isinstance(entry, DictConfig)]
    return {str(key).removeprefix("override /"): value for entry in entries for key, value in entry.items()}


def _memory_kinds(by_key: Mapping[str, Override], file: Any, folders: Sequence[Path]) -> set[str]:
    kinds: set[str] = set()
    for name in _values(by_key, file, "mechanism") or ["custom"]:
        if name == "custom":
            kinds.update(_values(by_key, file, "memory.kind") or _values(by_key, file, "memory") or ["device"])
        else:
            kinds.add(axes_of(name, folders)["memory.kind"])
    return kinds
