"""model=hf and what is set beside it: heeded or refused; quantized checkpoints; sliding windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import composed, job, resolved
from uvm_kv.job.resolve import resolve

MINITRON = {
    "model_type": "nemotron",
    "hidden_size": 3072,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9216,
    "vocab_size": 256000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
LABEL = "weights (awq, 4 bits in groups of 128; embedding and head 16 bits)"


def folder(path: Path, **changes: Any) -> list[str]:
    (path / "config.json").write_text(json.dumps(MINITRON | changes))
    return ["model=hf", f"model.path={path}", "hardware=a6000"]


def test_settings_beside_a_folder_are_heeded(tmp_path: Path) -> None:
    words = folder(tmp_path, model_type="llama")
    plain = resolved(*words)
    assert dict(plain.memory_account)["weights"] == pytest.approx(-10.19e9, rel=1e-3)
    ungated = resolved(*words, "model.gated_mlp=false")
    assert dict(ungated.memory_account)["weights"] == pytest.approx(-8.38e9, rel=1e-3)
    tied = resolved(*words, "model.tied_embeddings=true").model
    assert plain.model.num_parameters - tied.num_parameters == 256000 * 3072
    learned = resolved(*words, "model.rope=false").model
    assert learned.num_parameters - plain.model.num_parameters == 4096 * 3072
    assert resolved(*words, "model.num_layers=16").model.num_layers == 16


def test_a_model_with_shapes_of_its_own_takes_no_path(tmp_path: Path) -> None:
    folder(tmp_path)
    with pytest.raises(ValueError, match=r"model=llama_7b has shapes of its own, and model\.path="):
        resolve(composed("model=llama_7b", f"model.path={tmp_path}"))


def test_a_quantized_checkpoint(tmp_path: Path) -> None:
    words = folder(tmp_path, quantization_config=AWQ)
    found = resolved(*words)
    in_matrices = 32 * (3072 * 128 * 2 * (24 + 8) + 2 * 3072 * 9216)
    rest = 2 * 256000 * 3072 + 65 * 3072
    assert dict(found.memory_account)[LABEL] == -(in_matrices // 2 + in_matrices // 128 * 20 // 8 + 2 * rest)
    assert "quantized (awq, 4 bits" in found.notes()[0] and "ungated MLP" in found.notes()[0]
    assert found.precision.weight_bits == 4 and found.comparison()[0]["model.weight_bits"] == 4
    dense = resolved(*words, "model.weight_bits=16")
    assert dict(dense.memory_account)["weights"] == -2 * dense.model.num_parameters
    by_size = resolved(*words, "model.weight_bits=8")
    assert by_size.precision.weight_bits == 8 and by_size.model.quantization is None
    runs = {job(tmp_path, *words, *more).directory for more in ([], ["model.weight_bits=8"], ["model.weight_bits=16"])}
    assert len(runs) == 3
    with pytest.raises(ValueError, match=r"quant_method=aqlm is not counted; .* model\.weight_bits=4 or 8 counts"):
        resolved(*folder(tmp_path, quantization_config={"quant_method": "aqlm"}))


def test_a_window_that_ends_within_a_sequence_is_refused(tmp_path: Path) -> None:
    words = folder(tmp_path, model_type="gemma3_text", sliding_window=512)
    lengths = ["workload.prompt_tokens=500", "workload.output_tokens=12"]
    assert resolved(*words, *lengths).model.sliding_window == 512
    with pytest.raises(
        ValueError, match=r"sliding_window=512 in config\.json, and the longest sequence has 513 tokens"
    ):
        resolved(*words, lengths[0], "workload.output_tokens=13")


def test_plain_models_keep_the_ids_of_their_runs() -> None:
    """Neither a window nor a quantization that a model does not have is part of what a run is a hash of."""
    tree = resolved("model=llama_7b").determining()
    assert "model.num_layers" in tree
    assert {"model.sliding_window", "model.quantization", "prompts", "chat_template"}.isdisjoint(tree)
