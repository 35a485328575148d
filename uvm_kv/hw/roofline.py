"""Roofline: how long each operator of a step takes on a card, from its operations, its bytes and a fitted efficiency.

Each operator costs `overhead + (compute**k + memory**k)**(1/k)` with compute = operations / (peak * efficiency) and
memory = bytes / (HBM rate * efficiency). Overheads, efficiencies and knees are fitted to the operator times of a
Llama-3.1-8B layer measured on an RTX 3090 (casys-kaist/LLMServingSim, MIT; see `uvm_kv.hw.fit`). That table holds no
decode attention: it is charged its bytes at `gpu.hbm_gb_per_s * gpu.hbm_efficiency` (RTX 3090: 838.5 GB/s, the
measured copy rate of NCCL issue 1127) beside the overhead of the table's smallest prefill attention.
"""

from __future__ import annotations

from uvm_kv.hw.model import ModelGeometry
from uvm_kv.hw.profile import HardwareProfile, OperatorCost


def operator_work(model: ModelGeometry, num_tokens: int, dtype_bytes: int) -> dict[str, tuple[float, float]]:
    """Operations and bytes of every operator outside attention for `num_tokens` tokens: name -> (OPs, bytes).

    A linear layer does 2 * in * out * tokens operations and moves its weights and both activations once. Norms count
    7 operations an element, the activation 5, RoPE 6 (LLM-Viewer's convention); they read and write each element once.
    """
    h, q, kv, i = model.hidden_size, model.q_size, model.kv_size, model.intermediate_size
    n, b = num_tokens, dtype_bytes

    def linear(fan_in: int, fan_out: int) -> tuple[float, float]:
        return 2.0 * fan_in * fan_out * n, float(b * (fan_in * fan_out + n * (fan_in + fan_out)))

    def elementwise(width: int, ops: float) -> tuple[float, float]:
        return ops * width * n, 2.0 * b * width * n

    work = {
        "input_layernorm": elementwise(h, 7),
        "q_proj": linear(h, q),
        "k_proj": linear(h, kv),
        "v_proj": linear(h, kv),
        "rope": elementwise(q + kv, 6),
        "o_proj": linear(q, h),
        "post_layernorm": elementwise(h, 7),
        "gate_proj": linear(h, i),
        "up_proj": linear(h, i),
        "act_fn": elementwise(i, 5),
        "down_proj": linear(i, h),
    }
    if not model.rope:
        del work["rope"]
    if not model.gated_mlp:
        del work["gate_proj"]
    return work


def attention_work(model: ModelGeometry, num_tokens: int, context_len: int, dtype_bytes: int) -> tuple[float, float]:
    """Operations and bytes of causal attention of `num_tokens` new tokens behind `context_len` cached ones."""
    pairs = num_tokens * (context_len + (num_tokens + 1) / 2)
    ops = 4.0 * model.q_size * pairs
    read = 2 * (context_len + num_tokens) * model.kv_size
    return ops, float(dtype_bytes * (read + 2 * num_tokens * model.q_size))


class Roofline:
    """Times in seconds of the parts of one step of `model` on `profile`. Pure; token counts are memoised."""

    def __init__(self, profile: HardwareProfile, model: ModelGeometry, dtype_bytes: int) -> None:
        self.profile = profile
        self.model = model
        self.dtype_bytes = dtype_bytes
        self.hbm_bytes_per_s = profile.gpu.hbm_bytes_per_s
        # float32 runs on the plain cores of a tensor-core card at about half its fp16-with-fp32-accumulate rate.
        self._peak = profile.gpu.tensor_tflop_per_s * 1e12 * (1.0 if dtype_bytes == 2 else 0.5)
        self._hbm_peak = profile.gpu.hbm_gb_per_s * 1e9
        self._dense: dict[int, float] = {}
        self._head: dict[int, float] = {}
        self._embed: dict[int, float] = {}
        self._kv_layer_token_bytes = 2 * model.kv_size * dtype_bytes
        self._attention_overhead_s = self._cost("attn").overhead_us * 1e-6

    def _cost(self, operator: str) -> OperatorCost:
        # K and V projections of a model without grouped queries have the shape of its Q projection.
        if operator in ("k_proj", "v_proj") and self.model.num_kv_heads == self.model.num_heads:
            operator = "q_proj"
        return self.profile.operators[operator]

    def operator_s(self, operator: str, ops: float, num_bytes: float) -> float:
        cost = self._cost(operator)
        compute = ops / (self._peak * cost.compute_efficiency)
        memory = num_bytes / (self._hbm_peak * cost.memory_efficiency)
        corner: float = (compute**cost.knee + memory**cost.knee) ** (1 / cost.knee)
        return cost.overhead_us * 1e-6 + corner

    def layer_operators_s(self, num_tokens: int) -> dict[str, float]:
        work = operator_work(self.model, num_tokens, self.dtype_bytes)
        return {op: self.operator_s(op, *amounts) for op, amounts in work.items()}

    def dense_s(self, num_tokens: int) -> float:
        """One layer without attention."""
        value = self._dense.get(num_tokens)
        if value is None:
            value = self._dense[num_tokens] = sum(self.layer_operators_s(num_tokens).values())
        return value

    def prefill_attention_s(self, num_tokens: int, context_len: int) -> float:
        """Attention of one layer for one prefill chunk."""
        return self.operator_s("attn", *attention_work(self.model, num_tokens, context_len, self.dtype_bytes))

    def decode_attention_s(self, num_kv_tokens: float) -> float:
        """Attention of one layer for a decode batch that reads `num_kv_tokens` tokens of KV from HBM in all."""
        return self._attention_overhead_s + num_kv_tokens * self._kv_layer_token_bytes / self.hbm_bytes_per_s

    def head_s(self, num_tokens: int, num_rows: int) -> float:
        """What a step does outside its layers: embedding of all tokens, last norm and logits of the sampled rows."""
        embed = self._embed.get(num_tokens)
        if embed is None:
            width = self.model.hidden_size * self.dtype_bytes
            embed = self._embed[num_tokens] = self.operator_s("embedding", 0.0, 2.0 * width * num_tokens)
        head = self._head.get(num_rows)
        if head is None:
            h, v, b = self.model.hidden_size, self.model.vocab_size, self.dtype_bytes
            head = 0.0
            if num_rows:
                logits = (2.0 * h * v * num_rows, float(b * (h * v + num_rows * (h + v))))
                norm = (7.0 * h * num_rows, 2.0 * b * h * num_rows)
                head = self.operator_s("lm_head", *logits) + self.operator_s("final_layernorm", *norm)
            self._head[num_rows] = head
        return embed + head

    def decode_step_s(self, num_seqs: int, num_kv_tokens: float) -> float:
        """A decode step of `num_seqs` sequences whose whole KV of `num_kv_tokens` tokens lies on the device."""
        layer = self.dense_s(num_seqs) + self.decode_attention_s(num_kv_tokens)
        return self.model.num_layers * layer + self.head_s(num_seqs, num_seqs)

    def prefill_s(self, num_tokens: int) -> float:
        """A prefill of one prompt in one chunk."""
        layer = self.dense_s(num_tokens) + self.prefill_attention_s(num_tokens, 0)
        return self.model.num_layers * layer + self.head_s(num_tokens, 1)
