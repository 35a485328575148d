"""Families of models, each from a folder of random weights: served with the tokens of `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runner.torch_cpu.models import (
    FAMILIES,
    Reference,
    assert_same_tokens,
    axes_of,
    context_for,
    load_model,
    ragged,
    save_model,
    serve,
    tight_capacity,
)
from uvm_kv.kvcache.ops import OpKind
from uvm_kv.types import Layout

NUM_SEQS, BLOCK_SIZE, CHUNK = 12, 8, 24
DEMANDING = ("pinned_prefetch_ahead", "pinned_swap", "device_recompute", "managed_demand_capped")


def check(folder: Path, mechanism: str) -> None:
    axes, requests = axes_of(mechanism), ragged(NUM_SEQS)
    capacity = tight_capacity(axes, requests, BLOCK_SIZE, NUM_SEQS)
    layout = Layout.BLOCK_MAJOR if axes.preemption == "swap" else Layout.LAYER_MAJOR
    model = load_model(folder, "float32")
    context = context_for(model, folder, axes, capacity, block_size=BLOCK_SIZE, layout=layout)
    served = serve(model, context, axes, requests, batch_size=NUM_SEQS, max_num_batched_tokens=CHUNK)
    assert_same_tokens(Reference(folder), requests)
    assert served.num_chunked > 0
    assert len({token for r in requests for token in r.token_ids}) > 20, "a model that repeats itself proves little"
    moved = {op.kind for plan, _ in served.log for op in plan.ops}
    if mechanism == "device_recompute":
        assert served.scheduler.num_recomputed > 0
    elif mechanism == "managed_demand_capped":
        assert moved == {OpKind.EVICT}
    else:
        assert OpKind.COPY_IN in moved


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens(family: str, tmp_path: Path) -> None:
    check(save_model(tmp_path / family, family), "pinned_prefetch_ahead")


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_with_preemption(family: str, tmp_path: Path) -> None:
    check(save_model(tmp_path / family, family, seed=1), "pinned_swap")


@pytest.mark.full
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mechanism", DEMANDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_of_every_family(
    family: str, mechanism: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uvm_kv.kvcache.spec.CHUNK_BYTES", 16 << 10)
    check(save_model(tmp_path / family, family, seed=seed), mechanism)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 8}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        ("mistral", {"sliding_window": 88}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 88, "max_window_layers": 2}),
        ("opt", {"enable_bias": False}),
        ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_variants_of_a_family(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Heads shared by all, some or no queries; a window as long as the longest of these requests."""
    assert max(r.max_tokens for r in ragged(NUM_SEQS)) == 88
    check(save_model(tmp_path / family, family, **changes), "pinned_prefetch_ahead")
