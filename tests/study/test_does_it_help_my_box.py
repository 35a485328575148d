"""Card by card: gains and what they say, from made-up runs."""

from __future__ import annotations

import pandas as pd
import pytest

from tests.study.made import run, table
from uvm_kv.study.does_it_help_my_box import best_gains, draw


def made(
    swap: float, *factors: float, cards: tuple[str, ...] = ("rtx3090", "h100"), origin: str = "simulated"
) -> pd.DataFrame:
    """Per card two baselines at two batches, and pinned_swap at `swap` times the better; repeats of pinned_swap take
    each of `factors`."""
    rows = []
    for scale, card in enumerate(cards, start=1):
        for mechanism, rates in (
            ("device_resident", (90, 95)),
            ("device_recompute", (100, 80)),
            ("pinned_swap", (50, 100 * swap)),
        ):
            for batch, rate in zip((8, 16), rates, strict=True):
                for factor in factors or (1.0,):
                    rate_of_run = rate * scale * (factor if mechanism == "pinned_swap" else 1.0)
                    rows.append(run(mechanism, batch, rate_of_run, hardware=card, origin=origin))
    return table(*rows)


def test_each_side_is_taken_at_its_own_best_batch() -> None:
    found = best_gains(made(1.2))
    assert list(found["hardware"]) == ["rtx3090", "h100"] and list(found["baseline_batch"]) == [8, 8]
    assert list(found["gain"]) == pytest.approx([0.2, 0.2]) and set(found["offered_batch"]) == {16}


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


def test_repeats_count_by_their_median() -> None:
    """0.9, 0.9 and 1.3 times the baseline are a loss, and no gain of 30 %."""
    found = best_gains(made(1.0, 0.9, 0.9, 1.3))
    assert list(found["gain"]) == pytest.approx([-0.1, -0.1]) and set(found["num_runs"]) == {3}
    (claim,) = draw(made(1.0, 0.9, 0.9, 1.3, origin="measured"), ()).claims
    assert "of none of 2 cards by more than 1%: rtx3090 -10.0 %" in claim
    assert "AMBIGUOUS, and not counted: rtx3090 (-10.0 % to +30.0 %)" in claim


def test_measured_gains_count_where_their_repeats_decide() -> None:
    (claim,) = draw(made(1.2, 0.999, 1.0, 1.001, origin="measured"), ()).claims
    assert "of 2 of 2 cards" in claim and "AMBIGUOUS" not in claim
    drawn = draw(made(1.2, origin="measured"), ())
    assert "of none of 2 cards" in drawn.claims[0] and "rtx3090 (fewer than 3 repeats)" in drawn.claims[0]
    assert set(drawn.table["word"]) == {"AMBIGUOUS"}
    texts = [text.get_text() for text in drawn.figure.axes[0].texts]
    assert texts == ["+20.0 % ?"] * 2


def test_origins_are_told_apart() -> None:
    mixed = pd.concat([made(1.005), made(1.2, 0.999, 1.0, 1.001, origin="measured")])
    drawn = draw(mixed, ())
    assert len(drawn.table) == 4 and len(drawn.figure.axes[0].get_yticklabels()) == 4
    assert "of 2 of 2 measured cards by more than 1%: rtx3090 +20.0 %" in drawn.claims[0]
    assert "of none of 2 simulated cards by more than 1%: rtx3090 +0.5 %" in drawn.claims[0]
