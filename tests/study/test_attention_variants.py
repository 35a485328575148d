"""The attention variants: capacity and roofline points out of real small runs, claims that follow the data."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tests import jobs
from uvm_kv.job.build import run_job
from uvm_kv.report.load import load_runs
from uvm_kv.report.style import save_figure
from uvm_kv.store.records import read_records
from uvm_kv.study.attention_variants import STUDY

GIB = 1 << 30


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Two variants and two widths at 1 GiB of KV: 2,048 tokens of 512 KiB, and what a 4th and a 2nd of it makes."""
    folder = tmp_path_factory.mktemp("runs")
    for heads in (32, 8):
        for bits in (16, 8):
            short = ("workload.prompt_tokens=64", "workload.output_tokens=64", "workload.start=steady", "max_steps=8")
            job = jobs.job(
                folder, "mechanism=device_resident", f"model.num_kv_heads={heads}", f"kv_bits={bits}",
                "batch_size=64", f"memory.device_kv_bytes={GIB}", *short,
            )  # fmt: skip
            run_job(job, argv=["test"])
    return load_runs(read_records(folder)[0])


def claims(runs: pd.DataFrame) -> str:
    return "\n".join(STUDY.draw(runs, []).claims)


def test_capacity_batch_and_intensity_follow_from_the_sizes(finished: pd.DataFrame) -> None:
    table = STUDY.draw(finished, []).table.set_index(["kv_heads", "kv_bits"])
    assert table["kv_bytes_per_token"].to_dict() == {
        (32, 16): 524288,
        (32, 8): 262144,
        (8, 16): 131072,
        (8, 8): 65536,
    }
    assert table["capacity_tokens"].to_dict() == {(32, 16): 2048, (32, 8): 4096, (8, 16): 8192, (8, 8): 16384}
    assert table.loc[(32, 16), "running_batch_mean"] == pytest.approx(2048 / 128, rel=0.05)
    assert table.loc[(8, 16), "running_batch_mean"] == pytest.approx(64)
    # 4 operations a pair of query head and value, over 2 of K and V that 1 or 4 query heads share, of 2 or 1 bytes.
    assert table["attention_intensity"].tolist() == [1.0, 2.0, 4.0, 8.0]
    assert (table["attained_ops_per_s"] < table["roof_ops_per_s"]).all()


def test_claims_follow_the_data(finished: pd.DataFrame) -> None:
    usual = claims(finished)
    assert (
        "MHA with fp8, int8 KV takes 256 KiB per token, 1/2 of MHA with fp16 KV; 4096 tokens fit instead of 2048"
        in usual
    )
    assert "is not what limits the batch of" in usual and "all lie left of it" in usual
    assert "limits the running batch of all variants" in claims(finished.assign(device_kv_bytes=524288))
    assert claims(finished.assign(output_tokens_per_s=100.0)).count("nothing of what fits.") == 3
    much = finished.assign(output_tokens_per_s=1e9 / finished["kv_bits"] ** 9)
    assert "as much as fits." in claims(much)
    assert "1 of 4 lie right of it" in claims(finished.assign(running_batch_mean=[1.0, 1.0, 1.0, 1e4]))


def test_the_best_batch_of_each_variant_is_taken(finished: pd.DataFrame) -> None:
    slower = finished.assign(output_tokens_per_s=finished["output_tokens_per_s"] / 2, offered_batch=8)
    table = STUDY.draw(pd.concat([slower, finished], ignore_index=True), []).table
    assert len(table) == 4 and set(table["offered_batch"]) == {64}


def test_the_drawing_is_the_same_to_the_byte(finished: pd.DataFrame, tmp_path: Path) -> None:
    first = save_figure(STUDY.draw(finished, []).figure, tmp_path / "a")
    again = save_figure(STUDY.draw(finished.sample(frac=1, random_state=1), []).figure, tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]


