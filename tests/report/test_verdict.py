"""The verdict against made-up points whose answer is known."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from uvm_kv.report.load import points, setting_of
from uvm_kv.report.verdict import Verdict, verdicts, with_gains

Row = tuple[str, int, float, float]
"""Mechanism, batch, tokens per second and p99 TPOT in seconds."""
FITS, CLIFF = 8, 16
"""Sequences that the device holds with prompt plus output, and the most clients that run without preemption."""
ARGV = ["python", "-m", "experiments.run", "-m", "model=llama_7b", "mechanism=a,b", "batch_size=8,16"]


def table(rows: list[Row], **columns: Any) -> pd.DataFrame:
    """Runs as `load_runs` returns them, of a card with FITS and CLIFF."""
    made = []
    for mechanism, batch, throughput, tpot in rows:
        device = mechanism.startswith("device")
        optimistic = mechanism in ("device_recompute", "pinned_swap")
        running = batch if optimistic else min(batch, FITS + (not device))
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
                "h2d_bytes": 0.0 if device else 1.0,
                "d2h_bytes": 0.0,
                "mechanism": mechanism,
                "offered_batch": batch,
                "running_batch_mean": float(running),
                "waiting_batch_mean": float(batch - running),
                "preemptions": max(0, batch - CLIFF) if optimistic else 0,
                "working_set_ratio": batch / FITS,
                "output_tokens_per_s": throughput,
                "output_tokens_per_s_whole_run": 1.0,
                "tpot_s.p99": tpot,
                "admission": "optimistic" if optimistic else "worst_case",
                "memory": "device" if device else "pinned",
                "placement": "resident",
                "prompt_tokens": 512,
                "output_tokens": 512,
                "drawn": False,
                "seed": 0,
                "repeat": 0,
                "argv": ARGV,
            }
        )
    return pd.DataFrame(made).assign(**columns)


BASE: list[Row] = [("device_resident", 8, 100.0, 0.020), ("device_resident", 16, 105.0, 0.021)]
RECOMPUTE: list[Row] = [
    ("device_recompute", 15, 116.0, 0.029),
    ("device_recompute", 16, 120.0, 0.030),
    ("device_recompute", 17, 100.0, 0.032),
]


def verdict_of(rows: list[Row], **columns: Any) -> Verdict:
    (found,) = verdicts(points(table(rows, **columns)))
    return found


def swap(best: float, batch: int = 17, tpot: float = 0.035) -> list[Row]:
    """Swapping, best at `batch`, with both neighbours tried."""
    return [("pinned_swap", batch + i, best - abs(i), tpot) for i in (-1, 0, 1)]


def test_the_baseline_is_the_better_of_the_two() -> None:
    found = verdict_of([*BASE, *RECOMPUTE, ("pinned_balanced", 16, 115.0, 0.022), ("pinned_balanced", 8, 100.0, 0.02)])
    assert found.baseline is not None and found.baseline.mechanism == "device_recompute"
    assert found.gain == pytest.approx(115 / 120 - 1)
    assert found.same_admission is not None and found.same_admission.gain == pytest.approx(115 / 105 - 1)
    assert found.word == "LOWER"
    assert found.line().startswith("Verdict: llama_7b, fixed 512+512, on a simulated rtx3090: no: -4.2% (up to 1.0%")


def test_yes_names_mechanism_batch_and_where_it_loses() -> None:
    found = verdict_of(
        [*BASE, *RECOMPUTE, ("device_recompute", 18, 99.0, 0.05), *swap(130.0), ("pinned_swap", 19, 90, 1)]
    )
    assert found.challenger is not None
    assert (found.challenger.mechanism, found.challenger.batch) == ("pinned_swap", 17)
    assert found.word == "HIGHER"
    line = found.line()
    assert "yes: +8.3% (up to 1.0% is no difference), pinned_swap 130 tok/s at batch 17" in line
    assert "Most at an equal batch: +30.3%" in line and "pinned_swap 129 tok/s at batch 18" in line
    assert "It does not lose at the largest batch tried." in line


def test_equal_tpot_compares_only_points_that_are_as_fast() -> None:
    """The best swap point is slower per token than the baseline's best; the other one is not."""
    found = verdict_of([*RECOMPUTE, ("pinned_swap", 16, 110.0, 0.029), ("pinned_swap", 17, 150.0, 0.060)])
    assert found.equal_tpot is not None and found.equal_tpot.point.batch == 16
    assert found.equal_tpot.gain == pytest.approx(110 / 120 - 1)


