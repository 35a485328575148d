"""LLM-Viewer's published figures beside ours, and the exact counting beside counts done by hand and the simulator."""

from __future__ import annotations

import csv
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.helpers import DATA
from tests.jobs import composed
from uvm_kv.hw.counting import Counting, Precision
from uvm_kv.hw.model import ModelGeometry
from uvm_kv.hw.profile import HardwareProfile
from uvm_kv.hw.roofline import Roofline
from uvm_kv.hw.step import Operator, StepAnalysis, analyze_step
from uvm_kv.job.resolve import build_profile
from uvm_kv.types import Phase

TABLE = DATA / "llm_viewer_table1.csv"
PREFIX = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
LLAMA_2_7B = ModelGeometry("llama2_7b", 32, 4096, 32, 32, 128, 11008, 32000, 4096)
MQA = ModelGeometry("mqa", 32, 4096, 32, 1, 128, 11008, 32000, 4096)
OPT = ModelGeometry("opt", 40, 5120, 40, 40, 128, 20480, 50272, 2048, gated_mlp=False, rope=False, tied_embeddings=True)
GQA = ModelGeometry("llama3_8b", 32, 4096, 32, 8, 128, 14336, 128256, 8192)


def card(name: str) -> HardwareProfile:
    hardware: Any = OmegaConf.to_object(composed(f"hardware={name}").hardware)
    return build_profile(hardware)


def analyze(
    stage: str = "decode",
    batch_size: int = 1,
    sequence_length: int = 2048,
    *,
    bits: tuple[int, int, int] = (16, 16, 16),
    counting: str = "exact",
    model: ModelGeometry = LLAMA_2_7B,
    hardware: str = "a6000",
) -> StepAnalysis:
    return analyze_step(
        card(hardware),
        model,
        stage=Phase(stage),
        batch_size=batch_size,
        sequence_length=sequence_length,
        precision=Precision(*bits),
        counting=Counting(counting),
    )


def by_name(step: StepAnalysis) -> dict[str, Operator]:
    return {op.name: op for op in step.operators}


def printed(value: float, text: str) -> bool:
    """Whether `value` would be printed as `text`, "152M" or "0.99"."""
    digits = text.rstrip("KMGT")
    decimals = len(digits.partition(".")[2])
    return round(value / PREFIX[text[len(digits) :]], decimals) == float(digits)


def table1() -> list[dict[str, str]]:
    if not TABLE.is_file():
        pytest.skip(f"{TABLE} is not there: the published table is not part of the project")
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_1_is_reproduced() -> None:
    """Operations, bytes, intensity, rate and bound of all rows: as printed, and as LLM-Viewer itself puts them out."""
    steps = {stage: by_name(analyze(stage, counting="llm_viewer")) for stage in ("prefill", "decode")}
    rows = table1()
    for row in rows:
        op = steps[row["stage"]][row["layer"]]
        published = [row[f"published_{name}"] for name in ("OPs", "memory_access", "max_perf")]
        computed = (op.ops, op.num_bytes, op.attainable_ops_per_s)
        pairs = "  ".join(f"{text or '-':>5s} {value:.4g}" for text, value in zip(published, computed, strict=True))
        print(f"{row['stage']:8s} {op.name:10s} {pairs}")
        assert printed(op.ops, row["published_OPs"]), row
        assert printed(op.num_bytes, row["published_memory_access"]), row
        assert printed(op.intensity, row["published_AI"]), row
        assert not row["published_max_perf"] or printed(op.attainable_ops_per_s, row["published_max_perf"]), row
        assert op.bound == row["published_bound"], row
        assert op.ops == float(row["tool_OPs"])
        assert op.num_bytes == float(row["tool_memory_access_bytes"])
        assert op.intensity == pytest.approx(float(row["tool_AI"]), rel=1e-12)
        assert op.attainable_ops_per_s == pytest.approx(float(row["tool_performance"]), rel=2e-5)
        assert op.count == 32
    assert len(rows) == 22


