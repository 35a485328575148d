"""bandwidth_balanced: as much KV on the host as the link can hide, and none where that would lose.

A sequence is given host blocks only if, with every claimed host block full, the link time of a decode step is hidden
by the work it overlaps with (`uvm_kv.hw.overlap`), and the predicted throughput of the batch rises. So the policy
cannot lose by more than its model of the card is wrong. `reach` says which part of the step it may use: attention (in
place), the whole step (copy ahead), or both: in place as far as attention hides it, which costs no HBM traffic, and
copies for the rest.
"""

from __future__ import annotations

from typing import NamedTuple

from uvm_kv.kvcache.ops import MemoryOp
from uvm_kv.placement.base import (
    CopyAhead,
    PlacementContext,
    PlacementPolicy,
    PlacementView,
    Share,
    device_then_host,
)
from uvm_kv.types import MemoryKind, Reach


class Prediction(NamedTuple):
    """A decode step with part of its KV on the host."""

    layer_s: float
    num_in_place: int
    """Host tokens read in place; the rest is copied."""
    hidden: bool


class BandwidthBalanced(PlacementPolicy):
    memory_kinds = frozenset({MemoryKind.PINNED, MemoryKind.VMM})
    uses_host = True

    def __init__(self, context: PlacementContext) -> None:
        super().__init__(context)
        self._copies = CopyAhead(context)
        self._planned_for: tuple[int, ...] = ()
        self._copied: tuple[int, ...] = ()

    @property
    def reach(self) -> Reach | None:
        return self.context.reach

    def _predict(self, num_seqs: int, num_tokens: int, num_host: int) -> Prediction:
        """Decode of `num_seqs` sequences that read `num_tokens` tokens, `num_host` of them from the host."""
        roofline, spec = self.context.roofline, self.context.spec
        link = roofline.profile.link
        token_s = spec.layer_token_bytes / roofline.hbm_bytes_per_s
        in_place_s = spec.layer_token_bytes / link.zero_copy_bytes_per_s(num_host * spec.token_bytes)
        copy_s = spec.layer_token_bytes / link.h2d_bytes_per_s
        in_place = 0
        if self.context.reach is not Reach.COPY_AHEAD:
            # The most that attention hides: x * in_place_s = attention over the other tokens.
            most = roofline.decode_attention_s(num_tokens) / (in_place_s + token_s)
            in_place = min(num_host, int(most))
        copied = num_host - in_place
        dense = roofline.dense_s(num_seqs) + copied * token_s
        attention = roofline.decode_attention_s(num_tokens - in_place)
        link_free = dense + attention - in_place * in_place_s
        copy_time = copied * copy_s + (link.copy_call_us * 1e-6 if copied else 0.0)
        hidden = copy_time <= link_free and not (copied and self.context.reach is Reach.IN_PLACE)
        return Prediction(dense + attention, in_place, hidden)

    def _link_bound(self, view: PlacementView) -> int:
        """Host blocks that the link could move in a step of the running batch if it never rested."""
        roofline, spec = self.context.roofline, self.context.spec
        layer_s = roofline.dense_s(max(1, view.num_running)) + roofline.decode_attention_s(view.num_context_tokens)
        return int(layer_s * roofline.profile.link.h2d_bytes_per_s / spec.layer_block_bytes)

    def place(self, view: PlacementView, num_blocks: int, *, admitting: bool) -> Share | None:
        share = self._split(view, num_blocks, self._link_bound(view))
        if share is not None and (share.host == 0 or self._pays(view, share, admitting)):
            return share
        # Without the link: all on the device, with the staging of the host blocks there are held back.
        alone = Share(num_blocks, 0)
        if self._split(view, num_blocks, 0) == alone:
            return alone
        if view.num_running + admitting <= 1:  # What runs alone, slowly, beats what never runs.
            # Nothing is staged for those that wait, but for as much again as it has if it may grow.
            view = view._replace(num_waiting=2 if self.context.grows else 1)
            return self._split(view, num_blocks, self.context.capacity.num_host_blocks)
        return None

    def _split(self, view: PlacementView, num_blocks: int, max_host: int) -> Share | None:
        if self.context.reach is Reach.IN_PLACE:
            share = device_then_host(view, num_blocks)
            return share if share is None or share.host <= max_host else None
        return self._copies.place(view, num_blocks, max_host)

    def _pays(self, view: PlacementView, share: Share, admitting: bool) -> bool:
        """Whether the link hides every claimed host block, and the predicted throughput rises."""
        block_size = self.context.spec.block_size
        num_seqs = view.num_running + admitting
        num_host = (view.claimed_host + share.host) * block_size
        num_tokens = max(view.num_context_tokens + sum(share) * block_size, num_host)
        after = self._predict(num_seqs, num_tokens, num_host)
        if not after.hidden or not admitting or not view.num_running:
            return after.hidden
        now = min(view.claimed_host * block_size, view.num_context_tokens)
        before = self._predict(view.num_running, view.num_context_tokens, now)
        return num_seqs / after.layer_s > view.num_running / before.layer_s

    def plan(self, view: PlacementView) -> tuple[MemoryOp, ...]:
        blocks = view.host_blocks
        if blocks is self._planned_for:
            return self._copies.ops(self._copied)
        self._planned_for = blocks
        copied: tuple[int, ...] = ()
        if blocks and self.context.reach is not Reach.IN_PLACE:
            block_size = self.context.spec.block_size
            num_host = min(len(blocks) * block_size, view.num_context_tokens)
            num_in_place = self._predict(view.num_running, view.num_context_tokens, num_host).num_in_place
            copied = blocks[: len(blocks) - num_in_place // block_size]
        self._copied = copied
        return self._copies.ops(copied)
