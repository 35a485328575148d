"""KVBackend: what TorchRunner asks of the KV memory of its device. CpuKV and CudaKV are the two."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from uvm_kv.kvcache.ops import MemoryCounters, MemoryOp
from uvm_kv.kvcache.spec import KVCacheSpec


class SequenceRows(NamedTuple):
    """A scheduled sequence: rows [first, first + num_new) of the packed batch, behind `context_len` cached tokens."""

    first: int
    num_new: int
    context_len: int
    blocks: list[int]
    """Its block table, which may hold more blocks than its tokens need."""
    is_decode: bool

    @property
    def stop(self) -> int:
        return self.first + self.num_new

    @property
    def total(self) -> int:
        """Tokens whose KV is there once the step has written its own."""
        return self.context_len + self.num_new


class LayerOp(NamedTuple):
    """The part of an op that moves one layer's data; a layer >= num_layers is one of the next step."""

    op: MemoryOp
    layer: int


Issued = Mapping[int, Sequence[LayerOp]]
"""Layer -> what is issued before it runs."""


def random_kv(spec: KVCacheSpec, num_tokens: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """KV of unit variance for one layer, [K|V, token, kv_head, dim], whatever the blocks, their size and their tier."""
    shape = (2, num_tokens, spec.num_kv_heads, spec.head_dim)
    return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)


class KVBackend(ABC):
    """Both tiers of KV memory and attention over them. Block ids are the plan's: device blocks come first.

    Calls come in the order of a step: move, poison, acquire and fill while tables change; begin_step; attend once
    per layer, in order; end_step.
    """

    device: torch.device
    """Where the model's tensors live."""

    @abstractmethod
    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks, all layers, to other blocks of either tier."""

    @abstractmethod
    def poison(self, blocks: Sequence[int]) -> None:
        """Destroy what these blocks hold, so that a read of them shows in the result."""

    @abstractmethod
    def acquire(self, blocks: Sequence[int]) -> None:
        """Take blocks that are new in a table; their slots fill up as tokens come."""

    @abstractmethod
    def fill(self, blocks: Sequence[int], num_tokens: int, generator: torch.Generator) -> None:
        """The first `num_tokens` tokens of a sequence with this table get the KV of `random_kv`, layer by layer. Done
        when it returns: the runner's clock stands still meanwhile."""

    @abstractmethod
    def begin_step(self, batch: Sequence[SequenceRows], issued: Issued) -> None:
        """Announce the sequences of the coming step."""

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Write the new K and V, then attend causally over each sequence's own tokens.

        query [token, head, dim]; key and value [token, kv_head, dim]; the result has the query's shape.
        """

    @abstractmethod
    def integers(self, *lists: Sequence[int], into: Tensor | None = None) -> list[Tensor]:
        """Each list as int64 on the device, without waiting for it. `into`: takes them one after the other."""

    @abstractmethod
    def scope(self) -> AbstractContextManager[object]:
        """Open while the model runs: its operators go where this backend's go."""

    @abstractmethod
    def end_step(self) -> MemoryCounters:
        """Counters of what moved; None where nothing can be observed."""

    @abstractmethod
    def close(self) -> None: ...
