"""The shapes of a config's model: by its keys, or by the config.json of a folder with the keys given in its place."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from uvm_kv.config.schema import ModelSchema
from uvm_kv.hw.hf_config import quantization_config, read_geometry, with_quantization
from uvm_kv.hw.model import ModelGeometry

SHAPES = tuple(
    f.name for f in dataclasses.fields(ModelGeometry) if f.name not in ("name", "sliding_window", "quantization")
)
"""Keys of `model` that are the model's shapes."""


def build_model(model: ModelSchema, folder: Path | None = None) -> ModelGeometry:
    """Geometry of a config; of the `folder` that is served, where there is one."""
    if model.path is not None and model.source is not None:
        raise ValueError(
            f"model={model.name} has shapes of its own, and model.path={model.path} is given too; use model=hf with "
            f"the path, or drop it"
        )
    given = {name: value for name in SHAPES if (value := getattr(model, name)) is not None}
    if folder is not None:
        served = dataclasses.replace(read_geometry(str(folder), counted=False), name=_served_name(model))
        _check_as_served(model, served, given, folder)
        return served
    if model.path is not None:
        # model=hf has no shapes of its own: what is set there was given by hand, and stands in place of the file's.
        geometry = read_geometry(model.path, given)
        return with_quantization(geometry, model.path) if model.weight_bits is None else geometry
    if model.name == "hf":
        raise ValueError("model=hf needs a model folder in Hugging Face format: model.path=DIR")
    absent = [f.name for f in dataclasses.fields(ModelGeometry) if f.default is dataclasses.MISSING]
    absent = [name for name in absent if name != "name" and name not in given]
    if absent:
        raise ValueError(f"model.{absent[0]} is not set; a model needs it, or model.path of a Hugging Face folder")
    return ModelGeometry(model.name, **given)


def _check_as_served(model: ModelSchema, served: ModelGeometry, given: dict[str, Any], folder: Path) -> None:
    """ValueError for what a real model would ignore: it has the shapes and the weights of its folder."""
    for name, value in given.items():
        if value != getattr(served, name):
            raise ValueError(
                f"model.{name}={str(value).lower()} with model={model.name} on a real runner, which serves {folder} as "
                f"it is, with {str(getattr(served, name)).lower()}; drop it, or use runner=sim"
            )
    stored = quantization_config(str(folder))
    if stored is not None:
        raise ValueError(
            f"model.path={folder}: quantization_config (quant_method={stored.get('quant_method')}) in config.json; "
            f"quantized weights are simulated only: runner=sim"
        )


def check_window(model: ModelGeometry, num_tokens: int) -> None:
    """ValueError where a sliding window ends within a sequence of `num_tokens`: its layers keep less KV then than the
    others, and every block here holds all layers of its tokens."""
    if model.sliding_window is not None and num_tokens > model.sliding_window:
        raise ValueError(
            f"{model.name}: sliding_window={model.sliding_window} in config.json, and the longest sequence has "
            f"{num_tokens} tokens; KV that stops at a window is not counted, since one block table per sequence serves "
            f"all layers; keep sequences within the window, where all layers keep everything: "
            f"max_model_len={model.sliding_window}"
        )


def _served_name(model: ModelSchema) -> str:
    return model.name if model.path is None else Path(model.path).resolve().stem
