"""Model geometry: what the weights and the KV cache of a decoder-only transformer cost in bytes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import ceil

from uvm_kv.hw.quantization import Quantization

MAX_COUNT = 2**31


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
    sliding_window: int | None = None
    """Tokens that some or all layers attend to; None: the whole context."""
    quantization: Quantization | None = None
    """Quantization of the checkpoint's weights; None: they are not quantized."""

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
        in_matrices = self.num_layers * sum(fan_in * fan_out for fan_in, fan_out in self.layer_matrices)
        return in_matrices + self.num_parameters_outside_matrices

    @property
    def layer_matrices(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one layer."""
        h, q, kv, i = self.hidden_size, self.q_size, self.kv_size, self.intermediate_size
        return [(h, q), (h, kv), (h, kv), (q, h), *[(h, i)] * (2 if self.gated_mlp else 1), (i, h)]

    @property
    def num_parameters_outside_matrices(self) -> int:
        """Embedding, head, learned positions and norms."""
        h = self.hidden_size
        embedding = self.vocab_size * h * (1 if self.tied_embeddings else 2)
        positions = 0 if self.rope else self.max_position_embeddings * h
        return embedding + positions + (2 * self.num_layers + 1) * h

    def kv_bytes_per_token(self, dtype_bytes: float) -> int:
        return ceil(2 * self.num_layers * self.kv_size * dtype_bytes)

    def understood(self) -> str:
        """A line of text that names the parts that are counted."""
        window = "" if self.sliding_window is None else f" within a window of {self.sliding_window} tokens"
        parts = [
            f"{self.num_layers} layers of full attention{window}, KV heads: {self.num_kv_heads} of {self.head_dim}",
            f"{'gated' if self.gated_mlp else 'ungated'} MLP of {self.intermediate_size}",
            "rotary positions" if self.rope else "learned positions",
            f"{self.num_parameters / 1e9:.2f}e9 weights with {'tied' if self.tied_embeddings else 'untied'} embeddings",
        ]
        return ", ".join(parts)

    def activation_bytes(self, num_tokens: int, num_sequences: int, dtype_bytes: float) -> int:
        """Peak of the activations of one step of `num_tokens` tokens that samples `num_sequences` rows.

        The live set at the widest point is the MLP of one layer: residual, normed input and output (3 hidden) with
        gate, up and their product (3 intermediate; 2 without a gate). The logits are kept in float32 beside it.
        """
        wide = 3 * self.hidden_size + (3 if self.gated_mlp else 2) * self.intermediate_size
        return ceil(num_tokens * wide * dtype_bytes) + num_sequences * self.vocab_size * 4
