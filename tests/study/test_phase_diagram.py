"""Phase diagrams of made-up runs whose gains are known, and of one real grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests import jobs
from tests.study.made import run, table
from uvm_kv.report.load import load_runs
from uvm_kv.report.style import save_figure
from uvm_kv.store.records import read_records
from uvm_kv.study import phase_diagram, phase_diagram_link
from uvm_kv.types import GIB


def cell(gib: float, context: int, gain: float | None, *, bound: float = 0.2, seqs: int = 8) -> list[dict[str, Any]]:
    """device_resident at 100 tok/s (none where the gain is None), and prefetch_ahead at twice the capacity, of which it
    takes less."""
    place: dict[str, Any] = {"prompt_tokens": context - 64, "setting": {"memory.device_kv_bytes": int(gib * GIB)}}
    closed = {"closed_form_ceiling": bound, "closed_form.link": bound, "closed_form.num_seqs": seqs,
              "closed_form.stranded": 0.0}  # fmt: skip
    rows = [run("pinned_prefetch_ahead", 2 * seqs, 100 * (1 + (gain or 0)), **place, **closed, working_set_ratio=2.0,
                running_batch_mean=1.5 * seqs)]  # fmt: skip
    if gain is not None:
        rows.append(run("device_resident", seqs, 100.0, **place, working_set_ratio=1.0))
    return [row | {"setting": dict(row["setting"])} for row in rows]


def rows_of(*gains: float | None, bound: float = 0.2, seqs: int = 8) -> list[dict[str, Any]]:
    """Two sizes by two contexts: (1, 256), (1, 512), (2, 256), (2, 512)."""
    places = [(1, 256), (1, 512), (2, 256), (2, 512)]
    cells = [cell(*place, gain, bound=bound, seqs=seqs) for place, gain in zip(places, gains, strict=True)]
    return [row for rows in cells for row in rows]


def grid(*gains: float | None, bound: float = 0.2, seqs: int = 8) -> pd.DataFrame:
    return table(*rows_of(*gains, bound=bound, seqs=seqs))


def said(runs: pd.DataFrame) -> str:
    return "\n".join(phase_diagram.STUDY.draw(runs, ()).claims)


def test_gain_is_the_best_beyond_the_capacity_over_the_best_on_the_card() -> None:
    more = run("pinned_prefetch_ahead", 12, 130.0, prompt_tokens=192, working_set_ratio=1.5,
               setting={"memory.device_kv_bytes": GIB})  # fmt: skip
    idle = more | {"offered_batch": 8, "working_set_ratio": 1.0, "output_tokens_per_s": 500.0}
    drawn = phase_diagram.STUDY.draw(pd.concat([grid(0.1, 0.0, -0.4, 0.02), table(more, idle)]), ())
    first = drawn.table.iloc[0]
    assert (first["device_kv_gib"], first["context_tokens"], first["offered_batch"]) == ("1", "256", 12)
    assert first["gain"] == pytest.approx(0.3)
    assert list(drawn.table["gain"])[1:] == pytest.approx([0.0, -0.4, 0.02])


def test_claims_follow_the_gains() -> None:
    text = said(grid(0.1, 0.0, -0.4, 0.02))
    assert "pays (more than 1%) in 2 of 4 cells (50%)" in text and "at most +10.0 %" in text
    assert "loses more than 1% in 1, at worst -40.0 %, at device KV (GiB) 2, tokens per request 256" in text
    assert "pays in none of 4 cells (loses more than 1% in 1); its best is +0.9 %" in said(grid(0.0, 0.009, -0.4, 0.0))
    assert "it loses more than 1% in none" in said(grid(0.1, 0.0, 0.0, 0.02))


def tried(*batches: tuple[int, float, float], **more: Any) -> pd.DataFrame:
    """A grid whose first cell has these batches, throughputs and mean running batches in place of its own."""
    first, *rest = rows_of(0.0, 0.0, 0.0, 0.0)
    own = [
        first
        | more
        | {"offered_batch": n, "working_set_ratio": n / 8, "output_tokens_per_s": rate, "running_batch_mean": ran}
        for n, rate, ran in batches
    ]
    return table(*rest, *own)


@pytest.mark.parametrize(
    ("batches", "more", "expected"),
    [
        ([(12, 110, 12), (16, 120, 16)], {}, True),
        ([(16, 120, 16)], {}, True),
        ([(12, 120, 12), (16, 110, 16)], {}, False),  # It falls.
        ([(12, 120, 12), (16, 121, 16)], {}, False),  # It has risen.
        ([(12, 110, 12), (16, 120, 13)], {}, False),  # The mechanism takes no more.
        ([(12, 110, 12), (16, 120, 13)], {"host_kv_bytes": GIB // 2}, True),  # But here the CPU memory is full.
        ([(12, 110, 12), (16, 120, 13)], {"host_kv_bytes": 64 * GIB}, False),
    ],
)
def test_a_gain_that_still_rose_is_at_least_that(
    batches: list[tuple[int, float, float]], more: dict[str, Any], expected: bool
) -> None:
    drawn = phase_diagram.STUDY.draw(tried(*batches, device_kv_bytes=GIB, **more), ())
    assert list(drawn.table["at_least"]) == [expected, False, False, False]
    text = "\n".join(drawn.claims)
    assert ("at most +2" in text) is not expected
    assert ("the largest at least +20.0 %" in text) is expected
    assert ("in 1 of them it still rose at the largest batch tried" in text) is expected
    written = {text.get_text() for axis in drawn.figure.axes for text in axis.texts}
    assert ("\u226520" in written) is expected


def repeated(ours: list[float], theirs: list[float]) -> pd.DataFrame:
    """A measured grid whose first cell is repeated with these throughputs."""
    rows = [row | {"origin": "measured"} for row in rows_of(0.5, 0.5, 0.5, 0.5)]
    rates = {rows[0]["mechanism"]: ours, rows[1]["mechanism"]: theirs}
    first = [
        row | {"output_tokens_per_s": r, "seed": i} for row in rows[:2] for i, r in enumerate(rates[row["mechanism"]])
    ]
    return table(*first, *rows[2:])


def test_measured_gains_pay_where_their_repeats_decide() -> None:
    drawn = phase_diagram.STUDY.draw(repeated([120.0, 121.0, 119.0], [100.0, 101.0, 99.0]), ())
    assert list(drawn.table["word"]) == ["HIGHER", *["AMBIGUOUS"] * 3], "one run each decides nothing"
    assert (drawn.table["gain"][0], drawn.table["num_runs"][0]) == (pytest.approx(0.2), 3)
    assert "AMBIGUOUS over its repeats, and not counted, in 3" in drawn.claims[0]
    assert "pays (more than 1%) in 1 of 4 cells" in drawn.claims[1]
    drawn = phase_diagram.STUDY.draw(repeated([120.0, 90.0, 110.0], [100.0, 101.0, 99.0]), ())
    assert drawn.table["word"].tolist() == ["AMBIGUOUS"] * 4
    assert "pays in none of 4 cells" in drawn.claims[1]
    assert "no placement of KV in CPU memory pays in any of 4 cells; AMBIGUOUS" in drawn.claims[0]
    assert "+10?" in {text.get_text() for axis in drawn.figure.axes for text in axis.texts}


def test_decode_alone_is_said_where_it_was() -> None:
    runs = grid(0.1, 0.0, 0.0, 0.0)
    steady = phase_diagram.STUDY.draw(runs.assign(start="steady"), ())
    assert steady.claims[0].startswith(
        "On a simulated rtx3090 with llama2_7b, decode alone, no prefill, 64 output tokens per request, worst-case "
        "admission, over device KV (GiB) x "
    )
    assert all("decode alone, no prefill" in claim for claim in steady.claims), "each may be quoted alone"
    assert "served cold" not in "".join(steady.claims), "there is no such run"
    assert "decode alone" in steady.figure.axes[-1].get_xlabel()
    assert "prefill and decode" in phase_diagram.STUDY.draw(runs.assign(start="empty"), ()).claims[0]


def with_cold(steady: pd.DataFrame, cold: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([steady, cold.assign(start="cold")], ignore_index=True)


def test_the_same_cells_served_cold_stand_in_the_same_sentence() -> None:
    """The median of decode alone is of three cells, of 10, 30 and 2 %; from a cold start they have 5, 1.5 and 0 %."""
    drawn = phase_diagram.STUDY.draw(with_cold(grid(0.1, 0.0, 0.3, 0.02), grid(0.05, 0.0, 0.015, 0.0)), ())
    said = "in 3 of 4 cells (75%), by +10.0 % in their median and at most +30.0 %"
    cold = (
        "served cold, with their prefill, the same 3 cells gain +1.5 % in their median and at most +5.0 %, and 2 of 4"
    )
    for claim in drawn.claims[:2]:
        assert "decode alone, no prefill" in claim and said in claim and f"; {cold} cells pay" in claim
    assert drawn.table["cold_gain"].tolist() == pytest.approx([0.05, 0.0, 0.015, 0.0])
    assert drawn.table["gain"].tolist() == pytest.approx([0.1, 0.0, 0.3, 0.02]), "of decode alone, as before"
    assert {"+30", "+1.5"} <= {text.get_text() for axis in drawn.figure.axes for text in axis.texts}
    assert "served cold" in drawn.figure.legends[0].get_title().get_text()
    none = phase_diagram.STUDY.draw(with_cold(grid(0.1, 0.0, 0.0, 0.0), grid(-0.1, 0.0, 0.0, 0.0)), ()).claims[0]
    assert "the same 1 cell gains -10.0 % in its median and at most -10.0 %, and none of 4 cells pay" in none


def test_cells_and_placements_without_a_cold_run() -> None:
    """The best placement of a cell may be another one from a cold start; a cell that was not run so is not counted."""
    other = grid(0.2, 0.1, 0.1, 0.1).replace({"mechanism": {"pinned_prefetch_ahead": "pinned_balanced"}})
    both = pd.concat([grid(0.1, 0.1, 0.1, 0.1), other[other["mechanism"] == "pinned_balanced"]])
    drawn = phase_diagram.STUDY.draw(with_cold(both, grid(0.04, 0.06, None, None)), ())
    text = drawn.claims[0]
    assert "the 2 of them that were run so gain +5.0 % in their median and at most +6.0 %, and 2 of 2 cells pay" in text
    assert drawn.table["cold_gain"].isna().sum() == 6
    with pytest.raises(ValueError, match="of the runs that start cold: a diagram of"):
        phase_diagram.STUDY.draw(with_cold(both, table(*cell(1, 256, 0.1))), ())


def test_where_closed_form_and_simulation_differ_is_counted() -> None:
    text = said(grid(0.1, 0.0, -0.4, 0.02))
    assert "differ on whether it pays in 2 of 4 cells (2 where only the closed form says so, 0 where" in text
    assert "in 2 of the former the bound is below the smallest batch that was tried beyond the card" in text
    text = said(grid(0.1, 0.0, -0.4, 0.02, bound=1.5))
    assert "smallest batch" not in text, "twice the batch was tried, and 2.5 times it is allowed"
    text = said(grid(0.1, 0.0, -0.4, 0.02, bound=0.0))
    assert "(0 where only the closed form says so, 2 where only the simulation does)" in text
    assert "the simulated gain is above the bound in 2" in text
    assert "differ on whether it pays in 0 of 4 cells; the simulated gain" in said(grid(0.1, 0.1, 0.1, 0.1))


def test_a_cell_that_the_card_alone_cannot_serve_has_no_gain() -> None:
    drawn = phase_diagram.STUDY.draw(grid(0.1, None, 0.1, 0.1), ())
    assert drawn.table["gain"].isna().sum() == 1
    assert "device_resident has no run in 1 cells" in drawn.claims[-1]
    assert "no cell has a device_resident run" in said(grid(None, None, None, None))


def test_the_best_placement_of_each_cell_is_counted() -> None:
    other = grid(0.0, 0.0, 0.3, 0.0).replace({"mechanism": {"pinned_prefetch_ahead": "pinned_balanced"}})
    both = pd.concat([grid(0.1, 0.0, 0.1, 0.02), other[other["mechanism"] == "pinned_balanced"]])
    text = said(both)
    assert "beats device_resident in 3 of 4 cells (75%)" in text
    assert "the best is pinned_balanced in 1, pinned_prefetch_ahead in 2." in text


@pytest.mark.parametrize(("name", "other"), [("model", "llama3_8b"), ("hardware", "rtx4090"), ("origin", "replayed")])
def test_one_diagram_is_of_one_model_and_card(name: str, other: str) -> None:
    runs = grid(0.1, 0.1, 0.1, 0.1)
    runs.loc[runs["prompt_tokens"] == 448, name] = other
    with pytest.raises(ValueError, match=f"runs of several {name}s"):
        said(runs)


def test_runs_that_are_no_diagram_are_refused() -> None:
    with pytest.raises(ValueError, match="two values of each"):
        said(table(*cell(1, 256, 0.1), *cell(2, 256, 0.1)))
    other = cell(1, 256, 0.1)[0] | {"setting": {"memory.device_kv_bytes": GIB, "hardware.link.h2d_gb_per_s": 50.0}}
    mixed = pd.concat([grid(0.1, 0.1, 0.1, 0.1), table(other)])
    with pytest.raises(ValueError, match="several comparisons"):
        said(mixed)
    within = grid(0.1, 0.1, 0.1, 0.1)
    with pytest.raises(ValueError, match="run them again"):
        said(within.drop(columns="working_set_ratio"))
    with pytest.raises(ValueError, match="take larger batches"):
        said(within.assign(working_set_ratio=1.0))
    with pytest.raises(ValueError, match="takes workload=fixed"):
        said(within.assign(prompt_tokens=float("nan")))


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    files = [
        [p.read_bytes() for p in save_figure(phase_diagram.STUDY.draw(grid(0.1, None, -0.4, 2.0), ()).figure, stem)]
        for stem in (tmp_path / "a", tmp_path / "b")
    ]
    assert files[0] == files[1]


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Two links by two kinds of attention, on the simulator."""
    folder = tmp_path_factory.mktemp("links")
    short = ("model=llama2_7b", "workload.prompt_tokens=112", "workload.output_tokens=16", "workload.start=steady",
             "max_steps=16", f"memory.device_kv_bytes={GIB}", "working_set_ratio=1.25")  # fmt: skip
    for mechanism in ("device_resident", "pinned_prefetch_ahead"):
        for link in ("pcie3", "pcie5"):
            for heads in (32, 8):  # Of one model.
                jobs.run(folder, f"mechanism={mechanism}", f"link={link}", f"model.num_kv_heads={heads}", *short)
    return load_runs(read_records(folder)[0])


def test_a_faster_link_pays_more(links: pd.DataFrame) -> None:
    drawn = phase_diagram_link.STUDY.draw(links, ())
    gain = drawn.table.set_index(["link_gb_per_s", "kv_kib_per_token"])["gain"]
    mha, gqa = "MHA\n16 bit\n512", "GQA\n16 bit\n128"
    assert set(gain.index.get_level_values(1)) == {mha, gqa}
    for kv in (mha, gqa):
        assert gain["PCIe 5\n56", kv] > gain["PCIe 3\n11.5", kv]
    title = drawn.figure.legends[0].get_title().get_text()
    assert "llama2_7b on a simulated rtx3090, MHA: 32 KV heads, GQA: 8 KV heads, decode alone" in title
    assert (drawn.table["gain"] <= drawn.table["closed_form_ceiling"] + 0.01).all()
