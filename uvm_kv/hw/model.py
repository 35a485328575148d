"""Model geometry: what the weights and the KV cache of a decoder-only transformer cost in bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from math import ceil
from pathlib import Path
from typing import Any

MAX_COUNT = 2**31
LEARNED_POSITIONS = ("opt", "gpt2", "gpt_bigcode", "gpt_neo")
"""`model_type`s of Hugging Face whose positions are a table of weights."""
UNGATED = (*LEARNED_POSITIONS, "gpt_neox", "gptj", "codegen", "falcon", "phi", "starcoder2")
"""Those with two matrices in the MLP; all others have three."""
TIED = (
    *(*LEARNED_POSITIONS, "falcon", "gemma", "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text"),
    *("vaultgemma", "starcoder2", "cohere", "cohere2", "cohere_compass_text", "smollm3", "ernie4_5", "granite_swa"),
    *("lfm2", "lfm3", "zamba", "zamba2", "biogpt", "ctrl", "openai-gpt", "gpt_neox_japanese", "modernbert-decoder"),
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""Those whose config leaves `tie_word_embeddings` out where it is true: transformers' defaults, of all types whose
counts are read (a test compares)."""


@dataclass(frozen=True)
class ModelGeometry:
    """Shapes of a decoder-only transformer, named as in a Hugging Face `config.json`."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    gated_mlp: bool = True
    rope: bool = True
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value <= MAX_COUNT:
                limit = f"at most {MAX_COUNT}" if value > MAX_COUNT else "at least 1"
                raise ValueError(f"model.{field.name}={value}; it must be {limit}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}"
            )

    @property
    def kv_size(self) -> int:
        """Width of K (or V) of one token in one layer, in elements."""
        return self.num_kv_heads * self.head_dim

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights with embedding, head and norms; biases, under 0.1 % of any model here, are left out."""
        h, i = self.hidden_size, self.intermediate_size
        attention = h * (2 * self.q_size + 2 * self.kv_size)
        mlp = h * i * (3 if self.gated_mlp else 2)
        embedding = self.vocab_size * h * (1 if self.tied_embeddings else 2)
        positions = 0 if self.rope else self.max_position_embeddings * h
        return self.num_layers * (attention + mlp + 2 * h) + embedding + positions + h

    def weight_bytes(self, dtype_bytes: float) -> int:
        """`dtype_bytes` may be below 1: packed quantized weights, embedding and head with the rest."""
        return ceil(self.num_parameters * dtype_bytes)

    def kv_bytes_per_token(self, dtype_bytes: float) -> int:
        return ceil(2 * self.num_layers * self.kv_size * dtype_bytes)

    def activation_bytes(self, num_tokens: int, num_sequences: int, dtype_bytes: float) -> int:
        """Peak of the activations of one step of `num_tokens` tokens that samples `num_sequences` rows.

        The live set at the widest point is the MLP of one layer: residual, normed input and output (3 hidden) with
        gate, up and their product (3 intermediate; 2 without a gate). The logits are kept in float32 beside it.
        """
        wide = 3 * self.hidden_size + (3 if self.gated_mlp else 2) * self.intermediate_size
        return ceil(num_tokens * wide * dtype_bytes) + num_sequences * self.vocab_size * 4

    @classmethod
    def from_hf_config(cls, path: str, **given: int) -> ModelGeometry:
        """Read the `config.json` of a Hugging Face model folder (or the file itself); no weights, no torch.

        Counts in `given` stand in place of the file's. ValueError where a count is missing or is none.
        """
        raw = _read_hf_config(path)
        kind = str(raw.get("model_type"))

        def get(field: str, *names: str, default: int | None = None) -> int:
            if field in given:
                return given[field]
            for name in names:
                value = raw.get(name)
                if value is not None:
                    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                        raise ValueError(f"model.path={path}: {name} is {value!r} in config.json; it must be a count")
                    return value
            if default is None:
                raise ValueError(f"model.path={path}: config.json has none of {', '.join(names)}")
            return default

        hidden = get("hidden_size", "hidden_size", "n_embd")
        heads = get("num_heads", "num_attention_heads", "n_head")
        # Falcon and GPT-BigCode say multi-query by a flag, whatever they say of KV heads.
        multi_query = raw.get("multi_query") and not raw.get("new_decoder_architecture")
        kv_names = () if multi_query else ("num_key_value_heads", "num_kv_heads")
        return cls(
            name=_hf_name(Path(path)),
            num_layers=get("num_layers", "num_hidden_layers", "n_layer"),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=get("num_kv_heads", *kv_names, default=1 if multi_query else heads),
            head_dim=get("head_dim", "head_dim", default=max(1, hidden // max(1, heads))),
            intermediate_size=get("intermediate_size", "intermediate_size", "ffn_dim", "n_inner", default=4 * hidden),
            vocab_size=get("vocab_size", "vocab_size"),
            max_position_embeddings=get("max_position_embeddings", "max_position_embeddings", "n_positions"),
            gated_mlp=kind not in UNGATED,
            rope=kind not in LEARNED_POSITIONS,
            tied_embeddings=bool(raw.get("tie_word_embeddings", kind in TIED)),
        )


def check_dense(path: str) -> None:
    """ValueError for a Hugging Face config whose weights or KV are not those of a dense transformer."""
    raw = _read_hf_config(path)
    if isinstance(raw.get("hidden_size"), int) and not {"num_attention_heads", "n_head"} & set(raw):
        raise ValueError(f"model.path={path}: no attention heads in config.json; only transformers are counted")
    for name in ("num_local_experts", "num_experts", "moe_num_experts", "n_routed_experts", "kv_lora_rank"):
        value = raw.get(name)
        if isinstance(value, int) and value > 1:
            what = "latent attention" if name == "kv_lora_rank" else "a mixture of experts"
            raise ValueError(f"model.path={path}: {name}={value} in config.json, {what}; only dense models are counted")


def _read_hf_config(path: str) -> dict[str, Any]:
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"model.path={path}: no config.json there; give a folder of a Hugging Face model")
    try:
        raw: dict[str, Any] = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"model.path={path}: {file.name} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model.path={path}: {file.name} is not JSON ({error})") from None
    # Models that also see or hear nest the decoder.
    text = raw.get("text_config") or raw if isinstance(raw, dict) else None
    if not isinstance(text, dict):
        raise ValueError(f"model.path={path}: {file.name} is not a model's config")
    return text


def _hf_name(path: Path) -> str:
    path = path.resolve()
    return path.parent.name if path.name == "config.json" else path.name.removesuffix(".json")
