"""RequestSource: where requests come from, in open loop (given arrival times) or closed loop (given clients)."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from uvm_kv.sched.request import Request
from uvm_kv.types import NS_PER_S
from uvm_kv.workload.lengths import Lengths


class RequestSource(ABC):
    @abstractmethod
    def arrivals(self, now_ns: int) -> list[Request]:
        """Take the requests that have arrived by now, in order of arrival."""

    @abstractmethod
    def next_arrival_ns(self) -> int | None:
        """When the next request arrives, as far as it is known; None if none is on its way."""

    @abstractmethod
    def finished(self, request: Request, now_ns: int) -> None:
        """A request has ended: with its last token, or because it was cancelled."""

    @abstractmethod
    def more_to_come(self) -> bool:
        """Whether any request will still arrive."""


class OpenLoop(RequestSource):
    """Arrival times do not depend on the system."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._pending = deque(sorted(requests, key=lambda r: (r.arrival_ns, r.id)))

    def arrivals(self, now_ns: int) -> list[Request]:
        arrived = []
        while self._pending and self._pending[0].arrival_ns <= now_ns:
            arrived.append(self._pending.popleft())
        return arrived

    def next_arrival_ns(self) -> int | None:
        return self._pending[0].arrival_ns if self._pending else None

    def finished(self, request: Request, now_ns: int) -> None:
        pass

    def more_to_come(self) -> bool:
        return bool(self._pending)


def filled_request(
    request_id: int, prompt_tokens: int, output_tokens: int, arrival_ns: int = 0, *, num_done: int = 0
) -> Request:
    """A request whose prompt and first `num_done` output tokens hold KV without a prefill. One more token is known, as
    after any step, and its KV is what the next step computes; so the request puts out the rest, and decodes at the
    contexts of one that was served from its start. Where no token would be left to put out, one token less is known.
    """
    num_known = prompt_tokens + min(num_done + 1, output_tokens - 1)
    num_left = prompt_tokens + output_tokens - num_known
    return Request(request_id, num_known, num_left, arrival_ns, num_filled_tokens=num_known - 1)


class ClosedLoop(RequestSource):
    """`num_clients` clients, each sending its next request as its last one ends, until all lengths are used up.

    Client i's first request generates i / num_clients of its output, so that the clients do not run in step; it
    only brings the system into its steady state and is not measured. Or the first requests are given (`steady_start`),
    and the later ones begin with their prompt's KV, too.

    `if_preempted`: further lengths. They are used once a request has ended that was preempted, since the throughput of
    a loop that preempts settles slowly.
    """

    def __init__(
        self,
        lengths: Sequence[Lengths],
        num_clients: int,
        *,
        steady: Sequence[Request] | None = None,
        if_preempted: Sequence[Lengths] = (),
    ) -> None:
        self._num_started = min(num_clients, len(lengths))
        self._lengths = deque(lengths[self._num_started :])
        self._if_preempted = if_preempted
        self._next_id = self._num_started
        self._steady = steady is not None
        if steady is None:
            steady = [
                Request(i, prompt, max(1, output * i // num_clients), 0, measured=False)
                for i, (prompt, output) in enumerate(lengths[: self._num_started])
            ]
        assert len(steady) == self._num_started
        self._pending: list[tuple[int, int, Request]] = [(0, i, first) for i, first in enumerate(steady)]

    def arrivals(self, now_ns: int) -> list[Request]:
        arrived = []
        while self._pending and self._pending[0][0] <= now_ns:
            arrived.append(heapq.heappop(self._pending)[2])
        return arrived

    def next_arrival_ns(self) -> int | None:
        return self._pending[0][0] if self._pending else None

    def finished(self, request: Request, now_ns: int) -> None:
        if request.num_preemptions and self._if_preempted:
            self._lengths.extend(self._if_preempted)
            self._if_preempted = ()
        if self._lengths:
            prompt, output = self._lengths.popleft()
            make = filled_request if self._steady else Request
            request = make(self._next_id, prompt, output, now_ns)
            heapq.heappush(self._pending, (now_ns, self._next_id, request))
            self._next_id += 1

    def more_to_come(self) -> bool:
        return bool(self._pending or self._lengths)


class WithTokens(RequestSource):
    """A source whose requests carry token ids, for runners with a real model."""

    def __init__(
        self, inner: RequestSource, ids_of: Callable[[Request], tuple[int, ...]], stop_tokens: frozenset[int]
    ) -> None:
        self._inner = inner
        self._ids_of = ids_of
        self._stop_tokens = stop_tokens

    def arrivals(self, now_ns: int) -> list[Request]:
        requests = self._inner.arrivals(now_ns)
        for request in requests:
            request.prompt_ids, request.stop_tokens = self._ids_of(request), self._stop_tokens
        return requests

    def next_arrival_ns(self) -> int | None:
        return self._inner.next_arrival_ns()

    def finished(self, request: Request, now_ns: int) -> None:
        self._inner.finished(request, now_ns)

    def more_to_come(self) -> bool:
        return self._inner.more_to_come()


def all_at_once(lengths: Sequence[Lengths]) -> OpenLoop:
    return OpenLoop([Request(i, *pair) for i, pair in enumerate(lengths)])


def poisson(lengths: Sequence[Lengths], requests_per_s: float, rng: np.random.Generator) -> OpenLoop:
    """Exponential gaps with mean 1 / requests_per_s."""
    times = np.cumsum(rng.exponential(1 / requests_per_s, len(lengths))) * NS_PER_S
    return OpenLoop(
        [Request(i, *pair, arrival_ns=int(t)) for i, (pair, t) in enumerate(zip(lengths, times, strict=True))]
    )
