"""The proof of the seam with the real model in it: its plans are those of the simulator, and replay on both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from tests.helpers import make_sim
from tests.runner.torch_cpu.models import (
    Axes,
    Log,
    Reference,
    Served,
    TorchRunner,
    assert_same_tokens,
    context_for,
    load_model,
    ragged,
    save_model,
    serve,
)
from uvm_kv.engine import Engine
from uvm_kv.job.build import Job, build_placement, build_roofline, build_scheduler, build_source, workload_of
from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.ops import OpKind
from uvm_kv.runner.base import ModelRunner
from uvm_kv.runner.replay import PlanMismatch, ReplayRunner
from uvm_kv.runner.sim import SimRunner
from uvm_kv.store.directories import read_outputs, read_plans
from uvm_kv.telemetry.recorder import Recorder
from uvm_kv.types import Layout, MemoryKind

SYSTEMS: dict[str, tuple[Axes, KVCapacity, Layout]] = {
    "swap, and recompute once the host is full": (
        Axes(MemoryKind.PINNED, "resident", "optimistic", "swap"),
        KVCapacity(20, 6),
        Layout.BLOCK_MAJOR,
    ),
    "planned eviction and recompute": (
        Axes(MemoryKind.MANAGED, "demand_capped", "optimistic", "recompute"),
        KVCapacity(16, 10),
        Layout.LAYER_MAJOR,
    ),
    "prefetches ahead and planned evictions": (
        Axes(MemoryKind.MANAGED, "prefetch_ahead", "worst_case", "none"),
        KVCapacity(16, 60),
        Layout.LAYER_MAJOR,
    ),
    "copies ahead": (
        Axes(MemoryKind.PINNED, "prefetch_ahead", "worst_case", "none"),
        KVCapacity(16, 60),
        Layout.LAYER_MAJOR,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("parity") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder, "float32")


def encoded(log: Log) -> bytes:
    return json.dumps([plan.to_json() for plan, _ in log], sort_keys=True).encode()


@pytest.mark.parametrize("system", SYSTEMS)
def test_all_runners_are_given_the_same_plans(
    system: str, model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uvm_kv.kvcache.spec.CHUNK_BYTES", 8 << 10)
    axes, capacity, layout = SYSTEMS[system]
    context = context_for(model, folder, axes, capacity, block_size=8, layout=layout)

    def run(runner: ModelRunner) -> Served:
        return serve(model, context, axes, ragged(20), batch_size=12, max_num_batched_tokens=24, runner=runner)

    served = run(TorchRunner(model, context.spec, context.capacity, context.memory, max_tokens=88))
    assert_same_tokens(Reference(folder), served.requests)
    assert served.num_chunked > 0
    if axes.preemption != "none":
        assert served.scheduler.num_recomputed > 0
    if axes.preemption == "swap":
        assert served.scheduler.num_swapped_out > 0
        assert {op.kind for plan, _ in served.log for op in plan.ops} == {OpKind.COPY_IN, OpKind.COPY_OUT}
    elif axes.memory is MemoryKind.MANAGED:
        assert served.ops(OpKind.EVICT)
        assert bool(served.ops(OpKind.PREFETCH)) == (axes.placement == "prefetch_ahead")
    else:
        assert served.ops(OpKind.COPY_IN, staged=True)
    simulated = run(make_sim(context))
    assert encoded(simulated.log) == encoded(served.log)
    replayed = run(ReplayRunner(context.capacity, served.log))
    assert replayed.log == served.log
    assert [r.token_ids for r in replayed.requests] == [r.token_ids for r in served.requests]
    assert encoded(run(ReplayRunner(context.capacity, simulated.log)).log) == encoded(served.log)
    # And what the simulator recorded is what the real model carries out.
    again = run(TorchRunner(model, context.spec, context.capacity, context.memory, max_tokens=88))
    assert encoded(again.log) == encoded(simulated.log)


# ---- through the config


def recorded(tmp_path: Path, folder: Path, *more: str) -> Job:
    """A run on the CPU with its plans."""
    job = jobs.job(
        tmp_path,
        "runner=cpu",
        "model=hf",
        f"model.path={folder}",
        "dtype=float32",
        "block_size=8",
        "batch_size=12",
        "record_plans=true",
        "workload.arrival=all_at_once",
        "scheduler.max_num_batched_tokens=24",
        *more,
    )
    jobs.run_any_job(job, argv=["test"])
    return job


def engine_log(job: Job, runner: ModelRunner) -> Log:
    """The job's requests and policies through another runner."""
    resolved, recorder = job.resolved, Recorder()
    recorder.keep_plans()
    scheduler = build_scheduler(resolved, build_placement(resolved, build_roofline(resolved)))
    assert Engine(scheduler, runner, build_source(job, workload_of(job)), recorder).run() == "done"
    assert recorder.plans is not None
    return recorder.plans


