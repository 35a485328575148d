"""What quantized checkpoints take: their own settings, published sizes, and what is not counted."""

from __future__ import annotations

from typing import Any

import pytest

from uvm_kv.hw.counting import Precision, weight_bytes
from uvm_kv.hw.model import ModelGeometry
from uvm_kv.hw.quantization import by_size, of_checkpoint

QWEN_7B = ModelGeometry("qwen2.5-7b", 28, 3584, 28, 4, 128, 18944, 152064, 32768)
QWEN_14B = ModelGeometry("qwen2.5-14b", 48, 5120, 40, 8, 128, 13824, 152064, 32768)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "modules_to_not_convert": None}
GROUP = {"num_bits": 4, "group_size": 128, "strategy": "group", "symmetric": True, "type": "int"}


def compressed(**weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": GROUP | weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]}


def gb(model: ModelGeometry, config: dict[str, Any] | int) -> float:
    stored = by_size(config) if isinstance(config, int) else of_checkpoint(config)
    return weight_bytes(model, Precision(stored.bits, 16, 16, stored)) / 1e9


@pytest.mark.parametrize(
    ("model", "config", "published_gb"),
    [
        (QWEN_7B, AWQ, 5.57),  # Files of Qwen2.5-7B-Instruct-AWQ.
        (QWEN_14B, AWQ, 9.98),  # Files of Qwen2.5-14B-Instruct-AWQ.
        (QWEN_14B, 4, 9.98),
        (QWEN_7B, {"quant_method": "gptq", "bits": 8, "group_size": 128, "dynamic": {}}, 8.87),  # -GPTQ-Int8.
    ],
)
def test_sizes_of_published_checkpoints(
    model: ModelGeometry, config: dict[str, Any] | int, published_gb: float
) -> None:
    assert gb(model, config) == pytest.approx(published_gb, rel=0.01)


@pytest.mark.parametrize(
    ("config", "bits_per_weight"),
    [
        (AWQ, 4 + 20 / 128),
        (AWQ | {"zero_point": False}, 4 + 16 / 128),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, 3 + 19 / 128),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, 4 + 20 / 256),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4 + 32 / 64),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 4 + 8 / 64 + 32 / 64 / 256),
        ({"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}, 8 + 32 / 256),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 128 / 128),
        ({"quant_method": "fp8", "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"]}, 8),
        ({"quant_method": "fbgemm_fp8"}, 8 + 32 / 256),
        (compressed(), 4 + 16 / 128),
        (compressed(symmetric=False), 4 + 20 / 128),
        (compressed(num_bits=8, strategy="channel"), 8 + 16 / 256),
        (compressed(num_bits=8, strategy="tensor"), 8),
    ],
)
def test_scales_and_zeros_of_a_matrix(config: dict[str, Any], bits_per_weight: float) -> None:
    """A matrix of 256 inputs and 512 outputs."""
    assert of_checkpoint(config).matrix_bits(256, 512) == pytest.approx(bits_per_weight * 256 * 512)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "aqlm"}, "quant_method=aqlm is not counted; counted are awq, gptq"),
        ({}, "quant_method=none is not counted"),
        (AWQ | {"bits": 99}, "bits=99; it must lie between 1 and 15"),
        (AWQ | {"bits": "4"}, "bits is '4'; it must be a whole number"),
        (AWQ | {"group_size": 0}, "group_size=0; it must be at least 1"),
        (AWQ | {"modules_to_not_convert": ["model.layers.3.mlp"]}, "names 'model.layers.3.mlp': layers of several"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*down": {}}}, "dynamic names '-:.*down'"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size is 128; it must be two counts"),
        (compressed() | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (compressed() | {"config_groups": {}}, "config_groups is not of one group"),
        (compressed(strategy="magic"), "strategy=magic is not counted"),
    ],
)
def test_what_is_not_counted_is_refused_by_its_key(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="quantization_config") as refusal:
        of_checkpoint(config)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_embedding_and_head_stay_wide() -> None:
    """Also with activations of 8 bits; plain weights of any width are all alike."""
    assert Precision(8, 8, 8).table_bits == 16
    assert Precision(4, 32, 32).table_bits == 32
    assert Precision(16, 16, 4).table_bits == 16
    assert Precision.of_bytes(4).table_bits == 32
    assert weight_bytes(QWEN_7B, Precision()) == 2 * QWEN_7B.num_parameters


@pytest.mark.parametrize("kept", [5, True, 1.5])
def test_modules_left_as_they_are_must_be_names(kept: object) -> None:
    with pytest.raises(ValueError, match=r"modules_to_not_convert is .*; it must be a list of names"):
        of_checkpoint({"quant_method": "awq", "bits": 4, "modules_to_not_convert": kept})
