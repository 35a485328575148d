"""What must come out of the simulated card, whatever its details: ceilings, cliffs, conservation laws."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.jobs import MECHANISMS, resolved, run

ONE_GIB = ("memory.device_kv_bytes=1073741824", "workload.prompt_tokens=128", "workload.output_tokens=128")
LINK = ("hardware.link.h2d_gb_per_s={0}", "hardware.link.d2h_gb_per_s={0}")


@cache
def summary(*overrides: str) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        return run(Path(folder), *overrides)


def throughput(*overrides: str) -> float:
    value = summary(*overrides)["output_tokens_per_s"]
    assert value is not None
    return value


def best(mechanism: str, *overrides: str, batches: tuple[int, ...]) -> float:
    return max(throughput(f"mechanism={mechanism}", f"batch_size={b}", *overrides) for b in batches)


def link(gb_per_s: float) -> tuple[str, ...]:
    return tuple(text.format(gb_per_s) for text in LINK)


def test_device_only_is_flat_beyond_its_capacity() -> None:
    """LLaMA-7B holds 16 requests of 512 + 512 tokens on the card; more clients only queue."""
    values = [throughput("mechanism=device_resident", f"batch_size={b}") for b in (16, 20, 32, 64)]
    assert max(values) / min(values) < 1.02
    assert throughput("mechanism=device_resident", "batch_size=8") < 0.75 * values[0]


def test_device_only_offered_and_running_batch_differ() -> None:
    point = summary("mechanism=device_resident", "batch_size=32")
    assert point["offered_batch"] == 32
    assert 15 < point["running_batch_mean"] < 17


@pytest.mark.parametrize("layout", ["layer_major", "block_major"])
def test_managed_demand_falls_off_a_cliff(layout: str) -> None:
    below = throughput("mechanism=managed_demand", "batch_size=16", f"layout={layout}")
    beyond = summary("mechanism=managed_demand", "batch_size=32", f"layout={layout}", "max_steps=400")
    assert beyond["output_tokens_per_s_whole_run"] < 0.5 * below
    assert beyond["evicted_chunks"] > 0
    assert beyond["gpu_fault_groups"] > 0


def test_oversubscribed_demand_scans_the_set_once_per_layer_over_block_major() -> None:
    """Llama-3-8B's blocks of 16 tokens fill a chunk with all their layers: each layer faults the whole set in anew."""
    shared = (
        "model=llama3_8b",
        "mechanism=managed_demand",
        "batch_size=40",
        "memory.device_kv_bytes=536870912",
        "workload.prompt_tokens=128",
        "workload.output_tokens=128",
        "max_steps=40",
    )
    by_layer, by_block = (summary(*shared, f"layout={x}") for x in ("layer_major", "block_major"))
    assert by_layer["evicted_chunks"] > 0
    assert 20 < by_block["evicted_chunks"] / by_layer["evicted_chunks"] < 40


@pytest.mark.parametrize("model", ["llama_7b", "llama3_8b"])
@pytest.mark.parametrize("batch", [4, 16, 20, 32, 64])
@pytest.mark.parametrize("reach", ["in_place", "copy_ahead", "both"])
def test_balanced_never_loses_much_to_device_only(model: str, batch: int, reach: str) -> None:
    shared = (f"model={model}", f"batch_size={batch}", "workload.num_requests=128" if batch < 32 else "seed=0")
    alone = throughput("mechanism=device_resident", *shared)
    assert throughput("mechanism=pinned_balanced", f"placement.reach={reach}", *shared) >= 0.97 * alone


@pytest.mark.parametrize("gb_per_s", [0.1, 12.0, 25.0])
@pytest.mark.parametrize("kv_bytes", [600_000_000, 838_860_800, 1_300_000_000])
def test_balanced_never_loses_where_the_device_holds_one_or_two_requests(gb_per_s: float, kv_bytes: int) -> None:
    """Staging for those who wait must not push the only sequence that fits off the device."""
    shared = (f"memory.device_kv_bytes={kv_bytes}", "batch_size=8", "workload.num_requests=24", *link(gb_per_s))
    alone = summary("mechanism=device_resident", *shared)["output_tokens_per_s_whole_run"]
    assert summary("mechanism=pinned_balanced", *shared)["output_tokens_per_s_whole_run"] >= 0.97 * alone


