"""engine=...: another engine in the place of ours, and which settings of a job mean something to it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from typing import Any

from uvm_kv.config.schema import (
    CACHES,
    CONTINUOUS,
    ENGINES,
    ConfigSchema,
    DriverSchema,
    HintsSchema,
    PlacementSchema,
    SamplingSchema,
    SchedulerSchema,
)
from uvm_kv.types import OUR_ENGINE

NOT_OURS = ("memory", "placement", "reach", "hints", "admission", "preemption", "layout", "block_size", "allocation")
"""What a peer's runs say nothing of."""
PACKAGES = ("torch", "transformers", "accelerate")


def is_peer(config: ConfigSchema) -> bool:
    return config.engine != OUR_ENGINE


def cache_of(config: ConfigSchema) -> str:
    """transformers' cache_implementation of a peer that runs `generate`."""
    return CACHES[config.engine][("dynamic", "static").index(config.peer.cache)]


def peer_identity(config: ConfigSchema) -> dict[str, Any]:
    """What a peer's runs say of themselves in place of ours; nothing for ours."""
    if not is_peer(config):
        return {}
    named = {"mechanism": config.engine, "scheduler": "continuous" if config.engine == CONTINUOUS else "static"}
    return dict.fromkeys(NOT_OURS) | named


def page_size(config: ConfigSchema) -> int:
    """Tokens of a KV block of the job's engine."""
    return config.peer.page_size if config.engine == CONTINUOUS else config.block_size


def check_engine(config: ConfigSchema) -> None:
    """ValueError for a peer that cannot be had, and for what a job says that the peer would not heed."""
    engine, peer = config.engine, config.peer
    if engine == "vllm":
        raise ValueError(
            "engine=vllm is not served yet: it needs a class beside those of uvm_kv/runner/torch/peers.py that feeds "
            "vLLM's LLMEngine and reads its request metrics, and vLLM installed beside torch; allowed: "
            + ", ".join(ENGINES)
        )
    if engine not in ENGINES:
        return  # A mistyped name, which the check of all choices reports.
    if engine == OUR_ENGINE:
        return
    _check_runner(config)
    _check_defaults(config)
    arrival = config.workload.arrival or ("trace" if config.workload.path else "closed_loop")
    if arrival not in ("closed_loop", "all_at_once"):
        raise ValueError(
            f"workload.arrival={arrival} with engine={engine}; a peer is served in a closed_loop or all_at_once"
        )
    if peer.max_batch_tokens is not None and peer.max_batch_tokens < config.batch_size:
        raise ValueError(
            f"peer.max_batch_tokens={peer.max_batch_tokens} is below batch_size={config.batch_size}; a decode step "
            f"takes a token of every sequence, so raise it"
        )


def _check_runner(config: ConfigSchema) -> None:
    engine = config.engine
    if config.runner == "replay":
        raise ValueError(f"engine={engine} with runner=replay, which re-executes plans of ours; a peer makes none")
    if config.runner == "sim" and config.prompts is None:
        raise ValueError(f"engine={engine} with runner=sim: a peer serves a real model; use runner=cpu or runner=cuda")
    absent = [name for name in PACKAGES if find_spec(name) is None]
    if absent:
        raise ValueError(f"engine={engine} needs {' and '.join(absent)}, the extra 'torch': pip install -e '.[torch]'")
    if config.runner == "cuda":
        return
    if engine == "hf_offloaded":
        raise ValueError("engine=hf_offloaded moves KV between a GPU and the host; it needs runner=cuda")
    if config.memory.host_kv_bytes:
        raise ValueError(
            f"memory.host_kv_bytes={config.memory.host_kv_bytes} with engine={engine} and runner={config.runner}: its "
            f"host tier is pinned memory beside a GPU; it needs runner=cuda"
        )


def _check_defaults(config: ConfigSchema) -> None:
    engine = config.engine
    if config.memory.host_kv_bytes and engine != CONTINUOUS:
        raise ValueError(
            f"memory.host_kv_bytes={config.memory.host_kv_bytes} is ignored by engine={engine}, whose cache "
            f"grows as it needs; remove it"
        )
    left = {
        "mechanism": (config.mechanism, "custom"),
        "memory": (config.memory.kind, "device"),
        "memory.pageable": (config.memory.pageable, False),
        "placement": (config.placement, PlacementSchema(name="resident")),
        "hints": (config.hints, HintsSchema()),
        "driver": (config.driver, DriverSchema()),
        "scheduler": (config.scheduler, SchedulerSchema(name="continuous")),
        "sampling": (config.sampling, SamplingSchema()),
        "layout": (config.layout, "auto"),
        "block_size": (config.block_size, ConfigSchema.block_size),
        "allocation": (config.allocation, "paged"),
        "max_steps": (config.max_steps, None),
        "record_plans": (config.record_plans, False),
        "workload.start": (config.workload.start, "cold"),
    }
    for name, (given, default) in left.items():
        if given != default:
            which, value = _first_difference(name, given, default)
            raise ValueError(f"{which}={value} is ignored by engine={engine}, which decides for itself; remove it")


def _first_difference(name: str, given: Any, default: Any) -> tuple[str, Any]:
    """Name and value of what differs; for a group, of its first field that does."""
    if not is_dataclass(default):
        return name, given
    field = next(f.name for f in fields(default) if getattr(given, f.name) != getattr(default, f.name))
    return (name if field == "name" else f"{name}.{field}"), getattr(given, field)
