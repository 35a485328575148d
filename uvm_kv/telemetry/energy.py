"""Energy of a simulated run from a stated power model; measured runs read the card's own counter instead."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from uvm_kv.types import NS_PER_S

READ_EVERY_NS = 50_000_000
"""Shortest time between two readings."""
READING_SHARE = 0.005
"""Largest share of the time that readings may take, however long one takes."""
REST_S = 0.5
"""The card rests so long before its idle power is taken, over as long again."""
MIN_WINDOW_NS = NS_PER_S // 2
"""A shorter window has no energy: the counter itself moves every 20 to 100 ms."""
STOOD_STILL_NS = 5_000_000
"""By so much the run's clock is behind the wall clock where it stood still, rather than was read a little later."""


@dataclass(frozen=True)
class PowerModel:
    idle_w: float
    active_w: float
    waiting_w: float
    """Power while the compute stream waits for memory."""


def energy_j(power: PowerModel, *, duration_s: float, busy_s: float, stall_s: float) -> float:
    """active_w while computing, waiting_w while stalled, idle_w between steps."""
    idle_s = max(0.0, duration_s - busy_s)
    return power.active_w * (busy_s - stall_s) + power.waiting_w * stall_s + power.idle_w * idle_s


class _Reading(NamedTuple):
    time_ns: int
    """Time of the reading on the run's clock."""
    wall_ns: int
    energy_j: float


class EnergyMeter:
    """Energy of a measured run by a cumulative counter of the card: of all of it, whoever else uses it.

        rest      before the run: idle power, of the card with the model's weights in it and nothing to do
        start     the run's clock is known
        step      between two steps, never in one: a reading if one is due
        stop      the last reading

    Between two readings power is taken as constant. Where the run's clock stood still between them (KV that nobody
    computes is filled), what the card took is not the run's: the mean power of the rest of a window stands for it.
    """

    def __init__(
        self,
        read: Callable[[], float | None],
        *,
        wall_ns: Callable[[], int] = time.perf_counter_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`read`: joules so far, None where there is no counter."""
        self._read, self._wall_ns, self._sleep = read, wall_ns, sleep
        self._now_ns: Callable[[], int] = wall_ns
        self._readings: list[_Reading] = []
        self._due_ns = 0
        self.idle_power_w: float | None = None

    def rest(self) -> None:
        if self._read() is None:
            return
        self._sleep(REST_S)
        begun_ns, before = self._wall_ns(), self._read()
        self._sleep(REST_S)
        ended_ns, after = self._wall_ns(), self._read()
        if before is not None and after is not None:
            self.idle_power_w = (after - before) * NS_PER_S / (ended_ns - begun_ns)

    def start(self, now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns
        self._take()

    def step(self) -> None:
        if self._readings and self._wall_ns() >= self._due_ns:
            self._take()

    def stop(self) -> None:
        self._take()

    def _take(self) -> None:
        begun_ns, joules = self._wall_ns(), self._read()
        wall_ns, time_ns = self._wall_ns(), self._now_ns()
        self._due_ns = wall_ns + max(READ_EVERY_NS, round((wall_ns - begun_ns) / READING_SHARE))
        if joules is not None:
            self._readings.append(_Reading(time_ns, wall_ns, joules))

    def energy_j(self, begin_ns: int, end_ns: int) -> float | None:
        """Energy of a window on the run's clock, in joules. None where the window is not within the readings, is too
        short for the counter, or is unknown for more than half of its length."""
        readings = self._readings
        if not readings or end_ns - begin_ns < MIN_WINDOW_NS:
            return None
        if begin_ns < readings[0].time_ns or end_ns > readings[-1].time_ns:
            return None
        joules, known_ns = 0.0, 0
        for a, b in pairwise(readings):
            piece_ns = b.time_ns - a.time_ns
            inside_ns = min(b.time_ns, end_ns) - max(a.time_ns, begin_ns)
            if inside_ns > 0 and b.wall_ns - a.wall_ns - piece_ns < STOOD_STILL_NS:
                joules += (b.energy_j - a.energy_j) * inside_ns / piece_ns
                known_ns += inside_ns
        return joules * (end_ns - begin_ns) / known_ns if 2 * known_ns >= end_ns - begin_ns else None
