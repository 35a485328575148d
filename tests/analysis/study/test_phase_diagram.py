"""Phase diagrams of made-up runs whose gains are known, and of one real grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests import jobs
from tests.analysis.study.made import run, table
from uvm_kv.analysis.load import load_runs
from uvm_kv.analysis.study import phase_diagram, phase_diagram_link
from uvm_kv.analysis.style import save_figure
from uvm_kv.telemetry.records import read_records
from uvm_kv.types import GIB


def cell(gib: float, context: int, gain: float | None, *, bound: float = 0.2, seqs: int = 8) -> list[dict[str, Any]]:
    """device_resident at 100 tok/s (none where the gain is None), and prefetch_ahead at twice the capacity."""
    place: dict[str, Any] = {"prompt_tokens": context - 64, "setting": {"memory.device_kv_bytes": int(gib * GIB)}}
    closed = {"closed_form_ceiling": bound, "closed_form.link": bound, "closed_form.num_seqs": seqs,
              "closed_form.stranded": 0.0}  # fmt: skip
    rows = [run("pinned_prefetch_ahead", 2 * seqs, 100 * (1 + (gain or 0)), **place, **closed, working_set_ratio=2.0)]
    if gain is not None:
        rows.append(run("device_resident", seqs, 100.0, **place, working_set_ratio=1.0))
    return [row | {"setting": dict(row["setting"])} for row in rows]


def grid(*gains: float | None, bound: float = 0.2, seqs: int = 8) -> pd.DataFrame:
    """Two sizes by two contexts: (1, 256), (1, 512), (2, 256), (2, 512)."""
    places = [(1, 256), (1, 512), (2, 256), (2, 512)]
    cells = [cell(*place, gain, bound=bound, seqs=seqs) for place, gain in zip(places, gains, strict=True)]
    return table(*(row for rows in cells for row in rows))


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
    assert "loses more than 1% in 1, at worst -40.0 %, at device KV (GiB) 2, tokens a request 256" in text
    assert "pays in none of 4 cells (loses more than 1% in 1); its best is +0.9 %" in said(grid(0.0, 0.009, -0.4, 0.0))
    assert "it loses more than 1% in none" in said(grid(0.1, 0.0, 0.0, 0.02))


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
            for heads in (32, 8):
                jobs.run(folder, f"mechanism={mechanism}", f"link={link}", f"model.num_kv_heads={heads}", *short)
    return load_runs(read_records(folder)[0])


def test_a_faster_link_pays_more(links: pd.DataFrame) -> None:
    drawn = phase_diagram_link.STUDY.draw(links, ())
    gain = drawn.table.set_index(["link_gb_per_s", "kv_kib_per_token"])["gain"]
    mha, gqa = "MHA\n16 bit\n512", "GQA\n16 bit\n128"
    assert set(gain.index.get_level_values(1)) == {mha, gqa}
    for kv in (mha, gqa):
        assert gain["PCIe 5\n56", kv] > gain["PCIe 3\n11.5", kv]
    assert (drawn.table["gain"] <= drawn.table["closed_form_ceiling"] + 0.01).all()
