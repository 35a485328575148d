"""runner=cpu through the config: prompts in, outputs.jsonl out, and a summary that says what it is worth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from tests.runner.torch_cpu.models import MECHANISMS, VOCABULARY, Reference, ragged, save_model
from uvm_kv.kvcache.ops import MemoryCounters
from uvm_kv.runner.torch import smollm2_path
from uvm_kv.store.directories import read_json, read_outputs, read_table

PROMPTS: list[dict[str, Any]] = [
    {"prompt_ids": list(r.prompt_ids or ()), "output_tokens": r.output_tokens} for r in ragged(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("serving") / "my_model")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


def write_prompts(tmp_path: Path, prompts: list[dict[str, Any]]) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return file


def overrides(folder: Path, *more: str) -> list[str]:
    return ["runner=cpu", "model=hf", f"model.path={folder}", "dtype=float32", "batch_size=8", *more]


def run(tmp_path: Path, folder: Path, *more: str) -> tuple[dict[str, Any], Path]:
    """Summary and run directory of a job."""
    job = jobs.job(tmp_path / "runs", *overrides(folder, *more))
    return jobs.run_any_job(job, argv=["test"]), job.directory


def serve(tmp_path: Path, folder: Path, *more: str, prompts: list[dict[str, Any]] = PROMPTS) -> list[dict[str, Any]]:
    _, directory = run(tmp_path, folder, f"prompts={write_prompts(tmp_path, prompts)}", *more)
    return read_outputs(directory)


def until_eos(tokens: list[int], eos: int = 2) -> list[int]:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


@pytest.mark.parametrize("mechanism", ["device_resident", "pinned_swap", "pinned_prefetch_ahead", "managed_by_tier"])
def test_outputs_in_the_order_of_the_file(mechanism: str, folder: Path, reference: Reference, tmp_path: Path) -> None:
    """Ids in and out of every line, the tokens of `generate` up to its end of sequence, each line's own length."""
    rows = serve(tmp_path, folder, f"mechanism={mechanism}")
    assert [row["request_id"] for row in rows] == list(range(len(PROMPTS)))
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert set(row) == {"request_id", "prompt_ids", "output_ids"}, "text needs a tokenizer"
        assert row["prompt_ids"] == prompt["prompt_ids"]
        expected = reference.tokens(tuple(prompt["prompt_ids"]), prompt["output_tokens"], eos=2)
        assert row["output_ids"] == expected == until_eos(expected)
    assert any(len(row["output_ids"]) < p["output_tokens"] for row, p in zip(rows, PROMPTS, strict=True))


def test_prompts_alone_mean_the_cpu(folder: Path, tmp_path: Path) -> None:
    """prompts=FILE is text for a real model; the runner need not be said."""
    file = write_prompts(tmp_path, PROMPTS[:2])
    resolved = jobs.resolved("model=hf", f"model.path={folder}", f"prompts={file}")
    assert resolved.config.runner == "cpu"
    assert resolved.serving is not None and resolved.model.name == "my_model"


def test_output_tokens_of_the_workload_hold_where_a_line_says_nothing(folder: Path, tmp_path: Path) -> None:
    prompts = [{"prompt_ids": [5, 6, 7]}, {"prompt_ids": [9], "output_tokens": 3}]
    rows = serve(tmp_path, folder, "workload.output_tokens=5", prompts=prompts)
    lengths = [len(row["output_ids"]) for row in rows]
    assert lengths[0] == len(until_eos(rows[0]["output_ids"])) <= 5
    assert lengths[1] <= 3


def test_num_requests_takes_the_first_lines(folder: Path, tmp_path: Path) -> None:
    rows = serve(tmp_path, folder, "workload.num_requests=3")
    assert [row["prompt_ids"] for row in rows] == [p["prompt_ids"] for p in PROMPTS[:3]]


