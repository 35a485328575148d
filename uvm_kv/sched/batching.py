"""Batching: when waiting requests may join. Static and dynamic batches run to their end, continuous never close."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Batching(ABC):
    @abstractmethod
    def num_admissible(
        self, *, now_ns: int, oldest_arrival_ns: int, num_waiting: int, num_running: int, more_to_come: bool
    ) -> int:
        """How many of the waiting requests may be admitted in this step, memory permitting."""

    @abstractmethod
    def wake_ns(self, oldest_arrival_ns: int) -> int | None:
        """When waiting requests become admissible without a further arrival; None if time alone changes nothing."""


class StaticBatching(Batching):
    """Runs a batch until its last sequence ends. A full one starts at once, a smaller one `window_ns` after its oldest
    arrival (Triton's dynamic batcher) or, without a window (FasterTransformer's serving), after the last arrival."""

    def __init__(self, batch_size: int, window_ns: int | None = None) -> None:
        self._batch_size = batch_size
        self._window_ns = window_ns

    def num_admissible(
        self, *, now_ns: int, oldest_arrival_ns: int, num_waiting: int, num_running: int, more_to_come: bool
    ) -> int:
        due = not more_to_come if self._window_ns is None else now_ns >= oldest_arrival_ns + self._window_ns
        return self._batch_size if not num_running and (due or num_waiting >= self._batch_size) else 0

    def wake_ns(self, oldest_arrival_ns: int) -> int | None:
        return None if self._window_ns is None else oldest_arrival_ns + self._window_ns


class ContinuousBatching(Batching):
    """Admits at every step (Orca's iteration-level scheduling)."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size

    def num_admissible(
        self, *, now_ns: int, oldest_arrival_ns: int, num_waiting: int, num_running: int, more_to_come: bool
    ) -> int:
        return self._batch_size - num_running

    def wake_ns(self, oldest_arrival_ns: int) -> int | None:
        return None