SWAP = ("mechanism=pinned_swap", "workload.prompt_tokens=20", "workload.output_tokens=40", "workload.num_requests=16")
BLOCK_BYTES = 4 * 8 * 2 * 2 * 16 * 4
"""Layers, slots, K and V, heads, dimensions, bytes of the small model's block of 8 tokens."""


def test_a_recorded_run_replays_and_the_simulator_plans_the_same(folder: Path, tmp_path: Path) -> None:
    sizes = (f"memory.device_kv_bytes={30 * BLOCK_BYTES}", f"memory.host_kv_bytes={12 * BLOCK_BYTES}")
    job = recorded(tmp_path, folder, *SWAP, *sizes)
    resolved = job.resolved
    assert resolved.capacity == (30, 12)
    log = list(read_plans(job.directory))
    kinds = {op.kind for plan, _ in log for op in plan.ops}
    assert kinds == {OpKind.COPY_IN, OpKind.COPY_OUT}
    assert engine_log(job, ReplayRunner(resolved.capacity, read_plans(job.directory))) == log
    simulator = SimRunner(build_roofline(resolved), resolved.spec, resolved.capacity, resolved.memory)
    simulated = engine_log(job, simulator)
    assert encoded(simulated) == encoded(log)
    assert encoded(engine_log(job, ReplayRunner(resolved.capacity, simulated))) == encoded(log)
    assert [len(row["output_ids"]) for row in read_outputs(job.directory)] == [40] * 16


def test_a_recorded_run_with_stop_tokens_replays(folder: Path, tmp_path: Path) -> None:
    """The recorded tokens end the requests of the replay; a simulator, which has none, must differ."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt_ids": list(r.prompt_ids or ()), "output_tokens": 48} for r in ragged(12)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = recorded(tmp_path, folder, "mechanism=pinned_prefetch_ahead", f"prompts={prompts}")
    resolved, log = job.resolved, list(read_plans(job.directory))
    lengths = [len(row["output_ids"]) for row in read_outputs(job.directory)]
    assert min(lengths) < 48
    assert engine_log(job, ReplayRunner(resolved.capacity, log)) == log
    simulated = engine_log(job, SimRunner(build_roofline(resolved), resolved.spec, resolved.capacity, resolved.memory))
    assert encoded(simulated) != encoded(log)


def test_a_recording_of_other_tiers_is_told_apart(folder: Path, tmp_path: Path) -> None:
    sizes = (f"memory.device_kv_bytes={30 * BLOCK_BYTES}", f"memory.host_kv_bytes={12 * BLOCK_BYTES}")
    job = recorded(tmp_path, folder, *SWAP, *sizes)
    smaller = jobs.job(
        tmp_path,
        *("runner=cpu", "model=hf", f"model.path={folder}", "dtype=float32", "block_size=8", "batch_size=12"),
        *("workload.arrival=all_at_once", "scheduler.max_num_batched_tokens=24", *SWAP),
        *(f"memory.device_kv_bytes={20 * BLOCK_BYTES}", sizes[1]),
    )
    with pytest.raises(PlanMismatch, match=r"step \d+, \w+: recorded"):
        engine_log(smaller, ReplayRunner(smaller.resolved.capacity, read_plans(job.directory)))
