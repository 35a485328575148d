"""Card by card: gains and what they say, from made-up runs."""

from __future__ import annotations

import pandas as pd
import pytest

from uvm_kv.analysis.study.does_it_help_my_box import best_gains, draw


def made(swap: float, *, cards: tuple[str, ...] = ("rtx3090", "h100")) -> pd.DataFrame:
    """Per card two baselines at two batches, and pinned_swap at `swap` times the better."""
    rows = []
    for scale, card in enumerate(cards, start=1):
        for mechanism, rates in (
            ("device_resident", (90, 95)),
            ("device_recompute", (100, 80)),
            ("pinned_swap", (50, 100 * swap)),
        ):
            for batch, rate in zip((8, 16), rates, strict=True):
                rows.append(
                    {"hardware": card, "model": "llama_7b", "mechanism": mechanism, "offered_batch": batch,
                     "prompt_tokens": 512, "output_tokens": 512, "output_tokens_per_s": rate * scale,
                     "output_tokens_per_s_whole_run": 1.0}
                )  # fmt: skip
    return pd.DataFrame(rows)


def test_each_side_is_taken_at_its_own_best_batch() -> None:
    table = best_gains(made(1.2))
    assert list(table["hardware"]) == ["rtx3090", "h100"] and list(table["baseline_batch"]) == [8, 8]
    assert list(table["gain"]) == pytest.approx([0.2, 0.2]) and set(table["batch"]) == {16}


@pytest.mark.parametrize(
    ("swap", "said"),
    [(1.2, "of 2 of 2 cards by more than 1%"), (1.005, "of none of 2 cards"), (0.5, "of none of 2 cards")],
)
def test_the_claim_follows_the_runs(swap: float, said: str) -> None:
    (claim,) = draw(made(swap), ()).claims
    assert said in claim and "rtx3090" in claim and "(pinned_swap)" in claim


def test_what_cannot_be_compared() -> None:
    runs = made(1.2)
    with pytest.raises(ValueError, match="has no run of device_resident or device_recompute"):
        best_gains(runs[~runs["mechanism"].str.startswith("device")])
    with pytest.raises(ValueError, match="no run of a CPU-backed mechanism"):
        best_gains(runs[runs["mechanism"].str.startswith("device")])
    with pytest.raises(ValueError, match="several models or lengths"):
        best_gains(pd.concat([runs, runs.assign(prompt_tokens=64)]))
