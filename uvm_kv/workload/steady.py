"""The steady state of a closed loop: the requests under way, and the progress of each.

After a cold start every client's first request must be served before the mix of contexts in the batch settles. A steady
start begins with requests whose contexts are spread over their range and whose KV is filled directly, so that a few
steps are enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from uvm_kv.kvcache.ops import NO_TRAFFIC
from uvm_kv.sched.plan import StepOutput, StepTiming
from uvm_kv.sched.request import Request
from uvm_kv.sched.scheduler import Scheduler
from uvm_kv.workload.lengths import Lengths
from uvm_kv.workload.source import RequestSource, filled_request

GOLDEN = (5**0.5 - 1) / 2


def steady_start(
    lengths: Sequence[Lengths], num_clients: int, num_running: int, rng: np.random.Generator
) -> list[Request]:
    """The first requests of a closed loop that has run for long: `num_running` of them somewhere in their outputs, and
    the rest of the clients waiting with requests that are new.

    A request is met in proportion to its output, and equally likely anywhere in it. Both are stratified, so that a few
    clients cover the range; multiples of the golden ratio, so that any of them that follow one another do, too: those
    that find room on the device are then no older than those on the host.
    """
    num_clients = min(num_clients, len(lengths))
    n = min(num_running, num_clients)
    ends = np.cumsum([output for _, output in lengths])
    met = np.searchsorted(ends, (np.arange(n) + rng.random()) / max(n, 1) * ends[-1], side="right")
    shares = (rng.random() + np.arange(n) * GOLDEN) % 1
    started = [(int(share * lengths[i].output_tokens), lengths[i]) for i, share in zip(met, shares, strict=True)]
    states = started + [(0, pair) for pair in lengths[n:num_clients]]
    return [filled_request(i, *pair, num_done=done) for i, (done, pair) in enumerate(states)]


def plan_without_runner(scheduler: Scheduler, source: RequestSource, num_steps: int) -> list[int]:
    """Let the scheduler plan `num_steps` steps of a nanosecond each, which no runner executes. Returns the number of
    sequences that ran in each step."""
    num_running = []
    for now_ns in range(num_steps):
        for request in source.arrivals(now_ns):
            scheduler.add(request)
        plan = scheduler.schedule(now_ns, more_to_come=True)
        assert plan is not None, "a closed loop always has work"
        num_running.append(len(plan.scheduled))
        for request in scheduler.update(plan, StepOutput(StepTiming(now_ns, now_ns + 1), NO_TRAFFIC)):
            source.finished(request, now_ns + 1)
    for request in source.arrivals(num_steps):
        scheduler.add(request)
    return num_running


def nearest_to_mean(values: Sequence[int], window: int) -> int:
    """Index from which the next `window` values have the mean nearest to the mean of all values."""
    sums = np.concatenate(([0], np.cumsum(values)))
    means = (sums[window:] - sums[:-window]) / window
    return int(np.argmin(abs(means - np.mean(values))))


def continued(request_id: int, request: Request) -> Request:
    """The rest of a request, as a new request. Its known tokens are the prompt and hold KV. If it was preempted by
    recompute, they hold no KV, and they are prefilled as usual."""
    num_known, lost = request.num_tokens, request.num_preemptions > 0 and not request.num_computed
    num_filled = 0 if lost else num_known - 1
    return Request(request_id, num_known, request.max_tokens - num_known, num_filled_tokens=num_filled)
