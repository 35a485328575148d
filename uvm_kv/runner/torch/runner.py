"""TorchRunner: carries plans out with a real Hugging Face model on the CPU, on wall-clock time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.ops import MemoryCounters, MemoryOp, OpKind
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.runner.base import ModelRunner
from uvm_kv.runner.torch.attention import Decodes, Prefill, StepContext, check_positions, step_context
from uvm_kv.runner.torch.kv_store import BlockIndex, KVStore, SlotIndex
from uvm_kv.sched.plan import ScheduledSequence, StepOutput, StepPlan, StepTiming
from uvm_kv.sched.request import Request
from uvm_kv.types import MemoryKind, Phase

# The CPU has no device memory: what a GPU's driver or link would count is not observed.
NOT_OBSERVED = MemoryCounters(*(None for _ in MemoryCounters._fields))


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0; else a draw from the softmax, seeded per request, whatever the batch."""

    temperature: float = 0.0
    seed: int = 0


class _Sequence:
    __slots__ = ("blocks", "generator", "tokens")

    def __init__(self, tokens: list[int], generator: torch.Generator | None) -> None:
        self.tokens = tokens
        self.blocks: list[int] = []
        self.generator = generator


class TorchRunner(ModelRunner):
    def __init__(
        self,
        model: Any,
        spec: KVCacheSpec,
        capacity: KVCapacity,
        memory: MemoryKind,
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        on_logits: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        """`max_tokens`: the longest sequence. `on_logits` sees each sampled row: (request id, [vocabulary])."""
        self._model = model
        self._spec = spec
        self._capacity = capacity
        self._max_tokens = max_tokens
        self._sampling = sampling or Sampling()
        self._on_logits = on_logits
        self._store = KVStore(spec, capacity, model.dtype, managed=memory is MemoryKind.MANAGED)
        self._sequences: dict[int, _Sequence] = {}
        self._clock_ns = time.perf_counter_ns()
        self._probe()

    def _probe(self) -> None:
        """One forward must call our attention once per layer: some families ignore the hook, some call it otherwise."""
        blocks, slots = (
            BlockIndex(torch.tensor([0]), self._store.num_device),
            SlotIndex([0], [0], self._store.num_device),
        )
        context = StepContext(
            self._store, slots, None, [Prefill(0, 1, 0, blocks)], lambda _: None, self._max_tokens, probing=True
        )
        name = type(self._model).__name__
        self._store.acquire([0])
        with torch.inference_mode(), step_context(context):
            try:
                check_positions(self._model.config, self._max_tokens)
                self._call([0], [0], [0])
            except ValueError as error:
                raise ValueError(f"{name} cannot be served: {error}") from error
            except (TypeError, LookupError, RuntimeError, AttributeError, AssertionError) as error:
                raise ValueError(f"{name} cannot be served: a forward with paged attention fails ({error})") from error
        self._store.poison([0])
        if sorted(context.calls) != list(range(self._spec.num_layers)):
            raise ValueError(
                f"{name} cannot be served: a forward called paged attention {len(context.calls)} times, for "
                f"{self._spec.num_layers} layers; the model has attention of its own"
            )

    # ---- the seam

    def capacity(self) -> KVCapacity:
        return self._capacity

    def add(self, request: Request) -> None:
        if request.prompt_ids is None:
            raise ValueError(f"request {request.id} has no token ids; a real model needs them")
        generator = None
        if self._sampling.temperature > 0:
            generator = torch.Generator().manual_seed(self._sampling.seed * 1_000_003 + request.id)
        self._sequences[request.id] = _Sequence(list(request.prompt_ids), generator)

    def remove(self, request_id: int) -> None:
        self._store.poison(self._sequences.pop(request_id).blocks)

    def now_ns(self) -> int:
        return time.perf_counter_ns() - self._clock_ns

    def wait_until_ns(self, time_ns: int) -> None:
        while (left := time_ns - self.now_ns()) > 0:
            time.sleep(left * 1e-9)

    def close(self) -> None:
        self._sequences.clear()

    def execute(self, plan: StepPlan) -> StepOutput:
        start = self.now_ns()
        self._change_tables(plan)
        per_layer = self._ops_by_layer(plan)
        with torch.inference_mode():
            logits, sampled = self._forward(plan, per_layer)
            tokens = self._sample(sampled, logits.float())  # bfloat16 has no fast search for the largest.
        for request_id, token in zip(sampled, tokens, strict=True):
            self._sequences[request_id].tokens.append(token)
        return StepOutput(StepTiming(start, self.now_ns()), NOT_OBSERVED, tuple(tokens))

    # ---- memory

    def _change_tables(self, plan: StepPlan) -> None:
        """Forget dropped tables, move whole sequences, hand out new blocks; freed blocks lose their content."""
        freed: set[int] = set()
        for request_id in plan.dropped:
            freed.update(self._sequences[request_id].blocks)
            self._sequences[request_id].blocks = []
        filled: set[int] = set()
        for op in plan.ops:
            if op.targets:
                self._store.move(op.blocks, op.targets)
                freed.update(op.blocks)
                filled.update(op.targets)
                freed -= set(op.targets)
        self._store.poison(sorted(freed))
        for sequence in plan.scheduled:
            if sequence.new_blocks:
                self._sequences[sequence.request_id].blocks.extend(sequence.new_blocks)
                self._store.acquire([b for b in sequence.new_blocks if b not in filled])

    def _ops_by_layer(self, plan: StepPlan) -> dict[int, list[tuple[MemoryOp, int]]]:
        """Layer before which something is issued -> (op, layer whose data it moves)."""
        issued: dict[int, list[tuple[MemoryOp, int]]] = {}
        for op in plan.ops:
            if not op.targets:
                for layer in range(op.first_layer, op.last_layer):
                    issued.setdefault(max(0, layer - op.lead), []).append((op, layer))
        return issued

    def _before_layer(self, layer: int, issued: dict[int, list[tuple[MemoryOp, int]]]) -> None:
        for op, data_layer in issued.get(layer, ()):
            if op.kind is OpKind.COPY_IN:
                self._store.stage(data_layer % self._spec.num_layers, op.blocks)
            elif op.kind is OpKind.EVICT:
                self._store.evict(data_layer, data_layer + 1, op.blocks)
            else:
                raise ValueError(f"op {op.kind} is not served by runner=cpu")

    # ---- the model

    def _forward(self, plan: StepPlan, issued: dict[int, list[tuple[MemoryOp, int]]]) -> tuple[Tensor, list[int]]:
        """Logits of the rows that sample, [row, vocabulary], and whose they are."""
        size, store = self._spec.block_size, self._store
        ids: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        sampled: list[int] = []
        rows: list[int] = []
        decodes: list[tuple[int, ScheduledSequence]] = []
        prefills: list[Prefill] = []
        for item in plan.scheduled:
            request_id, phase, num_new, context, _ = item
            sequence = self._sequences[request_id]
            first, stop = len(ids), len(ids) + num_new
            ids += sequence.tokens[context : context + num_new]
            positions += range(context, context + num_new)
            blocks += [sequence.blocks[p // size] for p in range(context, context + num_new)]
            if phase is Phase.DECODE:
                decodes.append((first, item))
            else:
                held = sequence.blocks[: -(-(context + num_new) // size)] if context else [0]
                prefills.append(Prefill(first, stop, context, BlockIndex(torch.tensor(held), store.num_device)))
            if context + num_new == len(sequence.tokens):
                sampled.append(request_id)
                rows.append(stop - 1)
        slots = SlotIndex(blocks, [p % size for p in positions], store.num_device)
        context_of_step = StepContext(
            store,
            slots,
            self._decode_batch(decodes) if decodes else None,
            prefills,
            lambda layer: self._before_layer(layer, issued),
            self._max_tokens,
        )
        with step_context(context_of_step):
            return self._call(ids, positions, rows), sampled

    def _call(self, ids: list[int], positions: list[int], rows: list[int]) -> Tensor:
        """The model's forward over one packed row; logits of `rows`."""
        keep = torch.tensor(rows, dtype=torch.long)
        output = self._model(
            input_ids=torch.tensor([ids]),
            position_ids=torch.tensor([positions]),
            use_cache=False,
            logits_to_keep=keep,
        )
        logits: Tensor = output.logits[0]
        return logits if len(logits) == len(rows) else logits[keep]  # Some models drop the keyword.

    def _decode_batch(self, decodes: list[tuple[int, ScheduledSequence]]) -> Decodes:
        size = self._spec.block_size
        lengths = [item.context_len + 1 for _, item in decodes]
        width = -(-max(lengths) // size)
        padded = []
        for (_, item), length in zip(decodes, lengths, strict=True):
            held = self._sequences[item.request_id].blocks[: -(-length // size)]
            # The padding repeats a block of the sequence's own: finite, and masked out.
            padded += held + held[-1:] * (width - len(held))
        mask = torch.arange(width * size)[None, :] < torch.tensor(lengths)[:, None]
        return Decodes(
            torch.tensor([row for row, _ in decodes]),
            BlockIndex(torch.tensor(padded), self._store.num_device),
            mask[:, None, None, :],
        )

    def _sample(self, request_ids: list[int], logits: Tensor) -> list[int]:
        """One token a row of `logits` [row, vocabulary]."""
        if self._on_logits is not None:
            for request_id, row in zip(request_ids, logits, strict=True):
                self._on_logits(request_id, row)
        best = logits.argmax(-1)  # NaN counts as the largest.
        bad = logits.gather(1, best[:, None]).isnan().flatten()
        if bad.any():
            raise RuntimeError(
                f"request {request_ids[int(bad.nonzero()[0])]}: its logits are NaN; its KV was read from where "
                f"there is none, or {self._model.dtype} is too narrow for this model"
            )
        if self._sampling.temperature == 0:
            tokens: list[int] = best.tolist()
            return tokens
        weights = torch.softmax(logits / self._sampling.temperature, -1)
        generators = [self._sequences[request_id].generator for request_id in request_ids]
        return [int(torch.multinomial(w, 1, generator=g)) for w, g in zip(weights, generators, strict=True)]
