"""Decode attention that reads KV on the host in place, against a plain streaming read; KV in both tiers; the streaming
read by footprint, against a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np

from experiments.gpu_kit.microbench.batch import DecodeBatch, Shape, new_kv, scattered_table, split_table
from experiments.gpu_kit.microbench.bench import Bench, Memory, Side, WrongResultError
from experiments.gpu_kit.microbench.limits import scaled
from experiments.gpu_kit.microbench.stats import rates, ratios
from uvm_kv.memory import KVMemory, Slab, probes
from uvm_kv.types import GIB, MIB, MemoryKind

READ_TARGET, BOTH_TARGET = 0.95, 0.90
FOOTPRINTS_MIB = (256, 512, 1024, 2048, 4096, 8192)
QUICK_FOOTPRINT_MIB = 2048
"""At most, with --quick."""
KINDS = (MemoryKind.PINNED, MemoryKind.VMM, MemoryKind.MANAGED)
MHA, GQA = Shape(32), Shape(8)
COPY_TARGET_BYTES = 2 * GIB
"""Room on the card that larger footprints are copied to piece by piece."""
LINK_BYTES = 256 * MIB
"""KV per layer over which the link's own rate is read while KV lies in both tiers."""
HBM_COPY_BYTES = GIB // 2
"""Size of the copy within the card's memory that runs beside them."""
HOST_WORKERS = (32, 128, 512)
"""Warps that start with what lies on the host; beside the default."""
LAYERS = 2


def run(bench: Bench) -> None:
    bench.case("reads in place, by footprint", partial(_footprints, bench))
    quick = bench.settings.quick
    for kind in KINDS[:1] if quick else KINDS:
        bench.case(f"all on the host, {kind}, {MHA.name}", partial(_all_on_host, bench, kind, MHA))
    if not quick:
        bench.case(f"all on the host, pinned, {GQA.name}", partial(_all_on_host, bench, MemoryKind.PINNED, GQA))
    for kind in KINDS[:1] if quick else KINDS:
        bench.case(f"both tiers, {kind}, {MHA.name}", partial(_both_tiers, bench, kind, MHA))


def read_side(bench: Bench, slab: Slab, offsets: list[int], num_bytes: int, total: Slab) -> Callable[[int], None]:
    """A streaming read of `num_bytes` from one offset after the other."""

    def enqueue(index: int) -> None:
        what = probes.span(slab, offset=offsets[index % len(offsets)], num_bytes=num_bytes)
        probes.stream_read(what, total=probes.span(total, num_bytes=8), stream=bench.stream)

    return enqueue


def copy_side(bench: Bench, slab: Slab, offsets: list[int], num_bytes: int, target: Slab) -> Callable[[int], None]:
    """cudaMemcpyAsync of the same bytes to the card."""

    def enqueue(index: int) -> None:
        offset = offsets[index % len(offsets)]
        for begin in range(0, num_bytes, target.num_bytes):
            piece = min(target.num_bytes, num_bytes - begin)
            bench.move(slab, offset + begin, target, 0, piece)

    return enqueue


def _footprints(bench: Bench, memory: Memory) -> None:
    quick = bench.settings.quick
    wanted = QUICK_FOOTPRINT_MIB if quick else FOOTPRINTS_MIB[-1]
    whole = scaled(wanted, bench.ledger.room("pinned") - 64 * MIB, MIB, FOOTPRINTS_MIB[0]) * MIB
    if whole < wanted * MIB:
        bench.record.note(f"footprints scaled down to {whole // MIB} MiB: no more host memory may be pinned here")
    slab, total = memory.pinned(whole), memory.device(2 * MIB)
    target = memory.device(min(whole, COPY_TARGET_BYTES))
    probes.fill_random(probes.span(slab), "words", seed=29, stream=bench.stream)
    _check_read(bench, slab, total)
    for footprint in (mib * MIB for mib in FOOTPRINTS_MIB):
        if footprint <= whole:
            bench.case(f"footprint {footprint // MIB} MiB", partial(_footprint, bench, slab, footprint, target, total))


