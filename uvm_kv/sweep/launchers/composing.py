"""Jobs of a sweep are composed once per choice of groups in each process; plain values are set on a copy."""

from __future__ import annotations

import copy
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import HydraContext
from omegaconf import DictConfig

from uvm_kv.config.command import set_plain, split_plain
from uvm_kv.config.names import parse_overrides

_composed: dict[tuple[str, ...], DictConfig] = {}
"""By Hydra's own overrides and those that choose options: the configs of this process."""


class Remembering(ConfigLoaderImpl):  # type: ignore[misc]
    """Hydra's loader, which composes each choice of groups once: 0.16 s per job otherwise."""

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        plain, chosen = split_plain(parse_overrides(list(sweep_overrides)))
        key = (*map(str, master_config.hydra.overrides.hydra), *chosen)
        if key not in _composed:
            _composed[key] = super().load_sweep_config(master_config, list(chosen))
        config = copy.deepcopy(_composed[key])
        set_plain(config, plain)
        config.hydra.overrides.task = list(sweep_overrides)
        return config


def remembering(context: HydraContext) -> HydraContext:
    """The context of a launcher, with the loader that remembers."""
    loader: Any = context.config_loader
    return HydraContext(Remembering(loader.config_search_path), context.callbacks)
