"""Operations and bytes of every operator of one step, counted in one of two ways.

`exact` is what the simulator charges. A linear layer does 2 * in * out operations per token and moves its weights and
both activations once. Attention is one fused kernel: no scores in memory, its softmax not counted (5 operations per
element beside 4 * head_dim), only the causal half in prefill. A norm counts 7 operations per element and one for the
residual add that engines fuse into it, and reads and writes two streams; SiLU-mul counts 5 per element of the
intermediate size with two operands in and one out; RoPE 6 per element of Q and K. New K and V are written in the KV
cache's width. Logits are taken of one token per sequence, with the 2 of any linear layer. Quantized weights are the
matrices of the layers, with their scales and zeros; embedding and head stay 16 bits wide. Biases, rotation tables and
the scales of quantized KV are left out.

`llm_viewer` is the counting of LLM-Viewer (hahnyuan/LLM-Viewer; "LLM Inference Unveiled", table 1) with its quirks:
lm_head without the 2 and with one row of activations, SiLU-mul over the hidden size, an add that reads one operand,
a gate in every MLP, K read twice in prefill in place of Q and K, scores written and read back, no causal half, no
embedding, no RoPE, a weight footprint without embedding and head. It is there to be
held against published figures.

A work is (operations, bytes), of one layer where an operator is part of the layers. Bits are packed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from math import ceil

from uvm_kv.hw.model import ModelGeometry
from uvm_kv.hw.quantization import WIDE_BITS, Quantization, by_size
from uvm_kv.types import Phase

Work = tuple[float, float]

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
MAX_BITS = 32


class Counting(StrEnum):
    EXACT = "exact"
    LLM_VIEWER = "llm_viewer"


@dataclass(frozen=True)
class Precision:
    """Bits per element. ValueError where they are not between 1 and 32."""

    weight_bits: int = 16
    """Width of the weights in the matrices of the layers."""
    activation_bits: int = 16
    kv_bits: int = 16
    checkpoint: Quantization | None = None
    """How a quantized checkpoint of `weight_bits` stores them; None: the usual format of that width."""

    def __post_init__(self) -> None:
        for field in fields(self):
            bits = getattr(self, field.name)
            if isinstance(bits, int) and not 1 <= bits <= MAX_BITS:
                raise ValueError(f"{field.name}={bits}; it must lie between 1 and {MAX_BITS}")

    @classmethod
    def of_bytes(cls, dtype_bytes: int) -> Precision:
        """Everything in one dtype."""
        return cls(8 * dtype_bytes, 8 * dtype_bytes, 8 * dtype_bytes)

    @property
    def quantization(self) -> Quantization | None:
        """Quantization of the weights; None where they are not quantized."""
        if self.weight_bits >= WIDE_BITS:
            return None
        return self.checkpoint or by_size(self.weight_bits)

    @property
    def table_bits(self) -> int:
        """Bits per element of embedding, head and norms."""
        return self.weight_bits if self.quantization is None else max(WIDE_BITS, self.activation_bits)

    def matrix_bits(self, fan_in: int, fan_out: int) -> float:
        """Bits of one matrix of a layer, its scales and zeros included."""
        if self.quantization is None:
            return self.weight_bits * fan_in * fan_out
        return self.quantization.matrix_bits(fan_in, fan_out)

    @property
    def widest(self) -> int:
        return max(self.weight_bits, self.activation_bits, self.kv_bits)


def weight_bytes(model: ModelGeometry, precision: Precision) -> int:
    """All weights: quantized ones are the matrices of the layers; embedding, head and norms are 16 bits wide then."""
    bits = model.num_layers * sum(precision.matrix_bits(*shape) for shape in model.layer_matrices)
    return ceil((bits + precision.table_bits * model.num_parameters_outside_matrices) / 8)


def _linear(
    fan_in: int, fan_out: int, num_tokens: int, precision: Precision, out_bits: int, matrix_bits: float | None = None
) -> Work:
    """`matrix_bits`: of all weights, where they are not those of a matrix of a layer."""
    bits = precision.matrix_bits(fan_in, fan_out) if matrix_bits is None else matrix_bits
    bits += num_tokens * (precision.activation_bits * fan_in + out_bits * fan_out)
    return 2.0 * fan_in * fan_out * num_tokens, bits / 8


def _elementwise(width: int, ops: int, num_streams: int, num_tokens: int, precision: Precision) -> Work:
    """Work of an element-wise operator: `num_streams` of `width` elements per token are read or written."""
    return float(ops * width * num_tokens), num_streams * width * num_tokens * precision.activation_bits / 8


def operator_work(model: ModelGeometry, num_tokens: int, precision: Precision) -> dict[str, Work]:
    """Exact, one layer without its attention, for `num_tokens` tokens."""
    h, q, kv, i = model.hidden_size, model.q_size, model.kv_size, model.intermediate_size
    n, p, a = num_tokens, precision, precision.activation_bits
    work = {
        "input_layernorm": _elementwise(h, 8, 4, n, p),
        "q_proj": _linear(h, q, n, p, a),
        "k_proj": _linear(h, kv, n, p, p.kv_bits),
        "v_proj": _linear(h, kv, n, p, p.kv_bits),
        "rope": _elementwise(q + kv, 6, 2, n, p),
        "o_proj": _linear(q, h, n, p, a),
        "post_layernorm": _elementwise(h, 8, 4, n, p),
        "gate_proj": _linear(h, i, n, p, a),
        "up_proj": _linear(h, i, n, p, a),
        "act_fn": _elementwise(i, 5, 3 if model.gated_mlp else 2, n, p),
        "down_proj": _linear(i, h, n, p, a),
    }
    if not model.rope:
        del work["rope"]
    if not model.gated_mlp:
        del work["gate_proj"]
    return work


def attention_work(model: ModelGeometry, num_tokens: int, context_len: int, precision: Precision) -> Work:
    """Exact, one layer and one sequence: causal attention of `num_tokens` new tokens behind `context_len` cached."""
    pairs = num_tokens * (context_len + (num_tokens + 1) / 2)
    read_bits = precision.kv_bits * 2 * (context_len + num_tokens) * model.kv_size
    return 4.0 * model.q_size * pairs, (read_bits + precision.activation_bits * 2 * num_tokens * model.q_size) / 8


def embedding_work(model: ModelGeometry, num_tokens: int, precision: Precision) -> Work:
    """Exact: a row of the table read and written for every token."""
    return 0.0, num_tokens * model.hidden_size * (precision.table_bits + precision.activation_bits) / 8


def head_work(model: ModelGeometry, num_rows: int, precision: Precision) -> dict[str, Work]:
    """Exact: last norm and logits of the sampled rows."""
    h, v = model.hidden_size, model.vocab_size
    return {
        "final_layernorm": _elementwise(h, 8, 4, num_rows, precision),
        "lm_head": _linear(h, v, num_rows, precision, precision.activation_bits, precision.table_bits * h * v),
    }


def _llm_viewer_linear(model: ModelGeometry) -> dict[str, tuple[int, int]]:
    """In and out of the linear layers as LLM-Viewer has them: heads of hidden_size / num_heads, always a gate."""
    h, i = model.hidden_size, model.intermediate_size
    kv = h * model.num_kv_heads // model.num_heads
    return {
        "q_proj": (h, h),
        "k_proj": (h, kv),
        "v_proj": (h, kv),
        "out_proj": (h, h),
        "gate_proj": (h, i),
        "up_proj": (h, i),
        "down_proj": (i, h),
    }


def llm_viewer_weight_bytes(model: ModelGeometry, precision: Precision) -> int:
    elements = sum(fan_in * fan_out for fan_in, fan_out in _llm_viewer_linear(model).values())
    return model.num_layers * elements * precision.weight_bits // 8


def llm_viewer_work(
    model: ModelGeometry, stage: Phase, batch_size: int, sequence_length: int, precision: Precision
) -> dict[str, Work]:
    """LLM-Viewer's work of one layer, and of `lm_head`, under its own operator names."""
    h, s, p, a = model.hidden_size, sequence_length, precision, precision.activation_bits
    queries = s if stage is Phase.PREFILL else 1
    n = batch_size * queries
    scores = batch_size * model.num_heads * queries * s
    head_dim = h // model.num_heads
    k_bits = p.kv_bits * batch_size * s * model.num_kv_heads * head_dim
    qk_read_bits = 2 * k_bits if stage is Phase.PREFILL else k_bits + a * n * model.num_heads * head_dim
    work = {
        name: _linear(
            *(fan_in, fan_out, n, p, p.kv_bits if name in ("k_proj", "v_proj") else a), p.weight_bits * fan_in * fan_out
        )
        for name, (fan_in, fan_out) in _llm_viewer_linear(model).items()
    }
    return work | {
        "qk_matmul": (2.0 * scores * head_dim, (qk_read_bits + a * scores) / 8),
        "sv_matmul": (2.0 * scores * head_dim, (k_bits + a * (scores + n * model.num_heads * head_dim)) / 8),
        "softmax": (5.0 * scores, 2 * a * scores / 8),
        "attn_norm": _elementwise(h, 7, 2, n, p),
        "mlp_norm": _elementwise(h, 7, 2, n, p),
        "attn_add": _elementwise(h, 1, 2, n, p),
        "mlp_add": _elementwise(h, 1, 2, n, p),
        "mlp_act": _elementwise(h, 2, 3, n, p),
        "lm_head": (
            float(batch_size * h * model.vocab_size),
            (p.weight_bits * h * model.vocab_size + a * (h + model.vocab_size)) / 8,
        ),
    }
