"""Energy of a simulated run from a stated power model; measured runs read the card's own counter instead."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PowerModel:
    idle_w: float
    active_w: float
    waiting_w: float
    """While the compute stream waits for memory."""


def energy_j(power: PowerModel, *, duration_s: float, busy_s: float, stall_s: float) -> float:
    """active_w while computing, waiting_w while stalled, idle_w between steps."""
    idle_s = max(0.0, duration_s - busy_s)
    return power.active_w * (busy_s - stall_s) + power.waiting_w * stall_s + power.idle_w * idle_s
