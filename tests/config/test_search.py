"""The search for the best batch size, on made-up curves whose peak is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from uvm_kv.sweep.search import Tried, search_best

Curve = Callable[[int], Tried | None]


def linear(batch: int, cliff: int) -> float:
    """Tokens per second of `batch` sequences that all run: concave, as they share the pass over the weights."""
    return 1000 * batch / (20 + batch) if batch <= cliff else 1000 * cliff / (20 + cliff)


def preempting(cliff: int, *, sawtooth: float = 0.0, moves: bool = False) -> Curve:
    """Optimistic admission: all run up to `cliff`, and 8 % less is made beyond it, in teeth of 7 batches."""

    def run(batch: int) -> Tried:
        rate = linear(batch, cliff)
        if batch > cliff:
            rate *= 0.92 + sawtooth * ((batch - cliff) % 7)
        beyond = batch > cliff
        return Tried(batch, rate, min(batch, cliff), limited=beyond, preempted=beyond, counts=not moves or beyond)

    return run


def waiting(fits: int) -> Curve:
    """Worst-case admission: `fits` sequences run at any larger batch."""
    return lambda batch: Tried(batch, linear(batch, fits), min(batch, fits), limited=batch > fits, preempted=False)


def paging(fits: int) -> Curve:
    """Demand paging: a fall to a tenth beyond `fits`."""
    return lambda batch: Tried(
        batch, linear(batch, batch) * (1 if batch <= fits else 0.1), batch, limited=False, preempted=False
    )


def best(tried: list[Tried]) -> Tried:
    return max(tried, key=lambda it: (it.counts, it.tokens_per_s, -it.batch_size))


@pytest.mark.parametrize("cliff", [1, 2, 3, 16, 22, 61, 154, 700])
@pytest.mark.parametrize("start", [[16], [57, 62], [1, 2, 4, 8, 16, 32, 64, 128], [1000]])
def test_the_cliff_is_found_to_the_batch(cliff: int, start: list[int]) -> None:
    """Llama-3-8B: its peak at 61 lay between the 57 and 62 that were tried."""
    tried = search_best(preempting(cliff), start, one_length=True, most=2048)
    assert best(tried).batch_size == cliff
    assert {cliff, cliff + 1} <= {it.batch_size for it in tried}


def test_the_best_batch_of_a_mechanism_that_must_move_kv_lies_beyond_the_cliff() -> None:
    tried = search_best(preempting(61, sawtooth=0.01, moves=True), [61, 62], one_length=True, most=2048)
    found = best(tried)
    assert found.counts and found.batch_size > 61
    peak = max(preempting(61, sawtooth=0.01, moves=True)(b).tokens_per_s for b in range(62, 200))  # type: ignore[union-attr]
    assert found.tokens_per_s > 0.97 * peak


@pytest.mark.parametrize(("fits", "start"), [(16, [1]), (16, [16]), (47, [45]), (47, [200]), (1, [1]), (500, [8])])
def test_a_plateau_is_reached_and_left_in_a_few_runs(fits: int, start: list[int]) -> None:
    tried = search_best(waiting(fits), start, one_length=True, most=2048)
    assert best(tried).tokens_per_s == pytest.approx(linear(fits, fits), rel=0.005)
    assert len(tried) < 60


@pytest.mark.parametrize("start", [[4], [20], [12, 64]])
def test_the_last_batch_before_paging_is_found(start: list[int]) -> None:
    assert best(search_best(paging(20), start, one_length=True, most=2048)).batch_size == 20


def test_with_drawn_lengths_no_cliff_is_looked_for() -> None:
    """Preemptions begin at any batch; the top is flat."""

    def curve(batch: int) -> Tried:
        rate = 400 - abs(batch - 24) / 10 if batch > 18 else 20.0 * batch
        return Tried(batch, rate, min(batch, 19), limited=batch > 12, preempted=batch > 12)

    tried = search_best(curve, [8, 16, 32, 64], one_length=False, most=2048)
    assert best(tried).tokens_per_s > 0.995 * 400
    assert len(tried) < 12


def test_a_batch_that_is_refused_ends_the_ladder() -> None:
    tried = search_best(lambda b: waiting(1000)(b) if b <= 40 else None, [8], one_length=True, most=2048)
    assert best(tried).batch_size == 40, "the largest that is served is found, not only a rung of the ladder"
    assert search_best(lambda _: None, [8, 16], one_length=True, most=2048) == []


def test_no_batch_is_larger_than_the_most_allowed_nor_tried_twice() -> None:
    asked: list[int] = []

    def curve(batch: int) -> Tried | None:
        asked.append(batch)
        return waiting(1000)(batch)

    tried = search_best(curve, [8, 50, 300], one_length=True, most=60)
    assert max(asked) == 60 == best(tried).batch_size
    assert len(asked) == len(set(asked)) == len(tried)


def test_rungs_that_lie_close_do_not_end_the_ladder() -> None:
    """Three batches beside each other differ by less than 0.5 % on any rising curve."""
    tried = search_best(waiting(300), [80, 81, 82], one_length=True, most=2048)
    assert best(tried).tokens_per_s == pytest.approx(linear(300, 300), rel=0.005)
