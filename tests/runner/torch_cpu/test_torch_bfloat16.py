"""In bfloat16 the logits are those of transformers within rounding, and greedy tokens part where two are close."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.runner.torch_cpu.models import (
    Reference,
    axes_of,
    context_for,
    load_model,
    ragged,
    save_model,
    serve,
    tight_capacity,
    torch,
)
from uvm_kv.runner.torch import load_tokenizer, materialize, smollm2_path
from uvm_kv.sched.request import Request

TOLERANCE = 0.2
"""Root mean square difference of a row's logits from those of transformers in bfloat16, as a share of the row's spread
(its standard deviation). bfloat16 has 8 bits, and every layer rounds once more. The median row is below a quarter."""
NO_WORSE = 1.25
"""How much further from float32 we may be than transformers in bfloat16 is, in the mean over all rows."""


def rms(difference: Any) -> Any:
    return difference.square().mean(-1).sqrt()


def compare(folder: Path, requests: list[Request], mechanism: str) -> None:
    """Each sampled row against the reference's forward over the same tokens; prints how far apart they are."""
    model, reference, exact = load_model(folder, "bfloat16"), Reference(folder, "bfloat16"), Reference(folder)
    rows: dict[int, list[Any]] = {}
    axes = axes_of(mechanism)
    capacity = tight_capacity(axes, requests, 8, len(requests))
    context = context_for(model, folder, axes, capacity, block_size=8, dtype="bfloat16")
    serve(
        model,
        context,
        axes,
        requests,
        batch_size=len(requests),
        max_num_batched_tokens=24,
        on_logits=lambda request_id, row: rows.setdefault(request_id, []).append(row.float().clone()),
    )
    differences, our_errors, their_errors, firsts = [], [], [], []
    for request in requests:
        ids = [*(request.prompt_ids or ()), *request.token_ids]
        span = slice(request.prompt_tokens - 1, -1)
        expected, true = reference.logits(ids)[span].float(), exact.logits(ids)[span]
        given = torch.stack(rows[request.id])
        assert given.shape == expected.shape and given.isfinite().all()
        spread = true.std(-1)
        differences += (rms(given - expected) / spread).tolist()
        our_errors += (rms(given - true) / spread).tolist()
        their_errors += (rms(expected - true) / spread).tolist()
        tokens = reference.tokens(request.prompt_ids or (), request.output_tokens)
        pairs = zip(request.token_ids, tokens, strict=True)
        firsts.append(next((i for i, (a, b) in enumerate(pairs) if a != b), None))
    num_parted = sum(first is not None for first in firsts)
    num_tokens = sum(r.output_tokens if i is None else i + 1 for i, r in zip(firsts, requests, strict=True))
    print(
        f"\n{folder.name}, {mechanism}, bfloat16: {num_parted} of {len(requests)} sequences part from generate, "
        f"{num_parted / num_tokens:.4f} per token until then; logits differ by {statistics.median(differences):.4f} "
        f"(median) and {max(differences):.4f} (most) of a row's spread; from float32 by "
        f"{statistics.mean(our_errors):.4f}, transformers by {statistics.mean(their_errors):.4f}"
    )
    assert max(differences) <= TOLERANCE
    assert statistics.median(differences) <= TOLERANCE / 4
    assert statistics.mean(our_errors) <= NO_WORSE * statistics.mean(their_errors)


@pytest.mark.parametrize("mechanism", ["device_recompute", "pinned_prefetch_ahead"])
def test_small_llama(mechanism: str, tmp_path: Path) -> None:
    compare(save_model(tmp_path / "small_llama"), ragged(17), mechanism)


def test_smollm2() -> None:
    try:
        folder = materialize(smollm2_path())
    except ValueError as error:
        pytest.skip(str(error))
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    texts = ("The capital of France is", "def fibonacci(n):", "In computing, virtual memory is", "Once upon a time,")
    requests = []
    for i, text in enumerate(texts):
        ids = tuple(tokenizer(text)["input_ids"])
        requests.append(Request(i, len(ids), 12, prompt_ids=ids))
    compare(folder, requests, "pinned_prefetch_ahead")
