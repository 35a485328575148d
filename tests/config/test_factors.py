"""Factors of a study that resolve to something else: the working set, bits of weights and KV."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.jobs import composed, job, resolved, run
from uvm_kv.config.names import CONF_DIR, check_overrides, parse_overrides
from uvm_kv.config.schema import UvmReplaySchema
from uvm_kv.job.build import build_roofline, identity, workload_of
from uvm_kv.job.resolve import resolve

SMALL = ("memory.device_kv_bytes=1073741824", "workload.prompt_tokens=100", "workload.output_tokens=100")
"""LLaMA-7B: 128 blocks of 8 MiB on the device; 13 of them per request."""


@pytest.mark.parametrize(("ratio", "clients"), [(0.5, 5), (0.9, 9), (1.0, 10), (1.1, 11), (2, 20), (0.001, 1)])
def test_a_working_set_is_a_number_of_clients(ratio: float, clients: int, tmp_path: Path) -> None:
    asked = job(tmp_path, *SMALL, f"working_set_ratio={ratio}")
    found = asked.resolved
    assert found.config.batch_size == clients
    assert len(workload_of(asked).lengths) == 8 * clients
    assert found.working_set_ratio() == clients * 13 / 128


def test_it_is_of_the_device_tier_whatever_its_size_and_unit() -> None:
    """Without device_kv_bytes the tier is what the card leaves; managed memory has whole chunks only."""
    whole = resolved("working_set_ratio=1.5")
    assert whole.config.batch_size == round(1.5 * whole.capacity.num_device_blocks / 64)
    for layout in ("layer_major", "block_major"):
        managed = resolved(
            *SMALL, "mechanism=managed_demand", f"layout={layout}", "block_size=48", "working_set_ratio=3"
        )
        blocks = managed.capacity.num_device_blocks
        assert managed.config.batch_size == round(3 * blocks / managed.spec.num_blocks(200))
        assert blocks * managed.spec.block_bytes < 2**30


def test_the_run_is_the_one_of_its_batch(tmp_path: Path) -> None:
    by_ratio, by_batch = (job(tmp_path, *SMALL, how) for how in ("working_set_ratio=1.1", "batch_size=11"))
    assert by_ratio.directory == by_batch.directory
    assert identity(by_ratio) == identity(by_batch)


def test_a_summary_holds_the_true_ratio(tmp_path: Path) -> None:
    summary = run(tmp_path, *SMALL, "working_set_ratio=1", "max_steps=2")
    assert summary["working_set_ratio"] == 10 * 13 / 128
    assert summary["offered_batch"] == 10
    for other in (["workload=azure_conv", "model=llama3_8b"], [*SMALL, "workload.arrival=all_at_once"]):
        assert run(tmp_path, *other, "memory.device_kv_bytes=1073741824", "max_steps=2")["working_set_ratio"] is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["working_set_ratio=1", "batch_size=8"], "working_set_ratio=1.0 with batch_size=8: .* drop one of the two"),
        (["working_set_ratio=0"], "working_set_ratio=0.0; it must be at least"),
        (["working_set_ratio=-1"], "working_set_ratio=-1.0; it must be at least"),
        (["working_set_ratio=nan"], "working_set_ratio=nan; it must be at least"),
        (["working_set_ratio=1", "workload=azure_conv"], "with workload=azure_conv .* give batch_size"),
        (
            ["working_set_ratio=1", "workload.arrival=all_at_once"],
            "all_at_once; it counts the clients of a closed_loop",
        ),
        (["working_set_ratio=200"], "max_num_batched_tokens=2048 is below batch_size="),
        (
            ["working_set_ratio=1", "runner=cpu", "model=llama3_8b", "model.weights=random"],
            "with runner=cpu needs memory.device_kv_bytes",
        ),
        (["workload.start=steady", "scheduler=continuous_whole"], "needs scheduler.chunked_prefill=True, given is"),
        (["model.weight_bits=7"], "model.weight_bits '7' is unknown; allowed: 16, 4, 8"),
        (["kv_bits=2"], "kv_bits '2' is unknown; allowed: 16, 4, 8"),
        (["kv_bits=8", "runner=cpu", "model.weights=random"], "kv_bits=8 with dtype=float32 and a real model"),
        (
            ["model.weight_bits=4", "runner=cpu", "model.weights=random", "dtype=bfloat16"],
            "model.weight_bits=4 .* quantized ones are simulated only: runner=sim",
        ),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        resolve(composed(*overrides))


def test_int8_weights_halve_the_weights_alone() -> None:
    """Llama-2-13B in fp16 does not fit 24 GB. In int8 the matrices of its layers take a byte per weight and two per
    output for the scale; embedding, head, norms, KV and activations stay fp16."""
    with pytest.raises(ValueError, match="llama2_13b leaves no KV memory on rtx3090"):
        resolved("model=llama2_13b")
    found = resolved("model=llama2_13b_int8")
    account = dict(found.memory_account)
    assert found.model.num_parameters == 13_015_864_320
    assert account["weights (by size, 8 bits; embedding and head 16 bits)"] == -13_348_218_880
    assert found.spec.token_bytes == 819_200
    whole = dict(resolved("model=llama2_13b", "hardware=a6000").memory_account)
    assert account["activation peak"] == whole["activation peak"]
    assert 8e9 < account["KV budget"] < 10e9


def test_narrow_kv_is_smaller_and_read_sooner() -> None:
    """Per token and layer 2 * 8 heads * 128 elements; the weights' time stays."""
    times, blocks = {}, {}
    weights_s = build_roofline(resolved("model=llama3_8b")).layer_operators_s(8)["up_proj"]
    for bits in (16, 8, 4):
        found = resolved("model=llama3_8b", "memory.device_kv_bytes=1073741824", f"kv_bits={bits}")
        assert found.spec.layer_token_bytes == 2 * 8 * 128 * bits // 8
        roofline = build_roofline(found)
        times[bits] = roofline.decode_attention_s(100_000) - roofline.decode_attention_s(0)
        blocks[bits] = found.capacity.num_device_blocks
        assert roofline.layer_operators_s(8)["up_proj"] == weights_s
    assert times[16] == pytest.approx(2 * times[8]) == pytest.approx(4 * times[4])
    assert (blocks[8], blocks[4]) == (2 * blocks[16], 4 * blocks[16])