def test_balanced_never_loses_much_on_a_length_distribution() -> None:
    shared = ("workload=azure_conv", "batch_size=24")
    assert throughput("mechanism=pinned_balanced", *shared) >= 0.97 * throughput("mechanism=device_resident", *shared)


def test_balanced_gains_at_one_gib_and_stays_under_the_gross_link_bound() -> None:
    """BW_link * t / C, with the step time and the KV in use of the device-only run itself."""
    batches = (8, 12, 16)
    alone = best("device_resident", *ONE_GIB, batches=batches)
    gain = best("pinned_balanced", *ONE_GIB, batches=batches) / alone - 1
    point = summary("mechanism=device_resident", "batch_size=8", *ONE_GIB)
    step_s = point["duration_s"] / point["num_steps"]
    assert gain < 25e9 * step_s / point["kv_bytes_mean"]["used"]
    assert 0.10 < gain < 0.60


def test_balanced_stops_using_the_host_on_a_slow_link() -> None:
    batches = (8, 12, 16)
    alone = best("device_resident", *ONE_GIB, *link(0.1), batches=batches)
    assert abs(best("pinned_balanced", *ONE_GIB, *link(0.1), batches=batches) / alone - 1) < 0.02


def test_balanced_gains_more_on_a_faster_link() -> None:
    batches = (12, 16)
    slow = best("pinned_balanced", *ONE_GIB, batches=batches)
    assert best("pinned_balanced", *ONE_GIB, *link(250), batches=batches) > 1.05 * slow


@pytest.mark.parametrize("kv_requests", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("prompt", "output"), [(512, 512), (960, 64), (64, 960)])
def test_zero_copy_never_beats_the_in_place_ceiling(kv_requests: int, prompt: int, output: int) -> None:
    """Device KV for a whole number of requests, so that nothing is stranded and the ceiling is the link's alone."""
    setting = (
        f"memory.device_kv_bytes={kv_requests * 512 * 2**20}",
        f"workload.prompt_tokens={prompt}",
        f"workload.output_tokens={output}",
    )
    batches = tuple(kv_requests + extra for extra in (0, 1, 2, 4))
    alone = best("device_resident", *setting, batches=batches)
    bound = summary("mechanism=pinned_zero_copy", f"batch_size={kv_requests}", *setting)["closed_form"]
    assert bound["stranded"] == 0
    if kv_requests > 2:
        assert bound["link"] == pytest.approx(25 / (936 * 0.896), rel=0.25)
    assert best("pinned_zero_copy", *setting, batches=batches) / alone - 1 <= bound["total"]


@pytest.mark.parametrize("batch", [16, 17, 18, 20])
def test_zero_copy_stays_under_the_ceiling_with_short_requests(batch: int) -> None:
    """64 + 64 tokens are 8 blocks: a host share of one block must not be one that is hardly ever reached."""
    short = ("memory.device_kv_bytes=1073741824", "workload.prompt_tokens=64", "workload.output_tokens=64")
    many = (*short, "workload.num_requests=600")
    alone = best("device_resident", *many, batches=(16, 20))
    point = summary("mechanism=pinned_zero_copy", f"batch_size={batch}", *many)
    assert point["output_tokens_per_s"] / alone - 1 <= point["closed_form_ceiling"]


def test_the_closed_form_step_is_that_of_the_device_only_run() -> None:
    for lengths in (("64", "64"), ("512", "512"), ("1024", "128")):
        setting = (f"workload.prompt_tokens={lengths[0]}", f"workload.output_tokens={lengths[1]}")
        bound = summary("mechanism=pinned_balanced", "batch_size=1", *setting)["closed_form"]
        alone = summary("mechanism=device_resident", f"batch_size={bound['num_seqs']}", *setting)
        assert bound["step_s"] == pytest.approx(alone["duration_s"] / alone["num_steps"], rel=0.1)


@pytest.mark.parametrize(
    "mechanism",
    ["pinned_zero_copy", "pinned_balanced", "pinned_prefetch_ahead", "managed_by_tier", "managed_prefetch_ahead"],
)
@pytest.mark.parametrize("batch", [17, 18, 20, 24])
def test_no_reach_beats_its_ceiling(mechanism: str, batch: int) -> None:
    alone = best("device_resident", batches=(16, 32))
    point = summary(f"mechanism={mechanism}", f"batch_size={batch}")
    assert point["output_tokens_per_s"] / alone - 1 <= point["closed_form_ceiling"]


