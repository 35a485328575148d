"""Peers through the command's own path: the requests of ours, their tokens, and a run directory of the same kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from tests.runner.torch_cpu.models import ragged, save_model, torch
from uvm_kv.job.models import load_served
from uvm_kv.runner.torch.peers import Continuous, ContinuousOptions, Generate, own_attention
from uvm_kv.sched.request import Request
from uvm_kv.store.directories import read_json, read_outputs, read_table
from uvm_kv.telemetry.recorder import REQUEST_COLUMNS, STEP_COLUMNS

WAYS = {
    "dynamic": ("engine=hf_generate",),
    "static": ("engine=hf_generate", "peer.cache=static"),
    "continuous": ("engine=hf_continuous", "peer.page_size=16"),
}
LENGTHS = ("workload.prompt_tokens=20", "workload.output_tokens=9", "workload.num_requests=24")
PROMPTS: list[dict[str, Any]] = [
    {"prompt_ids": list(r.prompt_ids or ()), "output_tokens": r.output_tokens} for r in ragged(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("peers") / "my_model")


def run(tmp_path: Path, folder: Path, *more: str) -> tuple[dict[str, Any], Path]:
    job = jobs.job(tmp_path / "runs", "runner=cpu", "model=hf", f"model.path={folder}", "batch_size=3", *more)
    return jobs.run_any_job(job, argv=["test"]), job.directory


def tokens(directory: Path) -> list[list[int]]:
    return [row["output_ids"] for row in read_outputs(directory)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arrival", ["closed_loop", "all_at_once"])
def test_the_same_requests_yield_the_same_tokens_as_ours(way: str, arrival: str, folder: Path, tmp_path: Path) -> None:
    work = (*LENGTHS, f"workload.arrival={arrival}", "seed=3")
    summary, theirs = run(tmp_path, folder, *work, *WAYS[way])
    _, ours = run(tmp_path, folder, *work)
    assert tokens(theirs) == tokens(ours)
    assert [row["prompt_ids"] for row in read_outputs(theirs)] == [row["prompt_ids"] for row in read_outputs(ours)]
    assert summary["num_requests"] == 24
    assert summary["num_output_tokens"] == sum(map(len, tokens(ours)))


@pytest.mark.parametrize("way", WAYS)
def test_ragged_prompts_and_stop_tokens(way: str, folder: Path, tmp_path: Path) -> None:
    """Padded on the left and masked, each to its own length or its end of sequence."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    _, theirs = run(tmp_path, folder, f"prompts={file}", *WAYS[way])
    _, ours = run(tmp_path, folder, f"prompts={file}")
    assert tokens(theirs) == tokens(ours)
    assert len({len(row) for row in tokens(theirs)}) > 3
    assert any(row[-1] == 2 for row in tokens(theirs))


@pytest.mark.parametrize("way", WAYS)
def test_the_run_directory_is_of_the_same_kind(way: str, folder: Path, tmp_path: Path) -> None:
    summary, directory = run(tmp_path, folder, *LENGTHS, *WAYS[way])
    ours, our_directory = run(tmp_path, folder, *LENGTHS)
    assert set(ours) <= set(summary) == set(read_json(directory / "summary.json"))
    assert {f.name for f in directory.iterdir()} == {f.name for f in our_directory.iterdir()}
    assert set(read_json(directory / "manifest.json")) == set(read_json(our_directory / "manifest.json"))
    requests, steps = read_table(directory, "requests"), read_table(directory, "steps")
    assert tuple(requests) == REQUEST_COLUMNS
    assert tuple(steps) == STEP_COLUMNS
    assert summary["mechanism"] == summary["engine"] == WAYS[way][0].removeprefix("engine=")
    assert summary["origin"] == "measured"
    assert summary["memory_emulated"] is True
    assert summary["h2d_bytes"] is summary["energy_j"] is summary["stall_s"] is summary["placement"] is None
    assert "before the clock starts" in summary["warm_up"]
    assert summary["output_tokens_per_s"] > 0
    assert summary["tpot_s"]["p99"] > 0
    if way == "continuous":
        assert not steps["step"]
        assert summary["num_steps"] is summary["preemptions"] is None
    else:
        assert len(steps["step"]) == summary["num_steps"]
        assert sum(n or 0 for n in steps["num_output_tokens"]) == summary["num_output_tokens"]


@pytest.mark.parametrize("way", WAYS)
def test_times_are_in_order_and_the_batch_is_kept(way: str, folder: Path, tmp_path: Path) -> None:
    summary, directory = run(tmp_path, folder, *LENGTHS, *WAYS[way])
    table = read_table(directory, "requests")
    names = ("arrival_ns", "admitted_ns", "first_token_ns", "finish_ns")
    spans = []
    for times in zip(*(table[name] for name in names), strict=True):
        known = [int(t) for t in times if t is not None]
        assert known == sorted(known) and len(known) == 4
        spans.append((known[1], known[3]))
    for begun, _ in spans:
        assert sum(a <= begun < b for a, b in spans) <= 3
    assert 0 < summary["running_batch_mean"] <= summary["running_batch_max"] <= 3
    assert summary["duration_s"] == max(b for _, b in spans) / 1e9
    # Every client's first request brings the loop into its steady state, and is not measured.
    assert summary["num_measured_requests"] == 21


