"""The roofline study: its computed points, its figure, and claims that follow the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from uvm_kv.report.load import load_runs
from uvm_kv.report.style import save_figure
from uvm_kv.store.records import Record, pack, read_records
from uvm_kv.study.points import roofline_records
from uvm_kv.study.roofline import PUBLISHED_MS, STUDY


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return roofline_records(batches=(1, 8, 128), sequences=(128, 2048, 50000))


@pytest.fixture
def runs(records: Sequence[Record]) -> pd.DataFrame:
    return load_runs(records)


def claim(runs: pd.DataFrame, *words: str) -> str:
    (found,) = [c for c in STUDY.draw(runs, []).claims if all(word in c for word in words)]
    return found


def test_points_are_a_packed_set_like_any_other(records: Sequence[Record], tmp_path: Path) -> None:
    pack(records, {}, tmp_path)
    read, left_out = read_records(tmp_path)
    assert left_out == [] and [r.id for r in read] == [r.id for r in records]
    assert all(r.summary["origin"] == "analytic" for r in read)
    # Two cards, two countings, two stages, three batches, three lengths; six other precisions.
    assert len(read) == 2 * 2 * 2 * 3 * 3 + 6
    assert [r.sha256 for r in roofline_records(batches=(1, 8, 128), sequences=(128, 2048, 50000))] == [
        r.sha256 for r in records
    ]


def test_parts_sum_to_the_step(records: Sequence[Record]) -> None:
    for record in records:
        parts, total = record.summary["parts"].values(), record.summary
        assert sum(part["ms"] for part in parts) == pytest.approx(total["total_ms"])
        assert sum(part["bytes"] for part in parts) == pytest.approx(total["total_bytes"])


def test_all_published_totals_are_met_to_the_printed_digit(runs: pd.DataFrame) -> None:
    assert "agrees with its 9 published totals" in claim(runs, "published")
    table = STUDY.draw(runs, []).table
    printed = table[table["published_ms"].notna()]
    assert len(printed) == len(PUBLISHED_MS)
    assert (printed["total_ms"] / printed["published_ms"]).tolist() == pytest.approx([1.0] * 9, abs=1e-4)


def test_claims_follow_the_data(runs: pd.DataFrame) -> None:
    slower = runs.assign(total_ms=runs["total_ms"] * 1.02)
    assert "differs from its 9 published totals" in claim(slower, "published")
    assert "largest difference is 2" in claim(slower, "published")
    other = runs[(runs["hardware"] == "rtx3090")]
    assert "could not be held against" in claim(other, "published")

    assert "from batch 128 on" in claim(runs, "3090", "ridge") and "lies right of it" in claim(runs, "3090", "ridge")
    assert "at no batch tried" in claim(runs[runs["batch_size"] < 128], "3090", "ridge")

    held = claim(runs, "3090", "tokens/s")
    assert "at batch 8, the best of those that fit" in held and "batch 128 would reach" in held
    assert "a larger memory would bring nothing" in claim(runs.assign(fits=True), "3090", "tokens/s")
    assert "no batch tried fits the card" in claim(runs.assign(fits=False), "3090", "fits the card")

    assert "decode: 0 of 9 points exceed the card's memory." in claim(runs.assign(fits=True), "3090", "decode: ")
    assert "batch 1 of 50000 tokens" in claim(runs, "3090", "decode: ")


def test_the_drawing_is_the_same_to_the_byte(runs: pd.DataFrame, tmp_path: Path) -> None:
    first = save_figure(STUDY.draw(runs, []).figure, tmp_path / "a")
    again = save_figure(STUDY.draw(runs.sample(frac=1, random_state=3), []).figure, tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]


def test_what_cannot_be_drawn_is_refused(runs: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="without counting"):
        STUDY.draw(runs.drop(columns="counting"), [])
    with pytest.raises(ValueError, match="no point of a6000/llm_viewer or rtx3090/exact"):
        STUDY.draw(runs.assign(hardware="h100"), [])
    with pytest.raises(ValueError, match="several models"):
        STUDY.draw(pd.concat([runs, runs.assign(model="llama3_8b")]), [])


def test_what_is_drawn_is_in_the_table(runs: pd.DataFrame) -> None:
    drawn = STUDY.draw(runs, [])
    table = drawn.table[(drawn.table["hardware"] == "rtx3090") & drawn.table["drawn_in"].str.contains("roof")]
    roof, *lines = drawn.figure.axes[3].lines
    assert max(roof.get_ydata()) == pytest.approx(table["peak_ops_per_s"].iloc[0] / 1e12)
    assert roof.get_ydata()[0] / roof.get_xdata()[0] == pytest.approx(table["hbm_bytes_per_s"].iloc[0] / 1e12)
    decode = table[table["stage"] == "decode"].sort_values("batch_size")
    assert list(lines[0].get_ydata()) == pytest.approx(list(decode["parts.attention.attained_ops_per_s"] / 1e12))
    assert list(lines[3].get_ydata()) == pytest.approx(list(decode["parts.projections.attained_ops_per_s"] / 1e12))
