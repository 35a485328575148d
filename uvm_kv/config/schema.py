"""Schemas of the config. A mistyped key or a value of the wrong type fails at composition with the field's name.

Every field is explained in the YAML file of its group under `conf/`; this module holds types and defaults only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from uvm_kv.types import OUR_ENGINE, Allocation


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
    weights: str = "file"
    weight_bits: int | None = None
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
    kind: str = MISSING
    gpu_memory_utilization: float = 0.90
    device_kv_bytes: int | None = None
    host_kv_bytes: int | None = None
    pageable: bool = False
    allow_oversubscription: bool = False


@dataclass
class PlacementSchema:
    name: str = MISSING
    num_layers_ahead: int = 2
    reach: str = "both"


@dataclass
class HintsSchema:
    preferred_location: str = "none"
    accessed_by: bool = False
    read_mostly: bool = False
    discard_on_free: bool = False


@dataclass
class DriverSchema:
    prefetcher: str = "tree"
    prefetch_threshold_percent: int = 51
    concurrent_managed_access: bool = True


@dataclass
class SchedulerSchema:
    name: str = MISSING
    max_num_batched_tokens: int = 2048
    chunked_prefill: bool = True
    admission: str = "worst_case"
    preemption: str = "none"
    watermark: float = 0.01
    window_s: float = 1.0


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
    name: str = MISSING
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    lengths: LengthsSchema | None = None
    path: str | None = None
    num_requests: int | None = None
    arrival: str | None = None
    start: str = "cold"
    request_rate: float | None = None
    too_long: str | None = None


@dataclass
class TrackingSchema:
    name: str = "none"
    project: str = "uvm-kv"
    mode: str = "offline"


@dataclass
class SamplingSchema:
    temperature: float = 0.0


@dataclass
class ReplaySchema:
    path: str | None = None
    recorded_runner: str | None = None


@dataclass
class PeerSchema:
    cache: str = "dynamic"
    page_size: int = 256
    max_batch_tokens: int | None = None
    use_cuda_graph: bool | None = None


@dataclass
class ConfigSchema:
    hardware: HardwareSchema = field(default_factory=HardwareSchema)
    model: ModelSchema = field(default_factory=ModelSchema)
    mechanism: str = "custom"
    memory: MemorySchema = field(default_factory=MemorySchema)
    placement: PlacementSchema = field(default_factory=PlacementSchema)
    hints: HintsSchema = field(default_factory=HintsSchema)
    driver: DriverSchema = field(default_factory=DriverSchema)
    scheduler: SchedulerSchema = field(default_factory=SchedulerSchema)
    workload: WorkloadSchema = field(default_factory=WorkloadSchema)
    tracking: TrackingSchema = field(default_factory=TrackingSchema)
    replay: ReplaySchema = field(default_factory=ReplaySchema)
    sampling: SamplingSchema = field(default_factory=SamplingSchema)
    engine: str = OUR_ENGINE
    peer: PeerSchema = field(default_factory=PeerSchema)
    prompts: str | None = None
    chat_template: str = "auto"
    runner: str = "sim"
    layout: str = "auto"
    block_size: int = 16
    allocation: str = "paged"
    batch_size: int = 16
    working_set_ratio: float | None = None
    max_model_len: int | None = None
    dtype: str = "auto"
    kv_bits: int | None = None
    seed: int = 0
    num_repeats: int = 1
    first_repeat: int = 0
    max_steps: int | None = None
    max_seconds: float | None = None
    watchdog_s: float | None = None
    cuda_graphs: bool = True
    compile: bool = False
    record_plans: bool = False
    results_dir: str = "results/runs"
    rerun: str = "false"
    refine: bool = False


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
