"""Names of the placement policies. Registering one here also enters it into the contract suite."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, get_type_hints

from uvm_kv.placement.bandwidth_balanced import BandwidthBalanced
from uvm_kv.placement.base import PlacementContext, PlacementPolicy
from uvm_kv.placement.demand import Demand
from uvm_kv.placement.demand_capped import DemandCapped
from uvm_kv.placement.prefetch_ahead import PrefetchAhead
from uvm_kv.placement.resident import Resident
from uvm_kv.placement.static_split import StaticSplit
from uvm_kv.setting import RULE, Rule
from uvm_kv.types import MemoryKind

POLICIES: dict[str, type[PlacementPolicy]] = {
    "resident": Resident,
    "demand": Demand,
    "demand_capped": DemandCapped,
    "static_split": StaticSplit,
    "prefetch_ahead": PrefetchAhead,
    "bandwidth_balanced": BandwidthBalanced,
}


def check_served(name: str, memory: MemoryKind) -> None:
    """Raise ValueError where memory of that kind cannot serve the placement."""
    served = POLICIES[name].memory_kinds
    if memory not in served:
        able = ", ".join(p for p, cls in POLICIES.items() if memory in cls.memory_kinds)
        raise ValueError(
            f"placement={name} cannot be served by memory={memory}; it needs memory={' or '.join(sorted(served))}, "
            f"and memory={memory} serves placement={able}"
        )


def placement_options() -> dict[str, tuple[Any, Any, Rule]]:
    """(type, default, rule) of every option of a placement, by name. The placements that have it heed it."""
    found: dict[str, tuple[Any, Any, Rule]] = {}
    for name, policy in POLICIES.items():
        types = get_type_hints(policy.options_type)
        for it in fields(policy.options_type):
            rule = it.metadata[RULE]
            users = found[it.name][2].heeded["placement.name"] if it.name in found else ()
            found[it.name] = (types[it.name], it.default, replace(rule, heeded={"placement.name": (*users, name)}))
    return found


def build_policy(name: str, context: PlacementContext) -> PlacementPolicy:
    check_served(name, context.memory)
    return POLICIES[name](context)
