"""From a composed config to plain values: every check that can be made before anything runs.

All errors are ValueErrors of a few lines: what was given, what is allowed, how to mend it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from uvm_kv.config.command import check_complete
from uvm_kv.config.names import length_workloads
from uvm_kv.config.option_file import axes_of
from uvm_kv.config.schema import (
    ConfigSchema,
    HardwareSchema,
    HintsSchema,
    OperatorSchema,
    WorkloadSchema,
)
from uvm_kv.config.settings import (
    check_heeded,
    check_values,
    heeded,
    is_variant,
    settings,
    value_at,
    without_defaults,
)
from uvm_kv.hw.budget import MemoryBudget, memory_budget
from uvm_kv.hw.counting import Precision
from uvm_kv.hw.model import ModelGeometry
from uvm_kv.hw.profile import Gpu, HardwareProfile, Link, ManagedDriver, OperatorCost, Power
from uvm_kv.hw.roofline import peak_ops_per_s
from uvm_kv.job.cuda import capacity_of, check_cuda, check_shape, size_tiers
from uvm_kv.job.geometry import build_model, check_window
from uvm_kv.job.peers import check_engine, is_peer, page_size
from uvm_kv.job.serving import Serving, model_folder, prepare, tier_bytes
from uvm_kv.job.workload import Workload, build_workload, longest_request
from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.placement.registry import check_served
from uvm_kv.setting import Role
from uvm_kv.telemetry.summary import SCHEMA_VERSION
from uvm_kv.types import CHUNK_BYTES, DTYPE_BYTES, GIB, Allocation, Layout, MemoryKind

DEFAULT_HOST_KV_BYTES = 64 * GIB


@dataclass(frozen=True)
class Resolved:
    """A checked job: the config with every default filled in, and what is built from it."""

    config: ConfigSchema
    profile: HardwareProfile
    model: ModelGeometry
    precision: Precision
    memory: MemoryKind
    spec: KVCacheSpec
    capacity: KVCapacity
    memory_account: list[tuple[str, int]]
    """Where the memory goes, in bytes: the table that is printed."""
    max_model_len: int
    longest_request: int
    """Tokens, prompt and output, of the longest request that any repeat of the job may have."""
    serving: Serving | None
    """What a real model serves; None on the simulator."""
    trace: Workload | None = None
    """The requests of a trace file, which is read once a job; None where they are drawn or given."""

    def understood(self) -> str:
        """What the model's weights and KV are counted from, in words."""
        stored = self.precision.quantization
        return self.model.understood() + (
            "" if stored is None else f", quantized ({stored}; embedding and head 16 bits)"
        )

    def notes(self) -> list[str]:
        """What was understood of the model, and of the prompts."""
        found = [f"model: {self.understood()}"]
        if self.serving is not None and self.serving.chat_template is not None:
            found.append(f"chat template of text prompts: {self.serving.chat_template}")
        return found

    def determining(self) -> dict[str, Any]:
        """What the run id is a hash of: the settings that the job heeds and that are not at their defaults, what it
        serves, and the version of results. Files count by content, not by path."""
        return without_defaults(heeded(self.settings())) | {"schema_version": SCHEMA_VERSION}

    def settings(self) -> dict[str, Any]:
        """Every setting of the job that results may depend on, by dotted path, with its resolved value."""
        config = self.config
        flat = {path: value_at(config, path) for path, it in settings().items() if it.rule.role is not Role.NO_RESULT}
        # What is served counts by its token ids, and the clients of a working set by their number.
        for path in ("prompts", "chat_template", "working_set_ratio"):
            del flat[path]
        if not is_peer(config):
            flat = {path: value for path, value in flat.items() if path != "engine" and not path.startswith("peer.")}
        hardware = dataclasses.asdict(config.hardware)
        del hardware["sources"]
        if config.dtype != "float32":
            del hardware["gpu"]["float32_tflop_per_s"]
        model = {k: v for k, v in dataclasses.asdict(self.model).items() if v is not None}
        flat = {k: v for k, v in flat.items() if not k.startswith("model.")}
        flat |= _flatten({"hardware": hardware, "model": model})
        flat |= {"model.weight_bits": self.precision.weight_bits, "kv_bits": self.precision.kv_bits}
        if config.workload.path is not None:
            flat["workload.path"] = self._trace_sha256
        if config.workload.lengths is not None:
            lengths = dataclasses.asdict(config.workload.lengths)
            del lengths["source"], flat["workload.lengths"]
            flat |= _flatten(lengths, "workload.lengths.")
        if self.serving is not None:
            flat |= _flatten({"serving": self.serving.fingerprint()})
        if config.replay.path is not None:
            recording = Path(config.replay.path) / "plans.jsonl.gz"
            flat["replay.path"] = hashlib.sha256(recording.read_bytes()).hexdigest()
        return flat

    @cached_property
    def _trace_sha256(self) -> str:
        with Path(str(self.config.workload.path)).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def working_set_ratio(self) -> float | None:
        """KV blocks of the full requests of all clients over those of the device. None unless they are a closed loop of
        requests of one length; None for a peer, whose blocks are its own."""
        workload = self.config.workload
        if workload.arrival != "closed_loop" or workload.prompt_tokens is None or is_peer(self.config):
            return None
        return self.config.batch_size * _full_request_blocks(self.config, self.spec) / self.capacity.num_device_blocks

    def comparison(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(setting, variant): what two runs must share to be points of one comparison, and what tells points of one
        mechanism and batch size apart, both by dotted path. Repeats differ in neither."""
        flat = self.settings()
        for path in ("batch_size", "seed", "mechanism"):
            del flat[path]
        # Sized by the batch unless given.
        requests = flat.pop("workload.num_requests")
        variant = {path: value for path, value in flat.items() if is_variant(path)}
        variant["workload.requests_per_client"] = None if requests is None else requests / self.config.batch_size
        return {path: value for path, value in flat.items() if path not in variant}, variant


def _flatten(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def resolve(composed: DictConfig, folders: Sequence[Path] = ()) -> Resolved:
    """A checked job. `folders`: the user's own, where its mechanism may be."""
    check_complete(composed)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, ConfigSchema)
    config.rerun = config.rerun.lower()  # YAML's true is True as a text.
    check_engine(config)
    check_values(config)
    _check_mechanism(config, folders)
    _check_runner(config)
    check_heeded(config)
    profile = build_profile(config.hardware)
    card = check_cuda(config) if config.runner == "cuda" else None
    served = bool({"cpu", "cuda"} & {config.runner, config.replay.recorded_runner})
    folder = model_folder(config) if served and config.model.weights == "file" else None
    model = build_model(config.model, folder)
    if config.dtype == "auto":
        # float16 is slow on a CPU, and parity is in float32.
        config.dtype = "float32" if served and card is None else "float16"
    precision = _precision(config, model, served=served)
    if not is_peer(config):
        peak_ops_per_s(profile, precision.activation_bits)  # That of float32 may not be known.
    memory = MemoryKind(config.memory.kind)
    check_served(config.placement.name, memory)
    _check_axes(config, memory)
    if config.layout == "auto":
        whole_sequences = config.scheduler.preemption != "none"
        config.layout = Layout.BLOCK_MAJOR.value if whole_sequences else Layout.LAYER_MAJOR.value
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        raise ValueError(
            f"max_model_len={max_model_len} exceeds the context of {model.name}, {model.max_position_embeddings} tokens"
        )
    if not config.scheduler.chunked_prefill:
        # As in vLLM V0: a step holds the longest prompt, one that is computed again with its output included.
        config.scheduler.max_num_batched_tokens = max(config.scheduler.max_num_batched_tokens, max_model_len)
    spec = KVCacheSpec(
        model.num_layers,
        model.num_kv_heads,
        model.head_dim,
        precision.kv_bits / 8,
        config.block_size,
        Layout(config.layout),
    )
    serving = prepare(config, folder, model) if served else None
    _check_workload(config, max_model_len)
    _check_steady_start(config)
    if config.working_set_ratio is not None:
        config.batch_size = _batch_of_working_set(config, profile, model, precision, spec, simulated=not served)
        config.working_set_ratio = None
    _check_token_budget(config)
    workload = build_workload(config, max_model_len, None if serving is None else serving.prompts)
    lengths, longest = [sum(pair) for pair in workload.lengths], longest_request(config, max_model_len, workload)
    if not served:
        check_window(model, longest)
    if card is not None:
        check_shape(model)
        account = size_tiers(config, profile, model, spec, lengths, longest, card)
    elif serving is not None:
        unit = dataclasses.replace(spec, block_size=page_size(config))
        config.memory.device_kv_bytes, config.memory.host_kv_bytes = tier_bytes(config, unit, lengths)
        account = [("device tier (emulated)", config.memory.device_kv_bytes)]
        account.append(("host tier", config.memory.host_kv_bytes))
    else:
        account = _size_simulated_tiers(config, _budget(config, profile, model, precision), memory)
    device_bytes, host_bytes = config.memory.device_kv_bytes, config.memory.host_kv_bytes
    assert device_bytes is not None and host_bytes is not None
    num_device = _num_device_blocks(config, spec, device_bytes, simulated=serving is None)
    capacity = KVCapacity(num_device, host_bytes // spec.block_bytes)
    if card is not None:
        capacity = capacity_of(config, spec)
    if not is_peer(config):
        _check_tiers_hold_blocks(config, spec, capacity)
    if memory is MemoryKind.MANAGED and not config.driver.concurrent_managed_access:
        _check_without_concurrent_access(config)
    tokens = (max_model_len, longest)
    trace = workload if config.workload.path is not None else None
    return Resolved(config, profile, model, precision, memory, spec, capacity, account, *tokens, serving, trace)


def _check_tiers_hold_blocks(config: ConfigSchema, spec: KVCacheSpec, capacity: KVCapacity) -> None:
    block = f"one block of {spec.block_size} tokens takes {spec.block_bytes}"
    if not capacity.num_device_blocks:
        raise ValueError(f"memory.device_kv_bytes={config.memory.device_kv_bytes} holds no KV; {block}; give more")
    if config.memory.host_kv_bytes and not capacity.num_host_blocks:
        raise ValueError(
            f"memory.host_kv_bytes={config.memory.host_kv_bytes} holds no KV; {block}; give more, or 0 for no host tier"
        )


def _precision(config: ConfigSchema, model: ModelGeometry, *, served: bool) -> Precision:
    """Bits of weights, activations and KV. What is given as it is by default is left out of the config."""
    dtype_bits = 8 * DTYPE_BYTES[config.dtype]
    if config.model.weight_bits == dtype_bits:
        config.model.weight_bits = None
    if config.kv_bits == dtype_bits:
        config.kv_bits = None
    for name, bits in (("model.weight_bits", config.model.weight_bits), ("kv_bits", config.kv_bits)):
        if bits is not None and served:
            raise ValueError(
                f"{name}={bits} with dtype={config.dtype} and a real model, whose weights and KV are {dtype_bits} bits "
                f"wide; quantized ones are simulated only: runner=sim"
            )
    kv_bits = config.kv_bits or dtype_bits
    if model.quantization is not None:
        return Precision(model.quantization.bits, dtype_bits, kv_bits, model.quantization)
    return Precision(config.model.weight_bits or dtype_bits, dtype_bits, kv_bits)


def _full_request_blocks(config: ConfigSchema, spec: KVCacheSpec) -> int:
    prompt, output = config.workload.prompt_tokens, config.workload.output_tokens
    assert prompt is not None and output is not None
    return spec.num_blocks(prompt + output)


def _batch_of_working_set(
    config: ConfigSchema,
    profile: HardwareProfile,
    model: ModelGeometry,
    precision: Precision,
    spec: KVCacheSpec,
    *,
    simulated: bool,
) -> int:
    """Clients whose full requests take working_set_ratio times the device blocks: to the nearest, at least one."""
    asked = f"working_set_ratio={config.working_set_ratio}"
    if config.batch_size != ConfigSchema.batch_size:
        raise ValueError(
            f"{asked} with batch_size={config.batch_size}: each says how many clients; drop one of the two"
        )
    if is_peer(config):
        raise ValueError(f"{asked} with engine={config.engine}, whose KV blocks are its own; give batch_size")
    if config.workload.arrival != "closed_loop" or config.workload.prompt_tokens is None:
        raise ValueError(
            f"{asked} with workload={config.workload.name} and workload.arrival={config.workload.arrival}; it counts "
            f"the clients of a closed_loop with workload=fixed; give batch_size"
        )
    device_bytes = config.memory.device_kv_bytes
    if simulated:
        device_bytes = _budget(config, profile, model, precision).kv_bytes
    if device_bytes is None:
        raise ValueError(f"{asked} with runner={config.runner} needs memory.device_kv_bytes")
    assert config.working_set_ratio is not None
    num_device = _num_device_blocks(config, spec, device_bytes, simulated=simulated)
    return max(1, round(config.working_set_ratio * num_device / _full_request_blocks(config, spec)))


def _num_device_blocks(config: ConfigSchema, spec: KVCacheSpec, device_bytes: int, *, simulated: bool) -> int:
    if config.runner == "cuda" or (simulated and config.memory.kind == MemoryKind.MANAGED):
        # Their unit is the chunk: whole blocks are packed into whole chunks.
        return spec.num_blocks_in_chunks(device_bytes // CHUNK_BYTES)
    return device_bytes // spec.block_bytes


def _budget(config: ConfigSchema, profile: HardwareProfile, model: ModelGeometry, precision: Precision) -> MemoryBudget:
    return memory_budget(
        profile,
        model,
        precision=precision,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        batch_size=config.batch_size,
        utilization=config.memory.gpu_memory_utilization,
        device_kv_bytes=config.memory.device_kv_bytes,
    )


def _size_simulated_tiers(config: ConfigSchema, budget: MemoryBudget, memory: MemoryKind) -> list[tuple[str, int]]:
    """Fill in the sizes of both tiers; the account of the card's memory."""
    config.memory.device_kv_bytes = budget.kv_bytes
    if config.memory.host_kv_bytes is None:
        config.memory.host_kv_bytes = 0 if memory is MemoryKind.DEVICE else DEFAULT_HOST_KV_BYTES
    return budget.rows()


def _check_without_concurrent_access(config: ConfigSchema) -> None:
    if config.memory.host_kv_bytes:
        raise ValueError(
            f"driver.concurrent_managed_access=false (Windows, WSL2) with memory.host_kv_bytes="
            f"{config.memory.host_kv_bytes}: there the GPU takes no page faults and managed memory cannot exceed the "
            f"card; use memory.host_kv_bytes=0, or memory=pinned"
        )
    if config.hints != HintsSchema():
        raise ValueError(
            "driver.concurrent_managed_access=false (Windows, WSL2) with hints: there cudaMemAdvise and prefetch fail; "
            "use hints=none"
        )


def build_profile(hardware: HardwareSchema) -> HardwareProfile:
    def group(kind: type, node: Any) -> Any:
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in dataclasses.asdict(node).items()}
        return kind(**values)

    operators = {
        name: group(OperatorCost, cost if isinstance(cost, OperatorSchema) else OperatorSchema(**cost))
        for name, cost in hardware.operators.items()
    }
    return HardwareProfile(
        hardware.name,
        group(Gpu, hardware.gpu),
        group(Link, hardware.link),
        group(ManagedDriver, hardware.managed),
        group(Power, hardware.power),
        operators,
        {str(k): "" if v is None else str(v) for k, v in hardware.sources.items()},
    )


def _check_token_budget(config: ConfigSchema) -> None:
    if config.scheduler.max_num_batched_tokens < config.batch_size:
        raise ValueError(
            f"scheduler.max_num_batched_tokens={config.scheduler.max_num_batched_tokens} is below "
            f"batch_size={config.batch_size}; a decode step takes a token of every sequence, so raise it"
        )


def _check_mechanism(config: ConfigSchema, folders: Sequence[Path]) -> None:
    """A label never lies: the axes must be those of conf/mechanism/<name>.yaml."""
    if config.mechanism == "custom":
        return
    for path, value in axes_of(config.mechanism, folders).items():
        given = value_at(config, path)
        if given != value:
            axis = path.removesuffix(".kind").removesuffix(".name")
            raise ValueError(
                f"mechanism={config.mechanism} means {axis}={value}, but {axis}={given} is given; drop one of the two, "
                f"or say mechanism=custom"
            )


def _check_runner(config: ConfigSchema) -> None:
    if config.prompts is not None and config.runner == "sim":
        config.runner = "cpu"  # Prompts are text for a real model; a simulated one has lengths.
    if config.replay.recorded_runner is not None and config.runner != "replay":
        raise ValueError(
            f"replay.recorded_runner={config.replay.recorded_runner} is filled in from a recording; drop it"
        )
    if config.runner == "cpu":
        from importlib.util import find_spec

        absent = [name for name in ("torch", "transformers") if find_spec(name) is None]
        if absent:
            raise ValueError(
                f"runner=cpu needs {' and '.join(absent)}, the extra 'torch': pip install -e '.[torch]'; "
                f"runner=sim needs neither"
            )
    if config.model.weights == "random" and config.model.path is not None:
        raise ValueError(
            f"model.weights=random with model.path={config.model.path}, which has weights of its own; drop one of them"
        )
    if (config.runner == "replay") != (config.replay.path is not None):
        raise ValueError(
            f"runner={config.runner} with replay.path={config.replay.path}; "
            f"runner=replay and replay.path=RUN_DIRECTORY go together"
        )
    if config.replay.path is not None and not (Path(config.replay.path) / "plans.jsonl.gz").is_file():
        raise ValueError(
            f"replay.path={config.replay.path} holds no plans.jsonl.gz; record a run with record_plans=true first"
        )


def _check_axes(config: ConfigSchema, memory: MemoryKind) -> None:
    scheduler = config.scheduler
    if memory is MemoryKind.DEVICE and config.memory.host_kv_bytes and not is_peer(config):
        raise ValueError(
            f"memory.host_kv_bytes={config.memory.host_kv_bytes} with memory=device, which has no host tier; "
            f"use memory=pinned, managed or vmm"
        )
    if config.memory.pageable and (memory is not MemoryKind.PINNED or config.placement.name != "resident"):
        raise ValueError(
            f"memory.pageable=true with memory={memory} and placement={config.placement.name}: a kernel cannot read "
            f"pageable memory, and its copies overlap with nothing; it needs memory=pinned and placement=resident"
        )
    location = config.hints.preferred_location
    if memory is MemoryKind.MANAGED and config.placement.name == "static_split" and location != "by_tier":
        raise ValueError(
            f"placement=static_split on managed memory needs hints=by_tier, given is preferred_location={location}: "
            f"the driver would move what it reads, which is placement=demand"
        )
    if scheduler.admission == "optimistic" and scheduler.preemption == "none":
        raise ValueError(
            "scheduler.admission=optimistic needs scheduler.preemption=recompute or swap: growth may find no block"
        )
    if scheduler.preemption == "swap" and (memory is not MemoryKind.PINNED or config.placement.name != "resident"):
        raise ValueError(
            f"scheduler.preemption=swap needs memory=pinned and placement=resident, given are memory={memory} and "
            f"placement={config.placement.name}"
        )
    if config.allocation == "paged":
        return
    if config.placement.name != "resident":
        raise ValueError(
            f"allocation={config.allocation} keeps a sequence in one piece and needs placement=resident, given is "
            f"placement={config.placement.name}; other placements need allocation=paged"
        )
    needed = ("optimistic", "recompute") if Allocation(config.allocation).grows else ("worst_case", "none")
    if (scheduler.admission, scheduler.preemption) != needed:
        raise ValueError(
            f"allocation={config.allocation} needs scheduler.admission={needed[0]} and preemption={needed[1]} "
            f"(mechanism=device_{'resident' if needed[1] == 'none' else 'recompute'}), given are "
            f"{scheduler.admission} and {scheduler.preemption}"
        )


def _check_steady_start(config: ConfigSchema) -> None:
    """It is the middle of a closed loop under continuous batching, whose contexts are spread over their range."""
    workload = config.workload
    if workload.start == "cold":
        return
    if config.prompts is not None:
        raise ValueError(
            f"workload.start=steady with prompts={config.prompts}: it fills KV with random numbers, so that answers "
            f"mean nothing; use workload.start=cold"
        )
    needed = {
        "workload.arrival": (workload.arrival, "closed_loop"),
        "scheduler": (config.scheduler.name, "continuous"),
        "allocation": (config.allocation, "paged"),
        "scheduler.chunked_prefill": (config.scheduler.chunked_prefill, True),
    }
    for name, (given, allowed) in needed.items():
        if given != allowed:
            raise ValueError(f"workload.start=steady needs {name}={allowed}, given is {name}={given}")


def _check_lengths(workload: WorkloadSchema) -> None:
    """Lengths come from exactly one of: two fixed numbers, a distribution, a trace file. ValueError otherwise."""
    numbers = {"workload.prompt_tokens": workload.prompt_tokens, "workload.output_tokens": workload.output_tokens}
    ways = {
        "fixed": [f"{path}={value}" for path, value in numbers.items() if value is not None],
        "trace": [] if workload.path is None else [f"workload.path={workload.path}"],
        " or ".join(length_workloads()): [] if workload.lengths is None else ["workload.lengths"],
    }
    given = {way: said for way, said in ways.items() if said}
    if not given:
        raise ValueError(f"workload={workload.name} says no lengths; use workload={', '.join(ways)}")
    if len(given) == 1:
        if (alone := given.get("fixed")) is not None and len(alone) == 1:
            (absent,) = (path for path, value in numbers.items() if value is None)
            raise ValueError(f"{alone[0]} says half of the lengths; give {absent} too")
        return
    own = next((way for way in given if workload.name in way.split(" or ")), None)
    (other, said), *_ = ((way, said) for way, said in given.items() if way != own)
    raise ValueError(
        f"workload={workload.name} has lengths of its own, and {' and '.join(said)} is given; give exactly one: drop "
        f"{' and '.join(path.partition('=')[0] for path in said)}, or use workload={other}"
    )


def _check_workload(config: ConfigSchema, max_model_len: int) -> None:
    workload = config.workload
    if workload.name == "prompts":
        return
    if workload.name == "trace" and workload.path is None:
        raise ValueError("workload=trace needs a trace file: workload.path=FILE")
    if workload.path is not None and not Path(workload.path).is_file():
        raise ValueError(f"workload.path={workload.path}: that is not a file")
    _check_lengths(workload)
    if workload.arrival is None:
        workload.arrival = "trace" if workload.path is not None else "closed_loop"
    if workload.arrival == "trace" and workload.path is None:
        raise ValueError(
            "workload.arrival=trace needs workload=trace with workload.path=FILE; allowed here are closed_loop, "
            "all_at_once and poisson"
        )
    if (workload.arrival == "poisson") != (workload.request_rate is not None):
        raise ValueError(
            f"workload.arrival={workload.arrival} with workload.request_rate={workload.request_rate}; a rate in "
            f"requests per second goes with workload.arrival=poisson, and only with it"
        )
    if workload.prompt_tokens is not None and workload.output_tokens is not None:
        total = workload.prompt_tokens + workload.output_tokens
        if total > max_model_len:
            raise ValueError(
                f"workload.prompt_tokens={workload.prompt_tokens} plus output_tokens={workload.output_tokens} make "
                f"{total} tokens, beyond the {max_model_len} of model={config.model.name}"
            )
