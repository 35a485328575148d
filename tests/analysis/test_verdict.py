"""The verdict against made-up points whose answer is known."""

from __future__ import annotations

import pandas as pd
import pytest

from uvm_kv.analysis.load import points
from uvm_kv.analysis.verdict import verdicts, with_gains


def table(rows: list[tuple[str, int, float, float]]) -> pd.DataFrame:
    """Mechanism, batch, tokens per second and p99 TPOT in seconds -> runs as `load_runs` returns them."""
    made = []
    for mechanism, batch, throughput, tpot in rows:
        device = mechanism.startswith("device")
        optimistic = mechanism in ("device_recompute", "pinned_swap")
        made.append(
            {
                "runner": "sim",
                "memory_emulated": False,
                "origin": "simulated",
                "hardware": "rtx3090",
                "model": "llama_7b",
                "workload": "fixed",
                "setting": {"hardware.link.h2d_gb_per_s": 25.0},
                "variant": {"placement.name": "resident"},
                "h2d_bytes": 1.0,
                "d2h_bytes": 0.0,
                "mechanism": mechanism,
                "offered_batch": batch,
                "output_tokens_per_s": throughput,
                "output_tokens_per_s_whole_run": 1.0,
                "tpot_s.p99": tpot,
                "admission": "optimistic" if optimistic else "worst_case",
                "memory": "device" if device else "pinned",
                "placement": "resident",
                "prompt_tokens": 512,
                "output_tokens": 512,
            }
        )
    return pd.DataFrame(made)


BASE = [("device_resident", 8, 100.0, 0.020), ("device_resident", 16, 105.0, 0.021)]
RECOMPUTE = [("device_recompute", 8, 100.0, 0.020), ("device_recompute", 16, 120.0, 0.030)]


def test_the_baseline_is_the_better_of_the_two() -> None:
    rows = [*BASE, *RECOMPUTE, ("pinned_balanced", 16, 115.0, 0.022)]
    (verdict,) = verdicts(points(table(rows)))
    assert verdict.baseline is not None
    assert verdict.baseline.mechanism == "device_recompute"
    assert verdict.gain == pytest.approx(115 / 120 - 1)
    assert verdict.gain_same_admission == pytest.approx(115 / 105 - 1)
    assert verdict.line().startswith("Verdict: llama_7b, fixed 512+512, on a simulated rtx3090: no, CPU-backed KV")


def test_yes_names_mechanism_batch_and_where_it_loses() -> None:
    rows = [*BASE, *RECOMPUTE, ("pinned_swap", 8, 130.0, 0.035), ("pinned_swap", 16, 90.0, 0.050)]
    (verdict,) = verdicts(points(table(rows)))
    assert verdict.challenger is not None
    assert (verdict.challenger.mechanism, verdict.challenger.batch) == ("pinned_swap", 8)
    assert verdict.loses_from == {"pinned_swap": 16}
    line = verdict.line()
    assert "yes, CPU-backed KV raised the best throughput by +8.3%" in line
    assert "it loses from batch 16 on" in line
    assert "most at an equal batch: +30.0%, by pinned_swap at batch 8" in line


def test_equal_tpot_compares_only_points_that_are_as_fast() -> None:
    """The best swap point is slower per token than the baseline's best; the other one is not."""
    rows = [*RECOMPUTE, ("pinned_swap", 8, 110.0, 0.029), ("pinned_swap", 16, 150.0, 0.060)]
    (verdict,) = verdicts(points(table(rows)))
    assert verdict.equal_tpot is not None
    assert verdict.equal_tpot.batch == 8
    assert verdict.gain_equal_tpot == pytest.approx(110 / 120 - 1)


def test_within_one_per_cent_is_no_difference() -> None:
    (verdict,) = verdicts(points(table([*BASE, ("pinned_balanced", 16, 105.5, 0.021)])))
    assert "no difference" in verdict.line()


@pytest.mark.parametrize("rows", [BASE, [("pinned_swap", 8, 110.0, 0.02)]])
def test_without_both_sides_there_is_no_verdict(rows: list[tuple[str, int, float, float]]) -> None:
    (verdict,) = verdicts(points(table(rows)))
    assert ": none, because no " in verdict.line()


def test_groups_are_never_mixed() -> None:
    runs = table([*BASE, ("pinned_swap", 8, 110.0, 0.02)])
    faster = [{"hardware.link.h2d_gb_per_s": 250.0}] * len(runs)
    other = runs.assign(setting=faster, output_tokens_per_s=runs["output_tokens_per_s"] * 10)
    replayed = runs.assign(origin="replayed")
    found = verdicts(points(pd.concat([other, runs, replayed])))
    assert len({v.gain for v in found}) == 1
    assert [v.title for v in found] == [
        "llama_7b, fixed 512+512, on a replayed rtx3090",
        "llama_7b, fixed 512+512, on a simulated rtx3090, hardware.link.h2d_gb_per_s=25.0",
        "llama_7b, fixed 512+512, on a simulated rtx3090, hardware.link.h2d_gb_per_s=250.0",
    ]


