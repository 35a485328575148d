"""Streams of whoever made them, as the integer that the extension takes."""

from __future__ import annotations

from typing import Any

from uvm_kv.memory.extension import extension


def stream_handle(stream: object) -> int:
    """An int, or what torch (`.cuda_stream`), CuPy (`.ptr`), cuda.core (`__cuda_stream__`) and we (`.handle`) carry.

    torch's current stream is 0, the legacy one, until another one is entered; whatever takes a stream here refuses it.
    """
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    if callable(protocol := getattr(stream, "__cuda_stream__", None)):
        return int(protocol()[1])
    for name in ("cuda_stream", "ptr", "handle"):
        if isinstance(handle := getattr(stream, name, None), int):
            return handle
    raise TypeError(f"{stream!r} is no CUDA stream; give an integer handle, or a stream of torch, CuPy or cuda.core")


def new_stream(*, device: int = 0) -> Any:
    """A stream that does not wait for the legacy stream: handle, synchronize(), begin_capture(), end_capture()."""
    return extension().Stream(device=device)


def new_event(*, timing: bool = False, device: int = 0) -> Any:
    """record(stream=...), wait(stream=...), done(), synchronize().

    `external=True` makes a node of a graph, on a capturing stream only. Keep the event as long as the graph.
    """
    return extension().Event(timing=timing, device=device)
