"""torch.compile of the model's layers: our attention is one operator in them, and the tokens stay the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runner.torch_cpu.models import (
    Reference,
    assert_same_tokens,
    axes_of,
    context_for,
    load_model,
    ragged,
    save_model,
    serve,
    tight_capacity,
    torch,
)
from uvm_kv.runner.torch.attention import compile_layers


@pytest.mark.parametrize("mechanism", ["device_resident", "pinned_prefetch_ahead"])
def test_compiled_layers_put_out_the_same_tokens(mechanism: str, tmp_path: Path) -> None:
    """Every layer is compiled, once for the decode of one sequence and once for the rest, and none falls back."""
    folder = save_model(tmp_path / "model")
    model, reference = load_model(folder, "float32"), Reference(folder)
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters
    counted.clear()
    compile_layers(model, 4, backend="aot_eager", fullgraph=True)
    axes, requests = axes_of(mechanism), ragged(5)
    context = context_for(model, folder, axes, tight_capacity(axes, requests, 16, 5))
    serve(model, context, axes, requests, batch_size=5, max_num_batched_tokens=64)
    assert_same_tokens(reference, requests)
    assert 4 <= counted["stats"]["unique_graphs"] <= 12, dict(counted["stats"])
    assert not counted["graph_break"], dict(counted["graph_break"])


def test_a_probe_still_refuses_what_is_not_served(tmp_path: Path) -> None:
    """The checks are made where nothing is compiled."""
    folder = save_model(tmp_path / "model", "mistral", sliding_window=8)
    model = load_model(folder, "float32")
    compile_layers(model, 4, backend="aot_eager")
    axes, requests = axes_of("device_resident"), ragged(5)
    context = context_for(model, folder, axes, tight_capacity(axes, requests, 16, 5))
    with pytest.raises(ValueError, match="sliding window of 8 tokens"):
        serve(model, context, axes, requests, batch_size=5, max_num_batched_tokens=64)


def test_a_model_without_one_list_of_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="compile=true: Linear has no one list of 4 layers"):
        compile_layers(torch.nn.Linear(2, 2), 4)