def test_a_peer_differs_from_ours_in_nothing_but_itself(folder: Path, tmp_path: Path) -> None:
    """What makes them points of one comparison."""
    budget = "memory.device_kv_bytes=1000000"
    settings = [run(tmp_path, folder, *LENGTHS, budget, *way)[0]["setting"] for way in (*WAYS.values(), ())]
    assert settings == settings[:1] * len(settings)


def test_the_budget_is_set_where_it_can_be(folder: Path, tmp_path: Path) -> None:
    small = "memory.device_kv_bytes=90000"  # Five pages of 16 tokens, for three requests of two.
    summary, directory = run(tmp_path, folder, *LENGTHS, small, *WAYS["continuous"])
    assert summary["kv_budget"] == "set"
    assert summary["peer"]["num_blocks"] == 5
    assert summary["device_kv_bytes"] == 5 * 16 * 1024 <= 90000
    assert len(tokens(directory)) == 24
    with pytest.raises(ValueError, match=r"holds 1 pages of 16 tokens, the longest request takes 2; raise it"):
        run(tmp_path, folder, *LENGTHS, "memory.device_kv_bytes=20000", *WAYS["continuous"])


def test_a_budget_that_cannot_be_set_is_said(folder: Path, tmp_path: Path) -> None:
    summary, _ = run(tmp_path, folder, *LENGTHS, "memory.device_kv_bytes=40000", *WAYS["dynamic"])
    assert summary["kv_budget"] == "not settable"
    assert summary["device_kv_bytes"] is None
    # Three rows of 20 prompt and 8 further tokens hold KV when the ninth is there.
    assert summary["peer"]["kv_bytes_of_largest_batch"] == 3 * 28 * 1024
    assert any("beyond the job's 40000, which it cannot be given" in text for text in summary["warnings"])


@pytest.mark.parametrize("way", WAYS)
def test_a_time_limit_ends_a_peer(way: str, folder: Path, tmp_path: Path) -> None:
    lengths = ("workload.prompt_tokens=20", "workload.output_tokens=300", "workload.num_requests=3000")
    summary, _ = run(tmp_path, folder, *lengths, "max_seconds=0.2", "peer.page_size=256", *WAYS[way][:2][:1])
    assert summary["stopped_by"] == "seconds"
    assert summary["num_requests"] < 3000
    assert summary["num_output_tokens"] > 0
    assert any("max_seconds" in text for text in summary["warnings"])


def test_a_request_that_was_evicted_has_no_latency(folder: Path, tmp_path: Path) -> None:
    """Six pages hold three prompts, and not three whole requests."""
    lengths = ("workload.prompt_tokens=20", "workload.output_tokens=60", "workload.num_requests=6")
    tight = ("memory.device_kv_bytes=100000", "workload.arrival=all_at_once")
    summary, directory = run(tmp_path, folder, *lengths, *tight, *WAYS["continuous"])
    table = read_table(directory, "requests")
    evicted = [i for i, first in enumerate(table["first_token_ns"]) if first is None]
    assert evicted
    assert all(not table["measured"][i] for i in evicted)
    assert any(f"{len(evicted)} requests were evicted and prefilled again" in text for text in summary["warnings"])
    assert summary["num_output_tokens"] == 6 * 60
    _, ours = run(tmp_path, folder, *lengths, "workload.arrival=all_at_once")
    assert tokens(directory) == tokens(ours)


def test_a_model_that_is_kept_serves_ours_again(folder: Path) -> None:
    model = load_served(jobs.resolved("runner=cpu", "model=hf", f"model.path={folder}", *LENGTHS))
    before = model.config._attn_implementation, model.generation_config
    with own_attention(model):
        assert model.config._attn_implementation == "sdpa"
    assert (model.config._attn_implementation, model.generation_config) == before


def test_what_the_peer_dies_of_is_the_cause(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_served(jobs.resolved("runner=cpu", "model=hf", f"model.path={folder}", *LENGTHS))
    with own_attention(model):
        options = ContinuousOptions(page_size=16, num_blocks=8)
        peer = Continuous(model, options, max_prompt_tokens=4, max_output_tokens=4, num_requests=1)
        try:

            def out_of_memory(*_: Any, **__: Any) -> None:
                raise torch.OutOfMemoryError("CUDA out of memory")

            monkeypatch.setattr(type(model), "forward", out_of_memory)
            peer.submit(Request(0, 4, 4, prompt_ids=(5, 6, 7, 8)))
            with pytest.raises(RuntimeError, match="continuous batching failed: CUDA out of memory") as died:
                peer.finished(60)
        finally:
            peer.close()
    assert isinstance(died.value.__cause__, torch.OutOfMemoryError)


def test_rows_end_at_their_own_lengths(folder: Path) -> None:
    model = load_served(jobs.resolved("runner=cpu", "model=hf", f"model.path={folder}", *LENGTHS))
    requests = ragged(5)
    with own_attention(model):
        times = Generate(model).serve(requests)
    assert len(times) == max(r.output_tokens for r in requests)
    for request in requests:
        assert len(request.token_ids) == request.output_tokens
        assert request.finish_ns == times[request.output_tokens - 1]