def test_a_drawn_output_depends_on_the_seed_and_not_on_the_batch(folder: Path, tmp_path: Path) -> None:
    def outputs(*more: str) -> list[list[int]]:
        rows = serve(tmp_path, folder, "sampling.temperature=0.9", "rerun=true", *more)
        return [row["output_ids"] for row in rows]

    first = outputs("seed=5", "batch_size=8")
    assert outputs("seed=5", "batch_size=8") == first
    assert outputs("seed=5", "batch_size=1") == first
    assert outputs("seed=5", "batch_size=3", "mechanism=pinned_zero_copy") == first
    assert outputs("seed=6", "batch_size=8") != first
    assert [row["output_ids"] for row in serve(tmp_path, folder)] != first


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_both_tiers_default_to_what_the_requests_need(mechanism: str, folder: Path, tmp_path: Path) -> None:
    """The `batch_size` longest requests fit either tier; without a host tier it has no bytes."""
    file = write_prompts(tmp_path, PROMPTS)
    resolved = jobs.resolved(*overrides(folder, f"prompts={file}", f"mechanism={mechanism}"))
    spec = resolved.spec
    lengths = sorted(len(p["prompt_ids"]) + p["output_tokens"] for p in PROMPTS)[-8:]
    needed = sum(spec.num_blocks(n) for n in lengths)
    has_host = resolved.memory != "device"
    assert resolved.capacity == (needed, needed if has_host else 0)
    assert dict(resolved.memory_account) == {
        "device tier (emulated)": needed * spec.block_bytes,
        "host tier": needed * spec.block_bytes * has_host,
    }


def test_given_tiers_hold(folder: Path, tmp_path: Path) -> None:
    file = write_prompts(tmp_path, PROMPTS)
    more = ("mechanism=pinned_zero_copy", "memory.device_kv_bytes=200000", "memory.host_kv_bytes=600000")
    resolved = jobs.resolved(*overrides(folder, f"prompts={file}", *more))
    block = resolved.spec.block_bytes
    assert resolved.capacity == (200_000 // block, 600_000 // block)
    assert resolved.config.memory.device_kv_bytes == 200_000


def test_the_summary_says_what_it_is_worth(folder: Path, tmp_path: Path) -> None:
    file = write_prompts(tmp_path, PROMPTS)
    summary, directory = run(tmp_path, folder, f"prompts={file}", "mechanism=pinned_prefetch_ahead")
    assert (summary["origin"], summary["runner"], summary["hardware"]) == ("measured", "cpu", "cpu")
    assert summary["memory_emulated"] is True
    assert read_json(directory / "manifest.json")["memory_emulated"] is True
    unobserved = ("h2d_bytes", "d2h_bytes", "gpu_fault_groups", "evicted_chunks", "stall_s", "energy_j", "closed_form")
    assert {name: summary[name] for name in unobserved} == dict.fromkeys(unobserved)
    assert set(summary["link_bytes_by_cause"].values()) == {None}
    assert summary["model"] == "my_model" and summary["workload"] == "prompts"
    assert summary["num_requests"] == len(PROMPTS)
    steps = read_table(directory, "steps")
    for name in MemoryCounters._fields:
        assert set(steps[name]) == {None}
    assert sum(n or 0 for n in steps["num_output_tokens"]) == summary["num_output_tokens"]
    assert json.loads(json.dumps(summary)) == read_json(directory / "summary.json")


def test_random_ids_of_a_workload(folder: Path, tmp_path: Path) -> None:
    """Without prompts the workload's lengths are served with drawn ids, and no stop token cuts them short."""
    more = ("workload.prompt_tokens=20", "workload.output_tokens=12", "workload.num_requests=6", "batch_size=3")
    summary, directory = run(tmp_path, folder, *more)
    rows = read_outputs(directory)
    assert [len(row["prompt_ids"]) for row in rows] == [20] * 6
    assert [len(row["output_ids"]) for row in rows][3:] == [12] * 3
    assert all(0 <= token < VOCABULARY for row in rows for token in row["prompt_ids"])
    assert len({tuple(row["prompt_ids"]) for row in rows}) == 6
    assert summary["workload"] == "fixed"
    again, _ = run(tmp_path, folder, *more, "rerun=true")
    assert read_outputs(directory) == rows and again["num_steps"] == summary["num_steps"]


def test_a_run_id_depends_on_what_is_served(folder: Path, tmp_path: Path) -> None:
    """Prompts count by content, weights by name and size; where they lie does not count."""

    def name(prompts: list[dict[str, Any]], model: Path = folder, file: str = "a") -> str:
        (tmp_path / file).mkdir(exist_ok=True)
        path = write_prompts(tmp_path / file, prompts)
        return jobs.job(tmp_path, *overrides(model, f"prompts={path}")).directory.name

    base = name(PROMPTS)
    assert name(PROMPTS, file="b") == base
    assert name(PROMPTS[:-1]) != base
    assert name([*PROMPTS[:-1], PROMPTS[-1] | {"output_tokens": 1}]) != base
    smaller = save_model(tmp_path / "my_model", intermediate_size=32)
    assert name(PROMPTS, smaller) != base


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, folder: Path, tmp_path: Path) -> None:
    rows = serve(tmp_path, folder, f"dtype={dtype}", prompts=PROMPTS[:4])
    assert [len(until_eos(row["output_ids"])) for row in rows] == [len(row["output_ids"]) for row in rows]


