"""ManagedMemory against a naive first-in-first-out reference that walks the accesses one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uvm_kv.runner.sim.managed import DEVICE, HOST, NOWHERE, ManagedMemory


class Reference:
    """What the driver does at each access, with a list for the queue."""

    def __init__(self, num_chunks: int, capacity: int) -> None:
        self.capacity = capacity
        self.state = [NOWHERE] * num_chunks
        self.queue: list[int] = []

    def touch(self, chunks: list[int], segments: list[int]) -> list[list[int]]:
        """First touches, migrations and evictions of each segment."""
        counts = [[0] * len(segments) for _ in range(3)]
        for i, chunk in enumerate(chunks):
            if self.state[chunk] == DEVICE:
                continue
            segment = next(k for k, end in enumerate(segments) if i < end)
            counts[0 if self.state[chunk] == NOWHERE else 1][segment] += 1
            if len(self.queue) == self.capacity:
                self.state[self.queue.pop(0)] = HOST
                counts[2][segment] += 1
            self.queue.append(chunk)
            self.state[chunk] = DEVICE
        return counts

    def evict(self, chunks: list[int]) -> int:
        out = [c for c in chunks if self.state[c] == DEVICE]
        for chunk in out:
            self.queue.remove(chunk)
            self.state[chunk] = HOST
        return len(out)


def touch(memory: ManagedMemory, chunks: list[int], segments: list[int] | None = None) -> list[list[int]]:
    ends = [len(chunks)] if segments is None else segments
    result = memory.touch(np.array(chunks, np.int64), np.array(ends, np.int64))
    memory.check_integrity()
    return [x.tolist() for x in result]


@st.composite
def streams(draw: st.DrawFn) -> tuple[int, int, list[tuple[bool, list[int], list[int]]]]:
    """Steps over few chunks: a planned eviction, or an access stream in any order, cut into segments. Runs of
    neighbours are likely, since the implementation walks runs."""
    num_chunks = draw(st.integers(1, 14))
    steps = []
    for _ in range(draw(st.integers(1, 8))):
        if draw(st.booleans()):
            start, length = draw(st.integers(0, num_chunks - 1)), draw(st.integers(0, num_chunks))
            chunks = [(start + i) % num_chunks for i in range(length)]
        else:
            chunks = draw(st.permutations(range(num_chunks)))[: draw(st.integers(0, num_chunks))]
        cuts = draw(st.lists(st.integers(0, len(chunks)), max_size=3))
        steps.append((draw(st.integers(0, 4)) == 0, list(chunks), [*sorted(cuts), len(chunks)]))
    return num_chunks, draw(st.integers(1, num_chunks)), steps


@given(streams())
def test_it_equals_the_reference_on_any_stream(
    stream: tuple[int, int, list[tuple[bool, list[int], list[int]]]],
) -> None:
    num_chunks, capacity, steps = stream
    memory, reference = ManagedMemory(num_chunks, capacity), Reference(num_chunks, capacity)
    for is_eviction, chunks, segments in steps:
        if is_eviction:
            assert memory.evict(np.array(chunks, np.int64)) == reference.evict(chunks)
            memory.check_integrity()
        else:
            assert touch(memory, chunks, segments) == reference.touch(chunks, segments)
        assert memory.num_resident == len(reference.queue)


@pytest.mark.parametrize("capacity", [1, 4, 100])
def test_a_cyclic_scan_over_one_chunk_too_many_misses_every_time(capacity: int) -> None:
    memory = ManagedMemory(capacity + 1, capacity)
    scan = list(range(capacity + 1))
    assert touch(memory, scan) == [[capacity + 1], [0], [1]]
    for _ in range(5):
        assert touch(memory, scan) == [[0], [capacity + 1], [capacity + 1]]
    fits = ManagedMemory(capacity + 1, capacity + 1)
    assert touch(fits, scan) == [[capacity + 1], [0], [0]]
    assert touch(fits, scan) == [[0], [0], [0]]


def test_being_read_does_not_protect_a_chunk() -> None:
    """The driver sees faults, not accesses: chunk 0 came first and goes first, however often it was read since."""
    memory = ManagedMemory(4, 3)
    touch(memory, [0, 1, 2])
    for _ in range(3):
        assert touch(memory, [0]) == [[0], [0], [0]]
    assert touch(memory, [3]) == [[1], [0], [1]]
    assert touch(memory, [1, 2, 3]) == [[0], [0], [0]]
    assert touch(memory, [0]) == [[0], [1], [1]]


def test_a_planned_eviction_makes_room_and_is_not_the_drivers() -> None:
    memory = ManagedMemory(4, 3)
    touch(memory, [0, 1, 2])
    assert memory.evict(np.array([1, 3])) == 1
    assert memory.num_resident == 2
    assert touch(memory, [3]) == [[1], [0], [0]]
    assert touch(memory, [1]) == [[0], [1], [1]]
    assert memory.evict(np.array([0])) == 0


def test_a_device_without_a_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        ManagedMemory(4, 0)
