"""Traces whose schedule under vLLM V1's rules is worked out by hand (docs/validation.md), against the plans of
mechanism=device_recompute. Blocks of 4 tokens; `{request: tokens}` a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import ScriptedRunner, drive, make_context, make_scheduler, plans_of
from uvm_kv.sched.request import Request
from uvm_kv.types import MemoryKind
from uvm_kv.workload.source import OpenLoop
from uvm_kv.workload.trace import read_trace, write_trace

STEP_NS = 1_000

SCENARIOS = {
    # r0 takes its third block in step 3, r1 finds none for its ninth token in step 5 and preempts itself: nobody is
    # admitted in that step. r2 has waited since step 3 (its prompt needs 3 blocks), yet r1 goes ahead of it, recomputes
    # prompt + generated = 9 tokens in chunks of the budget, and r2 gets in when r1's blocks are back.
    "self-preemption goes to the head and recomputes what it generated": (
        5,
        8,
        8,
        [(0, 6, 6), (0, 5, 6), (2_500, 9, 3)],
        [{0: 6, 1: 2}, {0: 1, 1: 3}, *[{0: 1, 1: 1}] * 3, {0: 1}, {1: 8}, {1: 1}, {1: 1}, {2: 8}, *[{2: 1}] * 3],
        {1: 1},
    ),
    # r1's prompt comes in chunks of what r0's decode leaves of the budget. In step 5 r0 needs its third block: the
    # latest of the running gives all of its blocks, just after its first token. The 4 blocks of its 13 known tokens do
    # not fit beside r0's 3 of 5, so r1 starts again once r0 has ended.
    "the oldest takes the blocks of the latest": (
        5,
        4,
        8,
        [(0, 4, 9), (0, 12, 2)],
        [{0: 4}, *[{0: 1, 1: 3}] * 4, *[{0: 1}] * 4, {1: 4}, {1: 4}, {1: 4}, {1: 1}],
        {1: 1},
    ),
    # r1 is admitted in step 1 since 4 of the 5 free blocks hold its whole prompt, but it takes them chunk by chunk: in
    # step 6 r0 gets its third block, the last one, from what r1 has not come to, and ends before r1 needs it. Nobody is
    # preempted.
    "a prompt that is being prefilled holds only the blocks of its chunks": (
        6,
        3,
        8,
        [(0, 3, 7), (0, 16, 1)],
        [{0: 3}, *[{0: 1, 1: 2}] * 6, {1: 3}, {1: 1}],
        {},
    ),
    # In step 1 r1's first chunk would fit the 2 free blocks, its whole prompt (3) does not: it waits, and r2, which
    # would fit, does not overtake. In step 3 a token of budget and a block are left for r3, but max_num_seqs is 2.
    "admission wants the whole prompt to fit, in order, up to max_num_seqs": (
        5,
        8,
        2,
        [(0, 8, 2), (1, 12, 2), (2, 3, 1), (3, 1, 2)],
        [{0: 8}, {0: 1}, {1: 8}, {1: 4, 2: 3}, {1: 1, 3: 1}, {3: 1}],
        {},
    ),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_plans_are_those_of_vllm(scenario: str, tmp_path: Path) -> None:
    num_blocks, budget, max_num_seqs, trace, expected, preempted = SCENARIOS[scenario]
    write_trace(tmp_path / "trace.csv", trace)
    requests = [
        Request(i, row.prompt_tokens, row.output_tokens, row.arrival_ns)
        for i, row in enumerate(read_trace(str(tmp_path / "trace.csv")).rows)
    ]
    context = make_context(num_blocks, memory=MemoryKind.DEVICE)
    scheduler = make_scheduler(
        context,
        batch_size=max_num_seqs,
        max_num_batched_tokens=budget,
        admission="optimistic",
        preemption="recompute",
    )
    plans = plans_of(drive(scheduler, ScriptedRunner(context, step_ns=STEP_NS), OpenLoop(requests)))
    assert [{s.request_id: s.num_new_tokens for s in plan.scheduled} for plan in plans] == expected
    assert {r.id: r.num_preemptions for r in requests if r.num_preemptions} == preempted