def test_within_one_per_cent_is_no_difference() -> None:
    assert verdict_of([*BASE, *RECOMPUTE, *swap(121.0)]).word == "SAME"
    assert verdict_of([*BASE, *RECOMPUTE, *swap(121.3)]).word == "HIGHER"


@pytest.mark.parametrize("rows", [[*BASE, *RECOMPUTE], swap(110.0)])
def test_without_both_sides_there_is_no_verdict(rows: list[Row]) -> None:
    found = verdict_of(rows)
    assert found.word == "UNKNOWN"
    assert "cannot say: no " in found.line()


def test_the_baseline_of_the_challengers_own_admission_is_needed() -> None:
    """device_resident against pinned_swap compares admissions: +19 % of nothing that CPU memory did."""
    found = verdict_of([*BASE, *swap(125.0)])
    assert found.word == "UNKNOWN"
    assert found.missing == (
        "device_recompute, the device-only baseline of pinned_swap's own admission, is not among the runs"
    )
    assert found.command == (
        "python -m experiments.run -m model=llama_7b batch_size=8,16 "
        "mechanism=device_recompute,device_resident,pinned_swap refine=true"
    )
    assert f"Run: {found.command}" in found.line()


def test_a_point_that_moved_nothing_is_no_gain_of_cpu_memory() -> None:
    found = verdict_of([*BASE, *RECOMPUTE, *swap(150.0)], h2d_bytes=0.0)
    assert found.word == "UNKNOWN" and found.challenger is None
    assert "no CPU-backed point that was tried moved KV over the link" in found.line()
    moved = table([*BASE, *RECOMPUTE, *swap(150.0)])
    moved.loc[moved["output_tokens_per_s"] == 150.0, "h2d_bytes"] = 0.0
    (other,) = verdicts(points(moved))
    assert other.challenger is not None and other.challenger.throughput == 149.0


def test_a_card_that_is_never_full_has_no_verdict() -> None:
    rows: list[Row] = [(m, b, 10.0 * b, 0.02) for m in ("device_recompute", "pinned_swap") for b in (2, 4, 6)]
    found = verdict_of(rows, h2d_bytes=0.0)
    assert found.missing == (
        "the throughput of device_recompute still rises at the largest batch tried (6 of about 8 that fit)"
    )


def test_a_peak_between_two_batches_that_were_tried_is_no_answer() -> None:
    """Llama-3-8B: 57 and 62 were tried, the card's best is at 61, and swapping seemed to win by 2.5 %."""
    coarse: list[Row] = [
        ("device_recompute", 13, 110.0, 0.03),
        ("device_recompute", 14, 114.0, 0.03),
        ("device_recompute", 17, 100.0, 0.03),
    ]
    found = verdict_of([*BASE, *coarse, *swap(117.0)])
    assert found.word == "UNKNOWN"
    # The line through 13 and 14 reaches 122 at 16.
    assert found.missing == "device_recompute may be up to 7.0% faster at a batch of 15 to 16"
    assert found.command is not None and found.command.endswith(" batch_size=15,16 refine=true"), "not the same again"
    assert verdict_of([*BASE, *coarse, *swap(124.0)]).word == "HIGHER"  # It beats even that.
    assert verdict_of([*BASE, *coarse, *swap(110.0)]).word == "LOWER"


def test_a_peak_may_lie_below_the_smallest_batch_that_was_tried() -> None:
    found = verdict_of([("device_recompute", 20, 90.0, 0.02), ("device_recompute", 22, 80.0, 0.02), *swap(95.0)])
    assert found.missing == "the best batch of device_recompute is the smallest tried (20), and KV memory limits it"


def test_a_plateau_of_worst_case_admission_hides_no_peak() -> None:
    """FITS sequences run at any larger batch, and no batch between two that were tried runs more."""
    balanced: list[Row] = [("pinned_balanced", 8, 100.0, 0.02), ("pinned_balanced", 32, 112.0, 0.02)]
    found = verdict_of([("device_resident", 8, 100.0, 0.02), ("device_resident", 64, 100.0, 0.02), *balanced])
    assert found.word == "HIGHER" and found.gain == pytest.approx(0.12)