def _check_read(bench: Bench, slab: Slab, total: Slab) -> None:
    """The read probe sums what the CPU sums."""
    num_bytes = min(slab.num_bytes, 64 * MIB)
    found = bench.checksum(probes.span(slab, num_bytes=num_bytes), total)
    words = slab.host_view(offset=0, num_bytes=num_bytes).view(np.uint32)
    expected = int(words.sum(dtype=np.uint64))
    if found != expected:
        raise WrongResultError(f"the streaming read summed {found} where the CPU sums {expected}")


def _footprint(bench: Bench, slab: Slab, footprint: int, target: Slab, total: Slab, _: Memory) -> None:
    offsets = list(range(0, slab.num_bytes - footprint + 1, footprint))
    sides = {
        "read": Side(read_side(bench, slab, offsets, footprint, total)),
        "copy": Side(copy_side(bench, slab, offsets, footprint, target)),
    }
    times = bench.times(sides, bench.settings.host_repeats)
    name = f"{footprint // MIB} MiB"
    predicted = bench.prediction
    read = bench.record.case(
        f"read in place, {name}", num_bytes=footprint, seconds=times["read"], predicted_gb_per_s=predicted.zero_copy
    )
    copy = bench.record.case(
        f"cudaMemcpy to the device, {name}",
        num_bytes=footprint,
        seconds=times["copy"],
        predicted_gb_per_s=predicted.h2d,
    )
    bench.record.ratio(f"read in place / cudaMemcpy, {name}", ratios(read, copy))
    bench.record.point("zero_copy", {"footprint_bytes": footprint}, times["read"])


def least_device_blocks(shape: Shape, num_layers: int) -> int:
    """A tier of the card cannot be empty: a chunk of blocks."""
    return shape.spec(num_layers).pieces_per_chunk


