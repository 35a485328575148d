"""Summary arithmetic on tables small enough to work out by hand."""

from __future__ import annotations

import pytest

from uvm_kv.kvcache.ops import MemoryCounters
from uvm_kv.telemetry.energy import PowerModel, energy_j
from uvm_kv.telemetry.recorder import REQUEST_COLUMNS, STEP_COLUMNS, Table
from uvm_kv.telemetry.summary import summarize

S = 1_000_000_000


def steps(rows: list[dict[str, int | None]]) -> Table:
    return {name: [row.get(name, 0) for row in rows] for name in STEP_COLUMNS}


def requests(rows: list[tuple[int, ...]]) -> Table:
    return {name: [row[i] for row in rows] for i, name in enumerate(REQUEST_COLUMNS)}


FOUR_STEPS = steps(
    [
        {"start_ns": 0, "end_ns": S, "num_output_tokens": 1, "num_running": 1},
        {"start_ns": S, "end_ns": 2 * S, "num_output_tokens": 2, "num_running": 2},
        {"start_ns": 2 * S, "end_ns": 4 * S, "num_output_tokens": 4, "num_running": 3, "stall_ns": S},
        {"start_ns": 4 * S, "end_ns": 5 * S, "num_output_tokens": 8, "num_running": 1},
    ]
)
# id, prompt, output, arrival, admitted, first token, finish, preemptions, measured
TWO_REQUESTS = requests([(0, 8, 2, 0, 0, S, S, 0, False), (1, 8, 5, S, 4 * S, 3 * S, 5 * S, 1, True)])


def test_steady_throughput_is_taken_from_first_completion_to_last_admission() -> None:
    """Completion at 1 s, last admission at 4 s: the steps that end in (1, 4] put out 2 + 4 tokens in 3 s."""
    result = summarize(FOUR_STEPS, TWO_REQUESTS, power=None, complete=True)
    assert result["output_tokens_per_s"] == pytest.approx(2.0)
    assert result["output_tokens_per_s_whole_run"] == pytest.approx(3.0)
    assert result["steady_window_s"] == [1.0, 4.0]
    assert result["running_batch_mean"] == pytest.approx((2 * 1 + 3 * 2) / 3)
    assert result["running_batch_max"] == 3


def test_latencies_are_those_of_measured_requests_only() -> None:
    result = summarize(FOUR_STEPS, TWO_REQUESTS, power=None, complete=True)
    assert result["ttft_s"]["mean"] == pytest.approx(2.0)
    assert result["tpot_s"]["p99"] == pytest.approx(2.0 / 4)
    assert result["num_measured_requests"] == 1


def test_what_was_not_observed_is_none_not_zero() -> None:
    blind: list[dict[str, int | None]] = [{"start_ns": 0, "end_ns": S} | dict.fromkeys(MemoryCounters._fields)]
    power = PowerModel(1.0, 2.0, 3.0)
    result = summarize(steps(blind), requests([]), power=power, complete=True)
    for name in ("h2d_bytes", "d2h_bytes", "gpu_fault_groups", "evicted_chunks", "stall_s", "energy_j"):
        assert result[name] is None
    assert result["ttft_s"]["p50"] is None


def test_energy_is_active_while_computing_waiting_while_stalled_idle_between() -> None:
    power = PowerModel(idle_w=10, active_w=300, waiting_w=100)
    assert energy_j(power, duration_s=10, busy_s=6, stall_s=2) == 300 * 4 + 100 * 2 + 10 * 4


def test_end_to_end_latency_and_the_same_over_the_length_of_the_output() -> None:
    """Arrival at 1 s, last token at 5 s, 5 tokens; the request that is not measured is left out."""
    result = summarize(FOUR_STEPS, TWO_REQUESTS, power=None, complete=True)
    assert set(result["e2e_s"].values()) == {4.0}
    assert result["normalized_latency_s"] == dict.fromkeys(("mean", "p50", "p90", "p99"), 0.8)


