"""Schemas of the config. A mistyped key or a value of the wrong type fails at composition with the field's name.

Every field is explained in the YAML file of its group under `conf/`. Here are its type, its default and its rule
(`uvm_kv.setting`), of which `uvm_kv.config.settings` makes errors, run ids and comparisons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from uvm_kv.placement.registry import POLICIES, placement_options
from uvm_kv.setting import RULE, Role, setting
from uvm_kv.types import DTYPE_BYTES, OUR_ENGINE, Allocation, Layout, MemoryKind

CONTINUOUS = "hf_continuous"
CACHES = {"hf_generate": ("dynamic", "static"), "hf_offloaded": ("offloaded", "offloaded_static")}
"""transformers' cache_implementation by peer, for peer.cache=dynamic and static."""
PEERS = (*CACHES, CONTINUOUS)
ENGINES = (OUR_ENGINE, *PEERS)


@dataclass
class GpuSchema:
    memory_bytes: int = MISSING
    hbm_gb_per_s: float = MISSING
    hbm_efficiency: float = MISSING
    tensor_tflop_per_s: float = MISSING
    tensor_int8_top_per_s: float = MISSING
    context_bytes: int = MISSING
    float32_tflop_per_s: float | None = None


@dataclass
class LinkSchema:
    h2d_gb_per_s: float = MISSING
    d2h_gb_per_s: float = MISSING
    duplex_h2d: float = MISSING
    duplex_d2h: float = MISSING
    zero_copy_gib: list[float] = MISSING
    zero_copy_share: list[float] = MISSING
    prefetch_share: float = MISSING
    pageable_share: float = MISSING
    copy_call_us: float = MISSING
    prefetch_call_us: float = MISSING
    prefetch_chunk_us: float = MISSING


@dataclass
class ManagedSchema:
    stream_fault_pages: int = MISSING
    fault_batch_us: float = MISSING
    fault_block_us: float = MISSING
    cpu_mapped_page_us: float = MISSING
    scattered_page_us: float = MISSING
    evict_fixed_us: float = MISSING
    prefetch_overlap: float = MISSING


@dataclass
class PowerSchema:
    idle_w: float = MISSING
    active_w: float = MISSING
    waiting_w: float = MISSING


@dataclass
class OperatorSchema:
    overhead_us: float = MISSING
    compute_efficiency: float = MISSING
    memory_efficiency: float = MISSING
    knee: float = MISSING


@dataclass
class HardwareSchema:
    name: str = MISSING
    measured_on: str | None = None
    gpu: GpuSchema = field(default_factory=GpuSchema)
    link: LinkSchema = field(default_factory=LinkSchema)
    managed: ManagedSchema = field(default_factory=ManagedSchema)
    power: PowerSchema = field(default_factory=PowerSchema)
    operators: dict[str, OperatorSchema] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)


@dataclass
class ModelSchema:
    name: str = MISSING
    source: str | None = None
    path: str | None = None
    weights: str = setting("file", allowed=("file", "random"))
    weight_bits: int | None = setting(None, allowed=(16, 8, 4))
    num_layers: int | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    gated_mlp: bool | None = None
    rope: bool | None = None
    tied_embeddings: bool | None = None


@dataclass
class MemorySchema:
    kind: str = setting(MISSING, allowed=tuple(MemoryKind), role=Role.VARIANT)
    gpu_memory_utilization: float = setting(0.90, above=0, most=1)
    device_kv_bytes: int | None = setting(None, least=1)
    host_kv_bytes: int | None = setting(None, least=0, most=2**46, role=Role.VARIANT)
    pageable: bool = setting(False, role=Role.VARIANT)
    allow_oversubscription: bool = setting(False, heeded={"runner": ("cuda",)})


if TYPE_CHECKING:

    class PlacementSchema:
        name: str

        def __init__(self, name: str = ...) -> None: ...

        def __getattr__(self, option: str) -> Any: ...

else:
    PlacementSchema = make_dataclass(
        "PlacementSchema",
        [
            ("name", str, setting(MISSING, allowed=tuple(POLICIES), role=Role.VARIANT)),
            *(
                (name, kind, field(default=default, metadata={RULE: rule}))
                for name, (kind, default, rule) in placement_options().items()
            ),
        ],
    )
    PlacementSchema.__module__ = __name__
    PlacementSchema.__doc__ = "A placement, and the options of all placements (`uvm_kv.placement.registry`)."


