"""Decode attention with all KV in device memory, against the card's copy bandwidth and torch's attention."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from experiments.gpu_kit.microbench.batch import TOLERANCE, DecodeBatch, Shape, new_kv, relative_error, scattered_table
from experiments.gpu_kit.microbench.batch import to_float64 as floats
from experiments.gpu_kit.microbench.bench import Array, Bench, Memory, Side, WrongResultError, theirs
from experiments.gpu_kit.microbench.limits import scaled
from experiments.gpu_kit.microbench.stats import rates, ratios
from uvm_kv.memory import KVMemory, Slab, probes
from uvm_kv.types import GIB, MIB, MemoryKind

COPY_TARGET, TORCH_TARGET = 0.85, 1.0
SHAPES = tuple(Shape(heads, dtype) for dtype in ("float16", "bfloat16") for heads in (32, 8))
BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
"""Backends of torch.nn.attention.SDPBackend. MATH copies K and V to float32; it is timed by itself, not with quick."""
SPLITS = (128, 512, 1024)
"""Tokens a piece; beside the default."""
COPY_BYTES = GIB
MIN_LAYER_BYTES = 2 * GIB
"""Least KV of all layers together: many times any L2 cache."""
TORCH_SPARE_BYTES = 1 << 30
"""For what torch allocates besides K and V."""


def run(bench: Bench) -> None:
    shapes = SHAPES[:2] if bench.settings.quick else SHAPES
    for shape in shapes:
        bench.case(f"attention {shape.name}", partial(_shape, bench, shape))
    if not bench.settings.quick:
        for shape in SHAPES[:2]:
            bench.case(f"split lengths {shape.name}", partial(_splits, bench, shape))


def num_layers_of(shape: Shape) -> int:
    """Layers to rotate among, two at least."""
    return max(2, MIN_LAYER_BYTES // shape.kv_bytes)


def device_batch(bench: Bench, memory: Memory, shape: Shape, **options: Any) -> DecodeBatch:
    num_layers = num_layers_of(shape)
    kv = new_kv(bench, memory, MemoryKind.DEVICE, shape, num_layers, shape.num_blocks, 0)
    table = scattered_table(shape, range(shape.num_blocks), seed=3)
    return DecodeBatch(bench, memory, kv, shape, [table], num_layers=num_layers, **options)


def copy_side(bench: Bench, memory: Memory, source: Slab) -> tuple[Side, int]:
    """A large copy within the card's memory, and the bytes that it reads and writes."""
    room = bench.ledger.room("device")
    num_bytes = scaled(COPY_BYTES // MIB, min(room, source.num_bytes), MIB) * MIB
    target = memory.device(num_bytes)
    return Side(lambda _: bench.move(source, 0, target, 0, num_bytes)), 2 * num_bytes


def _shape(bench: Bench, shape: Shape, memory: Memory) -> None:
    batch = device_batch(bench, memory, shape)
    bits, error = batch.check()
    sides = {"ours": Side(batch.enqueue, 4)}
    sides["copy"], copy_bytes = copy_side(bench, memory, batch.kv.device.slab)
    total = memory.device(2 * MIB)
    sides["read"] = Side(partial(_read_layer, bench, batch, total), 2)
    peers = bench.case(f"torch {shape.name}", partial(theirs, partial(_torch_sides, bench, batch, bits, memory)))
    sides |= peers or {}
    times = bench.times(sides, bench.settings.repeats, warmup=4)
    batch.check_again(bits)
    _record(bench, shape, times, copy_bytes, error)


def _read_layer(bench: Bench, batch: DecodeBatch, total: Slab, index: int) -> None:
    slab, layout = batch.kv.device
    offset = int(layout.offset(0, index % batch.num_layers))
    layer = probes.span(slab, offset=offset, num_bytes=batch.shape.kv_bytes)
    probes.stream_read(layer, total=probes.span(total, num_bytes=8), stream=bench.stream)


def _record(bench: Bench, shape: Shape, times: dict[str, list[float]], copy_bytes: int, error: float) -> None:
    record, hbm = bench.record, bench.prediction.hbm
    name = f"attention {shape.name}"
    ours = record.case(name, num_bytes=shape.kv_bytes, seconds=times["ours"], predicted_gb_per_s=hbm, error=error)
    copy = record.case(f"copy beside {shape.name}", num_bytes=copy_bytes, seconds=times["copy"], predicted_gb_per_s=hbm)
    read = record.case(
        f"streaming read beside {shape.name}", num_bytes=shape.kv_bytes, seconds=times["read"], predicted_gb_per_s=hbm
    )
    record.ratio(f"attention / copy, {shape.name}", ratios(ours, copy), COPY_TARGET, "K and V bytes / read + written")
    record.ratio(f"attention / streaming read, {shape.name}", ratios(ours, read))
    torch = {name: times[name] for name in times if name.startswith("torch")}
    for name, seconds in torch.items():
        record.case(f"{name} {shape.name}", num_bytes=shape.kv_bytes, seconds=seconds)
    if torch:
        best = min(torch, key=lambda name: median(torch[name]))
        values = ratios(ours, rates(shape.kv_bytes, torch[best]))
        record.ratio(f"attention / best of torch, {shape.name}", values, TORCH_TARGET, best)


def _torch_sides(bench: Bench, batch: DecodeBatch, bits: Array, memory: Memory, scope: Memory) -> dict[str, Side]:
    """torch's attention over contiguous copies of the same K and V, by every backend that takes them. `memory` lives
    until all sides are timed, `scope` while they are made."""
    torch, sdpa = importlib.import_module("torch"), importlib.import_module("torch.nn.attention")
    shape = batch.shape
    # K and V of each layer, while they are gathered both the blocks and the result; held until the shape is done.
    memory.book("device", batch.num_layers * shape.kv_bytes + TORCH_SPARE_BYTES)
    scope.book("device", 2 * shape.kv_bytes)
    peer = TorchAttention(bench, batch, torch, sdpa)
    memory.keep(peer.close)
    sides = {}
    if not bench.settings.quick:
        bench.case(f"torch MATH {shape.name}", partial(theirs, partial(_torch_math, bench, peer, bits)))
    for name in BACKENDS:
        side = bench.case(f"torch {name} {shape.name}", partial(theirs, partial(_torch_side, peer, name, bits)))
        if side is not None:
            sides[f"torch {name}"] = side
    return sides


def _torch_side(peer: TorchAttention, backend: str, bits: Array, _: Memory) -> Side:
    found = floats(peer.output(backend), peer.shape.dtype)
    error = relative_error(found, floats(bits, peer.shape.dtype))
    if not error <= 2 * TOLERANCE[peer.shape.dtype]:
        raise WrongResultError(f"differs from ours by {error:.2e}")
    return Side(peer.side(backend), 2)


def _torch_math(bench: Bench, peer: TorchAttention, bits: Array, memory: Memory) -> None:
    shape = peer.shape
    all_heads = shape.kv_bytes * shape.num_q_heads // shape.num_kv_heads
    copies = 2 if all_heads == shape.kv_bytes else 3  # Float32 is twice as large; heads are repeated before.
    memory.book("device", copies * all_heads)
    memory.keep(peer.empty_cache)
    side = _torch_side(peer, "MATH", bits, memory)
    times = bench.times({"math": side._replace(calls=1)}, bench.settings.host_repeats)
    bench.record.case(f"torch MATH {shape.name}", num_bytes=shape.kv_bytes, seconds=times["math"])


class TorchAttention:
    """scaled_dot_product_attention on our stream, a layer's K and V after the other."""

    def __init__(self, bench: Bench, batch: DecodeBatch, torch: Any, sdpa: Any) -> None:
        self.shape, self._torch, self._sdpa = batch.shape, torch, sdpa
        self._stream = torch.cuda.ExternalStream(bench.stream.handle)
        self._attend = torch.nn.functional.scaled_dot_product_attention
        with torch.cuda.stream(self._stream), torch.no_grad():
            self._queries = [torch.from_dlpack(query).unsqueeze(2).clone() for query in batch.queries]
            table = torch.from_numpy(batch.tables[0].astype(np.int64)).to(self._queries[0].device)
            self._layers = [self._gather(batch.kv, layer, table) for layer in range(batch.num_layers)]
        self._stream.synchronize()
        torch.cuda.empty_cache()

    def _gather(self, kv: KVMemory, layer: int, table: Any) -> tuple[Any, Any]:
        """Contiguous [sequences, KV heads, tokens, head size], half of the blocks' bytes each."""
        shape, (slab, layout) = self.shape, kv.device
        block = (2, shape.num_kv_heads, shape.block_size, shape.head_dim)
        offset = int(layout.offset(0, layer))
        assert int(layout.offset(shape.num_blocks - 1, layer)) == offset + (shape.num_blocks - 1) * (
            shape.kv_bytes // shape.num_blocks
        ), "blocks of a layer lie side by side"
        blocks = self._torch.from_dlpack(slab.view((shape.num_blocks, *block), shape.dtype, offset=offset))
        halves = []
        for half in range(2):
            rows = blocks[:, half][table]  # [sequences, blocks, KV heads, slots, head size]
            heads_first = rows.permute(0, 2, 1, 3, 4)
            halves.append(heads_first.reshape(shape.num_seqs, shape.num_kv_heads, shape.context, shape.head_dim))
        return halves[0], halves[1]

    def side(self, backend: str) -> Callable[[int], None]:
        def enqueue(index: int) -> None:
            self._run(backend, index % len(self._layers))

        return enqueue

    def _run(self, backend: str, layer: int) -> Any:
        key, value = self._layers[layer]
        which = getattr(self._sdpa.SDPBackend, backend)
        grouped = {"enable_gqa": True} if self.shape.num_kv_heads != self.shape.num_q_heads else {}
        with self._torch.cuda.stream(self._stream), self._torch.no_grad(), self._sdpa.sdpa_kernel([which]):
            return self._attend(self._queries[layer], key, value, **grouped)

    def output(self, backend: str) -> Array:
        """Output of layer 0: uint16 bits [sequences, query heads, head size]. RuntimeError if the backend refuses."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It warns of every reason for which it refuses.
            out = self._run(backend, 0)
        self._stream.synchronize()
        bits: Array = out.squeeze(2).contiguous().view(self._torch.int16).cpu().numpy().view(np.uint16)
        return bits

    def close(self) -> None:
        self._stream.synchronize()
        self._layers, self._queries = [], []
        self.empty_cache()

    def empty_cache(self) -> None:
        self._torch.cuda.empty_cache()


def _splits(bench: Bench, shape: Shape, memory: Memory) -> None:
    """How long a piece of the context should be: reported, for tuning."""
    base = device_batch(bench, memory, shape)
    batches = {0: base} | {
        split: DecodeBatch(bench, memory, base.kv, shape, base.tables, num_layers=base.num_layers, split_tokens=split)
        for split in SPLITS
    }
    for batch in batches.values():
        batch.check()
    times = bench.times({str(split): Side(b.enqueue, 4) for split, b in batches.items()}, bench.settings.repeats)
    for split, seconds in times.items():
        name = "default" if split == "0" else split
        bench.record.case(f"split {name}, {shape.name}", num_bytes=shape.kv_bytes, seconds=seconds)
