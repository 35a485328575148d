"""Scheduler: first come, first served; chunked prefill; preemption by recompute or swap.

A step serves the running sequences in the order of their admission (so decodes come before the prefill chunks of later
ones), up to `max_num_batched_tokens` tokens. A sequence that cannot get a block preempts the latest admitted one, if
need be itself, so the oldest always makes progress and nobody starves. Only a step that preempted nobody brings
swapped sequences back, and admits waiting ones; the head of the queue is never overtaken. vLLM V1's rules, and where
these differ: docs/validation.md. Without chunked prefill, vLLM V0's: a prompt is computed whole, in a step of prompts
only, and goes before the decodes.

    WAITING --admit--> RUNNING --last token--> FINISHED
       ^---- recompute ---' |  ^
                  swap out  v  '-- swap in
                         SWAPPED

Between two steps `cancel` takes a request out of any of these states but FINISHED; it is then CANCELLED.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from uvm_kv.kvcache.manager import KVCacheManager, largest_table
from uvm_kv.kvcache.ops import MemoryOp, OpKind
from uvm_kv.placement.base import PlacementPolicy, PlacementView, Share, empty_view
from uvm_kv.sched.batching import Batching
from uvm_kv.sched.plan import ScheduledSequence, StepOutput, StepPlan
from uvm_kv.sched.request import Request, Status
from uvm_kv.types import Phase, Tier

PREFILL, DECODE = Phase.PREFILL, Phase.DECODE


@dataclass(frozen=True)
class SchedulerConfig:
    max_num_batched_tokens: int
    admission: Literal["worst_case", "optimistic"]
    preemption: Literal["none", "recompute", "swap"]
    watermark: float = 0.01
    """Share of the device blocks that optimistic admission leaves free, so that growth does not preempt at once."""
    max_model_len: int = 0
    """Tokens that a request may have at most: what some allocation schemes claim for each."""
    chunked_prefill: bool = True
    """False: a prompt is never cut, so that `max_num_batched_tokens` must hold the longest request."""


class Scheduler:
    def __init__(
        self, config: SchedulerConfig, batching: Batching, kv: KVCacheManager, policy: PlacementPolicy
    ) -> None:
        self.config = config
        self.kv = kv
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.swapped: deque[Request] = deque()
        self.num_recomputed = 0
        self.num_swapped_out = 0
        self.num_cancelled = 0
        self.num_context_tokens = 0
        """Tokens that hold KV on blocks of running sequences."""
        self.num_swapped_tokens = 0
        self._batching = batching
        self._policy = policy
        self._step = 0
        self.num_sampled = self.num_scheduled_tokens = 0
        """Tokens that the last step put out, and took in."""
        self._dropped: list[int] = []
        self._owed = 0
        """Requests of a static batch that is being formed whose admission waits only for the token budget of the next
        step. Example: a batch of four prompts of 8 tokens, at 8 tokens per step, is admitted over four steps."""
        self._in_flight: list[Request] = []
        self._watermark = int(config.watermark * kv.capacity.num_device_blocks)

    # ---- arrivals and departures

    def add(self, request: Request) -> None:
        """Queue a request; ValueError if it could not even run alone."""
        capacity, claim = self.kv.capacity, self._claim_tokens(request)
        if request.max_tokens > claim:
            raise ValueError(
                f"request {request.id} of {request.max_tokens} tokens is longer than the {claim} reserved a request"
            )
        budget = self.config.max_num_batched_tokens
        if not self.config.chunked_prefill and request.max_tokens > budget:
            raise ValueError(f"request {request.id}: {request.max_tokens} tokens do not fit a step of {budget}")
        blocks = self.kv.spec.num_blocks(claim)
        if self._policy.place(empty_view(largest_table(capacity, self.kv.allocation)), blocks, admitting=True) is None:
            raise ValueError(
                f"request {request.id} needs {blocks} KV blocks ({request.prompt_tokens} prompt + "
                f"{request.output_tokens} output tokens); the budget of {capacity.num_device_blocks} device and "
                f"{capacity.num_host_blocks} host blocks cannot serve it; raise memory.device_kv_bytes, or give it a "
                f"host tier"
            )
        self.waiting.append(request)

    def cancel(self, request_id: int) -> Request | None:
        """Take out a request that is waiting, running (also in the middle of its prefill) or swapped out, and return
        it.

        Returns None where the id is unknown or its request has ended. A cancellation may come too late without a
        mistake of the sender, so this is not an error (vLLM's rule for aborted requests).

        The blocks and the claim of the request are free at once. Its status is CANCELLED, it has no `finish_ns`, and
        `num_cancelled` counts it; preemptions that it suffered stay counted. No later plan names it, so the runner may
        `remove` it now. RuntimeError between `schedule` and `update`: the plan under way may name it.
        """
        if self._in_flight:
            raise RuntimeError(f"request {request_id} is cancelled while a step is under way; call update first")
        queued = chain(self.running, self.swapped, self.waiting)
        request = next((request for request in queued if request.id == request_id), None)
        if request is None:
            return None
        queues = {Status.RUNNING: self.running, Status.SWAPPED: self.swapped, Status.WAITING: self.waiting}
        queues[request.status].remove(request)
        if request.status is not Status.WAITING:  # A waiting one holds no blocks, even if it was preempted.
            self._forget(request)
        self._dropped = [dropped for dropped in self._dropped if dropped != request_id]
        if not self.waiting:
            self._owed = 0  # The batch that is being formed is empty; later arrivals are not part of it.
        request.status = Status.CANCELLED
        self.num_cancelled += 1
        return request

    def _claim_tokens(self, request: Request) -> int:
        """Tokens that worst-case admission claims for the request."""
        return self.kv.allocation.claim_tokens(request.prompt_tokens, request.output_tokens, self.config.max_model_len)

    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self.swapped)

    def wake_ns(self) -> int | None:
        """When to call `schedule` again although nothing arrives; None if only an arrival can help."""
        return self._batching.wake_ns(self.waiting[0].arrival_ns) if self.waiting and not self.running else None

    # ---- one step

    def schedule(self, now_ns: int, *, more_to_come: bool = False) -> StepPlan | None:
        """The next step, or None if nothing can run now. `more_to_come`: further requests will arrive."""
        budget = self.config.max_num_batched_tokens
        scheduled: list[ScheduledSequence] = []
        ops: list[MemoryOp] = []
        self._in_flight = []
        running, before = self.running, self.num_recomputed + self.num_swapped_out
        whole = not self.config.chunked_prefill
        if whole and self.waiting and not self.swapped:
            self._admit(budget, now_ns, more_to_come, scheduled)
        index = len(running) if scheduled else 0
        while index < len(running):
            request = running[index]
            context = request.num_computed
            remaining = request.num_tokens - context
            num_new = remaining if remaining <= budget else budget
            if not num_new:
                break
            new_blocks: tuple[int, ...] = ()
            if context + num_new > request.num_slots:
                grown = self._grow(request, context + num_new, ops)
                if grown is None:
                    break  # It preempted itself, hence was the last.
                new_blocks = grown
            phase = DECODE if remaining == 1 and context >= request.prompt_tokens else PREFILL
            scheduled.append(ScheduledSequence(request.id, phase, num_new, context, new_blocks))
            self._in_flight.append(request)
            budget -= num_new
            index += 1
        # A lone sequence that preempted itself (a contiguous one that must start anew) may come back at once.
        if not running or self.num_recomputed + self.num_swapped_out == before:
            budget = self._resume(budget, scheduled, ops)
            if self.waiting and not self.swapped and not (whole and running):
                self._admit(budget, now_ns, more_to_come, scheduled)
        if not scheduled:
            assert not ops, "memory is moved for a step that nobody takes"
            return None
        moves = self._policy.plan(self._view())
        dropped, self._dropped = tuple(self._dropped), []
        self._step += 1
        return StepPlan(self._step - 1, tuple(scheduled), (*ops, *moves) if ops else moves, dropped)

    def _view(self) -> PlacementView:
        kv = self.kv
        tables = tuple(kv.blocks(r.id) for r in self.running) if self._policy.needs_tables else None
        return PlacementView(
            kv.available(Tier.DEVICE),
            kv.available(Tier.HOST),
            kv.claimed(Tier.DEVICE),
            kv.claimed(Tier.HOST),
            len(self.running),
            len(self.waiting),
            self.num_context_tokens,
            kv.host_blocks,
            tables,
        )

    def _leaves_watermark(self, num_device: int) -> bool:
        if self.config.admission == "worst_case" or not self.running:
            return True
        return self.kv.available(Tier.DEVICE) - num_device >= self._watermark

    def _grow(self, request: Request, num_tokens: int, ops: list[MemoryOp]) -> tuple[int, ...] | None:
        """Get blocks for `num_tokens` tokens, and preempt later sequences for them; None if it had to preempt
        itself."""
        kv = self.kv
        while True:
            missing = kv.num_unclaimed(request.id, num_tokens)
            if missing:
                share = self._policy.place(self._view(), missing, admitting=False)
                if share is not None:
                    kv.claim(request.id, *share)
                    missing = 0
            if not missing:
                new = kv.grow(request.id, num_tokens)
                if new is None:
                    new = self._relocate(request, num_tokens, ops)
                if new is not None:
                    request.num_slots = min(kv.num_slots(request.id), request.max_tokens - 1)
                    return tuple(new)
            victim = self.running[-1]
            self._preempt(victim, ops)
            if victim is request:
                return None

    def _relocate(self, request: Request, num_tokens: int, ops: list[MemoryOp]) -> list[int] | None:
        moved = self.kv.relocate(request.id, num_tokens)
        if moved is None:
            return None
        old, new = moved
        ops.append(MemoryOp(OpKind.COPY_IN, tuple(old), 0, self.kv.spec.num_layers, 0, tuple(new[: len(old)])))
        self._dropped.append(request.id)
        return new

    def _preempt(self, victim: Request, ops: list[MemoryOp]) -> None:
        """Take the latest sequence's blocks. A swap that finds the host tier full recomputes, and is counted so."""
        assert self.config.preemption != "none", "growth failed under worst-case admission"
        assert self.running.pop() is victim
        self._dropped.append(victim.id)
        victim.num_preemptions += 1
        moved = self.kv.swap_out(victim.id) if self.config.preemption == "swap" else None
        if moved is not None:
            source, target = moved
            ops.append(MemoryOp(OpKind.COPY_OUT, tuple(source), 0, self.kv.spec.num_layers, 0, tuple(target)))
            self.num_context_tokens -= victim.num_computed
            self.num_swapped_tokens += victim.num_computed
            victim.status = Status.SWAPPED
            victim.num_slots = 0
            self.swapped.appendleft(victim)
            self.num_swapped_out += 1
        else:
            self._forget(victim)
            victim.status = Status.WAITING
            self.waiting.appendleft(victim)
            self.num_recomputed += 1

    def _forget(self, request: Request) -> None:
        """Free what a sequence holds; its KV is gone."""
        if request.status is Status.SWAPPED:
            self.num_swapped_tokens -= request.num_computed
        else:
            self.num_context_tokens -= request.num_computed
        self.kv.release(request.id)
        request.num_computed = request.num_slots = 0

    def _resume(self, budget: int, scheduled: list[ScheduledSequence], ops: list[MemoryOp]) -> int:
        """Bring swapped sequences back, oldest first. Returns the token budget that is left."""
        kv = self.kv
        while self.swapped and budget:
            request = self.swapped[0]
            context = request.num_computed
            num_new = min(request.num_tokens - context, budget)
            claim = kv.spec.num_blocks(context + num_new)
            share = self._policy.place(self._view(), claim, admitting=True)
            if share is None or share.host or not self._leaves_watermark(share.device):
                break
            moved = kv.swap_in(request.id, claim)
            if moved is None:
                break
            self.swapped.popleft()
            source, target = moved
            ops.append(MemoryOp(OpKind.COPY_IN, tuple(source), 0, kv.spec.num_layers, 0, tuple(target)))
            self.num_swapped_tokens -= context
            self.num_context_tokens += context
            grown = kv.grow(request.id, context + num_new)
            assert grown is not None, "a claimed block is missing"
            self._start(request, num_new, tuple(kv.blocks(request.id)), scheduled)
            budget -= num_new
        return budget

    def _admit(self, budget: int, now_ns: int, more_to_come: bool, scheduled: list[ScheduledSequence]) -> None:
        config, waiting = self.config, self.waiting
        admissible = self._batching.num_admissible(
            now_ns=now_ns,
            oldest_arrival_ns=waiting[0].arrival_ns,
            num_waiting=len(waiting),
            num_running=len(self.running),
            more_to_come=more_to_come,
        )
        admissible = max(admissible, self._owed)
        self._owed = 0
        while waiting and admissible > 0 and budget:
            request = waiting[0]
            worst_case = config.admission == "worst_case"
            claim = self.kv.spec.num_blocks(self._claim_tokens(request) if worst_case else request.num_tokens)
            share = self._policy.place(self._view(), claim, admitting=True)
            if share is None or not self._leaves_watermark(share.device):
                return
            context = request.num_computed  # 0, or the number of tokens that are filled directly.
            remaining = request.num_tokens - context
            num_new = min(remaining, budget)
            if num_new < remaining and not config.chunked_prefill:
                budget = 0
                break
            if config.admission == "optimistic" and not self._policy.uses_host:
                # As in vLLM all known tokens must fit, but only the chunk is claimed: older ones may take the rest.
                share = Share(self.kv.spec.num_blocks(context + num_new), 0)
            blocks = self.kv.open(request.id, *share, context + num_new)
            if blocks is None:
                return
            waiting.popleft()
            if request.admitted_ns is None:
                request.admitted_ns = now_ns
            self.num_context_tokens += context
            self._start(request, num_new, tuple(blocks), scheduled)
            budget -= num_new
            admissible -= 1
        if waiting and not budget:
            self._owed = admissible

    def _start(
        self, request: Request, num_new: int, blocks: tuple[int, ...], scheduled: list[ScheduledSequence]
    ) -> None:
        context = request.num_computed
        request.status = Status.RUNNING
        request.num_slots = min(self.kv.num_slots(request.id), request.max_tokens - 1)
        self.running.append(request)
        ends = num_new == 1 == request.num_tokens - context
        phase = DECODE if ends and context >= (request.num_filled_tokens or request.prompt_tokens) else PREFILL
        scheduled.append(ScheduledSequence(request.id, phase, num_new, context, blocks))
        self._in_flight.append(request)

    def update(self, plan: StepPlan, output: StepOutput) -> list[Request]:
        """Book the step's tokens. Returns the requests that it finished."""
        now_ns, token_ids = output.timing.end_ns, output.token_ids
        finished: list[Request] = []
        num_sampled = num_scheduled = 0
        for request, sequence in zip(self._in_flight, plan.scheduled, strict=True):
            num_new = sequence.num_new_tokens
            computed = request.num_computed + num_new
            samples = sequence.context_len + num_new == request.num_tokens
            request.num_computed = computed
            num_scheduled += num_new
            if not samples:
                continue
            request.num_tokens = computed + 1
            if request.first_token_ns is None:
                request.first_token_ns = now_ns
            ended = computed + 1 >= request.prompt_tokens + request.output_tokens
            if token_ids is not None:
                token = token_ids[num_sampled]
                request.token_ids.append(token)
                ended = ended or token in request.stop_tokens
            num_sampled += 1
            if ended:
                request.finish_ns = now_ns
                finished.append(request)
        self.num_sampled, self.num_scheduled_tokens = num_sampled, num_scheduled
        self.num_context_tokens += num_scheduled
        self._in_flight = []
        if finished:
            for request in finished:
                self._forget(request)
                request.status = Status.FINISHED
            self.running = [r for r in self.running if r.status is Status.RUNNING]
        return finished

    def check_integrity(self) -> None:
        """Every sequence is in exactly one queue, holds exactly the blocks its tokens need, and nothing leaks."""
        self.kv.check_integrity()
        assert all(r.status is Status.RUNNING for r in self.running)
        assert all(r.status is Status.SWAPPED for r in self.swapped)
        assert all(r.status is Status.WAITING and r.num_computed in (0, r.num_filled_tokens) for r in self.waiting)
        ids = [r.id for queue in (self.running, self.swapped, self.waiting) for r in queue]
        assert len(set(ids)) == len(ids), "a request is queued twice"
        assert self.num_context_tokens == sum(r.num_computed for r in self.running)
        assert self.num_swapped_tokens == sum(r.num_computed for r in self.swapped)
        for request in self.running:
            assert request.num_computed <= request.num_slots <= self.kv.num_slots(request.id)
