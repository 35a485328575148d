"""Quantized weights: what the matrices of the layers take with their scales and zeros, by size or by a checkpoint's own
`quantization_config`. Embedding, head and norms stay 16 bits wide: no method counted here touches them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from uvm_kv.types import ceil_div

WIDE_BITS = 16
"""Weights of fewer bits are quantized."""
_SCALE_BITS = 16
_FLOAT_BITS = 32
GROUP_SIZE = 128
"""Inputs that share a scale where nothing else is said: the default of AWQ and of GPTQ."""
NOT_LAYERS = ("lm_head", "embed", "norm", "vision", "visual", "multi_modal", "audio")
"""Parts of the names of modules that a checkpoint may leave as they are: none of them is a matrix of a layer."""


@dataclass(frozen=True)
class Quantization:
    """How a matrix [outputs, inputs] of a layer is stored."""

    method: str
    bits: int
    """Bits per weight."""
    group_size: int | None
    """Inputs of one output that share a scale; None: all of them."""
    group_bits: float
    """Bits of a group's scale and zero together."""

    def matrix_bits(self, fan_in: int, fan_out: int) -> float:
        groups = 1 if self.group_size is None else ceil_div(fan_in, self.group_size)
        return self.bits * fan_in * fan_out + self.group_bits * groups * fan_out

    def __str__(self) -> str:
        groups = "" if self.group_size is None else f" in groups of {self.group_size}"
        return f"{self.method}, {self.bits} bits{groups}"


def by_size(bits: int) -> Quantization:
    """The usual format of a width. Up to 4 bits: groups of 128 with a 16-bit scale and a zero as wide as a weight, as
    AWQ and GPTQ store them; above: a 16-bit scale for each output."""
    if bits <= 4:
        return Quantization("by size", bits, GROUP_SIZE, _SCALE_BITS + bits)
    return Quantization("by size", bits, None, _SCALE_BITS)


def of_checkpoint(config: Mapping[str, Any]) -> Quantization:
    """The `quantization_config` of a Hugging Face config.json. ValueError, without the file's name, for a method or a
    setting that is not counted."""
    method = str(config.get("quant_method") or ("bitsandbytes" if _is_bitsandbytes(config) else "none"))
    readers = {
        "awq": _awq,
        "gptq": _gptq,
        "bitsandbytes": _bitsandbytes,
        "fp8": _fp8,
        "fbgemm_fp8": _fbgemm_fp8,
        "compressed-tensors": _compressed_tensors,
    }
    if method not in readers:
        raise ValueError(f"quantization_config.quant_method={method} is not counted; counted are {', '.join(readers)}")
    for key in ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "dynamic", "modules_in_block_to_quantize"):
        kept = config.get(key) or ()
        if not isinstance(kept, str | list | tuple | dict):
            raise ValueError(f"quantization_config.{key} is {str(kept)[:80]}; it must be a list of names")
        for name in [kept] if isinstance(kept, str) else kept:
            if not any(part in str(name) for part in NOT_LAYERS):
                raise ValueError(
                    f"quantization_config.{key} names {str(name)[:80]!r}: layers of several widths are not counted"
                )
    return readers[method](config)


def _is_bitsandbytes(config: Mapping[str, Any]) -> bool:
    return bool(config.get("load_in_4bit") or config.get("load_in_8bit"))


def _int(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"quantization_config.{names[0]} is {value!r}; it must be a whole number")
    return value


def _bits(config: Mapping[str, Any], *names: str) -> int:
    bits = _int(config, *names)
    if not 1 <= bits < WIDE_BITS:
        raise ValueError(f"quantization_config.{names[0]}={bits}; it must lie between 1 and {WIDE_BITS - 1}")
    return bits


def _group(config: Mapping[str, Any], *names: str) -> int | None:
    """-1 stands for a whole row."""
    size = _int(config, *names, default=GROUP_SIZE)
    if size < 1 and size != -1:
        raise ValueError(f"quantization_config.{names[0]}={size}; it must be at least 1, or -1 for whole rows")
    return None if size == -1 else size


def _awq(config: Mapping[str, Any]) -> Quantization:
    bits = _bits(config, "bits", "w_bit")
    zero = bits if config.get("zero_point", True) else 0
    return Quantization("awq", bits, _group(config, "group_size", "q_group_size"), _SCALE_BITS + zero)


def _gptq(config: Mapping[str, Any]) -> Quantization:
    # Zeros are stored with symmetric weights too. The order of the inputs, 32 bits each, is left out.
    bits = _bits(config, "bits")
    return Quantization("gptq", bits, _group(config, "group_size"), _SCALE_BITS + bits)


def _bitsandbytes(config: Mapping[str, Any]) -> Quantization:
    if config.get("load_in_4bit"):
        # One float32 maximum for 64 weights; quantized itself, 8 bits and a float32 for 256 of them.
        double = config.get("bnb_4bit_use_double_quant")
        return Quantization("bitsandbytes", 4, 64, 8 + _FLOAT_BITS / 256 if double else _FLOAT_BITS)
    if config.get("load_in_8bit"):
        return Quantization("bitsandbytes", 8, None, _FLOAT_BITS)
    raise ValueError("quantization_config of bitsandbytes has neither load_in_4bit nor load_in_8bit")


def _fp8(config: Mapping[str, Any]) -> Quantization:
    block = config.get("weight_block_size")
    if block is None:
        return Quantization("fp8", 8, None, 0)  # One scale for a whole matrix.
    sides = block if isinstance(block, list) else []
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"quantization_config.weight_block_size is {block!r}; it must be two counts")
    return Quantization("fp8", 8, sides[1], _FLOAT_BITS / sides[0])


def _fbgemm_fp8(_: Mapping[str, Any]) -> Quantization:
    return Quantization("fbgemm_fp8", 8, None, _FLOAT_BITS)


def _compressed_tensors(config: Mapping[str, Any]) -> Quantization:
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ValueError("quantization_config.config_groups is not of one group: layers of several widths")
    if config.get("kv_cache_scheme") is not None:
        raise ValueError("quantization_config.kv_cache_scheme, a quantized KV cache, is not counted; kv_bits=8 is")
    if config.get("sparsity_config"):
        raise ValueError("quantization_config.sparsity_config, sparse weights, is not counted")
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or group.get("targets") != ["Linear"]:
        raise ValueError("quantization_config.config_groups says nothing of the weights of all linear layers")
    bits = _bits(weights, "num_bits")
    zero = 0 if weights.get("symmetric", True) else bits
    match weights.get("strategy"):
        case "group":
            return Quantization("compressed-tensors", bits, _group(weights, "group_size"), _SCALE_BITS + zero)
        case "channel":
            return Quantization("compressed-tensors", bits, None, _SCALE_BITS + zero)
        case "tensor":
            return Quantization("compressed-tensors", bits, None, 0)
        case other:
            raise ValueError(f"quantization_config of compressed-tensors with strategy={other} is not counted")