@pytest.mark.parametrize(
    ("stage", "batch_size", "bits", "milliseconds"),
    [
        ("prefill", 1, (16, 16, 16), "226.88"),
        ("decode", 1, (16, 16, 16), "18.637"),
        ("decode", 8, (16, 16, 16), "28.653"),
        ("decode", 1, (16, 16, 8), "17.938"),
        ("decode", 1, (16, 16, 4), "17.588"),
        ("decode", 1, (8, 16, 16), "10.034"),
        ("decode", 1, (4, 16, 16), "5.732"),
        ("decode", 1, (8, 8, 8), "9.318"),
        ("decode", 1, (4, 16, 4), "4.683"),
    ],
)
def test_published_totals(stage: str, batch_size: int, bits: tuple[int, int, int], milliseconds: str) -> None:
    step = analyze(stage, batch_size, bits=bits, counting="llm_viewer")
    assert printed(step.total_s * 1e3, milliseconds), step.total_s * 1e3


def test_published_operations_bytes_and_footprint() -> None:
    prefill, decode = (analyze(stage, counting="llm_viewer") for stage in ("prefill", "decode"))
    assert printed(prefill.total_ops, "28.751T")
    assert printed(prefill.total_bytes, "65.861G")
    assert printed(decode.total_ops, "14.170G")
    assert printed(decode.total_bytes, "14.313G")
    assert printed(decode.weight_bytes, "12.952G")
    assert decode.kv_bytes == 2048 * 524288


def test_llm_viewer_takes_the_int8_peak_only_where_everything_has_8_bits() -> None:
    for bits, peak in (((8, 8, 8), 309.7e12), ((4, 8, 4), 309.7e12), ((8, 8, 16), 154.84e12), ((8, 16, 8), 154.84e12)):
        step = analyze("prefill", bits=bits, counting="llm_viewer")
        assert {op.peak_ops_per_s for op in step.operators} == {peak}


def test_exact_counts_are_those_done_by_hand() -> None:
    """Llama-2-7B, one token behind 2047: 2 bytes an element."""
    ops = by_name(analyze())
    h, i, v, s = 4096, 11008, 32000, 2048
    by_hand = {
        "embedding": (0, 2 * 2 * h),
        "q_proj": (2 * h * h, 2 * (h * h + 2 * h)),
        "k_proj": (2 * h * h, 2 * (h * h + 2 * h)),
        "rope": (6 * 2 * h, 2 * 2 * 2 * h),
        "attn": (2 * 2 * h * s, 2 * (2 * s * h + 2 * h)),
        "post_layernorm": (8 * h, 2 * 4 * h),
        "gate_proj": (2 * h * i, 2 * (h * i + h + i)),
        "act_fn": (5 * i, 2 * 3 * i),
        "lm_head": (2 * h * v, 2 * (h * v + h + v)),
    }
    for name, (count, num_bytes) in by_hand.items():
        assert (ops[name].ops, ops[name].num_bytes) == (count, num_bytes), name
    assert {name: op.count for name, op in ops.items() if op.count != 32} == {
        "embedding": 1,
        "final_layernorm": 1,
        "lm_head": 1,
    }
    assert analyze().weight_bytes == pytest.approx(13.476e9, rel=1e-4)


def test_the_quirks_that_exact_mends() -> None:
    for stage in ("prefill", "decode"):
        exact, viewer = by_name(analyze(stage)), by_name(analyze(stage, counting="llm_viewer"))
        assert exact["lm_head"].ops == 2 * viewer["lm_head"].ops
        assert exact["act_fn"].num_bytes == viewer["mlp_act"].num_bytes * 11008 / 4096
        assert {"embedding", "rope"} <= set(exact) - set(viewer)
        assert not {"softmax", "qk_matmul", "attn_add"} & set(exact)
    matmuls = viewer["qk_matmul"].ops + viewer["sv_matmul"].ops
    assert exact["attn"].ops == matmuls  # Decode: the whole context.
    exact, viewer = by_name(analyze("prefill")), by_name(analyze("prefill", counting="llm_viewer"))
    matmuls = viewer["qk_matmul"].ops + viewer["sv_matmul"].ops
    assert exact["attn"].ops == matmuls / 2 * (2049 / 2048)  # The causal half, diagonal included.
    assert exact["attn"].num_bytes < viewer["qk_matmul"].num_bytes  # No scores in memory.


