"""Config of the small commands (uvm_replay, calibrate ...): composed by Hydra, checked like the main one."""

from __future__ import annotations

from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from uvm_kv.config.names import CONF_DIR, check_overrides, mark_given, parse_overrides


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
    check_overrides(overrides, schema())
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = compose(name, arguments)
    if "hardware" in composed:
        mark_given(composed.hardware.sources, overrides)
    return OmegaConf.to_object(composed)
