"""The config of a recorded run: replayed with what the command line changes, or simulated on the same requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from uvm_kv.config.names import groups, parse_overrides
from uvm_kv.config.schema import ConfigSchema
from uvm_kv.store.directories import read_manifest, read_summary

SAYS_HOW = ("results_dir", "rerun", "refine", "tracking", "num_repeats", "record_plans")
FROM_COMMAND_LINE = ("runner", "replay.path", *SAYS_HOW)
NOT_OF_THE_WORK = (*SAYS_HOW, "first_repeat", "seed")
"""What recorded runs of one config may differ in."""
FIXED = ("runner", "replay", "prompts", "sampling", "workload", "experiment", "max_steps", *NOT_OF_THE_WORK)
"""What cannot be changed when a recording is simulated: it would be other work, or says nothing."""


def with_recorded_config(composed: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """`composed` itself, unless it replays: then the recording's config with the single keys of `overrides`."""
    if composed.runner != "replay" or composed.replay.path is None:
        return composed
    file = Path(composed.replay.path) / "config.yaml"
    if not file.is_file():
        raise ValueError(f"replay.path={composed.replay.path}: it is not a run directory (it has no config.yaml)")
    recorded = _load(file)
    recorded.replay.recorded_runner = recorded.runner
    _take_draw(recorded, Path(composed.replay.path))
    if recorded.max_seconds is not None:
        # A clock that is played back stops a step earlier or later.
        summary = read_summary(Path(composed.replay.path))
        recorded.max_seconds, recorded.max_steps = None, summary["num_steps"]
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


def _take_draw(config: DictConfig, directory: Path) -> None:
    """Make a recorded config draw what the run drew, whichever of its repeats it was."""
    manifest = read_manifest(directory)
    if manifest["seed"] == config.seed:
        config.first_repeat = manifest["repeat"]
    else:  # Of a version in which repeat r drew what the seed plus r draws, which its manifest holds.
        config.seed, config.first_repeat = manifest["seed"], 0


def _load(file: Path, *, without_hardware: bool = False) -> DictConfig:
    """A recorded config.yaml. ValueError where this version knows other keys."""
    tree = _load_yaml(file)
    try:
        if without_hardware and isinstance(tree, DictConfig):
            tree.pop("hardware", None)
        recorded = OmegaConf.merge(OmegaConf.structured(ConfigSchema), tree)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{file}: not a config of this version ({reason}); record the run again, or give hardware=NAME"
        ) from None
    assert isinstance(recorded, DictConfig)
    return recorded


def _load_yaml(file: Path) -> DictConfig:
    """ValueError where it holds no keys and values, or aliases, which no run writes and which may grow without end."""
    try:
        text = file.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it has aliases")
        content = yaml.safe_load(text)
        if not isinstance(content, dict):
            raise ValueError("it is not of keys and values")
        tree = OmegaConf.create(content)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise ValueError(f"{file}: not the config of a run ({reason}); record the run again") from None
    return tree


def check_simulable(overrides: Sequence[Override], *, of_run: bool) -> None:
    """ValueError for an override that would make the simulation serve other work than the recording, or `of_run`, a
    recorded run directory, be of another config."""
    for override in overrides:
        key, text = override.key_or_group, override.input_line
        if override.is_sweep_override():
            raise ValueError(f"{text}: one value a key; start it once a value")
        if key.startswith("hydra") or key.split(".")[0] in FIXED:
            raise ValueError(f"{text} cannot be given: the simulation serves what was recorded, in a place of its own")
        if of_run and key in groups() and key != "hardware":
            raise ValueError(
                f"{text}: a recorded run directory brings its own config; hardware and single keys can be changed, "
                f"such as scheduler.watermark=0"
            )


def simulation_of_run(directory: Path, composed: DictConfig, overrides: Sequence[Override]) -> DictConfig:
    """The config that simulates a recorded run: the run's own with the hardware and single keys of the command line.
    `composed`: those on the defaults. What only real runners have is reset, and a run that was stopped is as long in
    steps. ValueError if the recording's hardware is not of this version."""
    keys = [override.key_or_group for override in overrides]
    config = _load(directory / "config.yaml", without_hardware="hardware" in keys)
    if "hardware" in keys:
        config.hardware = composed.hardware
    for override in overrides:
        if override.key_or_group != "hardware":
            OmegaConf.update(config, override.key_or_group, override.value())
    if missing := OmegaConf.missing_keys(config):
        raise ValueError(
            f"{directory / 'config.yaml'}: {min(missing)} is missing, as an older version recorded it; give "
            f"hardware=NAME, or record the run again"
        )
    _take_draw(config, directory)
    config.update(runner="sim", prompts=None, num_repeats=1, record_plans=False)
    # One that began in its steady state may have been stopped; a simulated clock would stop it elsewhere.
    summary = read_summary(directory)
    config.update(
        max_seconds=None, max_steps=None if summary.get("stopped_by", "done") == "done" else summary["num_steps"]
    )
    config.update(compile=False, cuda_graphs=True, watchdog_s=None)  # Of a real model and its process.
    config.memory.allow_oversubscription = False
    config.replay.update(path=None, recorded_runner=None)
    config.sampling.temperature = 0.0
    config.tracking.name = "none"
    return config


def serve_trace(config: DictConfig, trace: Path) -> None:
    """Make a config serve the requests of a trace file at its times."""
    config.workload.update(
        name="trace",
        path=str(trace),
        arrival="trace",
        too_long="error",
        prompt_tokens=None,
        output_tokens=None,
        num_requests=None,
        request_rate=None,
        lengths=None,
    )


def work_key(directory: Path) -> str:
    """Equal for recorded runs of one config: their differences are noise."""
    tree = OmegaConf.to_container(_load_yaml(directory / "config.yaml"))
    assert isinstance(tree, dict)
    return json.dumps({k: v for k, v in tree.items() if k not in NOT_OF_THE_WORK}, sort_keys=True)
