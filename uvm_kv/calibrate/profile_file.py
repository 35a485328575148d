"""Hardware profiles as files: read by name from conf/hardware, and written with a source for every number; and the
shapes of models, by name."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from uvm_kv.config import names
from uvm_kv.config.command import compose_config
from uvm_kv.hw.model import ModelGeometry
from uvm_kv.hw.profile import HardwareProfile
from uvm_kv.job.geometry import build_model
from uvm_kv.job.resolve import build_profile


def load_profile(name: str) -> HardwareProfile:
    """The profile in `conf/hardware/<name>.yaml`; ValueError for a name that is not there."""
    return build_profile(_option("hardware", name, "base"))


def load_geometry(name: str) -> ModelGeometry:
    """The shapes in `conf/model/<name>.yaml`; ValueError for a name that is not there."""
    return build_model(_option("model", name, "model"))


def _option(group: str, name: str, key: str) -> Any:
    """An option of a group as its schema; the error for an unknown name calls it by the `key` that it is given with."""
    known = names.groups()[group]
    if name not in known:
        raise names.unknown_option(key, name, known)
    return OmegaConf.to_object(compose_config([f"{group}={name}"])[group])


def check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            f"name={name} cannot name a profile; it is of small letters, digits and _, and begins with a letter: "
            f"name=my_3090"
        )


def check_output(path: Path, *, force: bool) -> None:
    """ValueError where `write_profile` could not, or must not, write."""
    if path.is_dir() or path.suffix != ".yaml":
        raise ValueError(f"output={path} must be the path of a file that ends in .yaml")
    if not path.parent.is_dir():
        raise ValueError(f"output={path}: there is no folder {path.parent}; make it, or give another output")
    if path.exists() and not force:
        raise ValueError(f"{path} exists already; give another name or output, or force=true to replace it")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(
            f"output={path} cannot be written ({error.strerror or error}); give another: output=FILE.yaml"
        ) from None


def profile_yaml(profile: HardwareProfile, comment: list[str], measured_on: str | None = None) -> str:
    """The file of a profile that inherits from no other, with its sources; `comment` stands above it.
    `measured_on`: the card that it was calibrated on."""
    lines = [f"# {line}".rstrip() for line in comment] + [f"name: {profile.name}"]
    lines += [] if measured_on is None else [f"measured_on: {json.dumps(measured_on)}"]
    for group in ("gpu", "link", "managed", "power"):
        lines.append(f"{group}:")
        node = getattr(profile, group)
        values = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
        lines += [f"  {name}: {_number(value)}" for name, value in values.items() if value is not None]
    lines.append("operators:")
    for name, cost in profile.operators.items():
        costs = ", ".join(f"{key}: {_number(value)}" for key, value in dataclasses.asdict(cost).items())
        lines.append(f"  {name}: {{{costs}}}")
    lines.append("sources:")
    lines += [f"  {path}: {json.dumps(source)}" for path, source in profile.sources.items()]
    return "\n".join(lines) + "\n"


def write_profile(path: Path, text: str) -> None:
    """All of it or nothing: a reader finds the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _number(value: float | tuple[float, ...]) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_number, value))}]"
    # Without an exponent: YAML readers differ on whether 1e-5 is a number.
    return str(value) if isinstance(value, int) else np.format_float_positional(value, trim="0")