def test_what_cannot_be_drawn_is_refused(finished: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="without kv_bits"):
        STUDY.draw(finished.drop(columns="kv_bits"), [])
    with pytest.raises(ValueError, match="one length of prompts"):
        STUDY.draw(finished.assign(prompt_tokens=None), [])
    with pytest.raises(ValueError, match="several models"):
        STUDY.draw(pd.concat([finished, finished.assign(model="llama3_8b")]), [])
    with pytest.raises(ValueError, match=r"several origins \(measured, simulated\)"):
        STUDY.draw(pd.concat([finished, finished.assign(origin="measured")]), [])
    with pytest.raises(ValueError, match="no run of device_resident"):
        STUDY.draw(finished.assign(mechanism="pinned_swap"), [])


def test_what_the_smaller_projections_bring_is_told_from_what_the_kv_brings(finished: pd.DataFrame) -> None:
    """24 of 32 KV heads fewer: 2 x 24 x 128 x 4096 weights of 2 bytes in each of 32 layers, 1.61 GB."""
    table = STUDY.draw(finished, []).table.set_index(["kv_heads", "kv_bits"])
    less = table.loc[(32, 16), "weight_bytes_read"] - table.loc[(8, 16), "weight_bytes_read"]
    assert less == 2 * 24 * 128 * 4096 * 2 * 32
    roomier = finished.copy()
    gqa = [setting["model.num_kv_heads"] == 8 for setting in roomier["setting"]]
    roomier.loc[gqa, "device_kv_bytes"] = round(1.5 * GIB)
    text = claims(roomier)
    assert "12288 tokens fit instead of 2048, x6.00: x4 by the KV alone, x1.50 by 1.61 GB less of K and V" in text
    assert "4096 tokens fit instead of 2048, 32 sequences" in text  # 8 bits leave the weights as they are.


def test_the_roof_that_is_drawn_is_in_the_table(finished: pd.DataFrame) -> None:
    drawn = STUDY.draw(finished, [])
    roof = drawn.figure.axes[-1].lines[0].get_ydata()
    assert max(roof) == pytest.approx(drawn.table["peak_ops_per_s"].iloc[0] / 1e12)
    x, y = drawn.figure.axes[-1].lines[0].get_data()
    assert y[0] / x[0] == pytest.approx(drawn.table["hbm_bytes_per_s"].iloc[0] / 1e12)


def test_repeats_count_by_their_median_and_measured_ones_may_be_ambiguous(finished: pd.DataFrame) -> None:
    def repeated(*factors: float) -> pd.DataFrame:
        runs = finished.drop(columns="draw")  # Each measured run is a draw of its own.
        rates = runs["output_tokens_per_s"]
        return pd.concat([runs.assign(output_tokens_per_s=rates * x, origin="measured") for x in factors])

    usual = STUDY.draw(finished, []).table["throughput"].tolist()
    table = STUDY.draw(repeated(0.9, 1.3, 0.9), []).table
    assert table["throughput"].tolist() == pytest.approx([0.9 * x for x in usual]) and set(table["num_runs"]) == {3}
    assert "AMBIGUOUS" not in claims(repeated(0.999, 1.0, 1.001))
    assert claims(repeated(0.1, 1.0, 10.0)).count(", AMBIGUOUS.") == 3
    assert claims(repeated(1.0)).count(", AMBIGUOUS.") == 3 and "(AMBIGUOUS);" in claims(repeated(1.0))
    other = finished.assign(variant=[{"placement.name": "x"}] * len(finished))
    with pytest.raises(ValueError, match=r"attention_variants: several runs of kv_heads \d+, .* differ in variant"):
        STUDY.draw(pd.concat([finished, other]), [])


def test_the_experiment_runs_what_is_drawn_and_nothing_else() -> None:
    text = (Path(__file__).parents[2] / "conf" / "experiment" / "attention_variants.yaml").read_text()
    assert "override /mechanism: device_resident" in text and "pinned" not in text
