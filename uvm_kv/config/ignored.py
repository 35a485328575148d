"""Settings that every job of a command would ignore: refused in a line rather than dropped without a word.

What one job ignores is refused by its declaration (`uvm_kv.config.settings.check_heeded`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from uvm_kv.config.names import values_of
from uvm_kv.config.option_file import axes_of
from uvm_kv.config.settings import ignored, settings, typed

REAL = ("cpu", "cuda")


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
        raise ignored("model.weights", "random", only, f"runner={' or '.join(REAL)}")
    watchdog = given.get("watchdog_s")
    if watchdog is not None and set(values_of(watchdog)) != {"null"} and not has_worker:
        raise ignored("watchdog_s", values_of(watchdog)[0], only, "runner=cuda, or a sweep with hydra/launcher=basic")
    if "sim" not in runners:
        return
    kinds = _memory_kinds(by_key, file, folders)
    for it in settings().values():
        override, users = given.get(it.path), it.rule.heeded.get("memory.kind", ())
        if override is None or "memory.kind" not in it.rule.lenient or kinds & set(users):
            continue
        if other := [value for value in map(str.lower, values_of(override)) if value != typed(it.default)]:
            by = f"memory={' and '.join(sorted(kinds))}"
            raise ignored(it.path, other[0], by, f"memory={' or '.join(users)}, or a mechanism that has it")


def _values(by_key: Mapping[str, Override], file: Any, key: str) -> list[str]:
    """What the command gives a key or a group, or its experiment does; empty where neither does."""
    if key in by_key:
        return values_of(by_key[key])
    if file is None:
        return []
    value = _chosen(file).get(key, OmegaConf.select(file, key))
    return [] if value is None or isinstance(value, DictConfig) else [typed(value)]


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
