"""One prefill or decode step, operator by operator: operations, bytes, what bounds it and how long it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from uvm_kv.hw.counting import (
    Counting,
    Precision,
    Work,
    attention_work,
    embedding_work,
    head_work,
    llm_viewer_weight_bytes,
    llm_viewer_work,
    operator_work,
    weight_bytes,
)
from uvm_kv.hw.model import ModelGeometry
from uvm_kv.hw.profile import HardwareProfile
from uvm_kv.hw.roofline import Roofline, operand_bits, peak_ops_per_s
from uvm_kv.types import Phase


@dataclass(frozen=True)
class Operator:
    """One operator; all quantities are of one execution, of which a step has `count` (the layers, or 1)."""

    name: str
    count: int
    ops: float
    num_bytes: float
    peak_ops_per_s: float
    hbm_bytes_per_s: float
    """Nominal rates of the card: what the roof is made of."""
    time_s: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.ops / self.num_bytes

    @property
    def bound(self) -> str:
        """Left of the roof's ridge `memory`, else `compute`."""
        return "memory" if self.intensity < self.peak_ops_per_s / self.hbm_bytes_per_s else "compute"

    @property
    def attainable_ops_per_s(self) -> float:
        return min(self.peak_ops_per_s, self.intensity * self.hbm_bytes_per_s)

    @property
    def roof_s(self) -> float:
        """The time at the roof, which `time_s` exceeds by launch cost and what the kernel does not reach."""
        return max(self.ops / self.peak_ops_per_s, self.num_bytes / self.hbm_bytes_per_s)


