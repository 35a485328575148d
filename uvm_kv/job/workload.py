"""From the workload of a config to the lengths of its requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uvm_kv.config.schema import ConfigSchema
from uvm_kv.workload.draws import Purpose, entropy
from uvm_kv.workload.lengths import Lengths, Quantiles, draw_lengths
from uvm_kv.workload.prompts import Prompt
from uvm_kv.workload.trace import TraceRow, read_trace

REQUESTS_PER_CLIENT = 8
"""Requests per client of a closed loop, unless `num_requests` is given. With fewer, its steady window is short."""
REQUESTS_PER_SEQUENCE_IF_PREEMPTED = 32
"""The same where requests are preempted, for each sequence that the device holds: the throughput of such a loop settles
slowly. Llama-3-8B at 62 clients, swapped: 1285, 1256, 1255 and 1245 tokens/s with 8, 16, 32 and 64 for each."""


@dataclass(frozen=True)
class Workload:
    lengths: list[Lengths]
    rows: list[TraceRow] | None
    num_left_out: int
    """Requests drawn again, or dropped from a trace, because they exceed the model's context."""
    notes: tuple[str, ...] = ()
    """What of a trace is not served, in words."""
    if_preempted: Sequence[Lengths] = ()
    """Further requests of a closed loop, served if any of the first ones is preempted."""

    @property
    def all_lengths(self) -> list[Lengths]:
        return [*self.lengths, *self.if_preempted]


def longest_request(config: ConfigSchema, max_model_len: int, workload: Workload) -> int:
    """Tokens of the longest one that any repeat may draw, prompt and output."""
    drawn = config.workload.lengths
    if drawn is None:
        return max(sum(pair) for pair in workload.lengths)
    return min(max_model_len, sum(max(1, round(side.values[-1])) for side in (drawn.prompt, drawn.output)))


def build_workload(
    config: ConfigSchema, max_model_len: int, prompts: list[Prompt] | None = None, repeat: int = 0
) -> Workload:
    """Draw or read the requests of a repeat. ValueError for what does not fit the model's context."""
    workload, limit = config.workload, max_model_len
    if prompts is not None:
        for prompt in prompts:
            if len(prompt.ids) + prompt.output_tokens > limit:
                raise ValueError(
                    f"prompts={config.prompts}, line {prompt.line}: {len(prompt.ids)} prompt and "
                    f"{prompt.output_tokens} output tokens exceed the {limit} of the model"
                )
        return Workload([Lengths(len(p.ids), p.output_tokens) for p in prompts], None, 0)
    if workload.path is not None:
        return _of_trace(config, workload.path, limit)
    num_requests = workload.num_requests or REQUESTS_PER_CLIENT * config.batch_size
    lengths, redrawn = _made(config, limit, num_requests, _rng(config, repeat, Purpose.LENGTHS))
    return Workload(lengths, None, redrawn)


def further_lengths(config: ConfigSchema, max_model_len: int, num_sequences: int, repeat: int = 0) -> list[Lengths]:
    """What a closed loop goes on with if its first requests are preempted: `num_sequences` run at once. Empty where the
    number of requests is given, or the first ones are enough."""
    workload = config.workload
    made = workload.lengths is not None or workload.prompt_tokens is not None
    if not made or workload.arrival != "closed_loop" or workload.num_requests is not None:
        return []
    running = min(num_sequences, config.batch_size)
    count = REQUESTS_PER_SEQUENCE_IF_PREEMPTED * running - REQUESTS_PER_CLIENT * config.batch_size
    return _made(config, max_model_len, max(0, count), _rng(config, repeat, Purpose.FURTHER_LENGTHS))[0]


def _rng(config: ConfigSchema, repeat: int, purpose: Purpose) -> np.random.Generator:
    return np.random.default_rng(entropy(config.seed, repeat, purpose))


def _made(config: ConfigSchema, limit: int, num_requests: int, rng: np.random.Generator) -> tuple[list[Lengths], int]:
    """Lengths of `num_requests` requests, drawn or fixed, and how many were drawn again."""
    workload = config.workload
    if workload.lengths is not None:
        prompt_lengths, output_lengths = (
            Quantiles(tuple(q.probabilities), tuple(q.values))
            for q in (workload.lengths.prompt, workload.lengths.output)
        )
        if workload.too_long == "error" and prompt_lengths.values[-1] + output_lengths.values[-1] > limit:
            raise ValueError(
                f"workload={workload.name} reaches {prompt_lengths.values[-1]:.0f} prompt and "
                f"{output_lengths.values[-1]:.0f} output "
                f"tokens, beyond the {limit} of model={config.model.name}; use workload.too_long=drop"
            )
        return draw_lengths(prompt_lengths, output_lengths, num_requests, limit, rng)
    assert workload.prompt_tokens is not None and workload.output_tokens is not None
    return [Lengths(workload.prompt_tokens, workload.output_tokens)] * num_requests, 0


def _of_trace(config: ConfigSchema, path: str, limit: int) -> Workload:
    """The first `workload.num_requests` rows of a trace that fit the model's context of `limit` tokens."""

    def fits(where: str, prompt: int, output: int) -> bool:
        if prompt + output > limit and config.workload.too_long != "drop":
            raise ValueError(
                f"{where}: {prompt} prompt and {output} output tokens exceed the {limit} of model={config.model.name}; "
                f"use workload.too_long=drop to leave such rows out"
            )
        return prompt + output <= limit

    trace = read_trace(path, fits=fits, most=config.workload.num_requests)
    if not trace.rows:
        raise ValueError(f"workload.path={path}: no row fits the {limit} tokens of the model")
    notes = []
    if trace.num_failed:
        notes.append(f"{trace.num_failed} requests of the trace have no prompt or no output, failed and are left out")
    if trace.has_prefix_ids:
        notes.append("hash_ids of the trace are not used: every prompt is computed whole, though some begin alike")
    lengths = [Lengths(row.prompt_tokens, row.output_tokens) for row in trace.rows]
    return Workload(lengths, trace.rows, trace.num_unfit, tuple(notes))
