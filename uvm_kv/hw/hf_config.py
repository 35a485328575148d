"""The `config.json` of a Hugging Face model -> its shapes, read without transformers and without the model's code.

What a file leaves out is taken from `decoders.json`: the model types that are counted right, with the defaults of their
configs. A test builds each type of transformers and holds the table against it. Counted are decoders whose layers are
all alike: attention over the whole context and one MLP, quantized or not. Any other model is refused in a line that
names the key that shows it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uvm_kv.hw.model import ModelGeometry
from uvm_kv.hw.quantization import of_checkpoint

TABLE = Path(__file__).with_name("decoders.json")
COUNTS: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer"),
    "hidden_size": ("hidden_size", "n_embd"),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
}
"""Our counts by their names in config files."""
EXPERTS = ("num_local_experts", "num_experts", "moe_num_experts", "n_routed_experts")
OTHER_LAYERS = (
    *("mamba_", "ssm_", "linear_num_", "linear_key_", "linear_value_", "linear_conv_", "conv_L_cache", "lru_width"),
    *("attn_layer_", "full_attn_idxs", "full_attention_interval", "hybrid_override_pattern", "layers_block_type"),
    *("block_types", "time_step_", "attention_types", "hybrid_layer_ids"),
)
"""Beginnings of the keys of models with layers other than attention: Mamba, linear attention, convolutions."""
UNLIKE = {
    "kv_lora_rank": "latent attention",
    "attention_chunk_size": "attention in chunks",
    "num_kv_shared_layers": "layers that share the KV of others",
    "num_global_key_value_heads": "layers of several shapes",
    "global_head_dim": "layers of several shapes",
    "hidden_size_per_layer_input": "an embedding of its own for each layer",
    "cross_attention_layers": "cross-attention",
    "attn_logit_softcapping": "soft-capping of attention",
    "final_logit_softcapping": "soft-capping of logits",
    "is_encoder_decoder": "an encoder",
    "add_cross_attention": "cross-attention",
    "alibi": "position biases in attention",
}
"""Keys that, where they are set, say that the model is not of the kind that is counted."""
ATTENTION = ("full_attention", "attention", "sliding_attention")
"""Values of `layer_types` that are counted as attention."""


@functools.cache
def decoders() -> dict[str, dict[str, Any]]:
    """Model type -> {"gated_mlp", "rope", "defaults": of the config's keys}."""
    table: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())
    return table


