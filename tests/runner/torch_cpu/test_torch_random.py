"""Random weights of a config's shapes, and contexts that are filled directly: seeded, and the same in every memory."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from tests.runner.torch_cpu.models import TorchRunner, axes_of, context_for, load_model, save_model, serve, torch
from uvm_kv.hw.hf_config import read_geometry
from uvm_kv.hw.model import ModelGeometry
from uvm_kv.job.build import Job, run_job
from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.runner.torch import random_model
from uvm_kv.runner.torch.kv import random_kv
from uvm_kv.sched.request import Request
from uvm_kv.store.directories import read_json, read_outputs, read_plans, read_table
from uvm_kv.types import DTYPE_BYTES

SHAPES = ModelGeometry("shapes", 3, 64, 4, 2, 16, 96, 128, 512)
LLAMA = (
    "runner=cpu", "model=llama_7b", "model.weights=random", "model.num_layers=4", "model.hidden_size=64",
    "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=16", "model.intermediate_size=96",
    "model.vocab_size=128", "model.max_position_embeddings=512",
)  # fmt: skip
STEADY = (
    "workload.start=steady", "batch_size=8", "block_size=8", "workload.prompt_tokens=20", "workload.output_tokens=40",
    "max_steps=24", "scheduler.max_num_batched_tokens=64",
)  # fmt: skip


def weights_of(model: Any) -> list[Any]:
    return list(model.state_dict().values())


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_geometry_becomes_a_model(dtype: str, tied: bool) -> None:
    """The model has as many weights as the geometry counts, in the dtype, distributed as in transformers; norms are
    ones."""
    geometry = dataclasses.replace(SHAPES, tied_embeddings=tied, head_dim=32)
    model = random_model(geometry, dtype, 7)
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == geometry.num_parameters
    assert {str(p.dtype) for p in parameters} == {f"torch.{dtype}"}
    assert not model.training
    matrices = torch.cat([p.float().flatten() for p in parameters if p.dim() > 1])
    assert matrices.std().item() == pytest.approx(0.02, rel=0.02) and abs(matrices.mean().item()) < 2e-4
    assert all((p == 1).all() for p in parameters if p.dim() == 1)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_nothing_is_made_anywhere_but_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 13.5 GB, on a device that holds nothing (and has no generator)."""
    monkeypatch.setattr(torch, "Generator", lambda _: types.SimpleNamespace(manual_seed=lambda _: None))
    model = random_model(ModelGeometry("llama_7b", 32, 4096, 32, 32, 128, 11008, 32000, 2048), "float16", 0, "meta")
    assert {str(p.device) for p in (*model.parameters(), *model.buffers())} == {"meta"}


def test_rotary_embeddings_are_those_of_transformers(tmp_path: Path) -> None:
    """They are buffers, which must exist although the initialisation is skipped."""
    folder = save_model(tmp_path / "llama")
    loaded, model = load_model(folder, "float32"), random_model(read_geometry(str(folder)), "float32", 0)
    for (name, expected), (same, buffer) in zip(loaded.named_buffers(), model.named_buffers(), strict=True):
        assert name == same and torch.equal(expected, buffer)


