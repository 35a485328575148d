"""What is read of a config.json is what transformers builds of it, for every type of decoder that it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the models are built with torch, the extra 'torch'")
pytest.importorskip("transformers", reason="the models are transformers', the extra 'torch'")

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.runner.torch_cpu.decoder_types import (
    SMALL,
    build,
    default_config,
    describe,
    num_in_matrices,
    written,
)
from uvm_kv.hw.hf_config import decoders, read_geometry
from uvm_kv.hw.model import ModelGeometry

HERE = sorted(kind for kind in decoders() if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
pytestmark = pytest.mark.filterwarnings("ignore")


def read(folder: Path, config: dict[str, Any]) -> ModelGeometry:
    file = folder / "config.json"
    file.write_text(json.dumps(config, default=str))
    return read_geometry(str(file))


def matrices(model: ModelGeometry) -> int:
    return model.num_parameters - (2 * model.num_layers + 1) * model.hidden_size


def counted_right(model: Any, geometry: ModelGeometry) -> bool:
    beyond = num_in_matrices(model) - matrices(geometry)
    return beyond == 0 or (not geometry.rope and beyond == 2 * geometry.hidden_size)  # OPT's two positions more.


def test_the_table_is_what_transformers_builds() -> None:
    """The table must match; after a change run python -m tests.runner.torch_cpu.decoder_types"""
    assert {kind: describe(kind) for kind in HERE} == {kind: decoders()[kind] for kind in HERE}
    assert len(HERE) > 40 and {"llama", "qwen2", "starcoder2", "nemotron", "gemma3_text", "opt"} <= set(HERE)


def test_every_other_type_is_refused_by_name(tmp_path: Path) -> None:
    for kind in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(HERE)):
        config = default_config(kind)
        if config is not None:
            with pytest.raises(ValueError, match=r"in config\.json; only dense models are counted"):
                read(tmp_path, config.to_dict())


@pytest.mark.parametrize("kind", HERE)
def test_a_type_is_counted_right_however_its_config_is_written(kind: str, tmp_path: Path) -> None:
    """Configs with every count given, with one given and the rest left out, and with each flag inverted."""
    small, sparse = written(kind, SMALL), written(kind, {"num_layers": 1})
    flags = {key: not value for key, value in default_config(kind).to_dict().items() if isinstance(value, bool)}
    num_counted, refusals = 0, []
    for raw in (small, sparse, *(small | {key: value} for key, value in flags.items())):
        try:
            geometry = read(tmp_path, {"model_type": kind} | raw)
        except ValueError as refusal:
            refusals.append(str(refusal))
            continue
        try:
            model = build(kind, raw)
        except Exception:
            continue  # No such model can be built.
        assert counted_right(model, geometry), (raw, num_in_matrices(model), matrices(geometry))
        num_counted += 1
    assert all("in config.json" in refusal for refusal in refusals)
    assert num_counted or describe(kind) != decoders()[kind] or "softcapping" in str(decoders()[kind])


@pytest.mark.parametrize("kind", HERE)
def test_the_kv_of_a_type_is_counted_right(kind: str, tmp_path: Path) -> None:
    """Elements of transformers' own cache after five tokens, which are within every window."""
    raw = written(kind, SMALL)
    model = build(kind, raw, "cpu")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": kind} | raw))
    geometry = read_geometry(str(file), counted=False)
    with torch.inference_mode():
        cache = model(torch.tensor([[5, 6, 7, 8, 9]]), use_cache=True).past_key_values
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert elements == 5 * geometry.kv_bytes_per_token(1)
    layers = getattr(model.config, "layer_types", None) or []
    assert (geometry.sliding_window is not None) >= ("sliding_attention" in layers)


def test_starcoder2_3b_has_its_published_parameters(tmp_path: Path) -> None:
    """Its config.json says nothing of tied embeddings; 3.03 B are published."""
    counts = {"num_hidden_layers": 30, "hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 2}
    counts |= {"intermediate_size": 12288, "vocab_size": 49152, "max_position_embeddings": 16384}
    assert read(tmp_path, {"model_type": "starcoder2", **counts}).num_parameters == pytest.approx(3.03e9, rel=0.005)
