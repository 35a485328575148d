"""The headline of batch_sweep: by card and origin, and what measured runs do not decide is not counted."""

from __future__ import annotations

from typing import Any

import pandas as pd

from tests.study.made import run, table
from uvm_kv.study.batch_sweep import STUDY


def runs(gain: float, *factors: float, **more: Any) -> pd.DataFrame:
    """A card alone at 100 tokens/s, CPU-backed KV at 1 + `gain` of it; repeats times each of `factors`."""
    queued = {"running_batch_mean": 8.0, "waiting_batch_mean": 8.0}
    rows = [
        run(mechanism, batch, rate * x, repeat=i, **{"tpot_s.p50": 0.01}, **here, **more)
        for i, x in enumerate(factors or (1.0,))
        for mechanism, rate in (("device_resident", 100.0), ("pinned_balanced", 100.0 * (1 + gain)))
        for batch, here in ((8, {}), (16, queued))
    ]
    return table(*rows)


def headline(made: pd.DataFrame) -> str:
    return STUDY.draw(made, ()).claims[0]


def test_the_headline_counts_what_was_raised() -> None:
    head = headline(runs(0.1))
    assert head.startswith(
        "On a simulated rtx3090, decode alone, no prefill, CPU-backed KV raised the best throughput of 1 of 1 workloads"
    )
    assert "(llama2_7b, fixed 448+64: +10.0 % (pinned_balanced)); at equal p99 TPOT it did so in 1 of them." in head
    assert "of none of 1 workloads" in (same := headline(runs(0.005))) and "llama2_7b, fixed 448+64: +0.5 %" in same
    assert not STUDY.draw(runs(0.1).iloc[:1], ()).claims[0].startswith("On a")


def test_measured_gains_count_by_their_repeats_alone() -> None:
    single = headline(runs(0.1, origin="measured"))
    assert "On a measured rtx3090, decode alone, no prefill, CPU-backed KV raised the best throughput of none" in single
    assert "AMBIGUOUS, and not counted: llama2_7b, fixed 448+64, which needs 3 repeats on both sides" in single
    noisy = headline(runs(0.1, 0.8, 1.0, 1.2, origin="measured"))
    assert "of none of 1" in noisy and "AMBIGUOUS, and not counted: llama2_7b, fixed 448+64 (95 % interval -" in noisy
    quiet = headline(runs(0.1, 0.999, 1.0, 1.001, origin="measured"))
    assert "of 1 of 1 workloads" in quiet and "AMBIGUOUS" not in quiet and "in 1 of them" in quiet


def test_origins_and_cards_are_told_apart() -> None:
    faster = runs(0.5, 0.999, 1.0, 1.001, origin="measured")
    other = runs(0.049, hardware="a100_40g")
    drawn = STUDY.draw(pd.concat([runs(0.005), faster, other]), ())
    parts = drawn.claims[0].split(" On a ")
    assert [part.removeprefix("On a ").partition(",")[0] for part in parts] == [
        *("measured rtx3090", "simulated a100_40g", "simulated rtx3090")
    ]
    assert "1 of 1 workloads" in parts[0] and "+50.0 %" in parts[0]
    assert "1 of 1 workloads" in parts[1] and "+4.9 %" in parts[1]
    assert "none of 1 workloads" in parts[2] and "+0.5 %" in parts[2]
    titles = {axis.get_title(loc="left") for axis in drawn.figure.axes} - {""}
    assert len(titles) == 3 and all("on a " in title for title in titles)
    assert len(drawn.table[["origin", "hardware"]].drop_duplicates()) == 3


def test_what_else_tells_comparisons_apart_is_in_their_names() -> None:
    wide = runs(0.1, setting={"hardware.link.h2d_gb_per_s": 50.0})
    head = headline(pd.concat([runs(0.1), wide]))
    assert "2 of 2 workloads" in head and "hardware.link.h2d_gb_per_s=50.0: +10.0 %" in head
