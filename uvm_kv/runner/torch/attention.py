"""Paged attention as a function of transformers' AttentionInterface: the model's own code runs unmodified around it.

The tokens of all sequences are packed into one row. What a step is about (tables, positions, copies) is ambient, in
`StepContext`, because some models drop keywords that they do not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from uvm_kv.runner.torch.kv_store import BlockIndex, KVStore, SlotIndex

NAME = "uvm_kv_paged"
HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "is_causal", "position_bias"}
"""Keywords that do not change what we compute; those of `REFUSED` do, and the rest must be None."""
REFUSED = {"softcap": "attention logit soft-capping", "s_aux": "attention sinks", "head_mask": "head masks"}


@dataclass(frozen=True)
class Decodes:
    """Sequences with one new token each: their rows, their blocks padded to the longest, and what is masked out."""

    rows: Tensor
    blocks: BlockIndex
    mask: Tensor
    """[sequence, 1, 1, slot]: True where a slot holds a token of the sequence."""


@dataclass(frozen=True)
class Prefill:
    """One chunk: rows [start, stop) behind `context_len` cached tokens."""

    start: int
    stop: int
    context_len: int
    blocks: BlockIndex


@dataclass
class StepContext:
    store: KVStore
    slots: SlotIndex
    decodes: Decodes | None
    prefills: list[Prefill]
    before_layer: Callable[[int], None]
    """Carries out the memory ops that are issued before a layer."""
    max_tokens: int
    """Longest sequence of the run: a sliding window at least as long changes nothing."""
    num_calls: int = 0
    seen: list[int] = field(default_factory=list)


_current: StepContext | None = None


@contextmanager
def step_context(context: StepContext) -> Iterator[StepContext]:
    global _current
    assert _current is None, "steps do not nest"
    _current = context
    try:
        yield context
    finally:
        _current = None


def register() -> None:
    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Masks are ours: a mask over packed rows would be tokens squared."""


def check_keywords(keywords: dict[str, Any], max_tokens: int) -> None:
    """ValueError for what would change the result and is not served."""
    for name, meaning in REFUSED.items():
        if keywords.get(name) is not None:
            raise ValueError(f"the model uses {meaning} ({name}), which uvm-kv does not serve")
    window = keywords.get("sliding_window")
    if window is not None and window < max_tokens:
        raise ValueError(
            f"the model attends to a sliding window of {window} tokens, shorter than the longest sequence of "
            f"{max_tokens}; shorten the requests, or set max_model_len={window}"
        )


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """query [1, head, token, dim], key and value [1, kv_head, token, dim] -> ([1, token, head, dim], None)."""
    step = _current
    assert step is not None, "paged attention is called outside a step"
    assert attention_mask is None, "the packed row has no mask of its own"
    assert not dropout, "serving has no dropout"
    check_keywords(keywords, step.max_tokens)
    layer: int = module.layer_idx
    step.num_calls += 1
    step.before_layer(layer)
    query, key, value = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    step.store.write(layer, step.slots, key, value)
    if step.decodes is not None and not step.prefills:
        out = _decode(step.store, layer, step.decodes, query, scaling)
        step.store.drop_staged(layer)
        return out[None], None
    out = torch.empty_like(query)
    if step.decodes is not None:
        out[step.decodes.rows] = _decode(step.store, layer, step.decodes, query[step.decodes.rows], scaling)
    for chunk in step.prefills:
        rows = slice(chunk.start, chunk.stop)
        out[rows] = _prefill(step.store, layer, chunk, query[rows], key[rows], value[rows], scaling)
    step.store.drop_staged(layer)
    return out[None], None


def _decode(store: KVStore, layer: int, batch: Decodes, query: Tensor, scaling: float | None) -> Tensor:
    num_seqs = len(batch.rows)
    cached = store.read(layer, batch.blocks)  # [sequence * block, slot, K|V, kv_head, dim]
    kv_heads, dim = cached.shape[-2:]
    cached = cached.view(num_seqs, -1, 2, kv_heads, dim)
    # The query heads that share a KV head stand in for query positions: no KV is repeated.
    grouped = query.reshape(num_seqs, kv_heads, -1, dim)
    out = F.scaled_dot_product_attention(
        grouped,
        cached[:, :, 0].transpose(1, 2),
        cached[:, :, 1].transpose(1, 2),
        attn_mask=batch.mask,
        scale=scaling,
    )
    return out.reshape(num_seqs, -1, dim)


def _prefill(
    store: KVStore, layer: int, chunk: Prefill, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
) -> Tensor:
    num_new, mask = chunk.stop - chunk.start, None
    if chunk.context_len:
        total = chunk.context_len + num_new
        cached = store.read(layer, chunk.blocks).flatten(0, 1)[:total]  # [token, K|V, kv_head, dim]
        key, value = cached[:, 0], cached[:, 1]
        position = torch.arange(chunk.context_len, total)[:, None]
        mask = position >= torch.arange(total)[None, :]
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1).transpose(0, 1)[None] for x in (key, value))
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], key, value, attn_mask=mask, is_causal=mask is None, scale=scaling
    )
    return out[0].transpose(0, 1)