@pytest.mark.parametrize("model", ["llama_7b", "llama3_8b"])
def test_prefetching_managed_memory_gains_less_than_copying_from_pinned(model: str) -> None:
    """At 1 GiB both beat device-only. The same bytes come over the link and HBM, and on managed memory go back."""
    batches = (9, 10, 11, 12, 14) if model == "llama_7b" else (36, 40, 44, 48, 64)
    setting = (f"model={model}", *ONE_GIB)
    points = {
        mechanism: [throughput(f"mechanism={mechanism}", f"batch_size={b}", *setting) for b in batches]
        for mechanism in ("device_resident", "pinned_prefetch_ahead", "managed_prefetch_ahead")
    }
    alone, pinned, managed = points.values()
    assert all(m <= p for m, p in zip(managed, pinned, strict=True))
    assert 1.05 * max(alone) < max(managed) < 0.95 * max(pinned)
    point = summary("mechanism=managed_prefetch_ahead", f"batch_size={batches[0]}", *setting)
    assert point["h2d_bytes"] == pytest.approx(point["d2h_bytes"], rel=0.02)
    assert point["evicted_chunks"] == 0


@pytest.mark.parametrize("mechanism", [*MECHANISMS, "managed_prefetch_ahead"])
def test_the_link_carries_no_more_than_its_rate_and_tokens_are_conserved(mechanism: str) -> None:
    point = summary(f"mechanism={mechanism}", "batch_size=24", "workload.output_tokens=64", "workload.num_requests=48")
    assert point["h2d_bytes"] <= 25e9 * point["duration_s"]
    assert point["d2h_bytes"] <= 26e9 * point["duration_s"]
    assert point["stall_s"] <= point["duration_s"]
    first = sum(max(1, 64 * i // 24) for i in range(24))
    assert point["num_output_tokens"] == first + 24 * 64
    assert point["num_requests"] == 48
    assert point["num_measured_requests"] == 24


def test_swap_beats_recompute_where_both_preempt() -> None:
    """Copying a sequence's KV back costs about a tenth of computing it again."""
    swap, recompute = (summary(f"mechanism={m}", "batch_size=32") for m in ("pinned_swap", "device_recompute"))
    assert swap["preemptions_by_kind"]["swap"] > 0 < recompute["preemptions_by_kind"]["recompute"]
    assert swap["output_tokens_per_s"] > recompute["output_tokens_per_s"]


def test_one_sequence_larger_than_the_device_turns_from_refused_into_slow() -> None:
    shared = ("batch_size=1", "memory.device_kv_bytes=268435456", "workload.num_requests=3")
    with pytest.raises(ValueError, match="KV budget"):
        summary("mechanism=device_resident", *shared)
    slow = ("pinned_zero_copy", "pinned_balanced", "pinned_prefetch_ahead", "managed_demand", "managed_prefetch_ahead")
    for mechanism in slow:
        assert summary(f"mechanism={mechanism}", *shared)["num_requests"] == 3


def test_llama_7b_kv_budget_on_an_rtx3090() -> None:
    job = resolved()
    *parts, (_, kv_bytes) = job.memory_account
    assert parts[0] == ("card", 24 * 2**30)
    assert 8.6e9 < kv_bytes < 9.5e9
    assert sum(value for _, value in parts) == kv_bytes == job.config.memory.device_kv_bytes


def test_throughput_does_not_depend_on_the_length_of_the_run() -> None:
    """Nothing is preempted here: Llama-3-8B, 60 clients, with 4 and 8 requests each."""
    given = ("model=llama3_8b", "mechanism=device_recompute", "batch_size=60")
    short, usual = (throughput(*given, f"workload.num_requests={60 * n}") for n in (4, 8))
    assert short == pytest.approx(usual, rel=1e-4)
    assert usual == throughput(*given), "8 for each client is the default"


@pytest.mark.parametrize(("model", "cliff"), [("llama_7b", 22), ("llama3_8b", 61)])
def test_optimistic_admission_falls_off_a_cliff_where_it_begins_to_preempt(model: str, cliff: int) -> None:
    at, beyond = (
        summary(f"model={model}", "mechanism=device_recompute", f"batch_size={b}") for b in (cliff, cliff + 1)
    )
    assert (at["preemptions"], at["num_requests"]) == (0, 8 * cliff)
    assert beyond["preemptions"] > 0 and beyond["num_requests"] > 3 * at["num_requests"], "it settles slowly"
    assert beyond["output_tokens_per_s"] < 0.95 * at["output_tokens_per_s"]
