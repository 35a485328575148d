"""What a config.json leaves out is what transformers takes in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from uvm_kv.hw.model import ModelGeometry, check_dense


def default_config(kind: str) -> dict[str, Any] | None:
    """Of a model type; None where it has none, or nests the decoder, whose type then counts."""
    try:
        config: dict[str, Any] = CONFIG_MAPPING[kind]().to_dict()
    except (KeyError, StrictDataclassError):  # The defaults of some contradict each other.
        return None
    return None if "text_config" in config else config


def read(folder: Path, config: dict[str, Any]) -> ModelGeometry:
    file = folder / "config.json"
    file.write_text(json.dumps(config, default=str))
    check_dense(str(file))
    return ModelGeometry.from_hf_config(str(file))


@pytest.mark.filterwarnings("ignore")
def test_embeddings_are_tied_where_transformers_ties_them(tmp_path: Path) -> None:
    """Of every type of causal language model whose counts are read."""
    ours, theirs = {}, {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = default_config(kind)
        if config is None:
            continue
        tied = bool(config.pop("tie_word_embeddings", False))
        try:
            ours[kind], theirs[kind] = read(tmp_path, config).tied_embeddings, tied
        except ValueError:
            continue  # Not a dense transformer, or none whose counts are known by these names.
    assert ours == theirs
    assert len(ours) > 50 and {"llama", "qwen2", "starcoder2", "cohere2", "smollm3"} <= ours.keys()


def test_starcoder2_3b_has_its_published_parameters(tmp_path: Path) -> None:
    """Its config.json says nothing of tied embeddings; 3.03 B are published."""
    counts = {"num_hidden_layers": 30, "hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 2}
    counts |= {"intermediate_size": 12288, "vocab_size": 49152, "max_position_embeddings": 16384}
    assert read(tmp_path, {"model_type": "starcoder2", **counts}).num_parameters == pytest.approx(3.03e9, rel=0.005)
