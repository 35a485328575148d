"""MemoryOp and MemoryCounters: intent survives JSON, and what is not observed is None."""

from __future__ import annotations

import json

import pytest

from uvm_kv.kvcache.ops import NO_TRAFFIC, MemoryOp, OpKind


@pytest.mark.parametrize("kind", OpKind)
def test_an_op_survives_json(kind: OpKind) -> None:
    op = MemoryOp(kind, (3, 4), 1, 5, 1, (8, 9))
    assert MemoryOp.from_json(json.loads(json.dumps(op.to_json()))) == op


def test_counters_tell_nothing_from_not_observed() -> None:
    assert set(NO_TRAFFIC) == {0}
    assert NO_TRAFFIC._replace(evicted_chunks=None) != NO_TRAFFIC
