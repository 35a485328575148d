"""Configs that are composed outside of Hydra's own main: of the small commands (uvm_replay, calibrate ...), and of jobs
that are listed, advised on or compared. All errors are ValueErrors of a line."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable
from functools import cache
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from uvm_kv.config import names
from uvm_kv.config.names import check_overrides, folders_of, parse_overrides
from uvm_kv.config.option_file import check_files, mark_sources
from uvm_kv.config.schema import register


def compose_config(arguments: list[str], name: str = "config") -> DictConfig:
    """`conf/<name>.yaml` with the `key=value` arguments; each number of its profile has the source of who set it.

    Hydra composes once for each choice of groups, which takes 0.16 s; plain values are set on a copy, as Hydra would.
    ValueError for what cannot be composed, and for what is left without a value.
    """
    overrides = parse_overrides(arguments)
    folders = folders_of(overrides)
    known = names.groups()
    plain = [override for override in overrides if _is_plain(override, known)]
    chosen = tuple(str(o.input_line) for o in overrides if o not in plain)
    try:
        # A folder of the user's own may change while this process lives.
        composed, choices = (_compose if folders else _compose_once)(str(names.CONF_DIR), name, chosen)
        composed = copy.deepcopy(composed)
        for override in plain:
            OmegaConf.update(composed, override.key_or_group, override.value(), merge=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(" ".join(map(str.strip, str(error).splitlines()[:2]))) from None
    if "hardware" in composed:
        mark_sources(composed.hardware, overrides, choices=dict(choices), folders=folders)
    check_complete(composed)
    return composed


def _is_plain(override: Override, groups: Container[str]) -> bool:
    """Whether it gives a key of the config a value, and chooses no option of a group."""
    key = override.key_or_group
    is_value = not (override.is_delete() or override.is_add() or override.is_force_add() or override.package)
    return is_value and not key.startswith("hydra") and key not in groups


def _compose(conf_dir: str, name: str, chosen: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
    """The config of these choices, and the options by group."""
    register()
    with initialize_config_dir(conf_dir, version_base="1.3"):
        composed: DictConfig = compose(name, list(chosen), return_hydra_config=True)
    choices = dict(composed.hydra.runtime.choices)
    with open_dict(composed):
        del composed["hydra"]
    return composed, choices


_compose_once = cache(_compose)


def check_complete(composed: DictConfig) -> None:
    """ValueError for keys that no file and no argument gives a value."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        more = f" and {len(missing) - 3} more have" if len(missing) > 3 else " have" if len(missing) > 1 else " has"
        raise ValueError(f"{', '.join(missing[:3])}{more} no value; give {missing[0]}=VALUE, or an option that has it")


def compose_command(name: str, schema: type, arguments: list[str]) -> Any:
    """`conf/<name>.yaml` with the `key=value` arguments, as an instance of the dataclass `schema`.

    ValueError names an unknown key, option or a value of the wrong type, and what is allowed.
    """
    flags = [argument for argument in arguments if argument.startswith("-")]
    if flags:
        raise ValueError(f"{flags[0]} is not an option; write key=value, keys are in conf/{name}.yaml")
    overrides = parse_overrides(arguments)
    swept = [o.input_line for o in overrides if o.is_sweep_override()]
    if swept:
        raise ValueError(f"{swept[0]} has several values; this command takes one at a time (a list is [a,b])")
    check_overrides(overrides, schema(), keyless=_keyless(name))
    check_files(overrides, folders_of(overrides))
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    return OmegaConf.to_object(compose_config(arguments, name))


def _keyless(name: str) -> Iterable[str]:
    """Groups of a command's defaults list that fill in keys of others."""
    defaults = OmegaConf.load(names.CONF_DIR / f"{name}.yaml").defaults
    return [group for entry in defaults if isinstance(entry, DictConfig) for group in entry if group in names.NOT_A_KEY]
