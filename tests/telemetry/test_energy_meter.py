"""EnergyMeter on played clocks and a played counter: what a window costs, and what is not known of it."""

from __future__ import annotations

import pytest

from tests.telemetry.test_summary import FOUR_STEPS, TWO_REQUESTS, S
from uvm_kv.telemetry.energy import READ_EVERY_NS, READING_SHARE, REST_S, EnergyMeter
from uvm_kv.telemetry.summary import summarize

MS = 1_000_000


class Card:
    """A card whose counter follows `power_w`, on a wall clock of its own; the run's clock begins at `started_ns` and
    lags behind by what it stood still."""

    def __init__(self, *, reading_ns: int = 0, has_counter: bool = True) -> None:
        self.wall_ns, self.stood_ns, self.started_ns = 0, 0, 0
        self.joules, self.power_w = 1000.0, 60.0
        self.reading_ns, self.has_counter, self.num_reads, self.slept_s = reading_ns, has_counter, 0, 0.0
        self.meter = EnergyMeter(self.read, wall_ns=lambda: self.wall_ns, sleep=self.sleep)

    def pass_ns(self, ns: int) -> None:
        self.wall_ns += ns
        self.joules += self.power_w * ns / S

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds
        self.pass_ns(round(seconds * S))

    def read(self) -> float | None:
        self.num_reads += 1
        self.pass_ns(self.reading_ns)
        return self.joules if self.has_counter else None

    def now_ns(self) -> int:
        return self.wall_ns - self.started_ns - self.stood_ns

    def stand_still(self, ns: int) -> None:
        self.pass_ns(ns)
        self.stood_ns += ns

    def start(self) -> None:
        self.meter.rest()
        self.started_ns = self.wall_ns
        self.meter.start(self.now_ns)

    def steps(self, count: int, ns: int, power_w: float) -> None:
        self.power_w = power_w
        for _ in range(count):
            self.pass_ns(ns)
            self.meter.step()


def test_a_window_is_what_the_counter_says_between_its_ends() -> None:
    card = Card()
    card.start()
    card.steps(100, 20 * MS, 300)  # 0 to 2 s
    card.steps(100, 20 * MS, 100)  # 2 to 4 s
    card.meter.stop()
    assert card.meter.energy_j(0, 4 * S) == pytest.approx(800)
    assert card.meter.energy_j(1 * S, 3 * S) == pytest.approx(400)
    # Its ends lie between readings.
    assert card.meter.energy_j(1_013 * MS, 1_777 * MS) == pytest.approx(300 * 0.764)


def test_idle_power_is_that_of_a_card_at_rest() -> None:
    card = Card()
    card.start()
    assert card.meter.idle_power_w == pytest.approx(60)
    assert card.slept_s == 2 * REST_S


def test_readings_are_rare_and_take_a_small_part_of_the_time() -> None:
    quick = Card()
    quick.start()
    before = quick.num_reads
    quick.steps(1000, 5 * MS, 300)  # 5 s
    assert quick.num_reads - before == 5 * S // READ_EVERY_NS
    slow = Card(reading_ns=2 * MS)
    slow.start()
    before = slow.num_reads
    slow.steps(1000, 5 * MS, 300)
    assert 0 < (slow.num_reads - before) * 2 * MS <= 1.01 * READING_SHARE * slow.now_ns()
    slow.meter.stop()
    assert slow.meter.energy_j(S, 4 * S) == pytest.approx(900)


def test_what_a_card_takes_while_the_clock_stands_still_is_not_the_runs() -> None:
    """KV is filled in the first step for 3 s at 500 W; the mean power of the other steps stands for that step."""
    card = Card()
    card.start()
    card.power_w = 500
    card.stand_still(3 * S)
    card.steps(100, 20 * MS, 200)
    card.meter.stop()
    assert card.now_ns() == 2 * S
    assert card.meter.energy_j(0, 2 * S) == pytest.approx(400)


def test_what_is_not_known_is_none() -> None:
    blind = Card(has_counter=False)
    blind.start()
    blind.steps(100, 20 * MS, 300)
    blind.meter.stop()
    assert blind.meter.energy_j(0, S) is blind.meter.idle_power_w is None
    assert blind.slept_s == 0
    assert blind.num_reads == 3, "a card without a counter is not asked again and again"
    card = Card()
    card.start()
    assert card.meter.energy_j(0, S) is None, "it ends after the last reading"
    card.steps(100, 20 * MS, 300)
    assert card.meter.energy_j(0, 100 * MS) is None, "the counter is too coarse for it"
    card.stand_still(S)
    card.steps(1, 3 * S, 300)
    assert card.meter.energy_j(S, 5 * S) is None, "more than half of it is unknown"


def test_the_summary_divides_the_energy_of_the_window_by_its_tokens() -> None:
    """The steady window is (1, 4] s, with 6 tokens."""
    card = Card()
    card.start()
    card.steps(250, 20 * MS, 200)
    card.meter.stop()
    result = summarize(FOUR_STEPS, TWO_REQUESTS, power=None, complete=True, meter=card.meter)
    assert result["energy_j"] == pytest.approx(600)
    assert result["energy_j_per_output_token"] == pytest.approx(100)
    assert result["idle_power_w"] == pytest.approx(60)


def test_without_a_meter_there_is_no_idle_power() -> None:
    assert summarize(FOUR_STEPS, TWO_REQUESTS, power=None, complete=True)["idle_power_w"] is None
