"""Decode steps as CUDA graphs: a batch is padded to one of a few sizes, captured once, and replayed.

Memory ops and plans are issued before a replay, never inside it. A step with ops between its layers runs eagerly.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from uvm_kv.runner.torch.cuda_kv import CudaKV, PaddedBatch
from uvm_kv.runner.torch.kv import Issued, SequenceRows

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(input ids [token], position ids [token], rows [row]) -> logits [row, vocabulary]."""
WARM_UPS = 2
"""Forwards before a capture: kernels are loaded and libraries make their handles, which a capture must not."""


def padded_sizes(most: int) -> list[int]:
    """1, 2, 4, then multiples of 8 up to `most` and what is needed to reach it, as vLLM captures."""
    return sorted({size for size in (1, 2, 4, *range(8, most, 8)) if size < most} | {most})


class DecodeGraphs:
    def __init__(self, kv: CudaKV, forward: Forward, *, max_seqs: int, max_tokens: int) -> None:
        """Without a GPU of torch's, as in tests, the padded step runs eagerly: the same but for the launches."""
        self._kv, self._forward, self._max_tokens = kv, forward, max_tokens
        kv.reserve_decode(max_seqs, max_tokens)  # All sizes share it: only one of them runs at a time.
        self._sizes = padded_sizes(max_seqs)
        self._steps: dict[int, _PaddedStep] = {}
        self._pool: object = None
        """One memory pool for all sizes: only one of them runs at a time."""
        self.num_replays = 0

    def prepare(self) -> None:
        """Captures every size, the largest first, so that no step has to."""
        for size in reversed(self._sizes):
            self._steps[size] = self._make(size)

    def serves(self, batch: Sequence[SequenceRows], issued: Issued) -> bool:
        return len(batch) <= self._sizes[-1] and self._kv.can_pad(batch, issued)

    def run(self, batch: Sequence[SequenceRows], ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Logits of the batch, [sequence, vocabulary]; valid until the next run."""
        size = self._sizes[bisect_left(self._sizes, len(batch))]
        step = self._steps[size]
        self._kv.begin_padded(step.padded, batch)
        padding = [0] * (size - len(batch))
        self._kv.integers([*ids, *padding], [*positions, *padding], into=step.integers)
        self.num_replays += 1
        if step.graph is not None:
            step.graph.replay()
        else:
            step.logits = self._forward(*step.views)
        assert step.logits is not None
        return step.logits[: len(batch)]

    def _make(self, size: int) -> _PaddedStep:
        step = _PaddedStep(self._kv.padded(size, self._max_tokens), size, self._kv.device)
        if self._kv.device.type == "cpu":
            return step
        self._kv.begin_padded(step.padded, [])  # Nothing is written and nothing attended while it is captured.
        for _ in range(WARM_UPS):
            self._forward(*step.views)
        torch.cuda.current_stream().synchronize()
        step.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(step.graph, pool=self._pool, stream=torch.cuda.current_stream()):
                step.logits = self._forward(*step.views)
            self._pool = step.graph.pool()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"this model's decode cannot be captured ({reason}); give cuda_graphs=false") from error
        return step

    def close(self) -> None:
        for step in self._steps.values():
            step.padded.close()
        self._steps.clear()


class _PaddedStep:
    """Inputs and logits of one size, at fixed addresses."""

    def __init__(self, padded: PaddedBatch, size: int, device: torch.device) -> None:
        self.padded = padded
        self.integers = torch.zeros(2 * size, dtype=torch.int64, device=device)
        ids, positions = self.integers.split(size)
        self.views = (ids, positions, torch.arange(size, device=device))
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
