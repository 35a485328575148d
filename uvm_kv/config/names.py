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
from uvm_kv.config.shipped import shipped
from uvm_kv.setting import RULE

CONF_DIR = shipped("conf")
ALLOWED = {it.name: it.metadata[RULE].allowed for it in fields(ConfigSchema) if it.name == "rerun"}
"""Values of a text setting whose words YAML reads as another type."""
NOT_A_KEY = ("experiment", "link")
"""Groups of the main config whose options fill in keys of others."""


def unknown(what: str, given: str, allowed: Iterable[str]) -> ValueError:
    """The error for an unknown name: what was given, the nearest, and all that is allowed."""
    names = sorted(allowed)
    parts, depth = given.split("."), min((name.count(".") for name in names), default=0)
    by_part = {name.rpartition(".")[2]: name for name in names}  # The part of the key that differs, not its parents.
    near = difflib.get_close_matches(parts[min(depth, len(parts) - 1)], by_part, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(by_part[part] for part in near)}? " if near else ""
    return ValueError(f"{what} {given!r} is unknown; {hint}allowed: {', '.join(names)}")


def groups() -> dict[str, list[str]]:
    """Config groups and their options, from the folders of `conf/`."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(CONF_DIR.iterdir())
        if folder.is_dir()
    }


def folders_of(overrides: Iterable[Override]) -> list[Path]:
    """The folders that hydra.searchpath=[DIR] adds, such as one with a profile of the user's own; pkg:// is not among
    them. ValueError for a folder that does not exist."""
    found = []
    for override in overrides:
        if override.key_or_group != "hydra.searchpath":
            continue
        value = override.value()
        if not isinstance(value, list):
            raise ValueError(f"{override.input_line} is not a list of folders; write hydra.searchpath=[DIR]")
        for text in map(str, value):
            folder = Path(text.removeprefix("file://"))
            if "://" in text and not text.startswith("file://"):
                continue
            if not folder.is_dir():
                raise ValueError(f"hydra.searchpath=[{text}]: there is no such folder")
            found.append(folder)
    return found


def find_option(group: str, name: str, folders: Iterable[Path] = ()) -> Path | None:
    """The file of a group's option, in `conf/` or else in the user's own `folders`; None where there is none."""
    files = (folder / group / f"{name}.yaml" for folder in (CONF_DIR, *folders))
    return next((file for file in files if file.is_file()), None)


def own_options(folders: Iterable[Path]) -> dict[str, list[str]]:
    """Options by group in the user's own folders. ValueError for one that `conf/` has too: Hydra would take ours."""
    ours, found = groups(), dict[str, list[str]]()
    for file in (file for folder in folders for file in sorted(folder.glob("*/*.yaml"))):
        group, name = file.parent.name, file.stem
        if name in ours.get(group, ()):
            raise ValueError(f"{file}: {group}={name} is one of ours and would be taken instead; rename yours")
        found.setdefault(group, []).append(name)
    return found


def keys_of(node: DictConfig, prefix: str = "") -> set[str]:
    found = set()
    for key in node:
        path = f"{prefix}{key!s}"
        found.add(path)
        child = node._get_node(str(key))
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            found |= keys_of(child, path + ".")
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


def length_workloads(folders: Iterable[Path] = ()) -> list[str]:
    """The workloads that bring a distribution of lengths."""
    files = sorted(file for folder in (CONF_DIR, *folders) for file in (folder / "workload").glob("*.yaml"))
    return [file.stem for file in files if OmegaConf.select(OmegaConf.load(file), "lengths") is not None]


def operators() -> list[str]:
    """The operators of a profile, by the card that they are measured on; every card has these."""
    return [str(name) for name in OmegaConf.load(CONF_DIR / "hardware" / "rtx3090.yaml").operators]


def schema_of(config: Any = None) -> DictConfig:
    """The schema of a command with all that is optional filled in; without `config` the main config's."""
    if config is None:
        config = ConfigSchema(workload=WorkloadSchema(lengths=LengthsSchema()))
    if hasattr(config, "hardware"):
        config.hardware = HardwareSchema(operators={name: OperatorSchema() for name in operators()})
    schema: DictConfig = OmegaConf.structured(config)
    return schema


def check_overrides(
    overrides: Iterable[Override],
    config: Any = None,
    *,
    keyless: Iterable[str] | None = None,
    folders: Iterable[Path] = (),
) -> None:
    """ValueError for a group option or key that does not exist, or a value of the wrong type, before Hydra composes.

    `config` is an instance of the schema of a command of its own, and `keyless` its groups that are no keys; without
    it, the main config's. `folders`: the user's own, beside those that the overrides name.
    """
    overrides = list(overrides)
    if keyless is None:
        keyless = NOT_A_KEY if config is None else ()
    schema = schema_of(config)
    keys = keys_of(schema)
    own = own_options([*folders, *folders_of(overrides)])
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
                    raise unknown_option(key, value.strip("'\""), options[key])
        elif key == "hardware.sources" or key.startswith("hardware.sources."):
            raise ValueError(
                f"{key} cannot be given on the command line: sources stand in the file of a profile "
                f"(docs/hardware.md), and a number from the command line is recorded as given there"
            )
        elif key not in keys:
            raise unknown_key(key, keys | set(options))
        else:
            for value in values:
                _check_type(schema, key, value)


def unknown_option(group: str, given: str, allowed: Iterable[str]) -> ValueError:
    """The error for an unknown option; that of an unknown card names the page that tells how to add one."""
    error = unknown(group, given, allowed)
    return ValueError(f"{error}; docs/hardware.md tells how to add a card") if group in ("hardware", "base") else error


def unknown_key(key: str, keys: set[str]) -> ValueError:
    """The error for a key that is not among `keys`; what is allowed are its neighbours."""
    parts = key.split(".")
    known = next((n for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in keys), 0)
    group = "".join(f"{part}." for part in parts[:known])
    return unknown("key", key, {k for k in keys if k.startswith(group) and "." not in k[len(group) :]})


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


def _check_type(schema: DictConfig, key: str, text: str) -> None:
    if key in ALLOWED and text.lower() not in ALLOWED[key]:
        raise ValueError(
            f"{key}={text} is not of the right type; it must be {', '.join(ALLOWED[key][:-1])} or {ALLOWED[key][-1]}"
        )
    try:
        value = OverridesParser.create().parse_override(f"{key}={text}").value()
    except OverrideParseException as error:
        raise _wrong_type(schema, key, text, error) from None
    check_value(schema, key, value, text)


def check_value(schema: DictConfig, key: str, value: Any, text: str) -> None:
    """ValueError for a value that the key does not take; `text`: as the user wrote it."""
    try:
        OmegaConf.update(schema, key, value)
    except OmegaConfBaseException as error:
        raise _wrong_type(schema, key, text, error) from None


def _wrong_type(schema: DictConfig, key: str, text: str, error: Exception) -> ValueError:
    if (wanted := _wanted(schema, key)) is not None:
        return ValueError(f"{key}={text} is not of the right type; it must be {wanted}")
    reason = str(error).splitlines()[0]
    return ValueError(f"{key}={text} is not of the right type: {reason[:1].lower()}{reason[1:]}")


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
