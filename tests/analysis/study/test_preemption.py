"""The preemption study: costs out of runs, crossovers, and claims that follow made-up runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from uvm_kv.analysis.study.preemption import STUDY, crossings
from uvm_kv.analysis.style import save_figure

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
    with pytest.raises(ValueError, match="several runs of pinned_swap"):
        STUDY.draw(pd.concat([runs, runs]), [])
    with pytest.raises(ValueError, match="several models"):
        STUDY.draw(pd.concat([runs, runs.assign(model="llama3_8b")]), [])
    apart = runs.copy()
    apart.loc[apart["mechanism"] == "pinned_swap", "block_size"] = 4096
    with pytest.raises(ValueError, match="in common"):
        STUDY.draw(apart.drop_duplicates(["mechanism", "prompt_tokens", "block_size"]), [])
