"""The preemption study: costs out of runs, crossovers, and claims that follow made-up runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from uvm_kv.report.style import save_figure
from uvm_kv.study.preemption import STUDY
from uvm_kv.study.preemption_costs import crossings

BLOCKS = (1, 16, 256)
PIECE = 32 * 128 * 2  # Bytes of one token's K in one layer.


def made(
    swap_ms: float = 5.0, recompute_ms: float = 20.0, preemptions: int = 10, prompts: tuple[int, ...] = (64, 256)
) -> pd.DataFrame:
    """Runs whose work takes 10 s without preemption; a swap moves 1000 pieces of one token out and in."""
    rows: list[dict[str, Any]] = []
    for prompt in prompts:
        for block in BLOCKS:
            for mechanism, ms in (("pinned_swap", swap_ms), ("device_recompute", recompute_ms)):
                moved = 1000.0 * PIECE * preemptions if mechanism == "pinned_swap" else 0.0
                rows.append(
                    {
                        "model": "llama_7b",
                        "hardware": "rtx3090",
                        "origin": "simulated",
                        "mechanism": mechanism,
                        "prompt_tokens": prompt,
                        "output_tokens": 256,
                        "block_size": block,
                        "kv_bits": 16,
                        "preemptions": preemptions,
                        "stall_s": ms * preemptions / 1e3 if mechanism == "pinned_swap" else 0.0,
                        "duration_s": 10 + ms * preemptions / 1e3,
                        "h2d_bytes": moved,
                        "d2h_bytes": moved,
                        "setting": {
                            "hardware.link.copy_call_us": 6.0,
                            "model.num_kv_heads": 32,
                            "model.head_dim": 128,
                        },
                    }
                )
    return pd.DataFrame(rows)


def claims(runs: pd.DataFrame) -> str:
    return "\n".join(STUDY.draw(runs, []).claims)


def test_crossings_are_interpolated_in_the_logarithms() -> None:
    assert crossings([1, 4, 16], [0.5, 2, 4]) == pytest.approx([2.0])
    assert crossings([1, 4, 16], [0.5, 2, 0.5]) == pytest.approx([2.0, 8.0])
    assert crossings([1, 4, 16], [2, 3, 4]) == [] and crossings([8], [2]) == []


def test_costs_are_those_of_the_runs() -> None:
    table = STUDY.draw(made(), []).table
    assert table["swap_ms"].tolist() == pytest.approx([5.0] * 6)
    assert table["recompute_ms"].tolist() == pytest.approx([20.0] * 6)
    # 2000 calls of 6 us where each token is a block; a 16th and a 256th of them for larger blocks.
    assert table["swap_call_a_piece_ms"].tolist()[:3] == pytest.approx([17.0, 5.75, 5.046875])


def test_claims_follow_the_data() -> None:
    usual = claims(made())
    assert "costs 4 to 4 times one by swap" in usual
    assert usual.count("no crossover in the range") == 2 and "swap is cheaper at all blocks" in usual
    assert "only where each piece has a call of its own" in usual
    assert "+1.5 % more time" in usual and "bound of 20 % holds" in usual

    cheap = claims(made(recompute_ms=10.0))
    assert (
        "no crossover in the range" in cheap and "tokens for prompt 64 (below the first recompute is cheaper)" in cheap
    )
    assert "recompute is cheaper at all blocks" in claims(made(recompute_ms=1.0))
    assert "bound of 20 % does not hold" in claims(made(recompute_ms=500.0))
    assert "recompute stays within 20 % of swapping at 6 of 6 points." in claims(made(recompute_ms=5.0))

    growing = made()
    small = (growing["mechanism"] == "pinned_swap") & (growing["block_size"] == 1)
    growing.loc[small, "stall_s"] *= 3
    assert "swapping is bad at small blocks, as in vLLM's paper." in claims(growing)

    idle = made()
    idle.loc[idle["block_size"] == 16, "preemptions"] = 0
    assert "2 of 6 points preempted nothing" in claims(idle)


def test_the_drawing_is_the_same_to_the_byte(tmp_path: Path) -> None:
    runs = made(recompute_ms=10.0)
    first = save_figure(STUDY.draw(runs, []).figure, tmp_path / "a")
    again = save_figure(STUDY.draw(runs.sample(frac=1, random_state=1), []).figure, tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]


def test_what_cannot_be_drawn_is_refused() -> None:
    runs = made()
    with pytest.raises(ValueError, match="no run of device_recompute"):
        STUDY.draw(runs[runs["mechanism"] == "pinned_swap"], [])
    with pytest.raises(ValueError, match="no run preempted anything"):
        STUDY.draw(made(preemptions=0), [])
    other = runs.assign(setting=[setting | {"model.head_dim": 64} for setting in runs["setting"]])
    with pytest.raises(ValueError, match=r"preemption: several runs of mechanism pinned_swap, .* differ in setting"):
        STUDY.draw(pd.concat([runs, other]), [])
    with pytest.raises(ValueError, match=r"several origins \(measured, simulated\)"):
        STUDY.draw(pd.concat([runs, runs.assign(origin="measured")]), [])
    unequal = runs.copy()
    unequal.loc[unequal["mechanism"] == "pinned_swap", "preemptions"] = 20
    with pytest.raises(ValueError, match="at no point the two preempt as often, within 5%"):
        STUDY.draw(unequal, [])
    with pytest.raises(ValueError, match="several models"):
        STUDY.draw(pd.concat([runs, runs.assign(model="llama3_8b")]), [])
    apart = runs.copy()
    apart.loc[apart["mechanism"] == "pinned_swap", "block_size"] = 4096
    with pytest.raises(ValueError, match="in common"):
        STUDY.draw(apart.drop_duplicates(["mechanism", "prompt_tokens", "block_size"]), [])


def test_points_that_preempt_unequally_often_say_nothing_of_one_preemption() -> None:
    """42 swaps beside 30 recomputations: an absurd ratio there is in no claim, and in the picture an open marker."""
    runs = made()
    at = (runs["prompt_tokens"] == 64) & (runs["block_size"] == 16)
    runs.loc[at & (runs["mechanism"] == "pinned_swap"), ["preemptions", "stall_s"]] = [42, 0.0042]
    runs.loc[at & (runs["mechanism"] == "device_recompute"), "preemptions"] = 30
    drawn = STUDY.draw(runs, [])
    said = drawn.claims
    assert "costs 4 to 4 times one by swap" in said[0]
    assert (
        "At 1 of 6 points the two preempt unequally often, by more than 5% (prompt 64, block 16: 42 by swap, 30 by"
        in (said[1])
    )
    assert drawn.table["is_comparable"].tolist() == [True, False, True, True, True, True]
    assert "of 5 points" in said[-1]
    open_ = [line for line in drawn.figure.axes[1].lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_xdata()) for line in open_] == [[16], [16]]
    assert "preempt unequally often" in [text.get_text() for text in drawn.figure.legends[0].get_texts()]
    almost = made(preemptions=100)
    almost.loc[almost["mechanism"] == "pinned_swap", "preemptions"] = 96
    assert STUDY.draw(almost, []).table["is_comparable"].all()


def test_what_is_drawn_as_a_crossing_is_in_the_table() -> None:
    drawn = STUDY.draw(made(recompute_ms=10.0), [])
    rings = [float(line.get_xdata()[0]) for line in drawn.figure.axes[1].lines if line.get_markersize() == 6]
    told = drawn.table.drop_duplicates("prompt_tokens")
    assert told["crossings"].tolist() == ["", ""]
    assert [float(x) for x in told["crossings_call_a_piece"]] == pytest.approx(rings, rel=1e-3)


def test_repeats_count_by_their_median_and_measured_ones_may_be_ambiguous() -> None:
    def repeated(*factors: float) -> pd.DataFrame:
        runs = made().assign(origin="measured")
        return pd.concat([runs.assign(duration_s=runs["duration_s"] * x, stall_s=runs["stall_s"] * x) for x in factors])

    table = STUDY.draw(repeated(0.9, 1.0, 7.0), []).table
    assert table["recompute_ms"].tolist() == pytest.approx([20.0] * 6) and set(table["num_runs_swap"]) == {3}
    quiet = claims(repeated(0.9999, 1.0, 1.0001))
    assert "AMBIGUOUS" not in quiet and "bound of 20 % holds" in quiet
    noisy = claims(repeated(0.5, 1.0, 1.5))
    assert "AMBIGUOUS at 6 of 6 points" in noisy and "bound of 20 % is AMBIGUOUS here end to end." in noisy
    single = claims(repeated(1.0))
    assert "AMBIGUOUS at 6 of 6 points" in single and "for which it takes 3 repeats" in single