def drawn(rows: list[Row], factors: dict[str, list[float]]) -> pd.DataFrame:
    """The rows with random lengths, each drawn once per factor of its mechanism."""
    made = []
    for repeat in range(max(map(len, factors.values()))):
        runs = table(rows, drawn=True, prompt_tokens=None, output_tokens=None, repeat=repeat)
        here = runs["mechanism"].map(lambda m: dict(enumerate(factors[m])).get(repeat))  # noqa: B023
        made.append(runs.assign(output_tokens_per_s=runs["output_tokens_per_s"] * here)[here.notna()])
    return pd.concat(made)


def test_gains_of_drawn_lengths_are_paired() -> None:
    """Both sides move by 20 % from draw to draw, and together: the gain is the same in each."""
    draws = [0.9, 1.0, 1.1, 0.95, 1.05]
    rows = [*RECOMPUTE, *swap(123.6)]
    (found,) = verdicts(points(drawn(rows, {"device_recompute": draws, "pinned_swap": draws})))
    assert found.word == "HIGHER"
    assert found.main is not None and found.main.noise == 0.01 and found.main.num_draws == 5
    apart = [1.1, 0.9, 1.0, 1.05, 0.95]
    (found,) = verdicts(points(drawn(rows, {"device_recompute": draws, "pinned_swap": apart})))
    assert found.word == "SAME"
    gains = [1.03 * b / a for a, b in zip(draws, apart, strict=True)]
    spread = pd.Series(gains).std()
    assert found.main is not None and found.main.noise == pytest.approx(2.776 * spread / 5**0.5, rel=1e-3)
    assert f"(5 paired draws; up to {found.main.noise:.1%} is no difference)" in found.line()


def test_one_draw_of_the_lengths_shows_no_noise() -> None:
    (found,) = verdicts(points(drawn([*RECOMPUTE, *swap(150.0)], {"device_recompute": [1], "pinned_swap": [1]})))
    assert found.missing == "a single draw of the lengths does not show their noise"
    assert found.command is not None and "num_repeats=5" in found.command


def test_the_best_of_a_side_is_one_that_was_drawn_as_often_as_any() -> None:
    """The search tries most batches with one draw; a lucky one does not become the answer."""
    runs = drawn([*RECOMPUTE, *swap(123.0)], {"device_recompute": [1.0] * 5, "pinned_swap": [1.0] * 5})
    lucky = table([("pinned_swap", 20, 200.0, 0.02)], drawn=True, prompt_tokens=None, output_tokens=None)
    (found,) = verdicts(points(pd.concat([runs, lucky])))
    assert found.challenger is not None and found.challenger.batch == 17


def test_a_limit_of_256_sequences_stands_beside_the_best_limit() -> None:
    at_limit: list[Row] = [("device_recompute", 256, 90.0, 0.03), ("pinned_swap", 256, 99.0, 0.03)]
    found = verdict_of([*RECOMPUTE, *swap(121.0), *at_limit])
    assert found.at_limit is not None and found.at_limit.gain == pytest.approx(0.1)
    assert "At a limit of 256 sequences: +10.0%" in found.line()
    runs = table([*RECOMPUTE, *swap(121.0), *at_limit])
    runs.loc[(runs["mechanism"] == "pinned_swap") & (runs["offered_batch"] == 256), "h2d_bytes"] = 0.0
    (idle,) = verdicts(points(runs))
    assert idle.at_limit is None
    assert "At a limit of 256 sequences no CPU-backed point moved KV over the link." in idle.line()