def _all_on_host(bench: Bench, kind: MemoryKind, shape: Shape, memory: Memory) -> None:
    tier = "managed" if kind is MemoryKind.MANAGED else "pinned"
    num_seqs = scaled(shape.num_seqs, bench.ledger.room(tier) - GIB // 4, shape.kv_bytes // shape.num_seqs)
    if num_seqs < shape.num_seqs:
        bench.record.note(f"{kind}, all on the host: {num_seqs} sequences, no more host memory may be taken here")
    shape = replace(shape, num_seqs=num_seqs)
    kv = new_kv(bench, memory, kind, shape, 1, least_device_blocks(shape, 1), shape.num_blocks)
    first = kv.num_device_blocks
    table = scattered_table(shape, range(first, first + shape.num_blocks), seed=11)
    batch = DecodeBatch(bench, memory, kv, shape, [table], num_layers=1)
    bits, error = batch.check()
    total = memory.device(2 * MIB)
    slab, offset = host_place_of(kv, 0)
    read = read_side(bench, slab, [offset], shape.kv_bytes, total)
    times = bench.times({"ours": Side(batch.enqueue), "read": Side(read)}, bench.settings.host_repeats)
    batch.check_again(bits)
    name, predicted = f"{kind}, {shape.name}", bench.prediction.zero_copy
    case = partial(bench.record.case, num_bytes=shape.kv_bytes, predicted_gb_per_s=predicted)
    ours = case(f"attention in place, {name}", seconds=times["ours"], error=error)
    plain = case(f"streaming read, {name}", seconds=times["read"])
    bench.record.ratio(f"attention in place / streaming read, {name}", ratios(ours, plain), READ_TARGET)


def host_place_of(kv: KVMemory, layer: int) -> tuple[Slab, int]:
    """Where the host blocks of a layer begin: the slab and the offset in it."""
    placed, index = kv.locate(kv.num_device_blocks)
    return placed.slab, int(placed.layout.offset(index, layer))


def balanced_blocks(shape: Shape, hbm: float, link: float) -> int:
    """Host blocks of each sequence for which link and HBM take equally long; one at least."""
    return min(shape.seq_blocks // 2, max(1, round(shape.seq_blocks * link / (hbm + link))))


def _both_tiers(bench: Bench, kind: MemoryKind, shape: Shape, memory: Memory) -> None:
    spec = shape.spec(LAYERS)
    num_host = LINK_BYTES // spec.layer_block_bytes
    kv = new_kv(bench, memory, kind, shape, LAYERS, shape.num_blocks, num_host)
    near_table = scattered_table(shape, range(shape.num_blocks), seed=13)
    near = DecodeBatch(bench, memory, kv, shape, [near_table], num_layers=LAYERS)
    near.check()
    total = memory.device(2 * MIB)
    places = [host_place_of(kv, layer) for layer in range(LAYERS)]
    read = read_side(bench, places[0][0], [offset for _, offset in places], LINK_BYTES, total)
    alone = {"near": Side(near.enqueue, 4), "read": Side(read)}
    first = bench.times(alone, 3)
    hbm, link = shape.kv_bytes / median(first["near"]), LINK_BYTES / median(first["read"])
    per_seq = min(balanced_blocks(shape, hbm, link), num_host // shape.num_seqs)
    shares = (per_seq,) if bench.settings.quick else tuple(dict.fromkeys((per_seq, max(1, per_seq // 2), 2 * per_seq)))
    for share in shares:
        if share * shape.num_seqs <= num_host:
            body = partial(_both, bench, kv, shape, share, alone, share == per_seq)
            bench.case(f"both tiers, {kind}, {share} of {shape.seq_blocks} blocks on the host", body)
    if kind is MemoryKind.PINNED and not bench.settings.quick:
        bench.case("warps for the host", partial(_host_workers, bench, kv, shape, per_seq))


def mixed_batch(
    bench: Bench, memory: Memory, kv: KVMemory, shape: Shape, per_seq: int, num_host_workers: int = 0
) -> DecodeBatch:
    first = kv.num_device_blocks
    far = range(first, first + per_seq * shape.num_seqs)
    table = split_table(shape, range(shape.num_blocks), far, seed=per_seq)
    options = {"num_layers": LAYERS, "num_host_workers": num_host_workers}
    return DecodeBatch(bench, memory, kv, shape, [table], **options)


def _both(
    bench: Bench,
    kv: KVMemory,
    shape: Shape,
    per_seq: int,
    alone: dict[str, Side],
    is_balanced: bool,
    memory: Memory,
) -> None:
    batch = mixed_batch(bench, memory, kv, shape, per_seq)
    bits, error = batch.check()
    copied = memory.device(HBM_COPY_BYTES)
    sides = {"ours": Side(batch.enqueue, 4), **alone}
    sides["copy"] = Side(lambda _: bench.move(kv.device.slab, 0, copied, 0, copied.num_bytes))
    times = bench.times(sides, bench.settings.repeats)
    batch.check_again(bits)
    name = f"{kv.kind}, {per_seq} of {shape.seq_blocks} blocks on the host"
    ours = bench.record.case(
        f"attention, {name}",
        num_bytes=shape.kv_bytes,
        seconds=times["ours"],
        predicted_gb_per_s=bench.prediction.both_tiers if is_balanced else None,
        error=error,
    )
    near = bench.record.case(f"all in HBM, beside {name}", num_bytes=shape.kv_bytes, seconds=times["near"])
    read = bench.record.case(f"streaming read, beside {name}", num_bytes=LINK_BYTES, seconds=times["read"])
    copy = rates(2 * copied.num_bytes, times["copy"])
    target = BOTH_TARGET if is_balanced else None
    both = [a + b for a, b in zip(near, read, strict=True)]
    bench.record.ratio(f"both tiers / (attention in HBM + link), {name}", ratios(ours, both), target)
    both = [a + b for a, b in zip(copy, read, strict=True)]
    bench.record.ratio(f"both tiers / (copy in HBM + link), {name}", ratios(ours, both), target)


def _host_workers(bench: Bench, kv: KVMemory, shape: Shape, per_seq: int, memory: Memory) -> None:
    """How many warps should start with what lies on the host: reported, for tuning."""
    made = {num: mixed_batch(bench, memory, kv, shape, per_seq, num) for num in (0, *HOST_WORKERS)}
    times = bench.times({str(num): Side(b.enqueue, 4) for num, b in made.items()}, bench.settings.repeats)
    for num, seconds in times.items():
        name = "default" if num == "0" else num
        bench.record.case(f"host warps {name}, {per_seq} blocks", num_bytes=shape.kv_bytes, seconds=seconds)