def test_a_prompt_beyond_the_context_names_its_line(folder: Path, tmp_path: Path) -> None:
    file = write_prompts(tmp_path, [PROMPTS[0], {"prompt_ids": [3] * 500, "output_tokens": 13}])
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 2: 500 prompt and 13 output tokens exceed the 512"):
        jobs.resolved(*overrides(folder, f"prompts={file}"))
    with pytest.raises(ValueError, match=r"line 1: 40 prompt and 48 output tokens exceed the 50"):
        jobs.resolved(*overrides(folder, f"prompts={file}", "max_model_len=50"))


def test_a_token_beyond_the_vocabulary_names_its_line(folder: Path, tmp_path: Path) -> None:
    file = write_prompts(tmp_path, [PROMPTS[0], {"prompt_ids": [VOCABULARY]}])
    with pytest.raises(ValueError, match=rf"line 2: token id {VOCABULARY} is not below the vocabulary"):
        jobs.resolved(*overrides(folder, f"prompts={file}"))


def test_text_for_a_model_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    file = write_prompts(tmp_path, [{"prompt": "hello"}])
    with pytest.raises(ValueError, match="line 1: the model has no tokenizer; give prompt_ids"):
        jobs.resolved(*overrides(folder, f"prompts={file}"))


def test_a_rate_goes_with_poisson(folder: Path, tmp_path: Path) -> None:
    file = write_prompts(tmp_path, PROMPTS[:2])
    for more in (["workload.arrival=poisson"], ["workload.request_rate=3"]):
        with pytest.raises(ValueError, match=r"goes with workload.arrival=poisson, and only with it"):
            jobs.resolved(*overrides(folder, f"prompts={file}", *more))
    rows = serve(tmp_path, folder, "workload.arrival=poisson", "workload.request_rate=1000", prompts=PROMPTS[:4])
    assert [row["prompt_ids"] for row in rows] == [p["prompt_ids"] for p in PROMPTS[:4]]


def test_max_steps_writes_what_has_ended(folder: Path, tmp_path: Path) -> None:
    file = write_prompts(tmp_path, PROMPTS)
    summary, directory = run(tmp_path, folder, f"prompts={file}", "max_steps=2")
    assert any("max_steps" in warning for warning in summary["warnings"])
    rows = read_outputs(directory)
    assert len(rows) == summary["num_requests"] < len(PROMPTS)
    assert all(len(row["output_ids"]) <= 2 for row in rows)


