"""The cliff of made-up runs: where it is, how deep, and that it is not found where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.study.made import run, table
from uvm_kv.report.style import STYLES, save_figure
from uvm_kv.study.oversubscription import STUDY


def curve(mechanism: str, speeds: dict[float, float], **more: Any) -> list[dict[str, Any]]:
    """Runs by working set over capacity."""
    hints = {"hints.preferred_location": "none", "hints.accessed_by": False, "hints.read_mostly": False,
             "hints.discard_on_free": False}  # fmt: skip
    return [
        run(mechanism, round(64 * ratio), speed, **{"working_set_ratio": ratio, "h2d_bytes": 1e9, **hints, **more})
        for ratio, speed in speeds.items()
    ]


CLIFF = {0.5: 60.0, 1.0: 100.0, 1.02: 60.0, 1.06: 5.0, 2.0: 4.0}
GENTLE = {0.5: 60.0, 1.0: 100.0, 1.02: 101.0, 1.06: 104.0, 2.0: 80.0}


def said(*curves: list[dict[str, Any]]) -> str:
    return "\n".join(STUDY.draw(table(*(row for rows in curves for row in rows)), ()).claims)


def test_the_cliff_is_where_less_than_half_is_left() -> None:
    text = said(curve("managed_demand", CLIFF))
    assert "managed_demand, layer_major: falls under half of its best within the capacity (100 tok/s)" in text
    assert "between 1.02 and 1.06" in text
    assert "at 1.06 it is slower by a factor of 20; at 2 it is slower by a factor of 25" in text


def test_the_headline_sets_demand_paging_against_the_best_of_the_rest() -> None:
    text = said(curve("managed_demand", CLIFF), curve("pinned_prefetch_ahead", GENTLE)).splitlines()[0]
    assert "demand paging without hints keeps 4% to 60% of the throughput" in text
    assert "the best raises it to 1.04 times that (pinned_prefetch_ahead at 1.06)" in text
    assert "none raises it" in said(curve("managed_demand", GENTLE), curve("pinned_prefetch_ahead", CLIFF))
    assert "Once the working set" not in said(curve("managed_demand", CLIFF))


def test_without_a_cliff_none_is_named() -> None:
    text = said(curve("pinned_prefetch_ahead", GENTLE))
    assert "no cliff up to 2, where it still has 80% of its best" in text
    assert "at 1.06 it is 1.04 times it; at 2 it is slower by a factor of 1.25" in text


def test_a_line_on_one_side_of_the_capacity_has_no_cliff() -> None:
    assert "no point within the capacity" in said(curve("managed_demand", {1.06: 5.0, 2.0: 4.0}))
    assert "no point beyond the capacity" in said(curve("managed_demand", {0.5: 5.0, 1.0: 4.0}))


def test_layouts_are_compared_beyond_the_capacity() -> None:
    block = curve("managed_demand", {**CLIFF, 1.02: 30.0, 1.06: 1.0, 2.0: 1.0}, layout="block_major")
    text = said(curve("managed_demand", CLIFF), block)
    assert "layer_major is 4.00 times as fast as block_major in the median (2.00 to 5.00)" in text
    same = curve("managed_demand", CLIFF, layout="block_major")
    assert "are equal within 1% everywhere beyond" in said(curve("managed_demand", CLIFF), same)


def test_hints_make_lines_of_their_own() -> None:
    hints = {"memory": "managed", "placement": "demand", "hints.preferred_location": "host", "hints.accessed_by": True}
    drawn = STUDY.draw(table(*curve("managed_demand", CLIFF), *curve("custom", GENTLE, **hints)), ())
    assert set(drawn.table["curve"]) == {"managed_demand", "demand: prefer host, accessed_by"}
    assert drawn.table["moved_mb_per_token"].tolist() == pytest.approx([1.0] * len(drawn.table))


def test_the_baseline_is_drawn_and_not_judged() -> None:
    drawn = STUDY.draw(table(*curve("managed_demand", CLIFF), *curve("device_resident", GENTLE, h2d_bytes=0.0)), ())
    assert "device_resident" in set(drawn.table["curve"])
    assert not any("device_resident" in claim for claim in drawn.claims)


def test_runs_that_cannot_answer_are_refused() -> None:
    made = table(*curve("managed_demand", CLIFF))
    with pytest.raises(ValueError, match="closed_loop of workload=fixed"):
        STUDY.draw(made.assign(working_set_ratio=None), ())
    with pytest.raises(ValueError, match="several lines in one"):
        STUDY.draw(pd.concat([made, made.assign(variant=[{"placement.name": "x"}] * len(made))]), ())
    with pytest.raises(ValueError, match="several comparisons"):
        STUDY.draw(pd.concat([made, table(*curve("managed_by_tier", CLIFF, model="llama3_8b"))]), ())


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    made = table(*curve("managed_demand", CLIFF), *curve("pinned_zero_copy", GENTLE, layout="block_major"))
    files = [[path.read_bytes() for path in save_figure(STUDY.draw(made, ()).figure, tmp_path / name)] for name in "ab"]
    assert files[0] == files[1]


HOST = {"memory": "managed", "placement": "demand", "hints.preferred_location": "host", "hints.accessed_by": True}


def test_lines_that_are_not_the_same_within_the_capacity_are_named() -> None:
    text = said(curve("managed_demand", CLIFF), curve("pinned_prefetch_ahead", GENTLE))
    assert (
        "Within the capacity every line makes the same throughput within 0.0% of the fastest (60 to 100 tok/s)." in text
    )
    slow = {0.5: 30.0, 1.0: 40.0, 2.0: 45.0}
    text = said(curve("managed_demand", CLIFF), curve("pinned_zero_copy", GENTLE), curve("custom", slow, **HOST))
    assert "prefer host, accessed_by, layer_major, makes 30 to 40 tok/s and moves up to 1 MB per output token;" in text
    assert "every other line makes the same throughput within 0.0% of the fastest (60 to 100 tok/s)." in text
    assert "every line is the same" not in STUDY.how_to_read


def test_lines_that_lie_on_each_other_are_both_to_be_seen() -> None:
    drawn = STUDY.draw(table(*curve("managed_by_tier", GENTLE), *curve("pinned_zero_copy", GENTLE)), ())
    lines = {line.get_color(): (line.get_linewidth(), line.get_zorder()) for line in drawn.figure.axes[0].lines}
    under, over = lines[STYLES["managed_by_tier"][0]], lines[STYLES["pinned_zero_copy"][0]]
    assert under[0] > 2 * over[0]
    colours = [line.get_color() for line in drawn.figure.axes[0].lines]
    assert colours.index(STYLES["managed_by_tier"][0]) < colours.index(STYLES["pinned_zero_copy"][0])
    apart = STUDY.draw(table(*curve("managed_by_tier", CLIFF), *curve("pinned_zero_copy", GENTLE)), ())
    assert len({line.get_linewidth() for line in apart.figure.axes[0].lines[:2]}) == 1


def test_the_enlarged_panel_ends_where_its_points_end() -> None:
    figure = STUDY.draw(
        table(*curve("managed_demand", {0.5: 1.0, 0.95: 2.0, 1.0: 2.0, 1.09: 1.0, 2.0: 1.0})), ()
    ).figure
    assert figure.axes[1].get_xlim() == pytest.approx((0.94, 1.10))


def test_measured_gains_count_where_their_repeats_decide() -> None:
    def measured(*factors: float) -> str:
        lines = [
            [row for x in factors for row in curve(name, {r: v * x for r, v in speeds.items()}, origin="measured")]
            for name, speeds in (("managed_demand", CLIFF), ("pinned_prefetch_ahead", GENTLE))
        ]
        return said(*lines).splitlines()[0]

    assert "whether any raises it is AMBIGUOUS, the best reaches 1.04 times that" in measured(1.0)
    assert "whether any raises it is AMBIGUOUS" in measured(0.8, 1.0, 1.2)
    assert "the best raises it to 1.04 times that" in measured(0.999, 1.0, 1.001)
