"""The config.json of models of every kind: counted right, or refused in a line that names the key which tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from uvm_kv.hw.hf_config import read_geometry
from uvm_kv.hw.model import ModelGeometry

COUNTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
LLAMA = {"model_type": "llama", "tie_word_embeddings": False, **COUNTS}
GEMMA3 = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}


def read(folder: Path, config: dict[str, Any], **given: Any) -> ModelGeometry:
    (folder / "config.json").write_text(json.dumps(config))
    return read_geometry(str(folder), given)


@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [
        (LLAMA, 8.03e9),
        (
            {  # Minitron-4B-Base and AFM-4.5B: two matrices in the MLP.
                "model_type": "nemotron",
                "hidden_size": 3072,
                "num_hidden_layers": 32,
                "num_attention_heads": 24,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "intermediate_size": 9216,
                "vocab_size": 256000,
            },
            4.19e9,
        ),
        (
            {
                "model_type": "arcee",
                "hidden_size": 2560,
                "num_hidden_layers": 36,
                "num_attention_heads": 20,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "intermediate_size": 18432,
                "vocab_size": 128004,
            },
            4.619e9,
        ),
        # Gemma-3-4b: heads, head size and vocabulary are left out.
        ({"model_type": "gemma3", "text_config": GEMMA3 | {"sliding_window": 1024}, "vision_config": {}}, 3.88e9),
    ],
)
def test_published_sizes(config: dict[str, Any], num_parameters: float, tmp_path: Path) -> None:
    assert read(tmp_path, config).num_parameters == pytest.approx(num_parameters, rel=0.002)


def test_what_a_config_leaves_out_is_what_its_type_has_by_default(tmp_path: Path) -> None:
    model = read(tmp_path, {"model_type": "gemma3", "text_config": GEMMA3})
    assert (model.num_heads, model.num_kv_heads, model.head_dim, model.vocab_size) == (8, 4, 256, 262208)
    assert model.kv_bytes_per_token(2) == 139_264
    assert model.tied_embeddings and model.sliding_window == 4096
    mistral = {key: value for key, value in COUNTS.items() if key != "num_key_value_heads"}
    assert read(tmp_path, {"model_type": "mistral", **mistral}).num_kv_heads == 8
    assert read(tmp_path, {"model_type": "llama", **mistral}).num_kv_heads == 32


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (LLAMA, None),
        (LLAMA | {"model_type": "mistral"}, 4096),
        (LLAMA | {"model_type": "mistral", "sliding_window": None}, None),
        (LLAMA | {"model_type": "qwen2", "sliding_window": 1024}, None),
        (LLAMA | {"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": True}, 1024),
        (LLAMA | {"model_type": "gemma3_text", "sliding_window": 512}, 512),
        (LLAMA | {"sliding_window": 512, "layer_types": ["full_attention"] * 32}, None),
    ],
)
def test_windows(config: dict[str, Any], window: int | None, tmp_path: Path) -> None:
    assert read(tmp_path, config).sliding_window == window


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attn_layer_indices": [9, 18]}, "attn_layer_indices=[9, 18], layers other than attention,"),
        ({"mamba_d_ssm": 3072}, "mamba_d_ssm=3072, layers other than attention,"),
        ({"layer_types": ["conv", "full_attention"]}, "layer_types, 1 of 2 layers are conv,"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types, 3 of 3 layers are linear_attention,"),
        ({"hybrid_override_pattern": "M-M*"}, "hybrid_override_pattern=M-M*"),
        ({"num_experts": 8}, "num_experts=8, a mixture of experts,"),
        ({"kv_lora_rank": 512}, "kv_lora_rank=512, latent attention,"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0, soft-capping of attention,"),
        ({"model_type": "gemma2"}, "attn_logit_softcapping=50.0, soft-capping of attention,"),
        ({"intermediate_size": [1, 2]}, "intermediate_size, a list, layers of several shapes,"),
        ({"num_kv_shared_layers": 10}, "num_kv_shared_layers=10, layers that share the KV of others,"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True, an encoder,"),
        ({"model_type": "opt", "word_embed_proj_dim": 512}, "word_embed_proj_dim=512, an embedding narrower"),
        ({"model_type": "bert"}, "model_type=bert is none of the"),
        ({"model_type": None}, "model_type=null is none of the"),
        ({"model_type": "falcon_h1"}, "model_type=falcon_h1 is none of the"),
    ],
)
def test_what_is_not_counted_is_refused_by_its_key(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"in config\.json; only dense models are counted") as refusal:
        read(tmp_path, LLAMA | changes)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_window_must_be_a_count(tmp_path: Path) -> None:
    for value in (0, -1, "many", True):
        with pytest.raises(ValueError, match=r"sliding_window is .* it must be a count or null"):
            read(tmp_path, LLAMA | {"sliding_window": value})


def test_given_shapes_stand_in_place_of_the_files(tmp_path: Path) -> None:
    model = read(tmp_path, LLAMA, gated_mlp=False, rope=False, tied_embeddings=True, num_layers=4)
    assert (model.gated_mlp, model.rope, model.tied_embeddings, model.num_layers) == (False, False, True, 4)