# ---- SmolLM2


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return smollm2_path()
    except ValueError as error:
        pytest.skip(str(error))


def test_cpu_generate_for_a_few_steps(smollm2: Path, tmp_path: Path) -> None:
    summary = jobs.run(tmp_path, "experiment=cpu_generate", "max_steps=3")
    assert summary["num_steps"] == 3 and summary["num_output_tokens"] > 0
    assert (summary["model"], summary["runner"]) == ("smollm2_135m", "cpu")


def test_cpu_generate(smollm2: Path, tmp_path: Path) -> None:
    """The published experiment: a text for every prompt, as the ids say."""
    job = jobs.job(tmp_path, "experiment=cpu_generate", "workload.output_tokens=12")
    jobs.run_any_job(job, argv=["test"])
    rows = read_outputs(job.directory)
    assert [row["request_id"] for row in rows] == list(range(6))
    assert all(row["text"].strip() and row["output_ids"] for row in rows)
    assert "Paris" in rows[0]["text"]


def test_a_gguf_file_is_served_by_its_path(smollm2: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "The capital of France is", "output_tokens": 4}\n')
    words = ["runner=cpu", "model=hf", f"model.path={smollm2}", f"prompts={file}", "dtype=float32", "batch_size=1"]
    job = jobs.job(tmp_path, *words, "chat_template=none")
    summary = jobs.run_any_job(job, argv=["test"])
    assert "Paris" in read_outputs(job.directory)[0]["text"]
    assert summary["chat_template"] == "none: chat_template=none"
    chat = jobs.resolved(*words)
    assert chat.serving is not None and chat.serving.prompts is not None
    assert chat.serving.prompts[0].ids[-13:-4] == (4093, 198, 504, 3575, 282, 4649, 314, 2, 198)  # <|im_start|>user ...
    assert chat.notes()[-1] == "chat template of text prompts: the model's chat template"
    assert summary["model"].startswith("SmolLM2")


def test_prompts_bring_their_own_lengths(folder: Path, tmp_path: Path) -> None:
    """A setting that prompts would make void is refused, and the defaults are of prompts, not of a workload."""
    file = write_prompts(tmp_path, PROMPTS)
    resolved = jobs.resolved("model=hf", f"model.path={folder}", f"prompts={file}", "block_size=8")
    assert resolved.config.dtype == "float32"
    assert resolved.config.workload.output_tokens == 64
    for given, said in (
        ("runner=sim", "prompts are for a real model"),
        ("workload=azure_conv", "use workload=prompts"),
        ("workload.prompt_tokens=9", "workload.prompt_tokens=9 is ignored with prompts="),
        ("workload.arrival=closed_loop", "allowed are all_at_once and poisson"),
        ("replay.recorded_runner=cpu", "is filled in from a recording"),
    ):
        with pytest.raises(ValueError, match=said):
            jobs.resolved("model=hf", f"model.path={folder}", f"prompts={file}", given)


def test_other_weights_are_another_run(folder: Path, tmp_path: Path) -> None:
    """Weights count by content: of the same size, under the same name, they are others."""
    short = ("workload.prompt_tokens=8", "workload.output_tokens=4")
    first = jobs.job(tmp_path, *overrides(folder, *short)).directory.name
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    assert jobs.job(tmp_path, *overrides(copy, *short)).directory.name == first
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert jobs.job(tmp_path, *overrides(copy, *short)).directory.name != first


def test_text_with_unicode_line_ends_is_read_back(tmp_path: Path) -> None:
    rows = [{"request_id": i, "output_ids": [1], "text": text} for i, text in enumerate(("a\u2028b\u0085c", "d"))]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "outputs.jsonl").write_text(lines, encoding="utf-8")
    assert [row["text"] for row in read_outputs(tmp_path)] == ["a\u2028b\u0085c", "d"]
