"""StepPlan and StepOutput survive JSON; requests refuse lengths below 1."""

from __future__ import annotations

import json

import pytest

from tests.helpers import make_request
from uvm_kv.kvcache.ops import MemoryCounters, MemoryOp, OpKind
from uvm_kv.sched.plan import ScheduledSequence, StepOutput, StepPlan, StepTiming
from uvm_kv.types import Phase


def test_a_plan_survives_json() -> None:
    sequences = (ScheduledSequence(3, Phase.PREFILL, 8, 0, (1, 2)), ScheduledSequence(4, Phase.DECODE, 1, 9, ()))
    plan = StepPlan(7, sequences, (MemoryOp(OpKind.COPY_OUT, (1,), 0, 4, 0, (9,)),), (5,))
    again = StepPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.scheduled[0].phase is Phase.PREFILL


@pytest.mark.parametrize("token_ids", [None, (5, 6)])
def test_an_output_survives_json_with_what_was_not_observed(token_ids: tuple[int, ...] | None) -> None:
    output = StepOutput(StepTiming(5, 9), MemoryCounters(h2d_copy_bytes=3, evicted_chunks=None), token_ids)
    assert StepOutput.from_json(json.loads(json.dumps(output.to_json()))) == output


@pytest.mark.parametrize("lengths", [(0, 1), (1, 0), (-1, 5)])
def test_lengths_below_one_are_refused(lengths: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="both need >= 1"):
        make_request(0, *lengths)
