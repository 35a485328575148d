"""In fp32 the engine's greedy tokens are those of `generate`, whatever the mechanism does with the KV."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.runner.torch_cpu.models import (
    FAMILIES,
    MECHANISMS,
    Reference,
    Served,
    assert_same_tokens,
    axes_of,
    context_for,
    load_model,
    ragged,
    save_model,
    serve,
    tight_capacity,
    transformers,
)
from uvm_kv.kvcache.ops import OpKind
from uvm_kv.runner.torch import load_tokenizer, materialize, smollm2_path
from uvm_kv.sched.request import Request
from uvm_kv.types import Layout

CHUNK_BYTES = 8 << 10
"""A chunk of managed memory in these tests: small models have small blocks, and one of 2 MiB would hold them all."""
FAST_LINK_GB_PER_S = 2000.0
"""Fast enough that bandwidth_balanced puts blocks of a tiny model on the host."""

Case = tuple[str, Layout, int, int, int]
AXES: tuple[tuple[Any, ...], ...] = (
    tuple(MECHANISMS),
    tuple(Layout),
    (8, 16, 32),  # block size
    (8, 13, 64, 256),  # tokens of a step
    (5, 17, 64),  # sequences
)


def served_at_all(pair: set[Any]) -> bool:
    return Layout.BLOCK_MAJOR not in pair or not {"managed_demand_capped", "managed_prefetch_ahead"} & pair


def product() -> list[Case]:
    return [case for case in itertools.product(*AXES) if served_at_all(set(case))]


def pairs(case: Case) -> set[tuple[tuple[int, Any], ...]]:
    return set(itertools.combinations(enumerate(case), 2))


def pairwise() -> list[Case]:
    """Cases, chosen greedily, in which every pair of values of two axes occurs."""
    cases = product()
    missing = set().union(*(pairs(case) for case in cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def name_of(case: Case) -> str:
    mechanism, layout, block_size, chunk, num_seqs = case
    return f"{mechanism}-{layout}-block{block_size}-chunk{chunk}-seqs{num_seqs}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder, "float32")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvm_kv.kvcache.spec.CHUNK_BYTES", CHUNK_BYTES)


def assert_it_happened(mechanism: str, served: Served) -> None:
    """The mechanism did what it is named for, and not only in name."""
    scheduler = served.scheduler
    match mechanism:
        case "device_resident":
            assert not served.host_blocks and not any(plan.ops for plan, _ in served.log)
        case "device_recompute":
            assert scheduler.num_recomputed > 0
        case "pinned_swap" | "pageable_swap":
            assert scheduler.num_swapped_out > 0
            assert served.ops(OpKind.COPY_OUT, staged=False) and served.ops(OpKind.COPY_IN, staged=False)
        case "pinned_prefetch_ahead":
            assert served.host_blocks and served.ops(OpKind.COPY_IN, staged=True)
        case "managed_prefetch_ahead":
            assert served.host_blocks and served.ops(OpKind.PREFETCH) and served.ops(OpKind.EVICT)
        case "managed_demand_capped":
            assert served.host_blocks and served.ops(OpKind.EVICT)
        case _:
            assert served.host_blocks


def check(model: Any, folder: Path, reference: Reference, case: Case) -> Served:
    mechanism, layout, block_size, chunk, num_seqs = case
    axes, requests = axes_of(mechanism), ragged(num_seqs)
    batch_size = min(num_seqs, chunk)
    capacity = tight_capacity(axes, requests, block_size, batch_size)
    context = context_for(
        model, folder, axes, capacity, block_size=block_size, layout=layout, link_gb_per_s=FAST_LINK_GB_PER_S
    )
    served = serve(model, context, axes, requests, batch_size=batch_size, max_num_batched_tokens=chunk)
    assert_same_tokens(reference, requests)
    return served


@pytest.mark.parametrize("case", pairwise(), ids=name_of)
def test_same_tokens(case: Case, model: Any, folder: Path, reference: Reference, small_chunks: None) -> None:
    served = check(model, folder, reference, case)
    assert_it_happened(case[0], served)
    if case[3] < 40:
        assert served.num_chunked > 0


@pytest.mark.full
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_over_the_whole_product(family: str, mechanism: str, tmp_path: Path, small_chunks: None) -> None:
    folder = save_model(tmp_path / family, family)
    model, reference = load_model(folder, "float32"), Reference(folder)
    for case in product():
        if case[0] == mechanism:
            assert_it_happened(mechanism, check(model, folder, reference, case))


def test_the_subset_covers_every_pair() -> None:
    wanted = set().union(*(pairs(case) for case in product()))
    assert set().union(*(pairs(case) for case in pairwise())) == wanted
    assert len(pairwise()) < len(product()) / 10
    assert {"vmm_balanced", "managed_demand_capped", "pinned_balanced"} <= set(MECHANISMS)


def test_balanced_copies_ahead_and_reads_in_place(model: Any, folder: Path, reference: Reference) -> None:
    """Some host blocks of a step are staged, and others are read where they lie."""
    axes, requests = axes_of("pinned_balanced"), ragged(17)
    capacity = tight_capacity(axes, requests, 8, 17)
    context = context_for(model, folder, axes, capacity, block_size=8, link_gb_per_s=FAST_LINK_GB_PER_S)
    served = serve(model, context, axes, requests, batch_size=17, max_num_batched_tokens=64)
    assert_same_tokens(reference, requests)
    staged = {b for plan, _ in served.log for op in plan.ops for b in op.blocks}
    assert staged and served.host_blocks - staged


def test_a_stop_token_ends_a_request_as_it_ends_generate(model: Any, folder: Path, reference: Reference) -> None:
    """The token that the reference yields most often is the end of sequence: it is in the output, and the last."""
    requests = ragged(17)
    known = [reference.tokens(r.prompt_ids or (), r.output_tokens) for r in requests]
    flat = [token for tokens in known for token in tokens]
    eos = max(set(flat), key=flat.count)
    for request in requests:
        request.stop_tokens = frozenset({eos})
    axes = axes_of("device_recompute")
    context = context_for(model, folder, axes, tight_capacity(axes, requests, 8, 17), block_size=8)
    serve(model, context, axes, requests, batch_size=17, max_num_batched_tokens=64)
    assert_same_tokens(reference, requests, eos)
    assert any(r.token_ids[-1] == eos and len(r.token_ids) < r.output_tokens for r in requests)


def test_sampling_survives_preemption_and_any_batch(model: Any, folder: Path) -> None:
    """A drawn sequence depends on its seed and id alone."""
    from uvm_kv.runner.torch import Sampling

    def drawn(mechanism: str, batch_size: int, seed: int) -> list[list[int]]:
        axes, requests = axes_of(mechanism), ragged(9)
        context = context_for(model, folder, axes, tight_capacity(axes, requests, 8, batch_size), block_size=8)
        served = serve(
            model,
            context,
            axes,
            requests,
            batch_size=batch_size,
            max_num_batched_tokens=64,
            sampling=Sampling(1.0, seed),
        )
        if batch_size > 1 and mechanism != "device_resident":
            assert_it_happened(mechanism, served)
        return [r.token_ids for r in requests]

    alone = drawn("device_resident", 1, 3)
    assert drawn("device_recompute", 9, 3) == drawn("pinned_swap", 9, 3) == alone
    assert drawn("device_resident", 9, 4) != alone


def test_a_device_tier_without_a_block(model: Any, folder: Path, reference: Reference) -> None:
    """All KV may lie on the host."""
    axes, requests = axes_of("pinned_zero_copy"), ragged(5)
    capacity = tight_capacity(axes, requests, 16, 5)._replace(num_device_blocks=0)
    served = serve(
        model, context_for(model, folder, axes, capacity), axes, requests, batch_size=5, max_num_batched_tokens=64
    )
    assert_same_tokens(reference, requests)
    assert served.host_blocks


# ---- SmolLM2


@pytest.fixture(scope="module")
def smollm2() -> tuple[Path, Any, Reference]:
    try:
        path = smollm2_path()
    except ValueError as error:
        pytest.skip(str(error))
    folder = materialize(path)
    return folder, load_model(folder, "float32"), Reference(folder)


PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time, in a small village by the sea,", "1")


@pytest.mark.parametrize(
    ("mechanism", "layout", "block_size"),
    [
        ("device_recompute", Layout.BLOCK_MAJOR, 8),
        ("pinned_swap", Layout.BLOCK_MAJOR, 8),
        ("pinned_prefetch_ahead", Layout.LAYER_MAJOR, 8),
        ("managed_demand_capped", Layout.LAYER_MAJOR, 16),
        ("vmm_balanced", Layout.BLOCK_MAJOR, 32),
    ],
)
def test_smollm2(
    mechanism: str,
    layout: Layout,
    block_size: int,
    smollm2: tuple[Path, Any, Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert_it_happened(mechanism, check_smollm2(mechanism, layout, block_size, smollm2, monkeypatch))


def check_smollm2(
    mechanism: str,
    layout: Layout,
    block_size: int,
    smollm2: tuple[Path, Any, Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> Served:
    folder, model, reference = smollm2
    monkeypatch.setattr("uvm_kv.kvcache.spec.CHUNK_BYTES", 64 << 10)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    eos = reference.model.config.eos_token_id
    # Each prompt also behind a filler, so that prompts are longer than a chunk.
    texts = [*PROMPTS, *(f"Here is a line that I remember from a book. {text}" for text in PROMPTS)]
    requests = []
    for i, text in enumerate(texts):
        ids = tuple(tokenizer(text)["input_ids"])
        requests.append(Request(i, len(ids), 16, prompt_ids=ids, stop_tokens=frozenset({eos})))
    axes = axes_of(mechanism)
    capacity = tight_capacity(axes, requests, block_size, 8)
    context = context_for(model, folder, axes, capacity, block_size=block_size, layout=layout, link_gb_per_s=1e5)
    served = serve(model, context, axes, requests, batch_size=8, max_num_batched_tokens=12)
    assert_same_tokens(reference, requests, eos)
    assert served.num_chunked > 0
    return served


@pytest.mark.full
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_smollm2_over_layouts_and_block_sizes(
    mechanism: str, smollm2: tuple[Path, Any, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    for layout, block_size in itertools.product(Layout, (8, 16, 32)):
        if served_at_all({mechanism, layout}):
            check_smollm2(mechanism, layout, block_size, smollm2, monkeypatch)


def test_the_reference_uses_its_own_attention(smollm2: tuple[Path, Any, Reference], folder: Path) -> None:
    _, model, reference = smollm2
    assert reference.model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "uvm_kv_paged"
    assert transformers.AutoConfig.from_pretrained(str(folder))._attn_implementation != "uvm_kv_paged"
