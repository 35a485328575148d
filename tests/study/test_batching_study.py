"""The batching study: knees, sustained rates, and claims that follow made-up curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from uvm_kv.report.style import save_figure
from uvm_kv.study.batching import STUDY
from uvm_kv.study.batching_rates import knee, sustained

RATES = [1.0, 2.0, 4.0, 8.0]
FLAT = [0.02, 0.021, 0.03, 0.5]
LATE = [0.2, 0.1, 0.2, 0.9]


def made(curves: dict[tuple[str, float, bool], list[float]], **more: Any) -> pd.DataFrame:
    """(scheduler, window, chunked) -> latencies at RATES."""
    rows = [
        {
            "model": "llama3_8b",
            "hardware": "rtx3090",
            "workload": "azure_conv",
            "arrival": "poisson",
            "scheduler": scheduler,
            "offered_batch": 32,
            "request_rate": rate,
            "origin": "simulated",
            "seed": 0,
            "repeat": 0,
            "setting": {
                "scheduler.window_s": window,
                "scheduler.chunked_prefill": chunked,
                "workload.request_rate": rate,
                "memory.device_kv_bytes": 6e9 if chunked else 5e9,
            },
            "variant": {},
            "normalized_latency_s.mean": value,
            "normalized_latency_s.p50": 0.9 * value,
            "normalized_latency_s.p99": 2 * value,
            "ttft_s.p50": 10 * value,
            "tpot_s.p50": value,
            "tpot_s.p99": 1.5 * value,
            "running_batch_mean": 8.0,
            "num_measured_requests": 300,
            "output_tokens_per_s_whole_run": 100 * rate,
        }
        | more
        for (scheduler, window, chunked), curve in curves.items()
        for rate, value in zip(RATES, curve, strict=True)
    ]
    return pd.DataFrame(rows)


USUAL = {
    ("static", 1.0, True): LATE,
    ("dynamic", 1.0, True): [0.04, 0.05, 0.2, 0.9],
    ("dynamic", 8.0, True): [0.05, 0.05, 0.3, 0.9],
    ("continuous", 1.0, True): FLAT,
    ("continuous", 1.0, False): [0.02, 0.022, 0.032, 0.6],
}


def claims(runs: pd.DataFrame) -> str:
    return "\n".join(STUDY.draw(runs, []).claims)


def test_the_knee_is_where_rate_over_latency_is_largest() -> None:
    assert knee([1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 5, 10]) == 4
    assert knee([1, 2, 3, 4, 5, 6], [9, 3, 1, 1, 5, 10]) == 4, "what falls first raises the power"
    assert knee([1, 2, 4], [1, 1.9, 4]) == 2
    assert knee([1, 2, 3, 4], [1, 1.1, 1.2, 1.3]) == float("inf"), "it hardly rises: no knee yet"
    assert knee([1, 2, 3, 4], [1, 5, 8, 9]) == float("-inf"), "it rises from the first point on"


@pytest.mark.parametrize("service_s", [0.1, 0.5])
def test_the_knee_of_a_queue_is_the_known_one_wherever_the_rates_end(service_s: float) -> None:
    """M/M/1 stays 1 / (mu - lambda): the power lambda * (mu - lambda) is largest at half the service rate. Of a finite
    trace the latency stops to rise, so that the power rises again; that is no knee."""
    rates = [float(load) / service_s for load in np.arange(0.1, 0.96, 0.05)]
    latency = [1 / (1 / service_s - rate) for rate in rates]
    beyond = [rates[-1] * 2**i for i in range(1, 6)]
    for end in range(11, len(rates) + 1):
        assert knee(rates[:end], latency[:end]) == pytest.approx(0.5 / service_s)
    assert knee(rates + beyond, [*latency, *[latency[-1]] * 5]) == pytest.approx(0.5 / service_s)


def test_the_sustained_rate_is_interpolated_between_the_points_on_both_sides_of_the_bound() -> None:
    assert sustained([1, 2, 4], [1, 1, 4], 2) == pytest.approx(2 * 2**0.5)
    assert sustained([1, 2, 4], [1, 1, 1.5], 2) == 4
    assert sustained([1, 2, 4], [3, 3, 3], 2) == 0
    assert sustained([1, 2, 4], [3, 1, 1.5], 2) == 4, "a batch that waits to be filled is slow at low rates only"
    assert sustained([1, 2, 4], [1, 4, 1.5], 2) == pytest.approx(2**0.5), "up to the first that exceeds it"


def test_labels_and_lines_are_those_of_the_runs() -> None:
    table = STUDY.draw(made(USUAL), []).table
    assert set(table["batching"]) == {
        "static",
        "dynamic (1 s)",
        "dynamic (8 s)",
        "continuous (chunked prefill)",
        "continuous (whole prefills)",
    }
    at = table[(table["batching"] == "continuous (chunked prefill)")].set_index("request_rate")
    assert at["normalized_latency_s.mean"].tolist() == FLAT, "the mean, as facts of the field define it"
    assert set(at["knee_rate"]) == {4.0} and set(at["knee_latency_s"]) == {0.03}


def test_claims_follow_the_curves() -> None:
    usual = claims(made(USUAL))
    assert "continuous (chunked prefill) 4;" in usual and "static 4;" in usual and "dynamic (1 s) 2;" in usual
    assert "mean normalized latency of at most 60 ms per token, 3 times the lowest, " in usual
    assert "Continuous batching sustains 2" in usual
    assert (
        "8 requests/s" not in usual
        and "4 requests/s: chunked prefill lowers p99 TPOT (-6.2 %, of 3 requests per run)" in usual
    )

    worse = USUAL | {("continuous", 1.0, True): [0.02, 0.025, 0.04, 0.9]}
    assert "chunked prefill does not lower p99 TPOT (+25.0 %, of 3 requests per run)" in claims(made(worse))
    swapped = USUAL | {("dynamic", 1.0, True): [0.02, 0.02, 0.02, 0.02]}
    assert "Continuous batching sustains only" in claims(made(swapped)) and "8 and more" in claims(made(swapped))
    assert "chunked prefill" not in claims(made({k: v for k, v in USUAL.items() if k[2] and k[0] != "continuous"}))
    only = {k: v for k, v in USUAL.items() if k[0] == "continuous"} | {("static", 1.0, True): LATE}
    assert "Only continuous batching keeps it" in claims(made(only))


def test_the_drawing_is_the_same_to_the_byte(tmp_path: Path) -> None:
    runs = made(USUAL)
    first = save_figure(STUDY.draw(runs, []).figure, tmp_path / "a")
    again = save_figure(STUDY.draw(runs.sample(frac=1, random_state=1), []).figure, tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no run with workload.arrival=poisson"):
        STUDY.draw(made(USUAL, arrival="closed_loop"), [])
    with pytest.raises(ValueError, match="without a normalized latency"):
        STUDY.draw(made(USUAL).drop(columns="normalized_latency_s.mean"), [])
    for name, other in (("model", "llama_7b"), ("hardware", "h100"), ("origin", "measured")):
        with pytest.raises(ValueError, match=f"several {name}s"):
            STUDY.draw(pd.concat([made(USUAL), made(USUAL, **{name: other})]), [])
    with pytest.raises(ValueError, match="differ in block_size"):
        STUDY.draw(pd.concat([made(USUAL), made({("continuous", 1.0, True): FLAT}, variant={"block_size": 32})]), [])


def test_seeds_and_repeats_are_medians_with_their_range() -> None:
    """Three draws; knees and sustained rates are found in each, and not in the medians of their curves."""
    early = USUAL | {("continuous", 1.0, True): [0.02, 0.022, 0.1, 0.9], ("static", 1.0, True): LATE}
    late = USUAL | {("continuous", 1.0, True): [0.02, 0.021, 0.026, 0.03]}
    drawn = STUDY.draw(pd.concat([made(early, seed=0), made(USUAL, seed=1), made(late, seed=1, repeat=1)]), [])
    at = drawn.table[drawn.table["batching"] == "continuous (chunked prefill)"].set_index("request_rate")
    assert set(at["num_runs"]) == {3}
    assert at["normalized_latency_s.mean"].tolist() == [0.02, 0.021, 0.03, 0.5]
    assert at["normalized_latency_s.mean_low"].tolist() == [0.02, 0.021, 0.026, 0.03]
    assert at["normalized_latency_s.mean_high"].tolist() == [0.02, 0.022, 0.1, 0.9]
    assert at.loc[1.0, ["knee_rate_low", "knee_rate", "knee_rate_high"]].tolist() == [2, 4, float("inf")]
    said = "\n".join(drawn.claims)
    assert "continuous (chunked prefill) 4 (2 to beyond 8)" in said
    assert "(medians of 3 runs, and their range" in said
    assert "chunked prefill lowers p99 TPOT in 2 of 3 runs (-6.2 %" in said