def test_groups_are_never_mixed() -> None:
    runs = table([*BASE, *RECOMPUTE, *swap(130.0)])
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
    assert set(found["label"]) == {
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
    found = verdict_of([*BASE, ("pinned_swap", 8, 50.0, 0.02), ("pinned_swap", 16, 150.0, 0.02)])
    assert found.loses_from == {"pinned_swap": None}
    found = verdict_of([*BASE, ("pinned_swap", 8, 150.0, 0.02), ("pinned_swap", 16, 50.0, 0.02)])
    assert found.loses_from == {"pinned_swap": 16}


def test_cpu_runs_are_kept_out_and_repeats_are_averaged() -> None:
    runs = table([*BASE, ("pinned_swap", 8, 110.0, 0.02), ("pinned_swap", 8, 120.0, 0.02)])
    runs["repeat"] = [0, 0, 0, 1]
    cpu = runs.assign(runner="cpu", memory_emulated=True, output_tokens_per_s=1e9)
    found = points(pd.concat([runs, cpu]))
    swap = found[found["mechanism"] == "pinned_swap"].iloc[0]
    assert swap["throughput"] == pytest.approx(115.0)
    assert swap["num_runs"] == 2
    assert swap["throughput_std"] == pytest.approx(50**0.5)
    assert swap["by_draw"] == (((0, 0), 110.0), ((0, 1), 120.0))


def test_a_run_without_a_steady_window_counts_by_its_whole_run() -> None:
    runs = table([*BASE]).assign(output_tokens_per_s=None, output_tokens_per_s_whole_run=77.0)
    assert set(points(runs)["throughput"]) == {77.0}


def test_gains_are_over_the_best_baseline_point() -> None:
    rows = with_gains(points(table([*BASE, *RECOMPUTE, ("pinned_balanced", 8, 60.0, 0.02)])))
    balanced = rows[rows["mechanism"] == "pinned_balanced"].iloc[0]
    assert balanced["gain"] == pytest.approx(-0.5)
    assert balanced["gain_same_admission"] == balanced["gain_over_resident"] == pytest.approx(60 / 105 - 1)


def measured(rows: list[Row], repeats: list[float]) -> pd.DataFrame:
    """The same points, each measured with its throughput times every one of `repeats`."""
    runs = table(rows, origin="measured")
    return pd.concat(
        [runs.assign(output_tokens_per_s=runs["output_tokens_per_s"] * r, repeat=i) for i, r in enumerate(repeats)]
    )


def test_measured_runs_are_judged_by_their_repeats() -> None:
    rows: list[Row] = [*BASE, ("pinned_balanced", 8, 100.0, 0.02), ("pinned_balanced", 16, 115.0, 0.02)]
    (quiet,) = verdicts(points(measured(rows, [0.999, 1.0, 1.001, 1.0, 1.0])))
    assert quiet.word == "HIGHER" and "rtx3090: yes: +9.5%" in quiet.line()
    (noisy,) = verdicts(points(measured(rows, [0.8, 0.9, 1.0, 1.1, 1.2])))
    assert noisy.word == "AMBIGUOUS"
    assert ": AMBIGUOUS: +9.5% (95 % interval -" in noisy.line()
    (single,) = verdicts(points(measured(rows, [1.0])))
    assert "AMBIGUOUS" in single.line() and "needs 3 repeats on both sides" in single.line()
    (simulated,) = verdicts(points(table(rows)))
    assert simulated.word == "HIGHER"


def test_a_budget_that_follows_from_the_batch_tells_no_comparison_apart() -> None:
    """Qwen2.5-7B: the logits of more than 256 sequences take room of what the card leaves for KV."""
    summary = {"setting": {"memory.device_kv_bytes": 7, "block_size": 16}}
    left, given = ({"memory_budget": [["weights", 1], [name, 7]]} for name in ("KV budget", "KV budget (given)"))
    assert setting_of(summary | left) == {"memory.device_kv_bytes": None, "block_size": 16}
    assert setting_of(summary | given) == summary["setting"]


def test_a_lucky_draw_of_another_mechanism_leaves_nothing_open() -> None:
    """It was tried with one draw, above what was drawn five times: that is no gap between batches."""
    runs = drawn([*RECOMPUTE, *swap(123.0)], {"device_recompute": [1.0] * 5, "pinned_swap": [1.0] * 5})
    lucky = table([("pinned_balanced", 16, 140.0, 0.02)], drawn=True, prompt_tokens=None, output_tokens=None)
    (found,) = verdicts(points(pd.concat([runs, table(BASE, drawn=True, prompt_tokens=None), lucky])))
    assert found.word == "HIGHER" and found.missing is None
