"""Checks of what a user typed, with the nearest valid names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import OverrideParseException
from omegaconf import BooleanNode, DictConfig, FloatNode, IntegerNode, ListConfig, OmegaConf, StringNode, ValueNode
from omegaconf.errors import OmegaConfBaseException

from uvm_kv.config.schema import ConfigSchema, HardwareSchema, LengthsSchema, OperatorSchema, WorkloadSchema

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
ALLOWED = {"rerun": ("false", "true", "changed")}
"""Of settings that are no group: their values, known before anything is composed."""
NOT_A_KEY = ("experiment", "link")
"""Groups of the main config whose options fill in keys of others."""


def unknown(what: str, given: str, allowed: Iterable[str]) -> ValueError:
    """The error for an unknown name: what was given, the nearest, and all that is allowed."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return ValueError(f"{what} {given!r} is unknown; {hint}allowed: {', '.join(names)}")


def groups() -> dict[str, list[str]]:
    """Config groups and their options, from the folders of `conf/`."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(CONF_DIR.iterdir())
        if folder.is_dir()
    }


def _own_options(overrides: Iterable[Override]) -> dict[str, list[str]]:
    """Options of the folders that hydra.searchpath=[file:///DIR] adds, such as a profile that was calibrated here."""
    found: dict[str, list[str]] = {}
    for override in overrides:
        folders = override.value() if override.key_or_group == "hydra.searchpath" else []
        for folder in (Path(str(f).removeprefix("file://")) for f in folders if str(f).startswith("file://")):
            for file in sorted(folder.glob("*/*.yaml")):
                found.setdefault(file.parent.name, []).append(file.stem)
    return found


def _keys(node: DictConfig, prefix: str = "") -> set[str]:
    found = set()
    for key in node:
        path = f"{prefix}{key!s}"
        found.add(path)
        child = node._get_node(str(key))
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            found |= _keys(child, path + ".")
    return found


def parse_overrides(arguments: list[str]) -> list[Override]:
    try:
        parsed: list[Override] = OverridesParser.create().parse_overrides(arguments)
        return parsed
    except OverrideParseException as error:
        raise ValueError(f"{error.override!r} cannot be read; write key=value (several values: key=a,b)") from None


def values_of(override: Override) -> list[str]:
    """All that it gives its key, as text. ValueError for a sweep that does not list them."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep() or override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        raise ValueError(
            f"{override.input_line} cannot be swept; list the values, {override.key_or_group}=a,b, or use "
            f"range(start,stop)"
        )
    return list(override.sweep_string_iterator())


def length_workloads() -> list[str]:
    """The workloads that bring a distribution of lengths."""
    files = sorted((CONF_DIR / "workload").glob("*.yaml"))
    return [file.stem for file in files if OmegaConf.select(OmegaConf.load(file), "lengths") is not None]


def _operators() -> dict[str, set[str]]:
    """Operators of the profiles, and the fields of their costs."""
    files = [OmegaConf.to_container(OmegaConf.load(f)) for f in (CONF_DIR / "hardware").glob("*.yaml")]
    names = {op for file in files if isinstance(file, dict) for op in file.get("operators", {})}
    return {str(name): {f.name for f in fields(OperatorSchema)} for name in names}


def check_overrides(overrides: Iterable[Override], config: Any = None) -> None:
    """ValueError for a group option or key that does not exist, or a value of the wrong type, before Hydra composes.

    `config` is an instance of the schema of a command of its own; without it, the main config's.
    """
    overrides = list(overrides)
    keyless = NOT_A_KEY if config is None else ()
    if config is None:
        config = ConfigSchema(workload=WorkloadSchema(lengths=LengthsSchema()))
    if hasattr(config, "hardware"):
        config.hardware = HardwareSchema(operators={name: OperatorSchema() for name in _operators()})
    schema = OmegaConf.structured(config)
    keys = _keys(schema)
    own = _own_options(overrides)
    options = {name: values + own.get(name, []) for name, values in groups().items() if name in keys or name in keyless}
    for override in overrides:
        key = override.key_or_group
        if key.startswith("hydra") or override.is_force_add():
            continue
        if override.is_delete():
            raise ValueError(f"{override.input_line}: nothing can be taken out of the config; give {key} another value")
        values = values_of(override)
        if key in options:
            for value in values:
                if value not in options[key] and not (key == "experiment" and value == "null"):
                    raise unknown(key, value.strip("'\""), options[key])
        elif key.startswith("hardware.sources."):
            continue
        elif key not in keys:
            group = key.rpartition(".")[0] + "." if "." in key else ""
            siblings = {k for k in keys | set(options) if k.startswith(group) and "." not in k[len(group) :]}
            raise unknown("key", key, siblings or {k for k in keys | set(options) if "." not in k})
        else:
            for value in values:
                _check_type(schema, key, value)


def with_implied(arguments: list[str]) -> list[str]:
    """prompts=FILE means workload=prompts, and is for a real model; batch_size takes the place of an experiment's
    working_set_ratio. Given before Hydra composes."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if {"batch_size", "experiment"} <= set(given) and "working_set_ratio" not in given:
        arguments = [*arguments, "working_set_ratio=null"]
    if given.get("prompts", "null") == "null":
        return arguments
    if given.get("runner") == "sim":
        raise ValueError("runner=sim with prompts=FILE: prompts are for a real model; drop one of them")
    implied = [] if {"workload", "experiment"} & set(given) else ["workload=prompts"]
    return [*arguments, *implied]


def mark_given(hardware_sources: Any, overrides: Iterable[Override]) -> None:
    """What the command line changes of a profile is not what the profile's source speaks of."""
    for override in overrides:
        path = override.key_or_group.removeprefix("hardware.")
        if path != override.key_or_group and not path.startswith("sources"):
            hardware_sources[path] = "given on the command line"


def _check_type(schema: DictConfig, key: str, text: str) -> None:
    if key in ALLOWED and text.lower() not in ALLOWED[key]:
        raise ValueError(f"{key}={text}; it must be {', '.join(ALLOWED[key][:-1])} or {ALLOWED[key][-1]}")
    try:
        value = OverridesParser.create().parse_override(f"{key}={text}").value()
        OmegaConf.update(schema, key, value)
    except (OmegaConfBaseException, OverrideParseException) as error:
        if (wanted := _wanted(schema, key)) is not None:
            raise ValueError(f"{key}={text} is not of the right type; it must be {wanted}") from None
        reason = str(error).splitlines()[0]
        raise ValueError(f"{key}={text} is not of the right type: {reason[:1].lower()}{reason[1:]}") from None


def _wanted(schema: DictConfig, key: str) -> str | None:
    """What a key takes, in words; None for one that holds others."""
    group, _, name = key.rpartition(".")
    parent = OmegaConf.select(schema, group) if group else schema
    node = parent._get_node(name)
    words = {
        IntegerNode: "a whole number of bytes, such as 8589934592" if name.endswith("_bytes") else "a whole number",
        FloatNode: "a number",
        BooleanNode: "true or false",
        StringNode: "a text",
        ListConfig: "a list, such as [1,2]",
    }
    word = next((text for kind, text in words.items() if isinstance(node, kind)), None)
    return f"{word}, or null" if isinstance(node, ValueNode) and node._is_optional() else word