def test_int8_weights_are_read_in_half_the_time_and_multiplied_at_the_fp16_peak() -> None:
    """A decode step of one sequence waits for weights, a prefill of 2048 tokens for the tensor cores."""
    narrow, wide = (build_roofline(resolved(f"model.weight_bits={bits}")) for bits in (8, 16))
    few, many = (
        [
            r.operator_s("up_proj", 2 * 4096 * 11008 * n, r.precision.weight_bits / 8 * 4096 * 11008)
            for r in (narrow, wide)
        ]
        for n in (1, 100_000)
    )
    assert few[0] == pytest.approx(few[1] / 2, rel=0.01)
    assert many[0] == pytest.approx(many[1], rel=0.01)


def test_bits_of_the_dtype_are_the_default(tmp_path: Path) -> None:
    """They change neither the run nor its id; others do."""
    plain = job(tmp_path)
    assert job(tmp_path, "kv_bits=16", "model.weight_bits=16").directory == plain.directory
    assert len({job(tmp_path, given).directory for given in ("kv_bits=8", "kv_bits=4", "model.weight_bits=8")}) == 3
    assert (identity(plain)["weight_bits"], identity(plain)["kv_bits"]) == (16, 16)
    setting, _ = job(tmp_path, "kv_bits=8", "model.weight_bits=4").resolved.comparison()
    assert (setting["kv_bits"], setting["model.weight_bits"]) == (8, 4)
    setting, _ = plain.resolved.comparison()
    assert (setting["kv_bits"], setting["model.weight_bits"]) == (16, 16)


def test_a_job_of_narrow_kv_runs_in_every_kind_of_memory(tmp_path: Path) -> None:
    """The link carries half the bytes for the same tokens."""
    moved = {}
    for mechanism in ("pinned_zero_copy", "pinned_prefetch_ahead", "managed_prefetch_ahead"):
        for bits in (16, 8):
            device = 2**30 * bits // 16
            given = (f"mechanism={mechanism}", f"kv_bits={bits}", f"memory.device_kv_bytes={device}", "max_steps=40")
            summary = run(tmp_path, *SMALL[1:], *given, "batch_size=20", "workload.start=steady")
            moved[bits] = summary["h2d_bytes"]
        assert 0 < moved[8] <= 0.55 * moved[16], mechanism