def _hint(default: Any, **rule: Any) -> Any:
    return setting(default, heeded={"memory.kind": ("managed",)}, role=Role.VARIANT, **rule)


@dataclass
class HintsSchema:
    preferred_location: str = _hint("none", allowed=("none", "device", "host", "by_tier"))
    accessed_by: bool = _hint(False)
    read_mostly: bool = _hint(False)
    discard_on_free: bool = _hint(False)


def _of_driver(default: Any, **rule: Any) -> Any:
    """An option of the simulated driver. One job of a sweep may ignore it, as another's memory is managed."""
    heeded = {"runner": ("sim",), "memory.kind": ("managed",)}
    return setting(default, heeded=heeded, lenient=("memory.kind",), **rule)


@dataclass
class DriverSchema:
    prefetcher: str = _of_driver("tree", allowed=("tree", "none", "block"))
    prefetch_threshold_percent: int = _of_driver(51, least=1, most=100)
    concurrent_managed_access: bool = _of_driver(True)


@dataclass
class SchedulerSchema:
    name: str = setting(MISSING, allowed=("static", "dynamic", "continuous"))
    max_num_batched_tokens: int = setting(2048, least=1)
    chunked_prefill: bool = setting(True)
    admission: str = setting("worst_case", allowed=("worst_case", "optimistic"), role=Role.VARIANT)
    preemption: str = setting("none", allowed=("none", "recompute", "swap"), role=Role.VARIANT)
    watermark: float = setting(0.01, least=0, below=1)
    window_s: float = setting(1.0, above=0, below=math.inf, heeded={"scheduler.name": ("dynamic",)})


@dataclass
class QuantileSchema:
    probabilities: list[float] = MISSING
    values: list[float] = MISSING


@dataclass
class LengthsSchema:
    source: str = MISSING
    prompt: QuantileSchema = field(default_factory=QuantileSchema)
    output: QuantileSchema = field(default_factory=QuantileSchema)


@dataclass
class WorkloadSchema:
    name: str = setting(MISSING)
    prompt_tokens: int | None = setting(None, least=1)
    output_tokens: int | None = setting(None, least=1)
    lengths: LengthsSchema | None = setting(None)
    path: str | None = setting(None)
    num_requests: int | None = setting(None, least=1, most=10_000_000)
    arrival: str | None = setting(None, allowed=("closed_loop", "all_at_once", "poisson", "trace"))
    start: str = setting("cold", allowed=("cold", "steady"))
    request_rate: float | None = setting(None, least=1e-6, most=1e9)
    too_long: str | None = setting(None, allowed=("error", "drop"))


def _no_result(default: Any, **rule: Any) -> Any:
    return setting(default, role=Role.NO_RESULT, **rule)


@dataclass
class TrackingSchema:
    name: str = _no_result("none", allowed=("none", "wandb"))
    project: str = _no_result("uvm-kv")
    mode: str = _no_result("offline", allowed=("offline", "online"))


@dataclass
class SamplingSchema:
    temperature: float = setting(0.0, least=0, most=100, heeded={"runner": ("cpu", "cuda")})


@dataclass
class ReplaySchema:
    path: str | None = setting(None)
    recorded_runner: str | None = setting(None)


def _of_peer(default: Any, *engines: str, **rule: Any) -> Any:
    return setting(default, heeded={"engine": engines}, role=Role.VARIANT, **rule)


@dataclass
class PeerSchema:
    cache: str = _of_peer("dynamic", *CACHES, allowed=("dynamic", "static"))
    page_size: int = _of_peer(256, CONTINUOUS, least=4)
    max_batch_tokens: int | None = _of_peer(None, CONTINUOUS)
    use_cuda_graph: bool | None = _of_peer(None, CONTINUOUS)


