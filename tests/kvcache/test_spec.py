"""KVCacheSpec: bytes of a token and of a block, and how blocks lie in 2 MiB chunks."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import CONF
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.types import CHUNK_BYTES, KIB, MIB, Layout

LAYER_MAJOR, BLOCK_MAJOR = Layout.LAYER_MAJOR, Layout.BLOCK_MAJOR


def spec_of(model: str, layout: Layout, block_size: int = 16) -> KVCacheSpec:
    raw = yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text())
    return KVCacheSpec(raw["num_layers"], raw["num_kv_heads"], raw["head_dim"], 2, block_size, layout)


@pytest.mark.parametrize(
    ("model", "token_bytes"),
    [("llama_7b", 524_288), ("llama3_8b", 131_072), ("opt_13b", 819_200), ("qwen2_5_7b", 57_344)],
)
def test_bytes_of_a_token(model: str, token_bytes: int) -> None:
    spec = spec_of(model, LAYER_MAJOR)
    assert spec.token_bytes == token_bytes
    assert spec.block_bytes == 16 * token_bytes
    assert spec.layer_token_bytes * spec.num_layers == token_bytes


@pytest.mark.parametrize(
    ("model", "layout", "block_size", "num_blocks", "num_chunks", "loss"),
    [
        pytest.param("llama_7b", LAYER_MAJOR, 16, 8, 32, 0, id="8 blocks of 256 KiB fill a chunk in each layer"),
        pytest.param("llama_7b", LAYER_MAJOR, 16, 9, 64, 32 * 7 * 256 * KIB, id="the ninth opens a chunk a layer"),
        pytest.param("llama_7b", BLOCK_MAJOR, 16, 3, 12, 0, id="a block of 8 MiB takes 4 chunks"),
        pytest.param("qwen2_5_7b", BLOCK_MAJOR, 16, 4, 2, 2 * (2 * MIB - 2 * 917_504), id="two small blocks a chunk"),
        pytest.param("llama_7b", BLOCK_MAJOR, 5, 2, 4, 2 * (4 * MIB - 2_621_440), id="a block of 1.25 chunks takes 2"),
    ],
)
def test_blocks_are_packed_into_chunks(
    model: str, layout: Layout, block_size: int, num_blocks: int, num_chunks: int, loss: int
) -> None:
    spec = spec_of(model, layout, block_size)
    assert spec.num_chunks(num_blocks) == num_chunks
    assert spec.chunk_loss_bytes(num_blocks) == loss


@given(
    num_layers=st.integers(1, 40),
    num_kv_heads=st.sampled_from([1, 3, 8, 40]),
    block_size=st.integers(1, 64),
    num_blocks=st.integers(0, 500),
    layout=st.sampled_from(Layout),
)
def test_a_chunk_never_holds_more_than_it_can(
    num_layers: int, num_kv_heads: int, block_size: int, num_blocks: int, layout: Layout
) -> None:
    """Whole pieces that do not straddle chunks: bytes fit, and packing less tightly than needed is never counted."""
    spec = KVCacheSpec(num_layers, num_kv_heads, 128, 2, block_size, layout)
    assert spec.pieces_per_chunk * spec.piece_bytes <= CHUNK_BYTES * spec.chunks_per_piece
    assert spec.chunk_loss_bytes(num_blocks) >= 0
    assert spec.num_chunks(num_blocks) >= spec.num_chunks(max(0, num_blocks - 1))
    pieces = num_blocks * (num_layers if layout is LAYER_MAJOR else 1)
    assert spec.num_chunks(num_blocks) <= pieces * spec.chunks_per_piece


def test_blocks_are_rounded_up_and_a_block_holds_a_token() -> None:
    spec = spec_of("llama_7b", LAYER_MAJOR)
    assert [spec.num_blocks(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    with pytest.raises(ValueError, match="block_size=0"):
        spec_of("llama_7b", LAYER_MAJOR, block_size=0)
