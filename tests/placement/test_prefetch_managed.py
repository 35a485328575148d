"""prefetch_ahead on managed memory: groups of blocks that share chunks come ahead of their layer and leave after."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import make_context
from uvm_kv.kvcache.ops import MemoryOp, OpKind
from uvm_kv.placement.base import PlacementContext, PlacementPolicy, PlacementView, Share, empty_view
from uvm_kv.placement.registry import build_policy
from uvm_kv.types import Layout, MemoryKind

GROUP = 8
"""Blocks of 16 tokens to a chunk."""


def context_of(num_device: int = 64, num_host: int = 60, *, num_layers: int = 8, lead: int = 2) -> PlacementContext:
    return make_context(
        num_device,
        num_host,
        memory=MemoryKind.MANAGED,
        num_layers=num_layers,
        num_layers_ahead=lead,
        block_size=16,
    )


def plan(policy: PlacementPolicy, *host_blocks: int) -> tuple[MemoryOp, ...]:
    return policy.plan(empty_view(policy.context.capacity)._replace(num_running=1, host_blocks=host_blocks))


def group(*numbers: int) -> tuple[int, ...]:
    return tuple(b for n in numbers for b in range(n * GROUP, min((n + 1) * GROUP, 124)))


def into(first: int, last: int, *groups: int) -> MemoryOp:
    return MemoryOp(OpKind.PREFETCH, group(*groups), first, last, 2)


def out(first: int, last: int, lead: int, *groups: int) -> MemoryOp:
    return MemoryOp(OpKind.EVICT, group(*groups), first, last, lead)


def test_groups_run_ahead_across_the_step_boundary() -> None:
    """Eight layers, two ahead. A layer leaves before the next one runs, the last as the next step begins; what came
    ahead for a group that is given up leaves too. The last group is cut off where the ids end."""
    policy = build_policy("prefetch_ahead", context_of())
    assert plan(policy) == ()
    assert plan(policy, 64, 66) == (out(0, 7, -1, 8), into(0, 2, 8), into(2, 10, 8))
    steady = (out(7, 8, 7, 8), out(0, 7, -1, 8), into(2, 10, 8))
    assert plan(policy, 64, 66) == steady
    assert plan(policy, 64, 66, 71) == steady, "another block of the same chunk changes nothing"
    assert plan(policy, 71, 123) == (out(7, 8, 7, 8), out(0, 7, -1, 8, 15), into(0, 2, 15), into(2, 10, 8, 15))
    assert plan(policy, 123) == (out(7, 8, 7, 8, 15), out(0, 2, 2, 8), out(0, 7, -1, 15), into(2, 10, 15))
    assert plan(policy) == (out(7, 8, 7, 15), out(0, 2, 2, 15))
    assert plan(policy) == ()


def test_a_plan_that_repeats_is_the_same_object() -> None:
    policy = build_policy("prefetch_ahead", context_of())
    view = empty_view(policy.context.capacity)._replace(host_blocks=(64, 70))
    _, second, third, fourth = (policy.plan(view) for _ in range(4))
    assert second is third is fourth


@pytest.mark.parametrize(("num_layers", "lead"), [(4, 1), (4, 2), (8, 2), (32, 2)])
def test_no_more_than_the_staged_layers_lie_on_the_device(num_layers: int, lead: int) -> None:
    """A naive device that does what the plan says, over changing sets of host blocks: before each layer runs, the
    host groups of that layer are there, and of all groups no more than lead + 1 layers are."""
    context = context_of(num_layers=num_layers, lead=lead)

    @settings(max_examples=40)
    @given(shown=st.lists(st.frozensets(st.integers(64, 123), max_size=12), min_size=1, max_size=6))
    def check(shown: list[frozenset[int]]) -> None:
        policy = build_policy("prefetch_ahead", context)
        resident: set[tuple[int, int]] = set()
        for blocks in shown:
            ops = plan(policy, *sorted(blocks))
            wanted = {b // GROUP for b in blocks}
            for layer in range(num_layers):
                for op in ops:
                    for data_layer in range(op.first_layer, op.last_layer):
                        if max(0, data_layer - op.lead) == layer:
                            part = {(data_layer % num_layers, b // GROUP) for b in op.blocks}
                            resident = resident | part if op.kind is OpKind.PREFETCH else resident - part
                assert {(layer, g) for g in wanted} <= resident
                assert len(resident) <= (lead + 1) * len(wanted)

    check()


@pytest.mark.parametrize(("num_layers", "lead"), [(4, 1), (8, 2), (32, 2)])
@pytest.mark.parametrize("claimed_host", [0, 3, 20, 60])
def test_staging_is_held_back_in_whole_chunks(num_layers: int, lead: int, claimed_host: int) -> None:
    """Device blocks and staging, each rounded up to whole chunks, fit the chunks of the device tier."""
    context = context_of(num_layers=num_layers, lead=lead, num_host=200)
    policy = build_policy("prefetch_ahead", context)
    spec, placed = context.spec, 0
    for claimed_device in range(0, 64, 5):
        view = PlacementView(64 - claimed_device, 200 - claimed_host, claimed_device, claimed_host, 1, 3, 0, (), None)
        for num_blocks in range(1, 60, 7):
            share = policy.place(view, num_blocks, admitting=True)
            if share is not None and claimed_host + share.host:
                staged = spec.num_chunks(claimed_host + share.host) * (lead + 1) // num_layers
                assert spec.num_chunks(claimed_device + share.device) + staged <= spec.num_chunks(64)
                placed += 1
    assert placed


def test_a_device_that_all_fits_stages_nothing() -> None:
    policy = build_policy("prefetch_ahead", context_of())
    view = empty_view(policy.context.capacity)
    assert policy.place(view, 64, admitting=True) == Share(64, 0)
    full = view._replace(available_device=0, claimed_device=64)
    assert policy.place(full, 1, admitting=True) is None


@pytest.mark.parametrize("lead", [0, 7, 99])
def test_a_lead_that_leaves_no_layer_behind_is_refused(lead: int) -> None:
    with pytest.raises(
        ValueError, match=rf"num_layers_ahead={lead}; copying ahead in a model of 8 layers takes 1 to 6"
    ):
        build_policy("prefetch_ahead", context_of(lead=lead))


def test_block_major_is_refused() -> None:
    """A chunk there holds many layers, and none of them comes or goes alone."""
    context = make_context(16, 48, memory=MemoryKind.MANAGED, block_size=16, layout=Layout.BLOCK_MAJOR)
    with pytest.raises(ValueError, match="chunks of one layer, layout=layer_major; given is block_major"):
        build_policy("prefetch_ahead", context)
    build_policy("prefetch_ahead", make_context(16, 48, layout=Layout.BLOCK_MAJOR))  # Pinned memory takes either.
