"""CUDA graphs: captured kernels meet copies that cannot be captured, through an external event."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.cuda.slabs import POISON, get, random_bytes, whole
from uvm_kv.memory import Slab, new_event, new_stream
from uvm_kv.types import MIB

SIZE = 4 * MIB


def test_a_graph_replays_with_other_data(c: Any, stream: Any) -> None:
    """host -> staging by a batch copy outside, staging -> out by a captured kernel that waits for it."""
    host, staging, out, back = Slab.pinned(SIZE), Slab.device(SIZE), Slab.device(SIZE), Slab.pinned(SIZE)
    copies, arrived = new_stream(), new_event()
    runs = whole(host, out, SIZE)
    stream.begin_capture()
    arrived.wait(stream=stream.handle, external=True)
    c.copy(source=staging.raw, target=out.raw, runs=runs, method=3, stream=stream.handle)
    graph = stream.end_capture()
    assert graph.num_nodes == 2
    for seed in range(3):
        data = random_bytes(SIZE, seed)
        host.host_view(offset=0, num_bytes=SIZE)[:] = data
        out.fill(POISON, stream=copies)
        method = 1 if c.batch_copy() else 2
        c.copy(source=host.raw, target=staging.raw, runs=runs, method=method, stream=copies.handle)
        arrived.record(stream=copies.handle)
        graph.launch(stream=stream.handle)
        stream.synchronize()
        np.testing.assert_array_equal(get(out, SIZE, stream, back), data)
    copies.synchronize()


def test_external_nodes_are_for_graphs_only(stream: Any) -> None:
    """CUDA calls the flag invalid outside of a capture; inside, each call is one node and no edge."""
    event = new_event()
    for call in (event.record, event.wait):
        with pytest.raises(ValueError, match="this stream is not capturing"):
            call(stream=stream.handle, external=True)
    stream.begin_capture()
    event.wait(stream=stream.handle, external=True)
    event.record(stream=stream.handle, external=True)
    graph = stream.end_capture()
    assert graph.num_nodes == 2
    event.record(stream=stream.handle)
    graph.launch(stream=stream.handle)
    event.synchronize()


def test_batch_copies_refuse_a_capture_and_timed_ones_too(c: Any, stream: Any) -> None:
    source, target = Slab.pinned(SIZE), Slab.device(SIZE)
    runs = whole(source, target, SIZE)
    counters = c.TransferCounters()
    stream.begin_capture()
    try:
        with pytest.raises(c.CapturingStreamError, match="a batch copy cannot be captured"):
            c.copy(source=source.raw, target=target.raw, runs=runs, method=1, stream=stream.handle)
        with pytest.raises(c.CapturingStreamError, match="a timed transfer"):
            counters.copy("h2d", source=source.raw, target=target.raw, runs=runs, method=3, stream=stream.handle)
    finally:
        graph = stream.end_capture()
    assert graph.num_nodes == 0
    assert counters.totals(wait=True) == {}
