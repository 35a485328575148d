"""The table of model types that are counted, made from transformers: python -m tests.runner.torch_cpu.decoder_types

A type is counted if a small model of it, built on the meta device, has exactly the matrices that `ModelGeometry`
counts. A test asks the same of other ways to write its config, and that its cache holds exactly the KV.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from uvm_kv.hw.hf_config import COUNTS, TABLE, UNLIKE

SMALL = {
    "num_layers": 3,
    "hidden_size": 64,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "vocab_size": 101,
    "max_position_embeddings": 60,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SETTINGS = (
    *("tie_word_embeddings", "sliding_window", "use_sliding_window", "multi_query", "new_decoder_architecture"),
    *UNLIKE,
)
"""Keys beside the counts whose defaults matter."""
NOT_DECODERS = ("bert-generation", "bitnet", "diffllama", "openai-gpt")
"""Types whose matrices are those counted, but that are encoders by default, have ternary weights, attend twice, or have
no KV cache."""


@functools.cache
def default_config(kind: str) -> Any:
    """None for a type that nests the decoder, or whose defaults contradict each other."""
    try:
        config = CONFIG_MAPPING[kind]()
    except Exception:  # Each of them has errors of its own.
        return None
    return None if getattr(config, "text_config", None) is not None else config


def written(kind: str, counts: dict[str, int]) -> dict[str, Any]:
    """Counts under the names that the config of a type has for them."""
    keys = default_config(kind).to_dict()
    return {name: value for field, value in counts.items() for name in COUNTS[field] if name in keys}


def build(kind: str, raw: dict[str, Any], device: str = "meta") -> Any:
    rotary = {"rotary_dim": 8} if kind in ("gptj", "codegen") else {}  # Not wider than a head.
    config = CONFIG_MAPPING[kind](**raw | SPECIAL | rotary)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config).eval()
    model.tie_weights()
    return model


def num_in_matrices(model: Any) -> int:
    """Parameters but those of norms and biases; tied ones once."""
    distinct = {id(p): p for name, p in model.named_parameters() if "norm" not in name}
    return sum(p.numel() for p in distinct.values() if p.dim() > 1)


def defaults(kind: str) -> dict[str, Any]:
    """What the config of a type takes for keys that are left out; not what it computes from others."""
    config = default_config(kind)
    plain = config.to_dict()
    hidden = plain.get("hidden_size") or plain.get("n_embd")
    heads = plain.get("num_attention_heads") or plain.get("n_head")
    moved = written(kind, {"hidden_size": 8 * hidden, "num_heads": 2 * heads})
    try:
        other = CONFIG_MAPPING[kind](**moved).to_dict()
    except Exception:
        return {}
    names = [*(name for names in COUNTS.values() for name in names), *SETTINGS]
    kept = [n for n in names if plain.get(n) is not None and (plain[n] or n not in UNLIKE)]
    return {n: plain[n] for n in kept if plain[n] == other.get(n) or n in moved}


def describe(kind: str) -> dict[str, Any] | None:
    """The entry of a type; None for one that is not counted."""
    if kind in NOT_DECODERS or default_config(kind) is None:
        return None
    try:
        raw = written(kind, SMALL)
        model = build(kind, raw)
        found = num_in_matrices(model)
        has = model.config.to_dict()
    except Exception:
        return None
    first = {field: next((has[n] for n in names if has.get(n) is not None), None) for field, names in COUNTS.items()}
    if not isinstance(first["hidden_size"], int) or not isinstance(first["num_heads"], int):
        return None
    h, heads = first["hidden_size"], first["num_heads"]
    kv = 1 if has.get("multi_query") and not has.get("new_decoder_architecture") else first["num_kv_heads"] or heads
    dim, inner = first["head_dim"] or h // heads, first["intermediate_size"] or 4 * h
    positions = first["max_position_embeddings"]
    if not all(isinstance(x, int) for x in (kv, dim, inner, positions, first["vocab_size"], first["num_layers"])):
        return None
    for gated in (True, False):
        for rope in (True, False):
            tables = first["vocab_size"] * (1 if has.get("tie_word_embeddings") else 2) + (0 if rope else positions)
            layer = h * dim * 2 * (heads + kv) + (3 if gated else 2) * h * inner
            # OPT and BioGPT have two positions more than they say.
            if found - (first["num_layers"] * layer + tables * h) in ((0,) if rope else (0, 2 * h)):
                return {"gated_mlp": gated, "rope": rope, "defaults": defaults(kind)}
    return None


def table() -> dict[str, dict[str, Any]]:
    return {k: entry for k in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if (entry := describe(k)) is not None}


def text(entries: dict[str, dict[str, Any]]) -> str:
    """One type per line."""
    return "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(e)}" for k, e in entries.items()) + "\n}\n"


if __name__ == "__main__":
    TABLE.write_text(text(table()))
