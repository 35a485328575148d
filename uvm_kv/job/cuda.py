"""What runner=cuda asks of a config and of the machine: the card, the sizes of both tiers, and the KV memory itself."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from uvm_kv.config.schema import ConfigSchema
from uvm_kv.hw.budget import memory_budget
from uvm_kv.hw.counting import Precision, weight_bytes
from uvm_kv.hw.model import ModelGeometry
from uvm_kv.hw.profile import HardwareProfile
from uvm_kv.job.card import ask_card
from uvm_kv.job.peers import is_peer
from uvm_kv.job.serving import free_host_bytes
from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.memory import Capabilities, ExtensionMissingError, decode_workspace_bytes, extension
from uvm_kv.memory.counters import Nvml
from uvm_kv.telemetry.energy import EnergyMeter
from uvm_kv.types import CHUNK_BYTES, DTYPE_BYTES, Hints, MemoryKind

if TYPE_CHECKING:
    from uvm_kv.job.resolve import Resolved

HEAD_SIZES = (64, 80, 96, 128, 256)
BLOCK_SIZES = (8, 16, 32, 64, 128)
"""What the attention kernels serve (cuda_ext/include/uvm_kv/paged_attention.cuh)."""


@cache
def this_card() -> Capabilities:
    """ValueError where this machine cannot run runner=cuda at all."""
    try:
        return ask_card()
    except ExtensionMissingError as error:
        raise ValueError(f"runner=cuda: {error}") from None
    except RuntimeError as error:
        said = re.search(r"cudaError\w+, [^(]*\w", str(error))
        raise ValueError(
            f"runner=cuda needs an NVIDIA GPU, and there is none to use ({said[0] if said else error}); see uvm-kv "
            f"doctor, or use runner=sim"
        ) from None


def check_cuda(config: ConfigSchema) -> Capabilities:
    """ValueError for what runner=cuda does not serve here; what the card can do."""
    absent = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if absent:
        raise ValueError(f"runner=cuda needs {' and '.join(absent)}, the extra 'torch': pip install -e '.[torch]'")
    if config.memory.pageable:
        raise ValueError("memory.pageable=true is simulated only; runner=cuda has pinned host memory: memory=pinned")
    if config.block_size not in BLOCK_SIZES:
        raise ValueError(
            f"block_size={config.block_size} with runner=cuda; its kernels take {', '.join(map(str, BLOCK_SIZES))}"
        )
    card = this_card()
    kind = MemoryKind(config.memory.kind)
    lacking = {
        MemoryKind.PINNED: None if card.mapped_host_memory else "mapped host memory",
        MemoryKind.MANAGED: None if card.concurrent_managed_access else "concurrent managed access",
        MemoryKind.VMM: None if card.host_virtual_memory else "virtual memory management of host memory",
    }.get(kind)
    if lacking is not None:
        raise ValueError(f"memory={kind} needs {lacking}, which {card.name} with this driver has not")
    if config.memory.allow_oversubscription and kind is not MemoryKind.MANAGED:
        raise ValueError(f"memory.allow_oversubscription=true is ignored by memory={kind}")
    measured_on = config.hardware.measured_on
    if config.placement.name == "bandwidth_balanced" and measured_on != card.name:
        raise ValueError(
            f"placement=bandwidth_balanced on runner=cuda needs a profile that was calibrated on this {card.name}; "
            f"hardware={config.hardware.name} was calibrated on {measured_on or 'no machine'}: python -m "
            f"experiments.microbench, python -m experiments.calibrate, then hardware=NAME"
        )
    return card


def check_shape(model: ModelGeometry) -> None:
    """ValueError for a model whose attention no kernel serves."""
    if model.head_dim not in HEAD_SIZES:
        raise ValueError(
            f"{model.name} has heads of {model.head_dim}, and the kernels of runner=cuda take "
            f"{', '.join(map(str, HEAD_SIZES))}; use runner=cpu"
        )


def size_tiers(
    config: ConfigSchema,
    profile: HardwareProfile,
    model: ModelGeometry,
    spec: KVCacheSpec,
    lengths: list[int],
    longest: int,
    card: Capabilities,
) -> list[tuple[str, int]]:
    """Fill in the sizes of both tiers; the account of this card's memory.

    The device tier is what the card leaves, as on the simulator, less the workspace of decode steps of `batch_size`
    sequences of `longest` tokens; the host tier what the `batch_size` longest requests need, at most half of what the
    host has free.
    """
    workspace = 0
    if not is_peer(config):
        most = {"num_seqs": config.batch_size, "max_tokens": longest}
        workspace = decode_workspace_bytes(spec, dtype=config.dtype, num_q_heads=model.num_heads, **most)
    here = dataclasses.replace(
        profile, name=card.name, gpu=dataclasses.replace(profile.gpu, memory_bytes=card.total_bytes)
    )
    budget = memory_budget(
        here,
        model,
        precision=Precision.of_bytes(DTYPE_BYTES[config.dtype]),
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        batch_size=config.batch_size,
        utilization=config.memory.gpu_memory_utilization,
        device_kv_bytes=config.memory.device_kv_bytes,
        workspace_bytes=workspace,
    )
    config.memory.device_kv_bytes = budget.kv_bytes
    free = free_host_bytes()
    batch = sorted(lengths, reverse=True)[: config.batch_size]
    needed = sum(spec.num_blocks(tokens) for tokens in batch) * spec.block_bytes
    if config.memory.host_kv_bytes is None:
        has_host = config.memory.kind != MemoryKind.DEVICE
        config.memory.host_kv_bytes = min(needed, free // 2) if has_host else 0
    elif config.memory.host_kv_bytes > free:
        raise ValueError(
            f"memory.host_kv_bytes={config.memory.host_kv_bytes} is more than the {free} bytes that the host has free; "
            f"lower it, or batch_size"
        )
    if budget.kv_is_given:
        fixed = budget.weight_bytes + budget.activation_bytes + budget.workspace_bytes
        _check_cap_binds(config, needed, card.free_bytes - fixed)
    return [*budget.rows(), ("host tier", config.memory.host_kv_bytes)]


def _check_cap_binds(config: ConfigSchema, needed_bytes: int, free_bytes: int) -> None:
    """ValueError for demand paging that would not page: there is room on the card beyond the device tier.
    `needed_bytes`: of the KV of a full batch; `free_bytes`: of the card, beside the model."""
    device, host = config.memory.device_kv_bytes, config.memory.host_kv_bytes
    assert device is not None and host is not None
    used = min(needed_bytes, device + host)
    if (config.memory.kind, config.placement.name) == (MemoryKind.MANAGED, "demand") and device < used <= free_bytes:
        raise ValueError(
            f"placement=demand with memory.device_kv_bytes={device}: up to {used} bytes of KV are needed, this card "
            f"has {free_bytes} free, and no cap in software binds managed memory, so that nothing would page; use "
            f"mechanism=managed_demand_capped, which evicts by plan, or a batch that fits memory.device_kv_bytes"
        )


def check_room_for_weights(resolved: Resolved) -> None:
    """ValueError where the card has less free than the model's weights take. Asked in the process that loads them."""
    needed, free = weight_bytes(resolved.model, resolved.precision), extension().free_bytes(0)
    if needed > free:
        raise ValueError(
            f"no room for the weights of {resolved.model.name} in {resolved.config.dtype}: they take {needed} bytes "
            f"and {free} of the card are free (nvidia-smi shows who holds the rest); end that, or take a smaller model"
        )


