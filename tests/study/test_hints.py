"""The hints study: effects recovered from runs made of known effects; what does not stand out; refusals."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from uvm_kv.report.style import save_figure
from uvm_kv.study.factorial import lenth, remainder
from uvm_kv.study.hints import STUDY, design_of_runs


def made(
    rate: Callable[..., float], *, blocks: tuple[int, ...] = (16, 64), ahead: tuple[int, ...] = (0,), **more: Any
) -> pd.DataFrame:
    """Every combination of three hints, layout, block size and, over layer_major, layers ahead."""
    rows = []
    layouts = ("block_major", "layer_major")
    for location, accessed, mostly, layout, block, layers in product(
        ("none", "by_tier"), (False, True), (False, True), layouts, blocks, ahead
    ):
        if layers and layout == "block_major":
            continue
        value = rate(
            by_tier=location == "by_tier", accessed=accessed, mostly=mostly, layout=layout, block=block, layers=layers
        )
        rows.append(
            {
                "model": "llama3_8b",
                "hardware": "rtx3090",
                "origin": "simulated",
                "memory": "managed",
                "placement": "prefetch_ahead" if layers else "demand",
                "variant": {"placement.num_layers_ahead": layers or 2},
                "hints.preferred_location": location,
                "hints.accessed_by": accessed,
                "hints.read_mostly": mostly,
                "hints.discard_on_free": False,
                "layout": layout,
                "block_size": block,
                "output_tokens_per_s": value,
                "output_tokens_per_s_whole_run": 1.0,
            }
            | more
        )
    return pd.DataFrame(rows)


def known(by_tier: bool, accessed: bool, mostly: bool, block: int, **_: Any) -> float:
    """accessed_by doubles, read_mostly takes nine tenths; by_tier triples only without accessed_by."""
    value = 100.0 * (2 if accessed else 1) * (0.1 if mostly else 1) * (3 if by_tier and not accessed else 1)
    return value * (1.001 if block == 64 else 1)


def effects(runs: pd.DataFrame) -> dict[str, float]:
    table = STUDY.draw(runs, []).table
    return table[table["drawn_in"] != "means"].set_index("effect")["times"].to_dict()


def claims(runs: pd.DataFrame) -> str:
    return "\n".join(STUDY.draw(runs, []).claims)


def test_known_effects_come_back() -> None:
    found = effects(made(known))
    assert found["read mostly"] == pytest.approx(0.1)
    # In the mean over both levels of the other one: 2 / sqrt(3), sqrt(3); the interaction is 1 / sqrt(3).
    assert found["accessed by"] == pytest.approx(2 / 3**0.5)
    assert found["preferred location"] == pytest.approx(3**0.5)
    assert found["preferred location x accessed by"] == pytest.approx(3**-0.5)
    assert found["block size"] == pytest.approx(1.001)
    others = [value for name, value in found.items() if "x" in name and name != "preferred location x accessed by"]
    assert len(others) == 9 and others == pytest.approx([1.0] * 9)


def test_a_half_fraction_gives_the_same_main_effects() -> None:
    """2^(5-1) of resolution V: the product of all five signs is +1."""
    runs = made(known)
    signs = np.where(runs["hints.preferred_location"] == "by_tier", 1, -1) * np.where(runs["hints.accessed_by"], 1, -1)
    signs = signs * np.where(runs["hints.read_mostly"], 1, -1) * np.where(runs["layout"] == "layer_major", 1, -1)
    half = runs[signs * np.where(runs["block_size"] == 64, 1, -1) == 1]
    assert len(half) == 16
    assert effects(half) == pytest.approx(effects(runs))
    assert "16 of 32 combinations" in claims(half)


def test_lenths_pseudo_standard_error() -> None:
    """15 contrasts, 13 of them 1 or -1 and two large: s0 = 1.5, the large ones are dropped, PSE = 1.5."""
    pse, margin = lenth(np.array([1.0, -1.0] * 6 + [1.0, 40.0, -50.0]))
    assert pse == 1.5
    assert margin == pytest.approx(1.5 * 2.571, rel=1e-3)  # The 97.5 % quantile of t with 5 degrees of freedom.


def test_the_remainder_is_what_three_factors_do_together() -> None:
    def threefold(by_tier: bool, accessed: bool, mostly: bool, **_: Any) -> float:
        return float(np.exp(0.5 * (1 if by_tier ^ accessed ^ mostly else -1)))

    (design,) = design_of_runs(made(threefold)).values()
    rms, _ = remainder(design)
    assert rms == pytest.approx((1.0**2 / 16) ** 0.5)  # One contrast of 1 among 16 of three factors and more.
    assert "No main effect or two-way interaction stands out" in claims(made(threefold))


def test_layout_and_distance_are_told_apart_where_they_exclude_each_other() -> None:
    def ahead(layers: int, layout: str, **_: Any) -> float:
        return (4.0 if layers == 4 else 1.0) * (1.5 if layout == "layer_major" else 1.0)

    table = STUDY.draw(made(ahead, ahead=(0, 1, 4)), []).table.set_index(["runs", "effect"])["times"]
    assert table["demand paging", "layout"] == pytest.approx(1.5)
    assert table["prefetching ahead", "layers ahead"] == pytest.approx(4.0)
    assert ("demand paging", "layers ahead") not in table and ("prefetching ahead", "layout") not in table


def test_claims_say_which_hint_hurts() -> None:
    usual = claims(made(known))
    assert "Hints that hurt in the mean: read mostly = yes (x0.10)" in usual
    assert "accessed by (no to yes) multiplies throughput by 1.15 in the mean, and by 0.67 to 2.00" in usual
    assert "it helps in 8, hurts in 8, and changes less than 1 % in 0" in usual
    assert "a factor of 30." in usual

    def helps(accessed: bool, **_: Any) -> float:
        return 5.0 if accessed else 1.0

    assert "No hint hurts, neither in the mean nor in any combination." in claims(made(helps))

    def rarely(by_tier: bool, accessed: bool, mostly: bool, layout: str, block: int, **_: Any) -> float:
        one = by_tier and accessed and mostly and layout == "layer_major" and block == 64
        return 0.5 if one else 1.0

    assert "the worst in one combination is" in claims(made(rarely)) and "(x0.50)" in claims(made(rarely))


def test_the_drawing_is_the_same_to_the_byte(tmp_path: Path) -> None:
    runs = made(known)
    first = save_figure(STUDY.draw(runs, []).figure, tmp_path / "a")
    again = save_figure(STUDY.draw(runs.sample(frac=1, random_state=1), []).figure, tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]


def test_what_is_no_two_level_design_is_refused() -> None:
    runs = made(known)
    with pytest.raises(ValueError, match="31 runs are not a balanced half or whole of the 32 combinations"):
        STUDY.draw(runs.iloc[1:], [])
    with pytest.raises(ValueError, match="block size takes 3 values"):
        STUDY.draw(made(known, blocks=(16, 32, 64)), [])
    other = runs.assign(variant=[{"placement.num_layers_ahead": 2, "placement.reach": "both"}] * len(runs))
    with pytest.raises(
        ValueError, match=r"hints: several runs of preferred location .* differ in variant; only repeats"
    ):
        STUDY.draw(pd.concat([runs, other]), [])
    with pytest.raises(ValueError, match="only runs of memory=managed"):
        STUDY.draw(made(known, memory="pinned"), [])
    with pytest.raises(ValueError, match="several models"):
        STUDY.draw(pd.concat([runs, made(known, model="llama_7b")]), [])
    with pytest.raises(ValueError, match=r"several origins \(measured, simulated\)"):
        STUDY.draw(pd.concat([runs, runs.assign(origin="measured")]), [])
    with pytest.raises(ValueError, match="fewer than two factors"):
        STUDY.draw(runs.iloc[:1], [])


def test_the_means_of_the_right_panels_are_in_the_table() -> None:
    table = STUDY.draw(made(known), []).table
    assert (table["drawn_in"] == "bars").sum() == 14 and table["runs"].eq("all").all()
    means = table[(table["drawn_in"] == "means") & (table["effect"] == "preferred location x accessed by")]
    found = means.set_index(["first_level", "second_level"])["tokens_per_s"]
    # accessed_by doubles and location triples only without it; read_mostly (0.1) and blocks (1.001) in the mean.
    rest = 100 * (0.1 * 1.001) ** 0.5
    known_means = {("none", "no"): 1, ("none", "yes"): 2, ("by_tier", "no"): 3, ("by_tier", "yes"): 2}
    assert found.to_dict() == pytest.approx({levels: rest * times for levels, times in known_means.items()})


def repeated(factors: tuple[float, ...], **more: Any) -> pd.DataFrame:
    runs = made(known, **more)
    return pd.concat([runs.assign(output_tokens_per_s=runs["output_tokens_per_s"] * x) for x in factors])


def test_repeats_count_by_their_median_and_measured_ones_may_be_ambiguous() -> None:
    """One wild repeat of three changes no effect, but then no combination is told from another."""
    assert effects(repeated((1.0, 50.0, 1.0))) == pytest.approx(effects(made(known)))
    text = claims(repeated((0.999, 1.0, 1.001, 1.0), origin="measured"))
    assert "it helps in 8, hurts in 8, is AMBIGUOUS in 0, and changes less than 1 % in 0" in text
    assert "32 of 32 combinations of 5 factors (128 runs);" in text
    text = claims(repeated((0.1, 1.0, 10.0), origin="measured"))
    assert "accessed by (no to yes) multiplies throughput by 1.15 in the mean" in text
    assert "it helps in 0, hurts in 0, is AMBIGUOUS in 16, and changes less than 1 % in 0" in text
    single = claims(made(known, origin="measured"))
    assert "some with fewer than the 3 repeats" in single and "it helps in 0, hurts in 0, is AMBIGUOUS in 16" in single


def test_titles_end_in_a_word() -> None:
    figure = STUDY.draw(made(known), []).figure
    assert all(axis.get_title(loc="left")[-1].isalnum() for axis in figure.axes if axis.get_title(loc="left"))