def read_geometry(path: str, given: Mapping[str, Any] | None = None, *, counted: bool = True) -> ModelGeometry:
    """Shapes by the `config.json` of a model folder, or by the file itself; those in `given` stand in their place.

    `counted`: weights and KV must be counted whole; a real runner, which asks the model itself, needs the KV alone.
    ValueError for a missing or impossible count, and for a model that is not counted.
    """
    given = given or {}
    raw, kind = _read(path)
    known = decoders().get(kind, {"gated_mlp": True, "rope": True, "defaults": {}})
    raw = known["defaults"] | raw
    if counted and (what := _not_counted(raw, kind)) is not None:
        raise ValueError(
            f"model.path={path}: {what} in config.json; only dense models are counted, whose layers are all alike: "
            f"attention over the whole context and one MLP"
        )

    def get(field: str, default: int | None = None) -> int:
        if field in given:
            return int(given[field])
        for name in COUNTS[field]:
            value = raw.get(name)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ValueError(f"model.path={path}: {name} is {value!r} in config.json; it must be a count")
                return value
        if default is None:
            raise ValueError(f"model.path={path}: config.json has none of {', '.join(COUNTS[field])}")
        return default

    hidden, heads = get("hidden_size"), get("num_heads")
    kv_heads = get("num_kv_heads", heads)
    if "multi_query" in raw and not raw.get("new_decoder_architecture") and "num_kv_heads" not in given:
        # Falcon and GPT-BigCode say one or all by a flag, whatever they say of KV heads.
        kv_heads = 1 if raw["multi_query"] else heads
    return ModelGeometry(
        name=_name(Path(path)),
        num_layers=get("num_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=get("head_dim", max(1, hidden // max(1, heads))),
        intermediate_size=get("intermediate_size", 4 * hidden),
        vocab_size=get("vocab_size"),
        max_position_embeddings=get("max_position_embeddings"),
        gated_mlp=bool(given.get("gated_mlp", known["gated_mlp"])),
        rope=bool(given.get("rope", known["rope"])),
        tied_embeddings=bool(given.get("tied_embeddings", raw.get("tie_word_embeddings"))),
        sliding_window=_window(path, raw),
    )


def with_quantization(model: ModelGeometry, path: str) -> ModelGeometry:
    """The same with the quantization of the checkpoint, if it has one. ValueError for one that is not counted."""
    config = quantization_config(path)
    if config is None:
        return model
    try:
        return dataclasses.replace(model, quantization=of_checkpoint(config))
    except ValueError as error:
        raise ValueError(f"model.path={path}: {error}; model.weight_bits=4 or 8 counts by size") from None


def quantization_config(path: str) -> dict[str, Any] | None:
    """The `quantization_config` in a model folder's `config.json`; None where its weights are not quantized."""
    for raw in (_read_whole(path), _read(path)[0]):
        config = raw.get("quantization_config")
        if isinstance(config, dict):
            return config
        if config is not None:
            raise ValueError(f"model.path={path}: quantization_config is {str(config)[:80]!r} in config.json")
    return None


def has_own_code(path: str) -> bool:
    """Whether the model's `config.json` names code in its folder."""
    return any(bool(raw.get("auto_map")) for raw in (_read_whole(path), _read(path)[0]))


def _not_counted(raw: Mapping[str, Any], kind: str) -> str | None:
    """What tells that the counts of a config are not all of its model; None where they are."""
    for name in EXPERTS:
        value = raw.get(name)
        if isinstance(value, int) and value > 1:
            return f"{name}={value}, a mixture of experts,"
    layers = raw.get("layer_types")
    if isinstance(layers, list):
        other = [str(layer) for layer in layers if layer not in ATTENTION]
        if other:
            return f"layer_types, {len(other)} of {len(layers)} layers are {other[0][:40]},"
    for key, value in raw.items():
        if value and key.startswith(OTHER_LAYERS):
            return f"{key}={_short(value)}, layers other than attention,"
    for key, what in UNLIKE.items():
        if raw.get(key):
            return f"{key}={_short(raw[key])}, {what},"
    shapes = [name for names in COUNTS.values() for name in names]
    for key in shapes:
        if isinstance(raw.get(key), list):
            return f"{key}, a list, layers of several shapes,"
    width = raw.get("word_embed_proj_dim")
    if width is not None and width != raw.get("hidden_size"):
        return f"word_embed_proj_dim={_short(width)}, an embedding narrower than the layers,"
    if kind not in decoders():
        return f"model_type={kind or 'null'} is none of the {len(decoders())} decoders known here"
    return None


def _short(value: Any) -> str:
    return str(value)[:60]


def _window(path: str, raw: Mapping[str, Any]) -> int | None:
    """The window of the layers that have one; None where all attend to the whole context."""
    layers, window = raw.get("layer_types"), raw.get("sliding_window")
    if window is None or raw.get("use_sliding_window") is False:
        return None
    if isinstance(layers, list) and "sliding_attention" not in layers:
        return None
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"model.path={path}: sliding_window is {window!r} in config.json; it must be a count or null")
    return window


def _read(path: str) -> tuple[dict[str, Any], str]:
    """(config of the decoder, its model type): models that also see or hear nest it."""
    whole = _read_whole(path)
    text = whole.get("text_config") or whole
    if not isinstance(text, dict):
        raise ValueError(f"model.path={path}: text_config in config.json is not a model's config")
    if text is not whole and whole.get("tie_word_embeddings") is not None:
        text = text | {"tie_word_embeddings": whole["tie_word_embeddings"]}
    return text, str(text.get("model_type") or "")


def _read_whole(path: str) -> dict[str, Any]:
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"model.path={path}: no config.json there; give a folder of a Hugging Face model")
    try:
        raw = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"model.path={path}: {file.name} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model.path={path}: {file.name} is not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"model.path={path}: {file.name} is not a model's config")
    return raw


def _name(path: Path) -> str:
    path = path.resolve()
    return path.parent.name if path.name == "config.json" else path.name.removesuffix(".json")
