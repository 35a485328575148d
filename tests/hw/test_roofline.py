"""The profile of the RTX 3090 against the measured operator table it was fitted to, on the token counts left out."""

from __future__ import annotations

import statistics

import pytest
import yaml

from tests.helpers import CONF, DATA, make_geometry, make_profile
from uvm_kv.hw.fit import all_work, every_other, fit_operators, read_operator_table
from uvm_kv.hw.model import ModelGeometry
from uvm_kv.hw.profile import OperatorCost
from uvm_kv.hw.roofline import Roofline

TABLE = DATA / "rtx3090_llama31_8b_layers.csv"
LLAMA_3_8B = ModelGeometry("llama3_8b", 32, 4096, 32, 8, 128, 14336, 128256, 8192)
OUTSIDE_LAYERS = {"embedding", "final_layernorm", "lm_head"}

Table = dict[str, dict[int, float]]


@pytest.fixture(scope="module")
def split() -> tuple[Table, Table]:
    """Token counts that are fitted, and those left out."""
    if not TABLE.is_file():
        pytest.skip(f"{TABLE} is not there: the measured table is not part of the project")
    return every_other(read_operator_table(TABLE))


@pytest.fixture(scope="module")
def costs() -> dict[str, OperatorCost]:
    raw = yaml.safe_load((CONF / "hardware" / "rtx3090.yaml").read_text())
    assert (raw["gpu"]["tensor_tflop_per_s"], raw["gpu"]["hbm_gb_per_s"]) == (71.0, 936.0)
    return {name: OperatorCost(**cost) for name, cost in raw["operators"].items()}


def predicted_s(cost: OperatorCost, operator: str, num_tokens: int) -> float:
    ops, num_bytes = all_work(LLAMA_3_8B, num_tokens, 2)[operator]
    compute, memory = ops / (71e12 * cost.compute_efficiency), num_bytes / (936e9 * cost.memory_efficiency)
    return cost.overhead_us * 1e-6 + (compute**cost.knee + memory**cost.knee) ** (1 / cost.knee)


def test_the_split_shares_no_token_count(split: tuple[Table, Table]) -> None:
    fitted, held_out = split
    for operator in fitted:
        assert fitted[operator]
        assert held_out[operator]
        assert not set(fitted[operator]) & set(held_out[operator])


def test_a_whole_layer_is_within_the_bounds_on_the_token_counts_left_out(
    split: tuple[Table, Table], costs: dict[str, OperatorCost]
) -> None:
    held_out = split[1]
    layer = [op for op in held_out if op not in OUTSIDE_LAYERS]
    errors = []
    for num_tokens in held_out["q_proj"]:
        measured = sum(held_out[op][num_tokens] for op in layer)
        errors.append(abs(sum(predicted_s(costs[op], op, num_tokens) for op in layer) / measured - 1))
    for op in sorted(held_out):
        single = [abs(predicted_s(costs[op], op, n) / t - 1) for n, t in held_out[op].items()]
        print(f"{op:16s} median {statistics.median(single):6.1%}  worst {max(single):6.1%}")
    print(f"{'whole layer':16s} median {statistics.median(errors):6.1%}  worst {max(errors):6.1%}")
    assert len(errors) >= 5
    assert statistics.median(errors) < 0.05
    assert max(errors) < 0.15


def test_the_profile_is_what_the_fit_gives(split: tuple[Table, Table], costs: dict[str, OperatorCost]) -> None:
    """The same times within 1 %. Coefficients that the table does not identify, such as the compute efficiency of an
    operator that is bound by memory, are another processor's arithmetic away from other values."""
    pytest.importorskip("scipy", reason="the fit needs scipy (extra dev)")
    refit = fit_operators(split[0], LLAMA_3_8B, peak_flop_per_s=71e12, hbm_bytes_per_s=936e9)
    assert set(refit) == set(costs)
    for name, cost in refit.items():
        for num_tokens in split[0][name]:
            again, told = predicted_s(cost, name, num_tokens), predicted_s(costs[name], name, num_tokens)
            assert again == pytest.approx(told, rel=0.01), (name, num_tokens)


def test_the_roofline_charges_what_the_coefficients_say() -> None:
    """The simulator's layer is the sum of its operators at these costs; decode attention goes by its bytes."""
    roofline = Roofline(make_profile(), make_geometry(), 2)
    cost = make_profile().operators["q_proj"]
    work = all_work(make_geometry(), 64, 2)
    inside = [op for op in work if op not in OUTSIDE_LAYERS | {"attn"}]
    corner = [
        ((work[op][0] / (71e12 * cost.compute_efficiency)) ** 2 + (work[op][1] / (936e9 * cost.memory_efficiency)) ** 2)
        ** 0.5
        for op in inside
    ]
    assert roofline.dense_s(64) == pytest.approx(sum(corner) + len(inside) * 2e-6)
    token_bytes = 2 * 32 * 128 * 2
    assert roofline.decode_attention_s(1000) == pytest.approx(2e-6 + 1000 * token_bytes / (936e9 * 0.9))
