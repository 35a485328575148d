"""Roofline: how long each operator of a step takes on a card, from its operations, its bytes and a fitted efficiency.

Each operator costs `overhead + (compute**k + memory**k)**(1/k)` with compute = operations / (peak * efficiency) and
memory = bytes / (HBM rate * efficiency). Overheads, efficiencies and knees are fitted to the operator times of a
Llama-3.1-8B layer measured on an RTX 3090 (casys-kaist/LLMServingSim, MIT; see `uvm_kv.hw.fit`). That table holds no
decode attention: it is charged its KV bytes at `gpu.hbm_gb_per_s * gpu.hbm_efficiency` (RTX 3090: 838.5 GB/s, the
measured copy rate of NCCL issue 1127) beside the overhead of the table's smallest prefill attention.

Quantized weights and KV are counted by size: their bytes shrink, a matrix product runs at the peak of its wider
operand (half precision unless both are 8 bits or less), and what widening costs the kernel is not modelled, nor are
scales. It is therefore an upper bound on what weight-only or KV-only quantization gives.
"""

from __future__ import annotations

from uvm_kv.hw.counting import LINEAR, Precision, attention_work, embedding_work, head_work, operator_work
from uvm_kv.hw.model import ModelGeometry
from uvm_kv.hw.profile import HardwareProfile, OperatorCost


def peak_ops_per_s(profile: HardwareProfile, bits: int) -> float:
    """The card's rate for operands of `bits`: int8 up to 8, half precision up to 16, else the plain cores' float32.

    ValueError for a card whose rate is not known.
    """
    if bits <= 8:
        return profile.gpu.tensor_int8_top_per_s * 1e12
    if bits <= 16:
        return profile.gpu.tensor_tflop_per_s * 1e12
    if profile.gpu.float32_tflop_per_s is None:
        raise ValueError(
            f"hardware={profile.name} has no float32 rate; add hardware.gpu.float32_tflop_per_s, the peak of its plain "
            f"cores, or use dtype=float16 or bfloat16"
        )
    return profile.gpu.float32_tflop_per_s * 1e12


def operand_bits(operator: str, precision: Precision) -> int:
    """Width of the wider operand: what is narrower is widened to it before the multiplication."""
    if operator in LINEAR:
        weight_bits = precision.table_bits if operator == "lm_head" else precision.weight_bits
        return max(weight_bits, precision.activation_bits)
    if operator == "attn":
        return max(precision.activation_bits, precision.kv_bits)
    return max(precision.activation_bits, 16)  # Norms, RoPE and activations are not matrix products.


class Roofline:
    """Times in seconds of the parts of one step of `model` on `profile`. Pure; token counts are memoised.

    `precision` is for weights, activations and KV of different widths; without it all are of `dtype_bytes`.
    """

    def __init__(
        self, profile: HardwareProfile, model: ModelGeometry, dtype_bytes: int, precision: Precision | None = None
    ) -> None:
        self.profile = profile
        self.model = model
        self.precision = precision or Precision.of_bytes(dtype_bytes)
        self.hbm_bytes_per_s = profile.gpu.hbm_bytes_per_s
        self._peaks = {op: peak_ops_per_s(profile, operand_bits(op, self.precision)) for op in profile.operators}
        self._hbm_peak = profile.gpu.hbm_gb_per_s * 1e9
        self._dense: dict[int, float] = {}
        self._head: dict[int, float] = {}
        self._embed: dict[int, float] = {}
        self._kv_layer_token_bytes = 2 * model.kv_size * self.precision.kv_bits / 8
        attention = self._cost("attn")
        self._attention_overhead_s = attention.overhead_us * 1e-6
        self._attention_ops_per_s = self._peaks["attn"] * attention.compute_efficiency

    def _cost(self, operator: str) -> OperatorCost:
        # K and V projections of a model without grouped queries have the shape of its Q projection.
        if operator in ("k_proj", "v_proj") and self.model.num_kv_heads == self.model.num_heads:
            operator = "q_proj"
        return self.profile.operators[operator]

    def operator_s(self, operator: str, ops: float, num_bytes: float) -> float:
        cost = self._cost(operator)
        compute = ops / (self._peaks[operator] * cost.compute_efficiency)
        memory = num_bytes / (self._hbm_peak * cost.memory_efficiency)
        corner: float = (compute**cost.knee + memory**cost.knee) ** (1 / cost.knee)
        return cost.overhead_us * 1e-6 + corner

    def layer_operators_s(self, num_tokens: int) -> dict[str, float]:
        work = operator_work(self.model, num_tokens, self.precision)
        return {op: self.operator_s(op, *amounts) for op, amounts in work.items()}

    def dense_s(self, num_tokens: int) -> float:
        """One layer without attention."""
        value = self._dense.get(num_tokens)
        if value is None:
            value = self._dense[num_tokens] = sum(self.layer_operators_s(num_tokens).values())
        return value

    def prefill_attention_s(self, num_tokens: int, context_len: int) -> float:
        """Attention of one layer for one prefill chunk."""
        return self.operator_s("attn", *attention_work(self.model, num_tokens, context_len, self.precision))

    def decode_attention_s(self, num_kv_tokens: float) -> float:
        """Attention of one layer for a decode batch that reads `num_kv_tokens` tokens of KV from HBM in all."""
        memory_s = num_kv_tokens * self._kv_layer_token_bytes / self.hbm_bytes_per_s
        # Many query heads on one narrow KV head: the only case in which decoding waits for the tensor cores.
        compute_s = num_kv_tokens * 4 * self.model.q_size / self._attention_ops_per_s
        return self._attention_overhead_s + max(memory_s, compute_s)

    def head_s(self, num_tokens: int, num_rows: int) -> float:
        """What a step does outside its layers: embedding of all tokens, last norm and logits of the sampled rows."""
        embed = self._embed.get(num_tokens)
        if embed is None:
            work = embedding_work(self.model, num_tokens, self.precision)
            embed = self._embed[num_tokens] = self.operator_s("embedding", *work)
        head = self._head.get(num_rows)
        if head is None:
            rows = head_work(self.model, num_rows, self.precision) if num_rows else {}
            head = self._head[num_rows] = sum(self.operator_s(op, *amounts) for op, amounts in rows.items())
        return embed + head

    def decode_step_s(self, num_seqs: int, num_kv_tokens: float) -> float:
        """A decode step of `num_seqs` sequences whose whole KV of `num_kv_tokens` tokens lies on the device."""
        layer = self.dense_s(num_seqs) + self.decode_attention_s(num_kv_tokens)
        return self.model.num_layers * layer + self.head_s(num_seqs, num_seqs)

    def prefill_s(self, num_tokens: int) -> float:
        """A prefill of one prompt in one chunk."""
        layer = self.dense_s(num_tokens) + self.prefill_attention_s(num_tokens, 0)
        return self.model.num_layers * layer + self.head_s(num_tokens, 1)
