"""The batching study: knees, sustained rates, and claims that follow made-up curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from uvm_kv.analysis.study.batching import STUDY, knee, sustained
from uvm_kv.analysis.style import save_figure

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
            "request_rate": rate,
            "setting": {"scheduler.window_s": window, "scheduler.chunked_prefill": chunked},
            "variant": {},
            "normalized_latency_s.p50": value,
            "normalized_latency_s.p99": 2 * value,
            "ttft_s.p50": 10 * value,
            "tpot_s.p50": value,
            "tpot_s.p99": 1.5 * value,
            "running_batch_mean": 8.0,
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


def test_kneedle_finds_the_elbow() -> None:
    assert knee([1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 5, 10]) == 4
    assert knee([1, 2, 3, 4, 5, 6], [9, 3, 1, 1, 5, 10]) == 4, "what falls first is left out"
    assert knee([1, 2, 3, 4], [1, 1.1, 1.2, 1.3]) is None, "it hardly rises"
    assert knee([1, 2, 3, 4], [1, 5, 8, 9]) is None, "it rises from the first point on"
    assert knee([1, 2], [1, 9]) is None


def test_the_sustained_rate_is_interpolated_between_the_points_on_both_sides_of_the_bound() -> None:
    assert sustained([1, 2, 4], [1, 1, 4], 2) == pytest.approx(2 * 2**0.5)
    assert sustained([1, 2, 4], [1, 1, 1.5], 2) == 4
    assert np.isnan(sustained([1, 2, 4], [3, 3, 3], 2))
    assert sustained([1, 2, 4], [3, 1, 1.5], 2) == 4, "a batch that waits to be filled is slow at low rates only"


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
    assert at["normalized_latency_s.p50"].tolist() == FLAT
    assert at["is_knee"].tolist() == [False, False, True, False]
    assert set(at["knee_rate"]) == {4.0}


def test_claims_follow_the_curves() -> None:
    usual = claims(made(USUAL))
    assert "continuous (chunked prefill) 4;" in usual and "static none" in usual
    assert "Continuous batching sustains 2" in usual
    assert "8 requests/s" not in usual and "4 requests/s: chunked prefill lowers p99 TPOT (-6.2 %)" in usual

    worse = USUAL | {("continuous", 1.0, True): [0.02, 0.025, 0.04, 0.9]}
    assert "chunked prefill does not lower p99 TPOT (+25.0 %)" in claims(made(worse))
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
        STUDY.draw(made(USUAL).drop(columns="normalized_latency_s.p50"), [])
    with pytest.raises(ValueError, match=r"several runs of continuous \(chunked prefill\) at 1 requests/s"):
        STUDY.draw(pd.concat([made(USUAL), made({("continuous", 1.0, True): FLAT})]), [])
    with pytest.raises(ValueError, match="several models"):
        STUDY.draw(pd.concat([made(USUAL), made(USUAL, model="llama_7b")]), [])
