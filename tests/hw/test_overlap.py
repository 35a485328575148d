"""What overlaps with what: layers, copies ahead, both directions of the link, and the closed-form ceilings."""

from __future__ import annotations

import pytest

from uvm_kv.hw.overlap import CopyQueue, LayerWork, ceiling, duplex, run_layers
from uvm_kv.types import GIB, Reach

L = 10


def run(work: LayerWork, lead: int = 2, queue: CopyQueue | None = None) -> tuple[float, float]:
    return run_layers(L, work, lead, queue or CopyQueue())


def test_without_the_link_a_step_is_the_sum_of_its_layers() -> None:
    assert run(LayerWork(3.0, 1.0)) == (40.0, 0.0)


@pytest.mark.parametrize(
    ("work", "layer", "wait"),
    [
        pytest.param(LayerWork(3.0, 2.0, in_place_s=2.0), 5.0, 0.0, id="in place, hidden in attention"),
        pytest.param(LayerWork(3.0, 2.0, in_place_s=4.5), 7.5, 2.5, id="in place: dense work hides nothing"),
        pytest.param(LayerWork(3.0, 2.0, write_s=5.0), 5.0, 0.0, id="writes hide in the whole layer"),
        pytest.param(LayerWork(3.0, 2.0, write_s=6.0), 6.0, 1.0, id="writes longer than the layer"),
        pytest.param(LayerWork(3.0, 2.0, copy_write_s=1.0), 6.0, 0.0, id="a copied byte is written to HBM"),
    ],
)
def test_the_link_in_a_layer(work: LayerWork, layer: float, wait: float) -> None:
    assert run(work) == pytest.approx((L * layer, L * wait))


@pytest.mark.parametrize("lead", [1, 2, 5])
@pytest.mark.parametrize(("copy", "wait"), [(4.0, 0.0), (5.0, 0.0), (5.5, 0.5), (9.0, 4.0)])
def test_copies_ahead_hide_exactly_up_to_the_layer(lead: int, copy: float, wait: float) -> None:
    """In the steady state a layer of 5 carries a copy of 5; what is longer is waited for in every layer."""
    queue = CopyQueue()
    steps = [run(LayerWork(3.0, 2.0, copy_s=copy), lead, queue) for _ in range(12)]
    assert steps[-1] == pytest.approx((L * (5.0 + wait), L * wait))
    assert 0 <= queue.done_s <= lead * copy + 1e-9


def test_copies_get_what_reads_in_place_leave_of_the_link() -> None:
    """The reads take 2 of a layer of 5, so a copy of 3 hides and a copy of 4 waits for 1."""
    for copy, wait in ((3.0, 0.0), (4.0, 1.0)):
        queue = CopyQueue()
        for _ in range(12):
            step = run(LayerWork(3.0, 2.0, in_place_s=2.0, copy_s=copy), 2, queue)
        assert step == pytest.approx((L * (5.0 + wait), L * wait))


def test_copies_are_carried_into_the_next_step_and_run_out() -> None:
    """The first step with copies brings the next one's first two layers in; a step without copies still needs them."""
    queue = CopyQueue()
    run(LayerWork(3.0, 2.0, copy_s=4.0), 2, queue)
    assert queue.copy_s == 4.0
    assert 0.0 < queue.done_s <= 8.0
    assert run(LayerWork(3.0, 2.0), 2, queue)[1] == pytest.approx(0.0)
    assert (queue.copy_s, queue.done_s) == (0.0, pytest.approx(0.0))


def test_a_copy_that_could_not_start_is_waited_for() -> None:
    queue = CopyQueue(copy_s=4.0, done_s=1.0)
    _, waited = run(LayerWork(1.0, 1.0), 2, queue)
    assert waited == pytest.approx(3.0 + 2.0)


@pytest.mark.parametrize(
    ("h2d", "d2h", "expected"),
    [
        pytest.param(4.0, 0.0, (4.0, 0.0), id="alone"),
        pytest.param(0.0, 4.0, (0.0, 4.0), id="alone, the other way"),
        pytest.param(4.5, 4.5, (7.0, 5.0), id="d2h ends at 5, h2d has 2 left"),
        pytest.param(1.0, 9.0, (2.0, 9.2), id="h2d ends at 2, d2h has 7.2 left"),
    ],
)
def test_both_directions_slow_each_other_while_both_are_busy(
    h2d: float, d2h: float, expected: tuple[float, float]
) -> None:
    """Shares of 0.5 and 0.9: what is left when the shorter one ends runs alone, at the full rate."""
    assert duplex(h2d, d2h, 0.5, 0.9) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reach", "gib", "gain"),
    [
        (Reach.IN_PLACE, 8, 0.027),
        (Reach.IN_PLACE, 1, 0.027),
        (Reach.COPY_AHEAD, 8, 0.015),
        (Reach.COPY_AHEAD, 1, 0.31),
        (Reach.BOTH, 8, 0.036),
        (Reach.BOTH, 1, 0.31),
    ],
)
def test_ceilings_are_those_of_the_design_page(reach: Reach, gib: int, gain: float) -> None:
    """On the byte floor t = (W + C) / BW_hbm of LLaMA-7B on a 3090, rounded as printed there."""
    kv_bytes, hbm = gib * GIB, 936e9
    got = ceiling(
        reach,
        step_s=(13.5e9 + kv_bytes) / hbm,
        attention_s=kv_bytes / hbm,
        kv_bytes=kv_bytes,
        link_bytes_per_s=25e9,
        hbm_bytes_per_s=hbm,
    )
    assert round(got, 3 if gain < 0.1 else 2) == gain


def test_copying_ahead_pays_only_while_the_cache_is_smaller_than_the_weights() -> None:
    def gain(kv_bytes: float) -> float:
        step = (13.5e9 + kv_bytes) / 936e9
        return ceiling(
            Reach.COPY_AHEAD,
            step_s=step,
            attention_s=kv_bytes / 936e9,
            kv_bytes=kv_bytes,
            link_bytes_per_s=25e9,
            hbm_bytes_per_s=936e9,
        )

    assert gain(13.4e9) > 0
    assert gain(13.6e9) == 0
