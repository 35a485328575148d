"""The best batch size of a mechanism, searched: a ladder of batches around its peak, narrowed to the neighbours.

Throughput rises with the batch until the KV memory is full. What comes then depends on the admission:

    worst case               the running batch stays what fits: the curve ends on a plateau
    optimistic, one length   a cliff: the largest batch without preemption is a peak, and beyond it lies a sawtooth
    optimistic, drawn        preemptions come one by one: a flat top within the noise of the draw
    demand paging            a fall to a fraction

So the ladder goes up by FACTOR until it has ended (`_has_ended`); the gap in which memory begins to limit the running
batch is bisected, to the batch where all requests are alike; then the gaps beside the best batch are halved. Ternary
search does not work on a sawtooth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil, floor

FACTOR = 1.1
SAME = 0.005
"""Neighbouring batches whose throughputs differ by less, as a fraction, lie on a plateau."""
GIVE_UP = 0.9
"""A mechanism that has fallen below this share of its best is not tried at larger batches."""
SAWTOOTH = 1.5
"""Where all requests are alike, batches up to this many times the first that preempts are tried before a plateau is
believed: rungs may meet the same phase of the sawtooth."""
NEAR = 0.02
NEAR_DRAWN = 0.05
"""Gaps of this share of the best batch are not halved; with drawn lengths a finer one is noise."""


@dataclass(frozen=True)
class Tried:
    """What a run at a batch size showed."""

    batch_size: int
    tokens_per_s: float
    running_batch: float
    """Mean number of sequences that ran."""
    limited: bool
    """Whether KV memory limited the batch (`uvm_kv.telemetry.summary.is_limited_by_memory`)."""
    preempted: bool
    counts: bool = True
    """Whether it may be the best point; a CPU-backed mechanism's needs to have moved KV over the link."""


Evaluate = Callable[[int], Tried | None]
"""Run one batch size; None where it is refused."""


class _Search:
    def __init__(self, evaluate: Evaluate, most: int) -> None:
        self._evaluate, self._most = evaluate, most
        self.tried: dict[int, Tried] = {}
        self._refused: set[int] = set()

    def attempt(self, batch_size: int) -> Tried | None:
        batch_size = min(batch_size, self._most)
        if batch_size < 1 or batch_size in self._refused:
            return None
        if batch_size not in self.tried:
            found = self._evaluate(batch_size)
            if found is None:
                self._refused.add(batch_size)
                return None
            self.tried[batch_size] = found
        return self.tried[batch_size]

    def in_order(self) -> list[Tried]:
        return [self.tried[b] for b in sorted(self.tried)]

    def best(self) -> Tried:
        """The fastest batch: one that counts before any that does not, and of equal throughputs the smallest."""
        return max(self.tried.values(), key=lambda it: (it.counts, it.tokens_per_s, -it.batch_size))

    def most_served(self) -> int:
        """The largest batch size that may be tried: below any that is refused."""
        return min([self._most, *(b - 1 for b in self._refused if b > min(self.tried))])


def search_best(evaluate: Evaluate, start: Iterable[int], *, one_length: bool, most: int) -> list[Tried]:
    """Every batch size that was tried, in order; empty where all of `start` are refused.

    `start`: batches to begin with, such as those of a sweep. `one_length`: all requests are alike, so that there is a
    cliff to look for. `most`: the largest batch size allowed.
    """
    search = _Search(evaluate, most)
    for batch_size in sorted(set(start)):
        search.attempt(batch_size)
    if not search.tried:
        return []
    near = NEAR if one_length else NEAR_DRAWN
    _climb(search, one_length)
    _bisect_limit(search, 0.0 if one_length else near)
    _climb(search, one_length)
    _narrow(search, near)
    return search.in_order()


def _climb(search: _Search, one_length: bool) -> None:
    """Extend the ladder until it has ended above the best batch and begun below it."""
    while not _has_ended(search, one_length):
        largest = max(search.tried)
        rung = min(max(largest + 1, ceil(largest * FACTOR)), search.most_served())
        while rung > largest and search.attempt(rung) is None:  # The largest that is served lies between the two.
            rung = (largest + rung) // 2
    while search.best().batch_size == min(search.tried) > 1:
        if search.attempt(floor(min(search.tried) / FACTOR)) is None:
            break


def _has_ended(search: _Search, one_length: bool) -> bool:
    """Whether no larger batch will be better: it has fallen, or neither throughput nor running batch rises."""
    rungs, best = search.in_order(), search.best()
    if rungs[-1].batch_size >= search.most_served():
        return True
    if best.counts and rungs[-1].tokens_per_s < GIVE_UP * best.tokens_per_s:
        return True
    preempting = next((it.batch_size for it in rungs if it.preempted), 0)
    if one_length and rungs[-1].batch_size < SAWTOOTH * preempting:
        return False
    before = [it for it in rungs if it.batch_size * FACTOR**2 <= rungs[-1].batch_size]
    return bool(before) and all(_same(before[-1], it) for it in rungs[len(before) :])


def _same(smaller: Tried, larger: Tried) -> bool:
    return (
        larger.tokens_per_s < (1 + SAME) * smaller.tokens_per_s
        and larger.running_batch < (1 + SAME) * smaller.running_batch
    )


def _bisect_limit(search: _Search, near: float) -> None:
    """Find the largest batch that memory does not limit, within a share `near` of it, if a larger one was tried."""
    limited = [it.batch_size for it in search.in_order() if it.limited]
    if not limited:
        return
    high = limited[0]
    low = max((b for b in search.tried if b < high), default=0)
    while high - low > max(1, near * high):
        middle = search.attempt((low + high) // 2)
        if middle is None:
            return
        low, high = (low, middle.batch_size) if middle.limited else (middle.batch_size, high)


def _narrow(search: _Search, near: float) -> None:
    """Halve the gaps beside the best batch until they are small, or it lies on a plateau."""
    while True:
        best, rungs = search.best(), search.in_order()
        at = rungs.index(best)
        beside = [rungs[i] for i in (at - 1, at + 1) if 0 <= i < len(rungs)]
        wide = [
            it
            for it in beside
            if abs(it.batch_size - best.batch_size) > max(1, near * best.batch_size)
            and not (it.counts and abs(it.tokens_per_s / best.tokens_per_s - 1) < SAME)
        ]
        found = [search.attempt((best.batch_size + it.batch_size) // 2) for it in wide]
        if not any(found):
            return
