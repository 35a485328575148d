"""At load: does a model give the same logits whichever way a step presents its tokens? Layers that keep state outside
attention, such as Mamba's, do not: packed sequences run into each other, and a decode has forgotten the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.runner.torch.attention import StepContext, step_context
from uvm_kv.runner.torch.cpu_kv import CpuKV
from uvm_kv.runner.torch.kv import SequenceRows
from uvm_kv.types import MemoryKind

LENGTHS = (7, 4)
"""Tokens of the two sequences."""
PREFILL = 4
BLOCK_SIZE = 16
TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 0.125}
"""Share of the largest logit: some ten units of the last place. Lost state changes logits by their own size."""

RunModel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(ids, positions, rows) -> logits [row, vocabulary]."""


class _AttendOnCpu:
    """Attention over KV of the probe's own, whatever the device: the runner's has its capacity and its counters."""

    def __init__(self, kv: CpuKV) -> None:
        self._kv = kv

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        return self._kv.attend(layer, query.cpu(), key.cpu(), value.cpu(), scaling).to(query.device)


class _Probe:
    def __init__(self, model: Any, spec: KVCacheSpec, max_tokens: int, run_model: RunModel) -> None:
        self._model = model
        self._run_model = run_model
        self._max_tokens = max_tokens
        capacity = KVCapacity(len(LENGTHS), 0)
        self._kv = CpuKV(replace(spec, block_size=BLOCK_SIZE), capacity, MemoryKind.DEVICE, model.dtype)

    def logits(self, parts: Sequence[tuple[int, int, list[int]]]) -> Tensor:
        """One step of parts (block, cached tokens, new ids): float32 logits of every new token."""
        batch: list[SequenceRows] = []
        ids: list[int] = []
        positions: list[int] = []
        for block, context, new in parts:
            if not context:
                self._kv.acquire([block])
            is_decode = bool(context) and len(new) == 1
            batch.append(SequenceRows(len(ids), len(new), context, [block], is_decode))
            ids += new
            positions += range(context, context + len(new))
        self._kv.begin_step(batch, {})
        tensors = (torch.tensor(x, device=self._model.device) for x in (ids, positions, list(range(len(ids)))))
        with step_context(StepContext(_AttendOnCpu(self._kv), self._max_tokens)):
            return self._run_model(*tensors).float().cpu()

    def close(self) -> None:
        self._kv.close()


def check_logits(model: Any, spec: KVCacheSpec, max_tokens: int, run_model: RunModel) -> None:
    """ValueError for a model whose logits of two packed sequences are not those of each alone, or those of a prefill
    and decodes not those of one prefill. `max_tokens`: of the longest sequence that will be served."""
    vocabulary = model.get_input_embeddings().num_embeddings
    first, second = (
        [(17 + 7919 * (i + 3 * s)) % vocabulary for i in range(min(length, max_tokens))]
        for s, length in enumerate(LENGTHS)
    )
    probe = _Probe(model, spec, max_tokens, run_model)
    alone = probe.logits([(0, 0, first)])
    beside = torch.cat([alone, probe.logits([(0, 0, second)])])
    _compare(model, probe.logits([(0, 0, first), (1, 0, second)]), beside, "two sequences in one step", "each alone")
    steps = [probe.logits([(0, 0, first[:PREFILL])])]
    steps += [probe.logits([(0, i, first[i : i + 1])]) for i in range(PREFILL, len(first))]
    _compare(model, torch.cat(steps), alone, "a prefill and decodes", "one prefill")
    probe.close()


def _compare(model: Any, got: Tensor, wanted: Tensor, one_way: str, other_way: str) -> None:
    limit = TOLERANCE[model.dtype] * float(wanted.nan_to_num().abs().max())
    if not torch.allclose(got, wanted, rtol=0, atol=limit, equal_nan=True):
        share = float((got - wanted).nan_to_num().abs().max()) / max(limit / TOLERANCE[model.dtype], 1e-30)
        raise ValueError(
            f"the logits of {one_way} differ from those of {other_way} by {share:.1%} of the largest: the model keeps "
            f"state outside attention (as Mamba or convolutions do), or its positions are its own"
        )