LINKS = ("own", "pcie3", "pcie4", "pcie5", "nvlink_c2c")


def test_a_named_link_replaces_the_cards_own() -> None:
    """The RTX 3090's own is PCIe 4.0, a card of PCIe 5.0 can be put on 3.0, and a rate can still be given by hand."""
    rates = [resolved(f"link={link}").profile.link.h2d_gb_per_s for link in LINKS]
    assert rates == [25.0, 11.5, 25.0, 56.0, 375.0]
    assert resolved("link=pcie4").determining() == resolved().determining()
    assert resolved("link=pcie3", "hardware=h100").profile.link.zero_copy_share == (1.0, 0.72, 0.66)
    assert resolved("link=pcie3", "hardware.link.h2d_gb_per_s=9").profile.link.h2d_gb_per_s == 9


@pytest.mark.parametrize("link", LINKS[1:])
def test_every_number_of_a_named_link_has_a_source_of_its_own(link: str) -> None:
    tree = OmegaConf.load(CONF_DIR / "link" / f"{link}.yaml")
    assert {f"link.{name}" for name in tree.link} == set(tree.sources)
    profile = resolved(f"link={link}", "hardware=h200").profile
    assert all(profile.sources[name] == text for name, text in tree.sources.items())


def test_a_faster_link_gains_more(tmp_path: Path) -> None:
    gains = []
    for link in LINKS[1:]:
        given = ("mechanism=pinned_prefetch_ahead", "memory.device_kv_bytes=1073741824", "workload.start=steady")
        summary = run(tmp_path, *given, f"link={link}", "working_set_ratio=2", "max_steps=20")
        gains.append(summary["output_tokens_per_s"])
        assert summary["link_h2d_gb_per_s"] == resolved(f"link={link}").profile.link.h2d_gb_per_s
    assert gains == sorted(gains)
    assert gains[-1] > 2 * gains[0]


def test_link_names_are_checked() -> None:
    check_overrides(parse_overrides(["link=pcie3,pcie4"]))
    with pytest.raises(ValueError, match=r"link 'pcie6' is unknown; did you mean pcie"):
        check_overrides(parse_overrides(["link=pcie6"]))
    with pytest.raises(ValueError, match="key 'link' is unknown"):
        check_overrides(parse_overrides(["link=pcie3"]), UvmReplaySchema())


def test_without_chunks_a_step_holds_the_longest_request(tmp_path: Path) -> None:
    """vLLM V0's rule; the activations of such a step leave less for KV."""
    cut, whole = (resolved("model=llama3_8b", f"scheduler.chunked_prefill={given}") for given in ("true", "false"))
    assert (cut.config.scheduler.max_num_batched_tokens, whole.config.scheduler.max_num_batched_tokens) == (2048, 8192)
    assert dict(whole.memory_account)["activation peak"] < dict(cut.memory_account)["activation peak"] < 0
    assert (
        resolved("scheduler.chunked_prefill=false", "max_model_len=1100").config.scheduler.max_num_batched_tokens
        == 2048
    )
    plain = job(tmp_path)
    assert job(tmp_path, "scheduler.chunked_prefill=true").directory == plain.directory
    other = job(tmp_path, "scheduler=continuous_whole")
    assert other.directory != plain.directory
    assert (identity(plain)["chunked_prefill"], identity(other)["chunked_prefill"]) == (True, False)
    assert [j.resolved.comparison()[0]["scheduler.chunked_prefill"] for j in (plain, other)] == [True, False]


def test_chunks_shorten_the_longest_gap_between_tokens_and_delay_the_first(tmp_path: Path) -> None:
    """Sarathi-Serve's trade: decodes no longer wait for whole prompts."""
    given = ("model=llama3_8b", "max_model_len=8192", "scheduler.max_num_batched_tokens=512", "batch_size=8")
    lengths = ("workload.prompt_tokens=4000", "workload.output_tokens=60", "workload.num_requests=40")
    cut, whole = (run(tmp_path, *given, *lengths, f"scheduler.chunked_prefill={c}") for c in ("true", "false"))
    steps = {s["chunked_prefill"]: s["duration_s"] / s["num_steps"] for s in (cut, whole)}
    assert cut["num_output_tokens"] == whole["num_output_tokens"]
    assert steps[True] < steps[False]
    assert whole["ttft_s"]["mean"] < cut["ttft_s"]["mean"]
