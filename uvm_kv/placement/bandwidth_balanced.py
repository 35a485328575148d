"""bandwidth_balanced: host blocks are taken while the predicted throughput of the batch rises, and no further.

The prediction is that of a decode step in which every claimed block is full (`uvm_kv.hw.overlap`), the wait for the
link included: nothing need be hidden. It is made for the numbers of sequences that could run, each of the mean size,
and the staging of the best number is held back from the device. So the policy cannot lose by more than its model of
the card is wrong. `reach` says how host blocks are read: in place, copied ahead, or both, in the fastest proportion.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from uvm_kv.kvcache.ops import MemoryOp
from uvm_kv.placement.base import CopyAhead, CopyAheadOptions, PlacementContext, PlacementPolicy, PlacementView, Share
from uvm_kv.setting import Role, setting
from uvm_kv.types import MemoryKind, Reach


class Prediction(NamedTuple):
    """A layer of a decode step with part of its KV on the host."""

    layer_s: float
    num_in_place: float  # Host tokens that are read in place; the rest is copied.


class Batch(NamedTuple):
    """A number of sequences that could run, each of the mean size."""

    tokens_per_s: float  # Predicted; zero where they do not fit.
    num_seqs: int
    held_back: int  # Device blocks that are left to staging.


@dataclass(frozen=True)
class BalancedOptions(CopyAheadOptions):
    reach: str = setting(Reach.BOTH.value, allowed=tuple(Reach), role=Role.VARIANT)


class BandwidthBalanced(PlacementPolicy):
    memory_kinds = frozenset({MemoryKind.PINNED, MemoryKind.VMM})
    uses_host = True
    options_type = BalancedOptions

    def __init__(self, context: PlacementContext) -> None:
        super().__init__(context)
        options: BalancedOptions = self.options_in(context.options)
        self._reach = Reach(options.reach)
        self._copies = CopyAhead(context, options.num_layers_ahead)
        self._layers_per_staged = context.spec.num_layers / (options.num_layers_ahead + 1)
        self._asked: tuple[PlacementView, int, bool] | None = None
        self._answer: Share | None = None
        self._planned_for: tuple[int, ...] = ()
        self._copied: tuple[int, ...] = ()

    @property
    def reach(self) -> Reach | None:
        return self._reach

    def _predict(self, num_seqs: int, num_tokens: float, num_host: float, most_copied: float) -> Prediction:
        """Decode of `num_seqs` sequences that read `num_tokens` tokens, `num_host` of them from the host."""
        roofline, spec, reach = self.context.roofline, self.context.spec, self._reach
        link, token_bytes = roofline.profile.link, spec.layer_token_bytes
        token_s, copy_s = token_bytes / roofline.hbm_bytes_per_s, token_bytes / link.h2d_bytes_per_s
        least = num_host if reach is Reach.IN_PLACE else max(0.0, num_host - most_copied)
        options = {least}
        if reach is Reach.BOTH and num_host:
            # The most that attention hides: x * in_place_s = attention over the other tokens.
            in_place_s = token_bytes / link.zero_copy_bytes_per_s(num_host * spec.token_bytes)
            hidden = roofline.decode_attention_s(num_tokens) / (in_place_s + token_s)
            options |= {min(num_host, max(least, hidden)), num_host}
        predictions = []
        for in_place in options:
            copied = num_host - in_place
            in_place_s = in_place * token_bytes / link.zero_copy_bytes_per_s(in_place * spec.token_bytes)
            link_s = in_place_s + (copied * copy_s + link.copy_call_us * 1e-6 if copied else 0.0)
            attention_s = max(roofline.decode_attention_s(num_tokens - in_place), in_place_s)
            layer_s = roofline.dense_s(num_seqs) + copied * token_s + attention_s
            predictions.append(Prediction(max(layer_s, link_s), in_place))
        return min(predictions)

    def _batch(self, view: PlacementView, num_seqs: int, seq_blocks: float, stages: bool) -> Batch:
        """`num_seqs` sequences of `seq_blocks` blocks; if it `stages`, with room to copy all that lies on the host."""
        context, (num_device, most_host) = self.context, self.context.capacity
        total, ratio = num_seqs * seq_blocks, self._layers_per_staged
        host = max(0.0, total - num_device) * (ratio / (ratio - 1) if stages else 1.0)
        if num_seqs >= view.num_running:  # Nobody leaves, and what is claimed stays where it is.
            host = max(view.claimed_host, min(host, total - view.claimed_device))
        room = num_device - (total - host)
        if host > most_host or (self._reach is Reach.COPY_AHEAD and host > room * ratio + 1e-6):
            return Batch(0.0, num_seqs, 0)
        size = context.spec.block_size
        layer_s = self._predict(num_seqs, total * size, host * size, room * ratio * size).layer_s
        step_s = context.spec.num_layers * layer_s + context.roofline.head_s(num_seqs, num_seqs)
        return Batch(num_seqs / step_s, num_seqs, ceil(min(room, host / ratio) - 1e-6) if stages else 0)

    def _best(self, view: PlacementView, first: int, last: int, seq_blocks: float) -> Batch:
        """The batch of `first` to `last` sequences with the highest throughput, which rises with their number until
        it falls."""
        peaks = []
        for stages in {Reach.IN_PLACE: (False,), Reach.COPY_AHEAD: (True,), Reach.BOTH: (True, False)}[self._reach]:
            low, high = first, last
            while low < high:
                middle = (low + high) // 2
                here, beside = (self._batch(view, n, seq_blocks, stages) for n in (middle, middle + 1))
                low, high = (middle + 1, high) if beside.tokens_per_s > here.tokens_per_s else (low, middle)
            peaks.append(self._batch(view, low, seq_blocks, stages))
        return max(peaks, key=lambda batch: batch.tokens_per_s)

    def place(self, view: PlacementView, num_blocks: int, *, admitting: bool) -> Share | None:
        asked = (view._replace(num_context_tokens=0, host_blocks=(), tables=None), num_blocks, admitting)
        if asked != self._asked:  # A request that waits asks anew in each step.
            self._asked, self._answer = asked, self._place(*asked)
        return self._answer

    def _place(self, view: PlacementView, num_blocks: int, admitting: bool) -> Share | None:
        num_seqs, claimed = view.num_running + admitting, view.claimed_device + view.claimed_host
        seq_blocks = (claimed + num_blocks) / max(1, num_seqs)
        first, last = num_seqs - 1, num_seqs + (max(0, view.num_waiting - 1) if admitting else 0)
        best = self._best(view, max(1, first), max(1, last), seq_blocks)
        share = self._share(view, num_blocks, best.held_back) if best.num_seqs >= num_seqs else None
        if share is not None and best.tokens_per_s:
            return share
        # All on the device, where only the host blocks that there are need staging.
        staging = 0 if self._reach is Reach.IN_PLACE else ceil(view.claimed_host / self._layers_per_staged)
        on_device = Share(num_blocks, 0) if num_blocks <= view.available_device - staging else None
        if on_device is not None or num_seqs > 1:
            return on_device
        # What runs alone, slowly, beats what never runs. If it may grow, there is room for as much again.
        sizes = (2 * seq_blocks, seq_blocks) if self.context.grows else (seq_blocks,)
        shares = (self._share(view, num_blocks, self._best(view, 1, 1, size).held_back) for size in sizes)
        return next((share for share in shares if share is not None), None)

    def _share(self, view: PlacementView, num_blocks: int, held_back: int) -> Share | None:
        """The device first, but for what is held back; None where the host, or the staging, has no room."""
        if self._reach is Reach.COPY_AHEAD:
            return self._copies.split(view, num_blocks, held_back)
        device = max(0, num_blocks - view.available_host, min(num_blocks, view.available_device - held_back))
        return Share(device, num_blocks - device) if device <= view.available_device else None

    def plan(self, view: PlacementView) -> tuple[MemoryOp, ...]:
        blocks = view.host_blocks
        if blocks is self._planned_for:
            return self._copies.ops(self._copied)
        self._planned_for, copied = blocks, 0
        if blocks and self._reach is not Reach.IN_PLACE:
            size, room = self.context.spec.block_size, view.available_device * self._layers_per_staged
            num_host = min(len(blocks) * size, view.num_context_tokens)
            in_place = self._predict(view.num_running, view.num_context_tokens, num_host, room * size).num_in_place
            copied = min(len(blocks) - int(in_place) // size, int(room + 1e-6))
        self._copied = blocks[:copied]
        return self._copies.ops(self._copied)