@pytest.mark.parametrize("model", [LLAMA_2_7B, GQA, MQA, OPT], ids=lambda m: m.name)
@pytest.mark.parametrize("hardware", ["rtx3090", "h100"])
def test_exact_is_what_the_simulator_charges(model: ModelGeometry, hardware: str) -> None:
    roofline = Roofline(card(hardware), model, 2)
    decode = analyze("decode", 16, 1000, model=model, hardware=hardware)
    assert decode.total_s == pytest.approx(roofline.decode_step_s(16, 16 * 1000), rel=1e-12)
    prefill = analyze("prefill", 1, 700, model=model, hardware=hardware)
    assert prefill.total_s == pytest.approx(roofline.prefill_s(700), rel=1e-12)
    for op in (*decode.operators, *prefill.operators):
        assert op.time_s >= 0.999 * op.roof_s, op.name  # Nothing is faster than its roof.


def test_bits_shrink_what_they_are_the_bits_of() -> None:
    full, weights, kv = analyze(), analyze(bits=(4, 16, 16)), analyze(bits=(16, 16, 4))
    # Four bits for each weight of a matrix, 20 for each group of 128 of them; 16 for the rest.
    in_matrices, rest = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096 + 65 * 4096
    assert weights.weight_bytes == in_matrices // 2 + in_matrices // 128 * 20 // 8 + 2 * rest
    assert full.weight_bytes == 2 * (in_matrices + rest)
    assert kv.kv_bytes == full.kv_bytes / 4
    for name, op in by_name(full).items():
        less = by_name(weights)[name].num_bytes < op.num_bytes
        assert less == name.endswith("_proj"), name
        less = by_name(kv)[name].num_bytes < op.num_bytes
        assert less == (name in ("attn", "k_proj", "v_proj")), name


def test_matrix_products_run_at_the_rate_of_their_wider_operand() -> None:
    def peaks(*bits: int) -> dict[str, float]:
        return {op.name: op.peak_ops_per_s for op in analyze(bits=(bits[0], bits[1], bits[2])).operators}

    assert set(peaks(4, 16, 4).values()) == {154.84e12}
    assert peaks(8, 8, 16)["q_proj"] == 309.7e12
    assert peaks(8, 8, 16)["attn"] == 154.84e12
    assert peaks(8, 8, 8)["attn"] == 309.7e12
    assert peaks(8, 8, 8)["input_layernorm"] == 154.84e12
    assert set(peaks(32, 32, 32).values()) == {38.7e12}


def test_fewer_kv_heads_shrink_the_cache_and_the_attention_but_not_its_operations() -> None:
    many, one = analyze(), analyze(model=MQA)
    assert many.kv_bytes == 32 * one.kv_bytes
    assert by_name(many)["attn"].ops == by_name(one)["attn"].ops
    assert by_name(one)["attn"].intensity > 25 * by_name(many)["attn"].intensity
    assert by_name(one)["attn"].time_s < by_name(many)["attn"].time_s


def test_decode_attention_can_be_bound_by_compute() -> None:
    """32 query heads on one KV head of 4 bits, on the RTX 3090: beyond its ridge of 76 operations a byte."""
    attention = by_name(analyze("decode", 64, 4096, model=MQA, bits=(16, 16, 4), hardware="rtx3090"))["attn"]
    assert attention.bound == "compute"
    assert attention.time_s > attention.ops / 71e12


def test_what_does_not_fit_is_flagged() -> None:
    fits, not_ = analyze(hardware="rtx3090"), analyze(batch_size=64, hardware="rtx3090")
    assert fits.fits
    assert not fits.warnings
    assert not not_.fits
    assert "does not fit rtx3090" in not_.warnings[0]
    assert not_.required_bytes == not_.weight_bytes + not_.kv_bytes + not_.activation_bytes
    # LLM-Viewer's footprint leaves weights out; whether the step fits does not.
    assert analyze(counting="llm_viewer").required_bytes == analyze().required_bytes
    assert "beyond the context" in analyze(sequence_length=5000).warnings[0]


@pytest.mark.parametrize("bits", [0, -4, 33])
def test_impossible_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"kv_bits={bits}; it must lie between 1 and 32"):
        Precision(16, 16, bits)