@dataclass
class ConfigSchema:
    hardware: HardwareSchema = field(default_factory=HardwareSchema)
    model: ModelSchema = field(default_factory=ModelSchema)
    mechanism: str = setting("custom")
    memory: MemorySchema = field(default_factory=MemorySchema)
    placement: PlacementSchema = field(default_factory=PlacementSchema)
    hints: HintsSchema = field(default_factory=HintsSchema)
    driver: DriverSchema = field(default_factory=DriverSchema)
    scheduler: SchedulerSchema = field(default_factory=SchedulerSchema)
    workload: WorkloadSchema = field(default_factory=WorkloadSchema)
    tracking: TrackingSchema = field(default_factory=TrackingSchema)
    replay: ReplaySchema = field(default_factory=ReplaySchema)
    sampling: SamplingSchema = field(default_factory=SamplingSchema)
    engine: str = setting(OUR_ENGINE, allowed=ENGINES, role=Role.VARIANT)
    peer: PeerSchema = field(default_factory=PeerSchema)
    prompts: str | None = setting(None)
    chat_template: str = setting("auto", allowed=("auto", "none"))
    runner: str = setting("sim", allowed=("sim", "cpu", "cuda", "replay"))
    layout: str = setting("auto", allowed=("auto", *Layout), role=Role.VARIANT)
    block_size: int = setting(16, least=1)
    allocation: str = setting("paged", allowed=tuple(Allocation))
    batch_size: int = setting(16, least=1)
    working_set_ratio: float | None = setting(None, least=1e-6, most=1e6)
    max_model_len: int | None = setting(None, least=1)
    dtype: str = setting("auto", allowed=("auto", *DTYPE_BYTES))
    kv_bits: int | None = setting(None, allowed=(16, 8, 4))
    seed: int = setting(0, least=0, most=2**32 - 1)
    num_repeats: int = _no_result(1, least=1)
    first_repeat: int = _no_result(0, least=0, most=2**31)
    max_steps: int | None = setting(None, least=1)
    max_seconds: float | None = setting(None, least=1e-6, most=1e9)
    watchdog_s: float | None = _no_result(None, least=1e-6, most=1e9)
    cuda_graphs: bool = setting(True, heeded={"runner": ("cuda",)})
    compile: bool = setting(False, heeded={"runner": ("cpu", "cuda")})
    record_plans: bool = setting(False)
    results_dir: str = _no_result("results/runs")
    rerun: str = _no_result("false", allowed=("false", "true", "changed"))
    refine: bool = _no_result(False)


@dataclass
class RooflineSchema:
    hardware: HardwareSchema = field(default_factory=HardwareSchema)
    model: ModelSchema = field(default_factory=ModelSchema)
    stage: str = MISSING
    batch_size: int = MISSING
    sequence_length: int = MISSING
    weight_bits: int | None = MISSING
    activation_bits: int = MISSING
    kv_bits: int = MISSING
    counting: str = MISSING
    json: bool = MISSING
    figure: bool = MISSING
    figure_dir: str = MISSING


@dataclass
class UvmReplaySchema:
    hardware: HardwareSchema = field(default_factory=HardwareSchema)
    capacity_bytes: int = MISSING
    working_set_ratio: float = MISSING
    passes: list[str] = MISSING
    prefetcher: str = MISSING
    prefetch_threshold_percent: int = MISSING
    access: str = MISSING
    operation: str = MISSING
    advice: str = MISSING
    prefetch: bool = MISSING
    initial_location: str = MISSING
    concurrent_managed_access: bool = MISSING
    seed: int = MISSING
    json: bool = MISSING


@dataclass
class CalibrateSchema:
    curves: str | None = None
    name: str | None = None
    base: str = MISSING
    output: str | None = None
    force: bool = MISSING


def _host_tier(kind: str, num_bytes: int) -> int:
    """${host_tier:${memory.kind},BYTES}: a size for the mechanisms of a sweep that have a host tier."""
    return 0 if kind == "device" else num_bytes


def _if_growing(allocation: str, growing: str, otherwise: str) -> str:
    """${if_growing:${allocation},A,B}: what the schemes of a sweep need that take memory as tokens come, or at once."""
    return growing if allocation in [a for a in Allocation if a.grows] else otherwise


# Here, since workers import this and no more.
OmegaConf.register_new_resolver("host_tier", _host_tier, replace=True)
OmegaConf.register_new_resolver("if_growing", _if_growing, replace=True)


def register() -> None:
    """Make the schema known to Hydra as `config_schema`, the first entry of the defaults list."""
    ConfigStore.instance().store(name="config_schema", node=ConfigSchema)
