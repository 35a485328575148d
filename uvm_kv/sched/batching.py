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
    """Waits for a full batch, or for the last arrival, and runs it until its last sequence ends."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size

    def num_admissible(
        self, *, now_ns: int, oldest_arrival_ns: int, num_waiting: int, num_running: int, more_to_come: bool
    ) -> int:
        full = num_waiting >= self._batch_size or not more_to_come
        return self._batch_size if full and not num_running else 0

    def wake_ns(self, oldest_arrival_ns: int) -> int | None:
        return None


class DynamicBatching(Batching):
    """Waits for a full batch, or `window_ns` from the oldest arrival; runs it until its last sequence ends."""

    def __init__(self, batch_size: int, window_ns: int) -> None:
        self._batch_size = batch_size
        self._window_ns = window_ns

    def num_admissible(
        self, *, now_ns: int, oldest_arrival_ns: int, num_waiting: int, num_running: int, more_to_come: bool
    ) -> int:
        due = now_ns >= oldest_arrival_ns + self._window_ns
        return self._batch_size if not num_running and (due or num_waiting >= self._batch_size) else 0

    def wake_ns(self, oldest_arrival_ns: int) -> int | None:
        return oldest_arrival_ns + self._window_ns


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
