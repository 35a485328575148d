"""The account of a card's memory, which is printed before every run."""

from __future__ import annotations

from dataclasses import dataclass

from uvm_kv.hw.counting import Precision, weight_bytes
from uvm_kv.hw.model import ModelGeometry
from uvm_kv.hw.profile import HardwareProfile

LOGIT_ROWS = 256
"""Rows of logits that the activation peak is counted with, so that the KV budget does not move with the batch size."""


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes. Without an explicit KV size, kv = size * utilization - context - weights - activations - workspace."""

    card_bytes: int
    utilization: float
    context_bytes: int
    weight_bytes: int
    activation_bytes: int
    workspace_bytes: int
    """Workspace of the attention kernel, where its size is known before it runs."""
    kv_bytes: int
    kv_is_given: bool
    quantization: str | None = None
    """How quantized weights are stored."""

    def rows(self) -> list[tuple[str, int]]:
        """The lines of the printed table."""
        if self.kv_is_given:
            fixed = self.context_bytes + self.weight_bytes + self.activation_bytes + self.workspace_bytes
            rest = self.card_bytes - fixed - self.kv_bytes
            closing = [("KV budget (memory.device_kv_bytes)", self.kv_bytes), ("left free", rest)]
        else:
            usable = int(self.card_bytes * self.utilization)
            closing = [
                (f"left by gpu_memory_utilization {self.utilization:.2f}", usable - self.card_bytes),
                ("KV budget", self.kv_bytes),
            ]
        weights = "weights"
        if self.quantization is not None:
            weights += f" ({self.quantization}; embedding and head 16 bits)"
        return [
            ("card", self.card_bytes),
            ("CUDA context and libraries", -self.context_bytes),
            (weights, -self.weight_bytes),
            ("activation peak", -self.activation_bytes),
            *([("attention workspace", -self.workspace_bytes)] if self.workspace_bytes else []),
            *closing,
        ]


def memory_budget(
    profile: HardwareProfile,
    model: ModelGeometry,
    *,
    precision: Precision,
    max_num_batched_tokens: int,
    batch_size: int,
    utilization: float,
    device_kv_bytes: int | None,
    workspace_bytes: int = 0,
) -> MemoryBudget:
    """Raise ValueError where weights, activations, the workspace and KV do not fit the card."""
    card = profile.gpu.memory_bytes
    weights = weight_bytes(model, precision)
    rows = max(batch_size, LOGIT_ROWS)
    activations = model.activation_bytes(max_num_batched_tokens, rows, precision.activation_bits / 8)
    fixed = f"weights {_gb(weights)} + activation peak {_gb(activations)}"
    if workspace_bytes:
        fixed += f" + attention workspace {_gb(workspace_bytes)}"
    if device_kv_bytes is None:
        kv = int(card * utilization) - profile.gpu.context_bytes - weights - activations - workspace_bytes
        if kv <= 0:
            raise ValueError(
                f"{model.name} leaves no KV memory on {profile.name}: {fixed} + context "
                f"{_gb(profile.gpu.context_bytes)} of {_gb(int(card * utilization))} (memory.gpu_memory_utilization="
                f"{utilization} of {_gb(card)}); use a larger card, a smaller model or a higher utilization"
            )
    else:
        kv = device_kv_bytes
        if weights + activations + workspace_bytes + kv > card:
            raise ValueError(
                f"memory.device_kv_bytes={kv} does not fit {profile.name}: {fixed} + KV {_gb(kv)} exceed {_gb(card)}; "
                f"at most {max(0, card - weights - activations - workspace_bytes)} is allowed"
            )
    context, is_given = profile.gpu.context_bytes, device_kv_bytes is not None
    stored = None if precision.quantization is None else str(precision.quantization)
    return MemoryBudget(card, utilization, context, weights, activations, workspace_bytes, kv, is_given, stored)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
