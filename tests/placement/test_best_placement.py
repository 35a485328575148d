"""bandwidth_balanced chooses well: beside the placements that do not choose, at any queue, and as resources grow."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.jobs import run
from uvm_kv.types import GIB

FIXED = ("device_resident", "pinned_zero_copy", "pinned_prefetch_ahead")
RATIOS = (1.35, 2, 5)
CELLS = [(0.5, 4064), (0.5, 992), (1, 4064)]
SMALL = ("memory.device_kv_bytes=536870912", "workload.prompt_tokens=992", "batch_size=16")
"""Four requests on the device, and three times as many that wait."""


@cache
def rate(mechanism: str, *overrides: str) -> float:
    """Tokens per second of decoding in the steady state, in a cell of the phase diagram."""
    with TemporaryDirectory() as folder:
        summary = run(Path(folder), "experiment=phase_diagram", f"mechanism={mechanism}", *overrides)
    value = summary["output_tokens_per_s"]
    assert value is not None
    return value


@pytest.mark.parametrize(("gib", "prompt"), CELLS)
def test_it_is_the_best_placement_at_every_number_of_clients(gib: float, prompt: int) -> None:
    """It is within 2 % of the best, and a longer queue costs nothing."""
    best_so_far = 0.0
    for ratio in RATIOS:
        cell = (
            f"memory.device_kv_bytes={int(gib * GIB)}",
            f"workload.prompt_tokens={prompt}",
            f"working_set_ratio={ratio}",
        )
        balanced = rate("pinned_balanced", *cell)
        assert balanced >= 0.98 * max(rate(mechanism, *cell) for mechanism in FIXED)
        assert balanced >= 0.99 * best_so_far
        best_so_far = max(best_so_far, balanced)


@pytest.mark.parametrize("reach", ["in_place", "copy_ahead"])
@pytest.mark.parametrize("ratio", [2, 5])
def test_each_reach_is_no_worse_than_the_placement_that_reads_so(reach: str, ratio: float) -> None:
    cell = ("memory.device_kv_bytes=536870912", "workload.prompt_tokens=4064", f"working_set_ratio={ratio}")
    fixed = "pinned_zero_copy" if reach == "in_place" else "pinned_prefetch_ahead"
    balanced = rate("pinned_balanced", f"placement.reach={reach}", *cell)
    assert balanced >= 0.98 * max(rate("device_resident", *cell), rate(fixed, *cell))


def test_vmm_memory_gives_the_same() -> None:
    assert rate("vmm_balanced", *SMALL) == rate("pinned_balanced", *SMALL)


LADDERS = {
    "device KV": [f"memory.device_kv_bytes={mib << 20}" for mib in (256, 384, 512, 768, 1024, 1536)],
    "host KV": [f"memory.host_kv_bytes={mib << 20}" for mib in (2, 64, 256, 512, 1024, 4096)],
    "link": [f"hardware.link.h2d_gb_per_s={gb}" for gb in (0.1, 1, 4, 12, 25, 50, 200)],
}


@pytest.mark.parametrize("ladder", LADDERS)
def test_more_of_a_resource_is_never_worse(ladder: str) -> None:
    """Rates may fall by 2 %, because the prediction takes every block as full."""
    rates = [rate("pinned_balanced", *SMALL, rung) for rung in LADDERS[ladder]]
    assert all(after >= 0.98 * max(rates[: i + 1]) for i, after in enumerate(rates[1:])), rates
    assert rates[-1] > 1.2 * rates[0]


@pytest.mark.parametrize("num_clients", [1, 4, 6])
def test_managed_prefetching_serves_what_fits_alone_at_any_queue_length(num_clients: int) -> None:
    """A request as large as the device, whose chunks the staging for a queue would have cut into."""
    given = (
        "memory.device_kv_bytes=1073741824",
        "memory.host_kv_bytes=16777216",
        "workload.prompt_tokens=2000",
        "workload.output_tokens=40",
        "workload.num_requests=6",
    )
    with TemporaryDirectory() as folder:
        assert (
            run(Path(folder), "mechanism=managed_prefetch_ahead", *given, f"batch_size={num_clients}")["num_requests"]
            == 6
        )
