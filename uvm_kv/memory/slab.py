"""Slab: one allocation of one memory kind, and views of it for torch, CuPy and NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from uvm_kv.memory.extension import extension
from uvm_kv.memory.streams import stream_handle
from uvm_kv.types import MemoryKind

_TYPESTR = {"uint8": "|u1", "int32": "<i4", "int64": "<i8", "float16": "<f2", "float32": "<f4"}
"""Type strings of __cuda_array_interface__. It has none for bfloat16, which DLPack supports."""


class DeviceView:
    """Part of a slab for whoever takes DLPack or `__cuda_array_interface__`. Keeps the memory, also of a closed slab.

    Managed memory too is tagged as plain CUDA memory, since torch refuses the managed tag. A view brings no order: the
    stream that uses it must wait for the one that wrote.
    """

    def __init__(self, raw: Any, offset: int, shape: tuple[int, ...], dtype: str) -> None:
        self._array = raw.device_view(offset=offset, shape=shape, dtype=dtype)
        self._address = raw.address + offset
        self.shape = shape
        self.dtype = dtype

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self._array.__dlpack_device__()
        return device

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype not in _TYPESTR:
            raise AttributeError(f"__cuda_array_interface__ has no {self.dtype}; use DLPack")
        data = (self._address, False)
        return {"shape": self.shape, "typestr": _TYPESTR[self.dtype], "data": data, "version": 3, "strides": None}


class Slab:
    """One allocation. Class methods make it, one for each memory kind; as a context manager it is closed at the end.

    Memory is given back when the slab is closed or forgotten *and* no view of it is left. Close it outside of captures.
    `num_bytes` must be a positive multiple of 2 MiB. Any resource of the extension will do for `resource`, also a
    StatisticsResource around another one.
    """

    def __init__(self, resource: Any, num_bytes: int) -> None:
        self.resource = resource
        self.raw = extension().Slab(resource, num_bytes)

    @classmethod
    def device(cls, num_bytes: int, *, device: int = 0) -> Slab:
        return cls(extension().DeviceResource(device=device), num_bytes)

    @classmethod
    def pinned(cls, num_bytes: int, *, device: int = 0, numa_node: int | None = None) -> Slab:
        """`numa_node`: None for the node next to the device, -1 for the kernel's choice."""
        module = extension()
        node = module.host_numa_node(device) if numa_node is None else numa_node
        return cls(module.PinnedResource(device=device, numa_node=node), num_bytes)

    @classmethod
    def managed(
        cls,
        num_bytes: int,
        *,
        device: int = 0,
        reserve_bytes: int | None = None,
        allow_oversubscription: bool = False,
    ) -> Slab:
        """Refused (OversubscriptionError) where the managed bytes of this process would exceed what is free now.

        Does not see what other libraries and other processes hold: see `managed_booking`, and guard.hpp.
        """
        module = extension()
        reserve = module.default_reserve_bytes if reserve_bytes is None else reserve_bytes
        guard = {"reserve_bytes": reserve, "allow_oversubscription": allow_oversubscription}
        return cls(module.ManagedResource(device=device, **guard), num_bytes)

    @classmethod
    def vmm(cls, num_bytes: int, *, device_bytes: int, device: int = 0, numa_node: int | None = None) -> Slab:
        """The first `device_bytes` lie on the device, the rest on the host. Both in multiples of the granularity.

        `numa_node`: None for the node next to the device, -1 for the driver's choice, as a container may need.
        """
        module = extension()
        node = max(0, module.host_numa_node(device)) if numa_node is None else numa_node
        resource = module.VmmResource(device=device, device_bytes=device_bytes, numa_node=node)
        return cls(resource, num_bytes)

    @property
    def num_bytes(self) -> int:
        return int(self.raw.num_bytes)

    @property
    def address(self) -> int:
        return int(self.raw.address)

    @property
    def device_ordinal(self) -> int:
        return int(self.raw.device)

    @property
    def kind(self) -> MemoryKind:
        return MemoryKind(self.raw.kind)

    @property
    def host_offset(self) -> int:
        """The CPU may touch [host_offset, num_bytes)."""
        return int(self.raw.host_offset)

    def view(self, shape: tuple[int, ...], dtype: str, *, offset: int = 0) -> DeviceView:
        return DeviceView(self.raw, offset, shape, dtype)

    def host_view(self, *, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """The bytes themselves, where the CPU may touch them. Wait for the streams that use them first."""
        array: npt.NDArray[np.uint8] = self.raw.host_view(offset=offset, num_bytes=num_bytes)
        return array

    def fill(self, value: int, *, offset: int = 0, num_bytes: int | None = None, stream: object) -> None:
        """Sets every byte of a range, in the order of `stream`."""
        length = self.num_bytes - offset if num_bytes is None else num_bytes
        extension().fill(self.raw, offset=offset, num_bytes=length, value=value, stream=stream_handle(stream))

    def close(self) -> None:
        self.raw.close()

    def __enter__(self) -> Slab:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def managed_bytes_held() -> int:
    """Managed memory over all slabs and bookings of this process, as the guard counts it."""
    return int(extension().managed_bytes_held())


@contextmanager
def managed_booking(
    num_bytes: int, *, device: int = 0, reserve_bytes: int | None = None, allow_oversubscription: bool = False
) -> Iterator[None]:
    """Has the guard count managed memory that another library (CuPy, cuda.core) allocates and frees inside.

    Raises OversubscriptionError as a slab of that size would.
    """
    module = extension()
    reserve = module.default_reserve_bytes if reserve_bytes is None else reserve_bytes
    guard = {"reserve_bytes": reserve, "allow_oversubscription": allow_oversubscription}
    booking = module.Booking(device=device, num_bytes=num_bytes, **guard)
    try:
        yield
    finally:
        booking.end()
