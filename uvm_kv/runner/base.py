"""ModelRunner: the one seam. The plan is data, a runner carries it out, and the runner owns the clock."""

from __future__ import annotations

from abc import ABC, abstractmethod

from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.sched.plan import StepOutput, StepPlan
from uvm_kv.sched.request import Request


class ModelRunner(ABC):
    """The whole of what the layers above may ask.

    A runner executes plans in order, each exactly once. Within a plan it first forgets the tables of `dropped`
    requests, then appends each sequence's new blocks, then carries out the ops and the layers. It samples one token
    for every sequence whose scheduled tokens reach the end of what it has. Times are integer nanoseconds of one clock
    that never goes back: the wall clock, or virtual time. Counters it cannot observe are None.
    """

    @abstractmethod
    def capacity(self) -> KVCapacity:
        """KV blocks of both tiers, fixed for the runner's life."""

    @abstractmethod
    def add(self, request: Request) -> None:
        """Make a request known, before the first plan that schedules it; token ids and stop rule go in here. Its
        `num_filled_tokens` get KV that nobody computed as its first blocks come, in no time."""

    @abstractmethod
    def remove(self, request_id: int) -> None:
        """Forget a finished request and its block table."""

    @abstractmethod
    def now_ns(self) -> int: ...

    @abstractmethod
    def wait_until_ns(self, time_ns: int) -> None:
        """Idle until the clock reads at least `time_ns`."""

    @abstractmethod
    def execute(self, plan: StepPlan) -> StepOutput: ...

    @abstractmethod
    def close(self) -> None:
        """Give everything back; the runner may not be used again."""