@dataclass(frozen=True)
class StepAnalysis:
    """A step of `batch_size` sequences. `sequence_length` is the prompt in prefill; in decode it is what the new token
    attends to, itself included."""

    model: ModelGeometry
    profile: HardwareProfile
    stage: Phase
    batch_size: int
    sequence_length: int
    precision: Precision
    counting: Counting
    operators: tuple[Operator, ...]
    weight_bytes: int
    """Weight bytes as counted; LLM-Viewer leaves embedding and head out."""
    kv_bytes: int
    activation_bytes: int
    required_bytes: int
    """Bytes that the card must hold: all weights, the KV and the activation peak, whatever the counting."""

    @property
    def total_s(self) -> float:
        return sum(op.count * op.time_s for op in self.operators)

    @property
    def total_ops(self) -> float:
        return sum(op.count * op.ops for op in self.operators)

    @property
    def total_bytes(self) -> float:
        return sum(op.count * op.num_bytes for op in self.operators)

    @property
    def fits(self) -> bool:
        return self.required_bytes <= self.profile.gpu.memory_bytes

    @property
    def warnings(self) -> list[str]:
        found = []
        if not self.fits:
            found.append(
                f"does not fit {self.profile.name}: weights, KV and activations take "
                f"{self.required_bytes / 1e9:.2f} GB of {self.profile.gpu.memory_bytes / 1e9:.2f} GB"
            )
        if self.sequence_length > self.model.max_position_embeddings:
            found.append(
                f"sequence_length={self.sequence_length} is beyond the context of {self.model.name}, "
                f"{self.model.max_position_embeddings} tokens"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Operators with the fields of one execution and their `count`; the totals are over all executions.

        `roof_share` is the time at the roof over `time_ms`: 1 under `llm_viewer`, which charges the roof itself.
        """
        return {
            "model": self.model.name,
            "hardware": self.profile.name,
            "stage": self.stage.value,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "weight_bits": self.precision.weight_bits,
            "activation_bits": self.precision.activation_bits,
            "kv_bits": self.precision.kv_bits,
            "counting": self.counting.value,
            "num_heads": self.model.num_heads,
            "num_kv_heads": self.model.num_kv_heads,
            "operators": [
                {
                    "name": op.name,
                    "count": op.count,
                    "ops": op.ops,
                    "bytes": op.num_bytes,
                    "intensity": op.intensity,
                    "bound": op.bound,
                    "attainable_ops_per_s": op.attainable_ops_per_s,
                    "time_ms": op.time_s * 1e3,
                    "roof_share": op.roof_s / op.time_s,
                }
                for op in self.operators
            ],
            "total_ms": self.total_s * 1e3,
            "total_ops": self.total_ops,
            "total_bytes": self.total_bytes,
            "weight_bytes": self.weight_bytes,
            "kv_bytes": self.kv_bytes,
            "activation_bytes": self.activation_bytes,
            "required_bytes": self.required_bytes,
            "card_bytes": self.profile.gpu.memory_bytes,
            "fits": self.fits,
            "warnings": self.warnings,
        }


def analyze_step(
    profile: HardwareProfile,
    model: ModelGeometry,
    *,
    stage: Phase,
    batch_size: int,
    sequence_length: int,
    precision: Precision,
    counting: Counting,
) -> StepAnalysis:
    """Never refuses for size: what does not fit the card is flagged in the result."""
    arguments = (profile, model, stage, batch_size, sequence_length, precision)
    exact = counting is Counting.EXACT
    operators = _exact(*arguments) if exact else _llm_viewer(*arguments)
    weights = weight_bytes(model, precision)
    kv = batch_size * sequence_length * model.kv_bytes_per_token(precision.kv_bits / 8)
    num_tokens = batch_size * (sequence_length if stage is Phase.PREFILL else 1)
    activations = model.activation_bytes(num_tokens, batch_size, precision.activation_bits / 8)
    return StepAnalysis(
        model=model,
        profile=profile,
        stage=stage,
        batch_size=batch_size,
        sequence_length=sequence_length,
        precision=precision,
        counting=counting,
        operators=tuple(operators),
        weight_bytes=weights if exact else llm_viewer_weight_bytes(model, precision),
        kv_bytes=kv,
        activation_bytes=activations,
        required_bytes=weights + kv + activations,
    )


def _exact(
    profile: HardwareProfile,
    model: ModelGeometry,
    stage: Phase,
    batch_size: int,
    sequence_length: int,
    precision: Precision,
) -> list[Operator]:
    """Costs as the simulator charges them: the profile's fitted operators, decode attention by its KV bytes."""
    roofline = Roofline(profile, model, 2, precision)
    num_tokens = batch_size

    def operator(name: str, count: int, work: Work, time_s: float | None = None) -> Operator:
        peak = peak_ops_per_s(profile, operand_bits(name, precision))
        seconds = roofline.operator_s(name, *work) if time_s is None else time_s
        return Operator(name, count, *work, peak, profile.gpu.hbm_gb_per_s * 1e9, seconds)

    if stage is Phase.PREFILL:
        num_tokens *= sequence_length
        ops, num_bytes = attention_work(model, sequence_length, 0, precision)
        attention_s = batch_size * roofline.prefill_attention_s(sequence_length, 0)  # A kernel a sequence.
    else:
        ops, num_bytes = attention_work(model, 1, sequence_length - 1, precision)
        attention_s = roofline.decode_attention_s(batch_size * sequence_length)
    operators = [operator("embedding", 1, embedding_work(model, num_tokens, precision))]
    for name, work in operator_work(model, num_tokens, precision).items():
        if name == "o_proj":
            operators.append(
                operator("attn", model.num_layers, (batch_size * ops, batch_size * num_bytes), attention_s)
            )
        operators.append(operator(name, model.num_layers, work))
    operators.extend(operator(name, 1, work) for name, work in head_work(model, batch_size, precision).items())
    return operators


def _llm_viewer(
    profile: HardwareProfile,
    model: ModelGeometry,
    stage: Phase,
    batch_size: int,
    sequence_length: int,
    precision: Precision,
) -> list[Operator]:
    """Time = operations / attainable rate, one peak for all: int8 only where weights, activations and KV allow it."""
    peak = profile.gpu.tensor_int8_top_per_s if precision.widest <= 8 else profile.gpu.tensor_tflop_per_s
    hbm = profile.gpu.hbm_gb_per_s * 1e9
    operators = []
    for name, work in llm_viewer_work(model, stage, batch_size, sequence_length, precision).items():
        count = 1 if name == "lm_head" else model.num_layers
        time_s = max(work[0] / (peak * 1e12), work[1] / hbm)
        operators.append(Operator(name, count, *work, peak * 1e12, hbm, time_s))
    return operators
