"""The config of a recorded run, for runner=replay: what it was run with, and what the command line changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from uvm_kv.config.names import groups, parse_overrides
from uvm_kv.config.schema import ConfigSchema

FROM_COMMAND_LINE = ("runner", "replay.path", "results_dir", "rerun", "tracking", "num_repeats", "record_plans")


def with_recorded_config(composed: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """`composed` itself, unless it replays: then the recording's config with the single keys of `overrides`."""
    if composed.runner != "replay" or composed.replay.path is None:
        return composed
    file = Path(composed.replay.path) / "config.yaml"
    if not file.is_file():
        raise ValueError(f"replay.path={composed.replay.path}: it is not a run directory (it has no config.yaml)")
    recorded = OmegaConf.merge(OmegaConf.structured(ConfigSchema), OmegaConf.load(file))
    assert isinstance(recorded, DictConfig)
    recorded.replay.recorded_runner = recorded.runner
    for key in FROM_COMMAND_LINE:
        OmegaConf.update(recorded, key, OmegaConf.select(composed, key))
    for override in parse_overrides(list(overrides)):
        key = override.key_or_group
        if key in groups() and key != "tracking":
            raise ValueError(
                f"{key}={override.get_value_element_as_str()} with runner=replay, which takes its config from the "
                f"recording; single keys can be changed, such as batch_size=8"
            )
        if key not in FROM_COMMAND_LINE and not key.startswith("hydra"):
            OmegaConf.update(recorded, key, override.value())
    return recorded
