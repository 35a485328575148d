"""TorchRunner: carries plans out with a real Hugging Face model on the CPU or a GPU, on wall-clock time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.runner.base import ModelRunner
from uvm_kv.runner.torch import ranges
from uvm_kv.runner.torch.attention import StepContext, check_positions, eagerly, step_context
from uvm_kv.runner.torch.cpu_kv import CpuKV
from uvm_kv.runner.torch.cuda_kv import CudaKV
from uvm_kv.runner.torch.graphs import DecodeGraphs
from uvm_kv.runner.torch.kv import Issued, KVBackend, LayerOp, SequenceRows
from uvm_kv.runner.torch.probe import check_logits
from uvm_kv.sched.plan import StepOutput, StepPlan, StepTiming
from uvm_kv.sched.request import Request
from uvm_kv.types import MemoryKind, Phase


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0; else a draw from the softmax, seeded per request, whatever the batch."""

    temperature: float = 0.0
    seed: int = 0


class _Sequence:
    __slots__ = ("blocks", "generator", "num_to_fill", "swapped_blocks", "tokens")

    def __init__(self, tokens: list[int], generator: torch.Generator | None, num_to_fill: int) -> None:
        self.tokens = tokens
        self.num_to_fill = num_to_fill
        """Tokens whose KV is filled directly as the first blocks come."""
        self.blocks: list[int] = []
        self.swapped_blocks: list[int] = []
        """Where its KV lies while it is swapped out."""
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
        kv: KVBackend | None = None,
        graph_seqs: int = 0,
        sampling: Sampling | None = None,
        on_logits: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        """`max_tokens`: the longest sequence. `kv`: of the model's device; None is the CPU's. `graph_seqs`: decode
        steps of up to so many sequences are CUDA graphs. `on_logits` sees each sampled row: (request id, [vocabulary]).
        """
        self._model = model
        self._spec = spec
        self._capacity = capacity
        self._max_tokens = max_tokens
        self._sampling = sampling or Sampling()
        self._on_logits = on_logits
        self._kv: KVBackend = kv or CpuKV(spec, capacity, memory, model.dtype)
        self._sequences: dict[int, _Sequence] = {}
        self._graphs: DecodeGraphs | None = None
        if graph_seqs:
            assert isinstance(self._kv, CudaKV), "graphs are CUDA's"
            self._graphs = DecodeGraphs(self._kv, self._run_model, max_seqs=graph_seqs, max_tokens=max_tokens)
        self._between_steps = False
        """A range is open that the next step ends."""
        if self._kv.device.type == "cuda":
            ranges.to_nvtx()
        self._probe()
        if self._graphs is not None:
            with torch.inference_mode(), self._kv.scope(), step_context(StepContext(self._kv, max_tokens)):
                self._graphs.prepare()
        self._clock_ns = time.perf_counter_ns()

    def _probe(self) -> None:
        """One forward must call our attention once per layer, since some families ignore the hook and some call it
        otherwise; and logits must not depend on how a step presents the tokens."""
        context = StepContext(self._kv, self._max_tokens, probing=True)
        name = type(self._model).__name__
        self._kv.acquire([0])
        with torch.inference_mode(), self._kv.scope(), step_context(context), eagerly():
            self._kv.begin_step([SequenceRows(0, 1, 0, [0], False)], {})
            try:
                check_positions(self._model.config, self._max_tokens)
                self._call([0], [0], [0])
            except ValueError as error:
                raise ValueError(f"{name} cannot be served: {error}") from error
            except (TypeError, LookupError, RuntimeError, AttributeError, AssertionError) as error:
                raise ValueError(f"{name} cannot be served: a forward with paged attention fails ({error})") from error
        self._kv.poison([0])
        if sorted(context.calls) != list(range(self._spec.num_layers)):
            raise ValueError(
                f"{name} cannot be served: a forward called paged attention {len(context.calls)} times, for "
                f"{self._spec.num_layers} layers; the model has attention of its own"
            )
        with torch.inference_mode(), self._kv.scope(), eagerly():
            try:
                check_logits(self._model, self._spec, self._max_tokens, self._run_model)
            except ValueError as error:
                raise ValueError(f"{name} cannot be served: {error}") from error

    # ---- the seam

    def capacity(self) -> KVCapacity:
        return self._capacity

    def add(self, request: Request) -> None:
        if request.prompt_ids is None:
            raise ValueError(f"request {request.id} has no token ids; a real model needs them")
        generator = None
        if self._sampling.temperature > 0:
            generator = torch.Generator().manual_seed(self._seed_of(request.id))
        self._sequences[request.id] = _Sequence(list(request.prompt_ids), generator, request.num_filled_tokens)

    def remove(self, request_id: int) -> None:
        sequence = self._sequences.pop(request_id)
        self._kv.poison(sequence.blocks + sequence.swapped_blocks)

    def now_ns(self) -> int:
        return time.perf_counter_ns() - self._clock_ns

    def wait_until_ns(self, time_ns: int) -> None:
        with ranges.mark("idle"):
            while (left := time_ns - self.now_ns()) > 0:
                time.sleep(left * 1e-9)

    def close(self) -> None:
        self._end_schedule()
        self._sequences.clear()
        if self._graphs is not None:
            self._graphs.close()
        self._kv.close()

    def execute(self, plan: StepPlan) -> StepOutput:
        self._end_schedule()
        with ranges.mark("execute"):
            output = self._execute(plan)
        self._between_steps = True
        ranges.push("schedule")
        return output

    def _end_schedule(self) -> None:
        if self._between_steps:
            ranges.pop()
        self._between_steps = False

    def _execute(self, plan: StepPlan) -> StepOutput:
        start = self.now_ns()
        self._change_tables(plan)
        per_layer = self._ops_by_layer(plan)
        with torch.inference_mode(), self._kv.scope():
            logits, sampled = self._forward(plan, per_layer)
            with ranges.mark("sample"):
                tokens = self._sample(sampled, logits.float())  # bfloat16 has no fast search for the largest.
        for request_id, token in zip(sampled, tokens, strict=True):
            self._sequences[request_id].tokens.append(token)
        counters = self._kv.end_step()
        return StepOutput(StepTiming(start, self.now_ns()), counters, tuple(tokens))

    # ---- memory

    def _change_tables(self, plan: StepPlan) -> None:
        """Forget dropped tables, move whole sequences, hand out new blocks; freed blocks lose their content."""
        old_blocks: dict[int, list[int]] = {}
        for request_id in plan.dropped:
            old_blocks[request_id], self._sequences[request_id].blocks = self._sequences[request_id].blocks, []
        freed = {block for blocks in old_blocks.values() for block in blocks}
        filled: set[int] = set()
        moved: dict[int, int] = {}
        for op in plan.ops:
            if op.targets:
                with ranges.mark("move"):
                    self._kv.move(op.blocks, op.targets)
                freed.update(op.blocks)
                filled.update(op.targets)
                freed -= set(op.targets)
                moved.update(zip(op.blocks, op.targets, strict=True))
        for request_id, blocks in old_blocks.items():
            self._sequences[request_id].swapped_blocks = [moved[block] for block in blocks if block in moved]
        self._kv.poison(sorted(freed))
        for sequence in plan.scheduled:
            if sequence.new_blocks:
                self._sequences[sequence.request_id].blocks.extend(sequence.new_blocks)
                self._sequences[sequence.request_id].swapped_blocks = []
                self._kv.acquire([b for b in sequence.new_blocks if b not in filled])
                if self._sequences[sequence.request_id].num_to_fill:
                    self._fill(sequence.request_id)

    def _fill(self, request_id: int) -> None:
        """KV that nobody computed: random, and outside of the runner's time."""
        clock_ns, sequence = time.perf_counter_ns(), self._sequences[request_id]
        generator = torch.Generator(self._kv.device).manual_seed(self._seed_of(request_id))
        with torch.inference_mode():
            self._kv.fill(sequence.blocks, sequence.num_to_fill, generator)
        sequence.num_to_fill = 0
        self._clock_ns += time.perf_counter_ns() - clock_ns

    def _seed_of(self, request_id: int) -> int:
        return self._sampling.seed * 1_000_003 + request_id

    def _ops_by_layer(self, plan: StepPlan) -> dict[int, list[LayerOp]]:
        """Layer before which something is issued -> the ops, with the layer whose data each moves."""
        issued: dict[int, list[LayerOp]] = {}
        for op in plan.ops:
            if not op.targets:
                for layer in range(op.first_layer, op.last_layer):
                    issued.setdefault(max(0, layer - op.lead), []).append(LayerOp(op, layer))
        return issued

    # ---- the model

    def _forward(self, plan: StepPlan, issued: Issued) -> tuple[Tensor, list[int]]:
        """Logits of the rows that sample, [row, vocabulary], and whose they are."""
        ids: list[int] = []
        positions: list[int] = []
        sampled: list[int] = []
        rows: list[int] = []
        batch: list[SequenceRows] = []
        for request_id, phase, num_new, context, _ in plan.scheduled:
            sequence = self._sequences[request_id]
            batch.append(SequenceRows(len(ids), num_new, context, sequence.blocks, phase is Phase.DECODE))
            ids += sequence.tokens[context : context + num_new]
            positions += range(context, context + num_new)
            if context + num_new == len(sequence.tokens):
                sampled.append(request_id)
                rows.append(len(ids) - 1)
        with step_context(StepContext(self._kv, self._max_tokens)):
            if self._graphs is not None and len(rows) == len(batch) and self._graphs.serves(batch, issued):
                return self._graphs.run(batch, ids, positions), sampled
            self._kv.begin_step(batch, issued)
            return self._call(ids, positions, rows), sampled

    def _call(self, ids: list[int], positions: list[int], rows: list[int]) -> Tensor:
        """The model's forward over one packed row; logits of `rows`."""
        return self._run_model(*self._kv.integers(ids, positions, rows))

    def _run_model(self, ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        output = self._model(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows)
        logits: Tensor = output.logits[0]
        return logits if len(logits) == len(rows) else logits[rows]  # Some models drop the keyword.

    def _sample(self, request_ids: list[int], logits: Tensor) -> list[int]:
        """One token per row of `logits` [row, vocabulary]."""
        if self._on_logits is not None:
            for request_id, row in zip(request_ids, logits, strict=True):
                self._on_logits(request_id, row)
        best = logits.argmax(-1)  # NaN counts as the largest.
        is_bad = logits.gather(1, best[:, None]).isnan().flatten()
        tokens, bad = torch.stack((best, is_bad.long())).tolist()  # The one time that the host waits for the device.
        if any(bad):
            narrow = self._model.dtype is torch.float16
            raise ValueError(
                f"request {request_ids[bad.index(1)]}: its logits are NaN; its KV was read from where there is none (a "
                f"bug in uvm-kv), or the model's weights hold NaN"
                + (", or it exceeds the range of float16: try dtype=bfloat16" if narrow else "")
            )
        if self._sampling.temperature == 0:
            return list(tokens)
        weights = torch.softmax(
            logits / self._sampling.temperature, -1
        ).cpu()  # Generators there draw alike everywhere.
        generators = [self._sequences[request_id].generator for request_id in request_ids]
        return [int(torch.multinomial(w, 1, generator=g)) for w, g in zip(weights, generators, strict=True)]