def test_the_seed_gives_the_weights() -> None:
    one, same, other = (random_model(SHAPES, "float32", seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(weights_of(one), weights_of(same), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights_of(one), weights_of(other), strict=True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gated_mlp": False}, "model=shapes lacks a gated MLP, and model.weights=random builds models of"),
        ({"rope": False}, "lacks rotary embeddings"),
        ({"head_dim": 15}, "lacks an even head_dim"),
    ],
)  # fmt: skip
def test_a_geometry_that_no_llama_has_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        random_model(dataclasses.replace(SHAPES, **changes), "float32", 0)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=hf", "model.path=/some/where"], "model.weights=random with model.path=/some/where, which has"),
        (["model=hf"], "model=hf needs a model folder"),
        (["model=opt_13b"], "model=opt_13b lacks a gated MLP"),
        (["prompts=conf/no_such.jsonl"], "with model.weights=random, which has no tokenizer"),
        (["dtype=float64"], "dtype 'float64' is unknown"),
    ],
)  # fmt: skip
def test_settings_that_contradict_random_weights(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        jobs.job(tmp_path, "runner=cpu", "model=llama_7b", "model.weights=random", *overrides)
    assert len(str(caught.value).splitlines()) == 1


def test_a_steady_start_cannot_have_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt_ids": [3, 4]}\n')
    folder = save_model(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"workload.start=steady with prompts=.*fills KV with random numbers"):
        jobs.job(tmp_path, "model=hf", f"model.path={folder}", f"prompts={file}", "workload.start=steady")


def one_run(tmp_path: Path, *overrides: str) -> tuple[dict[str, Any], Job]:
    job = jobs.job(tmp_path, *LLAMA, *STEADY, *overrides)
    return run_job(job, argv=["test"]), job


def test_a_job_with_random_weights_says_so_and_repeats_to_the_token(tmp_path: Path) -> None:
    first, job = one_run(tmp_path / "a", "record_plans=true")
    assert (first["weights"], first["start"], first["stopped_by"], first["model"]) == (
        "random", "steady", "steps", "llama_7b",
    )  # fmt: skip
    assert read_json(job.directory / "manifest.json")["weights"] == "random"
    assert first["running_batch_mean"] == 8 and first["output_tokens_per_s"] > 0
    second, again = one_run(tmp_path / "b")
    assert second["num_output_tokens"] == first["num_output_tokens"] == 8 * 24
    rows = read_outputs(job.directory)
    assert rows == read_outputs(again.directory)
    assert rows and all(0 <= token < 128 for row in rows for token in row["output_ids"])
    assert len({token for row in rows for token in row["output_ids"]}) > 8
    # The simulator plans the same, and the recording replays.
    simulated = jobs.job(
        tmp_path / "c", *LLAMA[3:], "model=llama_7b", *STEADY, "record_plans=true", "dtype=float32",
        f"memory.device_kv_bytes={first['device_kv_bytes']}",
    )  # fmt: skip
    run_job(simulated, argv=["test"])
    assert [plan for plan, _ in read_plans(simulated.directory)] == [plan for plan, _ in read_plans(job.directory)]
    other = jobs.job(tmp_path / "d", *LLAMA, *STEADY, "seed=1")
    assert other.directory.name != job.directory.name
    assert jobs.job(tmp_path, *LLAMA, *STEADY, "model.num_layers=5").directory.name != job.directory.name


@pytest.mark.parametrize("mechanism", ["device_recompute", "pinned_swap"])
def test_preempted_contexts_are_served_on(mechanism: str, tmp_path: Path) -> None:
    """Recomputed from token ids, or swapped out and back: no NaN, and every sequence puts out its tokens."""
    block = 4 * 8 * 2 * 2 * 16 * 4
    sizes = [f"memory.device_kv_bytes={24 * block}"]
    if mechanism == "pinned_swap":
        sizes.append(f"memory.host_kv_bytes={30 * block}")
    summary, job = one_run(tmp_path, f"mechanism={mechanism}", *sizes, "max_steps=80")
    assert summary["preemptions"] > 0
    requests = read_table(job.directory, "requests")
    assert [len(row["output_ids"]) for row in read_outputs(job.directory)] == requests["output_tokens"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("filled") / "model")


def filled_requests() -> list[Request]:
    sizes = [(40, 12), (9, 20), (25, 16), (33, 8), (2, 18), (17, 17)]
    return [
        Request(i, prompt, output, prompt_ids=tuple(range(3, 3 + prompt)), num_filled_tokens=prompt - 1)
        for i, (prompt, output) in enumerate(sizes)
    ]


def served_tokens(
    folder: Path, mechanism: str, capacity: KVCapacity, block_size: int, batch_size: int = 6
) -> list[list[int]]:
    model, axes = load_model(folder, "float32"), axes_of(mechanism)
    context = context_for(model, folder, axes, capacity, block_size=block_size)
    requests = filled_requests()
    served = serve(model, context, axes, requests, batch_size=batch_size, max_num_batched_tokens=64)
    assert all(s.context_len for plan, _ in served.log for s in plan.scheduled)
    return [r.token_ids for r in requests]


def test_filled_contexts_give_the_same_tokens_whatever_the_memory(folder: Path) -> None:
    """KV is drawn per request: it does not depend on block size, tier, or who else is in the batch."""
    expected = served_tokens(folder, "device_resident", KVCapacity(60, 0), 8)
    for mechanism in ("pinned_zero_copy", "pinned_prefetch_ahead", "managed_by_tier", "managed_demand_capped"):
        assert served_tokens(folder, mechanism, KVCapacity(10, 60), 8) == expected
    assert served_tokens(folder, "device_resident", KVCapacity(200, 0), 4) == expected
    assert served_tokens(folder, "device_resident", KVCapacity(60, 0), 8, batch_size=2) == expected
    assert served_tokens(folder, "pinned_swap", KVCapacity(16, 30), 8) == expected


def test_filled_kv_has_unit_variance_and_stands_outside_of_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, axes = load_model(folder, "float32"), axes_of("device_resident")
    context = context_for(model, folder, axes, KVCapacity(60, 0), block_size=8)
    spec = context.spec
    drawn = random_kv(spec, 500, torch.Generator().manual_seed(0), torch.float32)
    assert drawn.shape == (2, 500, spec.num_kv_heads, spec.head_dim)
    assert drawn.std().item() == pytest.approx(1, rel=0.02)
    runner = TorchRunner(model, spec, context.capacity, context.memory, max_tokens=100)
    times = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr("time.perf_counter_ns", lambda: next(times))
    runner._clock_ns = 0
    before = runner.now_ns()
    runner.add(filled_requests()[0])
    runner._sequences[0].blocks = list(range(6))
    runner._fill(0)
    # Three looks at the clock lie between, two of them around the filling.
    assert runner.now_ns() - before == 2 * 10**6
