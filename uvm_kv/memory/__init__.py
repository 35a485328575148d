"""The thin Python face of the C++ extension, and its only importer: slabs, hints, copies, kernels,
capabilities, counters.

Importing this package touches neither the extension nor the driver. What needs the extension says so in one line where
it is not built. Streams are keyword-only and mandatory: an integer handle, or anything with `__cuda_stream__`,
`.cuda_stream` (torch) or `.ptr` (CuPy).
"""

from __future__ import annotations

from uvm_kv.memory.attention import (
    PagedAttention,
    PagedKV,
    append_kv,
    decode_workspace_bytes,
    new_workspace,
    plan_capacity,
)
from uvm_kv.memory.capabilities import Capabilities, PcieLink, capabilities, driver_version, num_devices, pcie_link
from uvm_kv.memory.copies import CopyMethod, Placed, TransferCounters, TwoWayCopies, copy_blocks
from uvm_kv.memory.extension import ExtensionMissingError, build_info, extension
from uvm_kv.memory.kv_memory import KVMemory
from uvm_kv.memory.layout import slab_layout
from uvm_kv.memory.residency import (
    MemAdvice,
    Place,
    advise,
    device_place,
    discard,
    discard_and_prefetch,
    host_place,
    numa_place,
    prefetch,
    prefetch_batch,
    query,
    whole_pages,
)
from uvm_kv.memory.slab import DeviceView, Slab, managed_booking, managed_bytes_held
from uvm_kv.memory.streams import new_event, new_stream, stream_handle

__all__ = [
    "MemAdvice",
    "Capabilities",
    "CopyMethod",
    "DeviceView",
    "ExtensionMissingError",
    "KVMemory",
    "PagedAttention",
    "PagedKV",
    "PcieLink",
    "Place",
    "Placed",
    "Slab",
    "TransferCounters",
    "TwoWayCopies",
    "advise",
    "append_kv",
    "build_info",
    "capabilities",
    "copy_blocks",
    "decode_workspace_bytes",
    "device_place",
    "discard",
    "discard_and_prefetch",
    "driver_version",
    "extension",
    "host_place",
    "managed_booking",
    "managed_bytes_held",
    "new_event",
    "new_stream",
    "new_workspace",
    "num_devices",
    "numa_place",
    "pcie_link",
    "plan_capacity",
    "prefetch",
    "prefetch_batch",
    "query",
    "slab_layout",
    "stream_handle",
    "whole_pages",
]
