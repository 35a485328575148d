"""Medians over repeats, and what is refused as no repeat."""

from __future__ import annotations

import pandas as pd
import pytest

from uvm_kv.report.repeats import medians, one_of_each
from uvm_kv.report.statistics import judge


def made() -> pd.DataFrame:
    rates = [(16, 90.0), (4, 7.0), (16, 130.0), (16, 91.0)]
    common = {"origin": "measured", "model": "m", "setting": {"a": 1}, "note": None}
    return pd.DataFrame([{"block_size": b, "rate": r, "is_on": True, **common} for b, r in rates])


def test_points_are_medians_in_order_of_their_first_runs() -> None:
    table = medians(made(), ["block_size"], keep=["rate"])
    assert table[["block_size", "rate", "num_runs"]].to_numpy().tolist() == [[16, 91.0, 3], [4, 7.0, 1]]
    assert table["rate.repeats"].tolist() == [(90.0, 91.0, 130.0), (7.0,)]
    assert table["is_on"].tolist() == [True, True] and table["setting"].tolist() == [{"a": 1}] * 2


def test_numbers_that_some_runs_did_not_observe_are_medians_of_the_rest() -> None:
    table = medians(made().assign(stall_s=pd.Series([1.0, None, 3.0, None], dtype=object)), ["block_size"])
    assert table["stall_s"].iloc[0] == 2.0 and pd.isna(table["stall_s"].iloc[1])


def test_what_differs_in_more_than_a_repeat_is_refused() -> None:
    other = made().assign(setting=[{"a": 2}] * 4)
    with pytest.raises(ValueError, match="several runs of block_size 16 differ in setting; only repeats"):
        medians(pd.concat([made(), other]), ["block_size"])
    assert len(medians(pd.concat([made(), other.assign(block_size=64)]), ["block_size"])) == 3
    with pytest.raises(ValueError, match=r"x: runs of several models \(m, n\)"):
        one_of_each(pd.concat([made(), made().assign(model="n")]), ("model",), "x")


@pytest.mark.parametrize(("gain", "word"), [(1.02, "HIGHER"), (1.005, "SAME"), (0.5, "LOWER")])
def test_what_has_no_noise_is_judged_by_its_median_and_what_is_measured_by_its_repeats(gain: float, word: str) -> None:
    assert judge([gain], [1.0], 0.01, measured=False).word == word
    assert judge([gain], [1.0], 0.01, measured=True).word == "AMBIGUOUS"
    assert judge([gain] * 3, [1.0] * 3, 0.01, measured=True).word == word