def test_normalized_latency_is_the_mean_of_ratios_not_the_ratio_of_means() -> None:
    two = requests([(0, 8, 2, 0, 0, S, 4 * S, 0, True), (1, 8, 8, 0, 0, S, 8 * S, 0, True)])
    result = summarize(FOUR_STEPS, two, power=None, complete=True)
    assert result["normalized_latency_s"]["mean"] == (4 / 2 + 8 / 8) / 2
    assert result["e2e_s"]["mean"] == 6.0


def test_a_steady_start_prefills_nothing_and_has_no_latency_from_arrival() -> None:
    result = summarize(FOUR_STEPS, TWO_REQUESTS, power=None, complete=True, steady_until_ns=5 * S)
    for name in ("ttft_s", "e2e_s", "normalized_latency_s"):
        assert set(result[name].values()) == {None}
    assert result["tpot_s"]["mean"] is not None


def test_energy_per_token_with_and_without_idle_power() -> None:
    """4 s of computing and 1 s of waiting in 5 s: 15 tokens."""
    result = summarize(FOUR_STEPS, TWO_REQUESTS, power=PowerModel(10, 300, 100), complete=True)
    assert result["energy_j_per_output_token"] == pytest.approx((4 * 300 + 100) / 15)
    assert result["energy_j_per_output_token_above_idle"] == pytest.approx((4 * 290 + 90) / 15)
    assert (result["power_w"], result["idle_power_w"]) == (pytest.approx(1300 / 5), 10)
    blind = summarize(FOUR_STEPS, TWO_REQUESTS, power=None, complete=True)
    for name in ("energy_j_per_output_token", "energy_j_per_output_token_above_idle", "power_w", "idle_power_w"):
        assert blind[name] is None


def test_the_steady_window_begins_after_the_last_request_that_is_not_measured() -> None:
    """All clients' first prefill lies before it."""
    rows = [
        (0, 8, 2, 0, 0, S, S, 0, False),
        (1, 8, 5, 0, 0, S, 2 * S, 0, False),
        (2, 8, 5, 0, 4 * S, 4 * S, 5 * S, 0, True),
    ]
    result = summarize(FOUR_STEPS, requests(rows), power=None, complete=True)
    assert result["steady_window_s"] == [2.0, 4.0]
    late = [rows[0], (*rows[1][:6], 5 * S, 0, False), rows[2]]
    result = summarize(FOUR_STEPS, requests(late), power=None, complete=True)
    assert result["steady_window_s"] is None and "too few requests follow those that warm up" in result["warnings"][0]


def test_a_run_that_was_stopped_in_its_warm_up_has_no_steady_window() -> None:
    """One of three clients has not finished its first request, so the finishes of the others do not end the warm-up."""
    rows = [
        (0, 8, 2, 0, 0, S, S, 0, False),
        (1, 8, 5, 0, 0, S, 2 * S, 0, False),
        (3, 8, 5, 0, 4 * S, 4 * S, 5 * S, 0, True),
    ]
    assert summarize(FOUR_STEPS, requests(rows), power=None, complete=False, num_warm_up=3)["steady_window_s"] is None
    assert summarize(FOUR_STEPS, requests(rows), power=None, complete=False, num_warm_up=2)["steady_window_s"] == [
        2.0,
        4.0,
    ]


def test_a_gap_between_arrivals_is_no_steady_window() -> None:
    """Three sparse requests: the first ends before the last is admitted, and nothing runs in between."""
    rows = [(i, 8, 2, i * S, i * S, i * S + 1, i * S + 2, 0, True) for i in range(3)]
    result = summarize(FOUR_STEPS, requests(rows), power=None, complete=True)
    assert result["steady_window_s"] is None and result["output_tokens_per_s"] is None
    assert result["output_tokens_per_s_whole_run"] > 0
    many = [(i, 8, 2, 0, i * S // 8, 0, S + i * S // 8, 0, True) for i in range(32)]
    assert summarize(FOUR_STEPS, requests(many), power=None, complete=True)["steady_window_s"] == [1.0, 3.875]
