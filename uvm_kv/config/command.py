"""Configs that are composed outside of Hydra's own main: of the small commands (uvm_replay, calibrate ...), and of jobs
that are listed, advised on or compared. All errors are ValueErrors of a line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from uvm_kv.config import names
from uvm_kv.config.names import check_overrides, folders_of, parse_overrides
from uvm_kv.config.option_file import check_files, mark_sources
from uvm_kv.config.schema import register


def compose_config(arguments: list[str], name: str = "config") -> DictConfig:
    """`conf/<name>.yaml` with the `key=value` arguments; each number of its profile has the source of who set it.

    ValueError for what cannot be composed, and for what is left without a value.
    """
    register()
    overrides = parse_overrides(arguments)
    folders = folders_of(overrides)
    try:
        with initialize_config_dir(str(names.CONF_DIR), version_base="1.3"):
            composed: DictConfig = compose(name, arguments, return_hydra_config=True)
        choices = dict(composed.hydra.runtime.choices)
        with open_dict(composed):
            del composed["hydra"]
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(" ".join(map(str.strip, str(error).splitlines()[:2]))) from None
    if "hardware" in composed:
        mark_sources(composed.hardware, overrides, choices=choices, folders=folders)
    check_complete(composed)
    return composed


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
