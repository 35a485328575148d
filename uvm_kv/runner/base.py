"""ModelRunner: the one seam. The plan is data, a runner carries it out, and the runner owns the clock."""

from __future__ import annotations

from abc import ABC, abstractmethod

from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.sched.plan import StepOutput, StepPlan
from uvm_kv.sched.request import Request


class ModelRunner(ABC):
    """The whole of what the layers above may ask.

    A runner executes plans in order, each exactly once. Within a plan it does, in this order:

    1. It forgets the block tables of `dropped` requests, but not yet what their blocks hold.
    2. It carries out the ops with `targets`, in the order of the plan. They move whole blocks.
    3. It appends each sequence's new blocks, and fills those of a request with `num_filled_tokens`. A new block that no
       move of this plan has written holds nothing before. So moves come first: a new block may be one that a move
       has just left, and filling it earlier would destroy what is to be moved.
    4. It carries out the other ops, each before its layer, and the layers.

    It samples one token for every sequence whose scheduled tokens reach the end of what it has. Times are integer
    nanoseconds of one clock that never goes back: the wall clock, or virtual time. Counters it cannot observe are None.
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
        """Forget a request that finished or was cancelled, with its block table. What its blocks hold is dead, also
        while it is swapped out. Called between two plans; no later plan names the request."""

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
