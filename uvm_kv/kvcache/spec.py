"""KVCacheSpec: what one block of KV cache holds, and how blocks lie in 2 MiB chunks of managed memory.

    layer_major                         block_major
    layer 0: |b0 b1 .. b7|b8 ..         b0: |l0 l1 .. l7|l8 .. |     (one block, all layers)
    layer 1: |b0 b1 .. b7|b8 ..         b1: |l0 l1 .. l7|l8 .. |
             '-- a chunk of one layer       '-- a chunk of one block, or several small blocks

Whole pieces are packed into chunks and never straddle one, unless a piece is larger than a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from uvm_kv.types import CHUNK_BYTES, Layout, ceil_div


@dataclass(frozen=True)
class KVCacheSpec:
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype_bytes: float
    """Bytes of an element; below 1 where quantized KV is packed. The scales of quantized KV are not counted."""
    block_size: int
    """Tokens per block."""
    layout: Layout

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size}; it must be at least 1 token (16 is usual)")

    @property
    def layer_token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return round(2 * self.num_kv_heads * self.head_dim * self.dtype_bytes)

    @property
    def token_bytes(self) -> int:
        return self.num_layers * self.layer_token_bytes

    @property
    def layer_block_bytes(self) -> int:
        return self.block_size * self.layer_token_bytes

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.layer_block_bytes

    def num_blocks(self, num_tokens: int) -> int:
        return ceil_div(num_tokens, self.block_size)

    @property
    def piece_bytes(self) -> int:
        """What lies together: a block of one layer, or a block of all layers."""
        return self.layer_block_bytes if self.layout is Layout.LAYER_MAJOR else self.block_bytes

    @property
    def pieces_per_chunk(self) -> int:
        """At least 1; a piece larger than a chunk takes `chunks_per_piece` whole chunks."""
        return max(1, CHUNK_BYTES // self.piece_bytes)

    @property
    def chunks_per_piece(self) -> int:
        return ceil_div(self.piece_bytes, CHUNK_BYTES)

    def num_chunks(self, num_blocks: int) -> int:
        """Chunks that hold `num_blocks` blocks in all layers."""
        groups = ceil_div(num_blocks, self.pieces_per_chunk) * self.chunks_per_piece
        return groups * (self.num_layers if self.layout is Layout.LAYER_MAJOR else 1)

    def num_blocks_in_chunks(self, num_chunks: int) -> int:
        """The most blocks whose chunks are no more than `num_chunks`."""
        per_group = self.chunks_per_piece * (self.num_layers if self.layout is Layout.LAYER_MAJOR else 1)
        return num_chunks // per_group * self.pieces_per_chunk

    def chunk_loss_bytes(self, num_blocks: int) -> int:
        """Bytes of those chunks that no block can use."""
        return self.num_chunks(num_blocks) * CHUNK_BYTES - num_blocks * self.block_bytes
