"""Where the blocks of a KVCacheSpec lie in a slab: whole pieces packed into chunks, as the spec says."""

from __future__ import annotations

from typing import Any, TypedDict

from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.memory.extension import extension
from uvm_kv.types import CHUNK_BYTES, Layout


class LayoutFields(TypedDict):
    num_blocks: int
    num_layers: int
    layer_block_bytes: int
    layer_major: bool
    pieces_per_group: int
    group_bytes: int
    base_bytes: int


def layout_fields(spec: KVCacheSpec, *, num_blocks: int, base_bytes: int = 0) -> LayoutFields:
    """The fields of `SlabLayout` (block_runs.hpp). `base_bytes`: where in the slab the first block lies."""
    return {
        "num_blocks": num_blocks,
        "num_layers": spec.num_layers,
        "layer_block_bytes": spec.layer_block_bytes,
        "layer_major": spec.layout is Layout.LAYER_MAJOR,
        "pieces_per_group": spec.pieces_per_chunk,
        "group_bytes": spec.chunks_per_piece * CHUNK_BYTES,
        "base_bytes": base_bytes,
    }


def slab_layout(spec: KVCacheSpec, *, num_blocks: int, base_bytes: int = 0) -> Any:
    return extension().SlabLayout(**layout_fields(spec, num_blocks=num_blocks, base_bytes=base_bytes))


def slab_bytes(spec: KVCacheSpec, num_blocks: int) -> int:
    """Bytes of slab for `num_blocks` blocks: whole chunks, so a multiple of 2 MiB."""
    return spec.num_chunks(num_blocks) * CHUNK_BYTES