def test_variants_of_a_mechanism_are_not_averaged() -> None:
    """The same mechanism and batch with another reach is another line, named by what differs."""
    runs = table([*BASE, ("pinned_balanced", 8, 110.0, 0.02), ("pinned_balanced", 8, 130.0, 0.02)])
    runs["variant"] = [{"placement.reach": "both"}] * 3 + [{"placement.reach": "in_place"}]
    found = points(runs)
    labels = set(found["label"])
    assert labels == {
        "device_resident",
        "pinned_balanced, placement.reach=both",
        "pinned_balanced, placement.reach=in_place",
    }
    (verdict,) = verdicts(found)
    assert verdict.challenger is not None
    assert (verdict.challenger.mechanism, verdict.challenger.throughput) == (
        "pinned_balanced, placement.reach=in_place",
        130.0,
    )


def test_losing_at_a_small_batch_and_winning_later_is_not_losing() -> None:
    rows = [*BASE, ("pinned_swap", 8, 50.0, 0.02), ("pinned_swap", 16, 150.0, 0.02)]
    (verdict,) = verdicts(points(table(rows)))
    assert verdict.loses_from == {"pinned_swap": None}


def test_the_spread_of_repeats_is_the_noise() -> None:
    rows = [*BASE, ("pinned_swap", 16, 100.0, 0.02), ("pinned_swap", 16, 120.0, 0.02)]
    (verdict,) = verdicts(points(table(rows)))
    assert verdict.noise > 0.2
    assert "no difference within" in verdict.line()


def test_a_best_point_that_moved_nothing_is_called_so() -> None:
    runs = table([*BASE, ("pinned_swap", 16, 150.0, 0.02)]).assign(h2d_bytes=0.0)
    (verdict,) = verdicts(points(runs))
    assert "that point moved no KV over the link" in verdict.line()


def test_cpu_runs_are_kept_out_and_repeats_are_averaged() -> None:
    runs = table([*BASE, ("pinned_swap", 8, 110.0, 0.02), ("pinned_swap", 8, 120.0, 0.02)])
    cpu = runs.assign(runner="cpu", memory_emulated=True, output_tokens_per_s=1e9)
    found = points(pd.concat([runs, cpu]))
    swap = found[found["mechanism"] == "pinned_swap"].iloc[0]
    assert swap["throughput"] == pytest.approx(115.0)
    assert swap["num_runs"] == 2
    assert swap["throughput_std"] == pytest.approx(50**0.5)


def test_a_run_without_a_steady_window_counts_by_its_whole_run() -> None:
    runs = table([*BASE]).assign(output_tokens_per_s=None, output_tokens_per_s_whole_run=77.0)
    assert set(points(runs)["throughput"]) == {77.0}


def test_gains_are_over_the_best_baseline_point() -> None:
    rows = with_gains(points(table([*BASE, *RECOMPUTE, ("pinned_balanced", 8, 60.0, 0.02)])))
    balanced = rows[rows["mechanism"] == "pinned_balanced"].iloc[0]
    assert balanced["gain"] == pytest.approx(-0.5)
    assert balanced["gain_same_admission"] == balanced["gain_over_resident"] == pytest.approx(60 / 105 - 1)


def measured(rows: list[tuple[str, int, float, float]], repeats: list[float]) -> pd.DataFrame:
    """The same points, each measured with its throughput times every one of `repeats`."""
    runs = table(rows).assign(origin="measured")
    return pd.concat([runs.assign(output_tokens_per_s=runs["output_tokens_per_s"] * r) for r in repeats])


def test_measured_runs_are_judged_by_their_repeats() -> None:
    rows = [*BASE, ("pinned_balanced", 16, 115.0, 0.02)]
    (quiet,) = verdicts(points(measured(rows, [0.999, 1.0, 1.001, 1.0, 1.0])))
    assert quiet.judged is not None and quiet.judged.word == "HIGHER" and ": yes, CPU-backed KV" in quiet.line()
    (noisy,) = verdicts(points(measured(rows, [0.8, 0.9, 1.0, 1.1, 1.2])))
    assert noisy.judged is not None and noisy.judged.word == "AMBIGUOUS"
    assert ": AMBIGUOUS, CPU-backed KV moved the best throughput by +9.5% (95 % interval -" in noisy.line()
    (single,) = verdicts(points(measured(rows, [1.0])))
    assert "AMBIGUOUS" in single.line() and "needs 3 repeats on both sides" in single.line()
    (simulated,) = verdicts(points(table(rows)))
    assert simulated.judged is not None and simulated.judged.word == "HIGHER"
    assert ": yes, CPU-backed KV" in simulated.line()
