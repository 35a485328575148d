"""What cannot be served rightly is refused before it is served: by name, and with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from tests.runner.torch_cpu.models import (
    FAMILIES,
    GQA,
    TorchRunner,
    axes_of,
    context_for,
    load_model,
    save_model,
    torch,
    transformers,
)
from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.ops import MemoryOp, OpKind
from uvm_kv.runner.torch import load_tokenizer, materialize
from uvm_kv.runner.torch.attention import check_keywords
from uvm_kv.sched.plan import ScheduledSequence, StepPlan
from uvm_kv.sched.request import Request
from uvm_kv.types import Phase

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2Config", GQA | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gpt_oss": ("GptOssConfig", GQA | {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "phi3": ("Phi3Config", GQA),
    "llama4": ("Llama4TextConfig", GQA | {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 96}),
    "minimax": ("MiniMaxConfig", GQA),
    "falcon": ("FalconConfig", {}),
    "bloom": ("BloomConfig", {}),
    "falcon_h1": (
        "FalconH1Config",
        GQA | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
    ),
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}


@pytest.fixture(autouse=True)
def _other_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, family in OTHERS.items():
        monkeypatch.setitem(FAMILIES, name, family)


def runner_for(folder: Path, model: Any = None, max_tokens: int = 100) -> TorchRunner:
    model = load_model(folder, "float32") if model is None else model
    axes = axes_of("pinned_prefetch_ahead")
    context = context_for(model, folder, axes, KVCapacity(8, 8))
    return TorchRunner(model, context.spec, context.capacity, context.memory, max_tokens=max_tokens)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {}, r"Gemma2ForCausalLM cannot be served: .*soft-capping \(softcap\)"),
        ("gpt_oss", {"sliding_window": 512}, r"GptOssForCausalLM cannot be served: .*attention sinks \(s_aux\)"),
        ("mistral", {"sliding_window": 99}, "MistralForCausalLM cannot be served: .*sliding window of 99 .* of 100"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, "sliding window of 16"),
        ("llama4", {"attention_chunk_size": 32}, "Llama4ForCausalLM cannot be served: .* window of 32"),
        (
            "phi3",
            {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE},
            "Phi3ForCausalLM .* longrope .* 64",
        ),
        ("minimax", {}, "MiniMaxForCausalLM cannot be served: .* called paged attention 2 times, for 4 layers"),
        ("falcon", {}, "cannot be loaded for serving: .* attention is its own"),
        ("falcon_h1", {}, "FalconH1ForCausalLM cannot be served: the logits of two sequences in one step differ from"),
        ("bloom", {}, "BloomForCausalLM cannot be served: .* called paged attention 0 times, for 4 layers"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_families_that_need_more(family: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / family, family, **changes)
    with pytest.raises(ValueError, match=message):
        runner_for(folder)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 100}),
        ("llama4", {"attention_chunk_size": 100}),
        ("phi3", {"original_max_position_embeddings": 100, "rope_parameters": LONGROPE}),
    ],
)
def test_a_window_as_long_as_the_longest_sequence_is_served(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    if family == "phi3":
        changes = changes | {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 100}}
    runner_for(save_model(tmp_path / family, family, **changes)).close()


@pytest.mark.parametrize("calls", ["none", "twice", "one layer for another", "later tokens"])
def test_attention_that_is_not_called_once_a_layer(calls: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "llama")
    model = load_model(folder, "float32")
    attentions = [layer.self_attn for layer in model.model.layers]
    own = type(attentions[0]).forward

    def none(self: Any, hidden_states: Any, **keywords: Any) -> Any:
        return hidden_states, None

    def twice(self: Any, *args: Any, **keywords: Any) -> Any:
        own(self, *args, **keywords)
        return own(self, *args, **keywords)

    if calls == "one layer for another":
        attentions[2].layer_idx = 1
    elif calls == "later tokens":
        model.config.is_causal = False
    else:
        monkeypatch.setattr(type(attentions[0]), "forward", {"none": none, "twice": twice}[calls])
    expected = {
        "none": "LlamaForCausalLM cannot be served: .* 0 times, for 4 layers",
        "twice": "LlamaForCausalLM cannot be served: .* 8 times, for 4 layers",
        "one layer for another": "LlamaForCausalLM cannot be served",
        "later tokens": "LlamaForCausalLM cannot be served: .* later tokens",
    }
    with pytest.raises(ValueError, match=expected[calls]):
        runner_for(folder, model)


def test_a_model_that_fails_in_its_forward_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "llama")
    model = load_model(folder, "float32")
    for error in (TypeError("a"), RuntimeError("b"), KeyError("c"), AssertionError("d"), IndexError("e")):

        def fails(self: Any, *args: Any, error: Exception = error, **keywords: Any) -> None:
            raise error

        monkeypatch.setattr(transformers.LlamaModel, "forward", fails)
        with pytest.raises(ValueError, match="LlamaForCausalLM cannot be served: a forward with paged attention fails"):
            runner_for(folder, model)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"softcap": 50.0}, "soft-capping"),
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"sinks": torch.zeros(4)}, "attention sinks"),
        ({"position_bias": torch.zeros(4)}, "position biases"),
        ({"indices": torch.zeros(4)}, r"unknown here \(indices\)"),
        ({"is_causal": False}, "later tokens"),
        ({"sliding_window": 9}, "sliding window of 9 tokens, shorter than the longest sequence of 10"),
    ],
)
def test_keywords_that_change_the_result(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_keywords(keywords, 10)


def test_keywords_that_change_nothing() -> None:
    check_keywords({"softcap": None, "s_aux": None, "indices": None, "sliding_window": 10, "is_causal": True}, 10)
    check_keywords({"position_ids": torch.zeros(1, 1), "use_cache": False, "sliding_window": None}, 10)


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights.pop(name)


KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(KEY), f"lacks the weights {KEY}"),
        (lambda weights: weights.update({KEY: torch.zeros(3, 3)}), f"other shapes than config.json says: .*{KEY}"),
    ],
)
def test_weights_that_are_not_whole(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    """transformers would put random numbers in their place, and say so in a log line."""
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_model(folder, "float32")


def test_files_that_are_no_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "llama")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"no weights"):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match="cannot be loaded for serving"):
            load_model(folder, "float32")
    weights.unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded for serving: .*model.safetensors"):
        load_model(folder, "float32")
    weights.write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": "nothing known"}))
    with pytest.raises(ValueError, match=r"cannot be loaded for serving: .*nothing known"):
        load_model(folder, "float32")


@pytest.mark.parametrize("kind", ["llama", "of_the_folder"])
def test_code_that_lies_in_a_folder_never_runs(kind: str, tmp_path: Path) -> None:
    """A folder that names code of its own is refused, nobody is asked, and loading it by other ways runs nothing."""
    folder = save_model(tmp_path / "llama")
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": own}))
    with pytest.raises(
        ValueError, match=r"auto_map in config\.json names code of the folder's own, which is never run"
    ):
        jobs.job(tmp_path, "runner=cpu", "model=hf", f"model.path={folder}")
    if kind == "of_the_folder":
        with pytest.raises(ValueError, match="cannot be loaded for serving"):
            load_model(folder, "float32")
    tokenizer = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="cannot be loaded for serving"):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"generation_config\.json is '\[\]'; it must be an object"),
        ("{", r"generation_config\.json cannot be read"),
        ('{"eos_token_id": "end"}', r"eos_token_id is \['end'\] in generation_config\.json; it must be ids"),
    ],
)
def test_a_generation_config_that_is_none(text: str, message: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "llama")
    (folder / "generation_config.json").write_text(text)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_ids": [5, 6]}')
    with pytest.raises(ValueError, match=message):
        jobs.job(tmp_path, "model=hf", f"model.path={folder}", f"prompts={prompts}")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("model.gated_mlp=false", r"model\.gated_mlp=false with model=hf on a real runner, which serves"),
        ("model.num_layers=3", r"model\.num_layers=3 with model=hf on a real runner, .* with 4; drop it"),
        ("model.tied_embeddings=true", r"model\.tied_embeddings=true with model=hf on a real runner"),
        ("chat_template=none", "chat_template=none is ignored without prompts=FILE"),
    ],
)
def test_settings_that_a_real_model_would_ignore(given: str, message: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "llama")
    with pytest.raises(ValueError, match=message):
        jobs.job(tmp_path, "runner=cpu", "model=hf", f"model.path={folder}", given)


def test_a_quantized_checkpoint_is_not_served(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}})
    )
    with pytest.raises(ValueError, match=r"quantization_config \(quant_method=awq\) .* simulated only: runner=sim"):
        jobs.job(tmp_path, "runner=cpu", "model=hf", f"model.path={folder}")


def test_a_gguf_file_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="GGUF files are read with the package gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match=r"give a folder in Hugging Face format or a .gguf file"):
        materialize(file)
    file.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"cannot be loaded for serving: .*GGUF"):
        materialize(file)
    left = [path for path in (tmp_path / "cache" / "uvm-kv").iterdir() if path.is_dir()]
    assert left == [], "a half-made folder is left in the cache"
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"give a folder in Hugging Face format or a .gguf file"):
        materialize(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=llama_7b"], "runner=cpu has no weights of model=llama_7b; give model=hf model.path=DIR"),
        (["model=hf"], "runner=cpu has no weights of model=hf; give model=hf model.path=DIR"),
        (["model=hf", "model.path=/no/such/folder"], "model.path=/no/such/folder: there is no such folder or file"),
        (["model=hf", "model.path=/no/such.gguf"], "model.path=/no/such.gguf: there is no such folder or file"),
        (["model=hf", "model.path={tmp}"], "no config.json there"),
        (["model=hf", "model.path={model}", "dtype=float64"], "dtype"),
        (["model=hf", "model.path={model}", "prompts=/no/prompts"], "prompts=/no/prompts: there is no such file"),
        (["model=hf", "model.path={model}", "max_model_len=513"], "max_model_len=513 exceeds the context"),
        (["model=hf", "model.path={model}", "workload.prompt_tokens=513"], "beyond the 512"),
        (
            ["model=hf", "model.path={model}", "workload.prompt_tokens=100", "memory.device_kv_bytes=1000"],
            "memory.device_kv_bytes=1000 holds no KV",
        ),
        (["model=hf", "model.path={model}", "memory.device_kv_bytes=1000000000000"], "more than half of the"),
    ],
)
def test_configs_that_name_nothing_to_serve(overrides: list[str], message: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "llama")
    filled = [o.format(tmp=tmp_path, model=model) for o in overrides]
    with pytest.raises(ValueError, match=message):
        jobs.job(tmp_path, "runner=cpu", "workload.prompt_tokens=8", "workload.output_tokens=4", *filled)


def test_a_request_needs_token_ids_and_an_op_needs_a_meaning(tmp_path: Path) -> None:
    runner = runner_for(save_model(tmp_path / "llama"))
    with pytest.raises(ValueError, match="request 7 has no token ids"):
        runner.add(Request(7, 3, 4))
    runner.add(Request(0, 3, 4, prompt_ids=(3, 4, 5)))
    scheduled = (ScheduledSequence(0, Phase.PREFILL, 3, 0, (0,)),)
    with pytest.raises(ValueError, match="advise is not served by runner=cpu"):
        runner.execute(StepPlan(0, scheduled, (MemoryOp(OpKind.ADVISE, (0,), 0, 4),)))


def test_a_step_that_failed_leaves_no_context_behind(tmp_path: Path) -> None:
    """The step context is ambient: after an error the next step finds none."""
    runner = runner_for(save_model(tmp_path / "llama"))
    runner.add(Request(0, 3, 4, prompt_ids=(3, 4, 5)))
    scheduled = (ScheduledSequence(0, Phase.PREFILL, 3, 0, (0,)),)
    with pytest.raises(ValueError, match="not served"):
        runner.execute(StepPlan(0, scheduled, (MemoryOp(OpKind.DISCARD, (0,), 0, 4),)))
    runner.remove(0)
    runner.add(Request(1, 3, 4, prompt_ids=(3, 4, 5)))
    assert runner.execute(StepPlan(1, (ScheduledSequence(1, Phase.PREFILL, 3, 0, (0,)),), ())).token_ids is not None