def capacity_of(config: ConfigSchema, spec: KVCacheSpec) -> KVCapacity:
    """Slabs are whole chunks, so blocks are those that fit whole chunks."""
    device, host = config.memory.device_kv_bytes, config.memory.host_kv_bytes
    assert device is not None and host is not None
    return KVCapacity(*(spec.num_blocks_in_chunks(num_bytes // CHUNK_BYTES) for num_bytes in (device, host)))


def build_kv(resolved: Resolved, model: Any) -> Any:
    """The KV memory of a job, and attention over it. ValueError where it does not fit what is free."""
    from uvm_kv.runner.torch import CudaKV

    config = resolved.config
    placement = config.placement
    stages = placement.name == "prefetch_ahead" and resolved.memory is not MemoryKind.MANAGED
    stages |= placement.name == "bandwidth_balanced" and placement.reach != "in_place"
    c = extension()
    try:
        kv = CudaKV(
            resolved.spec,
            resolved.capacity,
            resolved.memory,
            model.dtype,
            num_q_heads=resolved.model.num_heads,
            device=model.device,
            hints=Hints(**dataclasses.asdict(config.hints)),
            staged_layers=placement.num_layers_ahead + 1 if stages else 0,
            waits_for_evictions=placement.name == "demand_capped",
            allow_oversubscription=config.memory.allow_oversubscription,
        )
        kv.reserve_decode(config.batch_size, resolved.longest_request)
        return kv
    except (c.OutOfMemoryError, c.OversubscriptionError) as error:
        raise ValueError(
            f"no room for memory.device_kv_bytes={config.memory.device_kv_bytes} and memory.host_kv_bytes="
            f"{config.memory.host_kv_bytes}: {error}; {c.free_bytes(0)} bytes of the card are free beside the weights. "
            f"lower one of the two, or what else uses the card"
        ) from error


@contextmanager
def energy_meter(config: ConfigSchema) -> Iterator[EnergyMeter | None]:
    """The energy meter of the card that the job runs on. None for other runners, and where there is no NVML."""
    if config.runner != "cuda":
        yield None
        return
    with Nvml.opened(extension().pci_bus_id(0)) as nvml:
        yield None if nvml is None else EnergyMeter(nvml.energy_j)
