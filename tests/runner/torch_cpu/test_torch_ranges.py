"""Ranges for profilers: what nests in what, that every one is closed, and that nothing happens where nobody asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.runner.torch_cpu.models import axes_of, context_for, load_model, ragged, save_model, serve, tight_capacity
from uvm_kv.runner.torch import ranges
from uvm_kv.types import KIB


class Tool:
    """Takes ranges as NVTX does."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.paths: list[str] = []

    def push(self, name: str) -> int:
        self.opened.append(name)
        self.paths.append("/".join(self.opened))
        return len(self.opened)

    def pop(self) -> int:
        self.opened.pop()
        return len(self.opened)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tool]:
    tool = Tool()
    monkeypatch.setattr("torch.cuda.nvtx.range_push", tool.push)
    monkeypatch.setattr("torch.cuda.nvtx.range_pop", tool.pop)
    monkeypatch.setattr(ranges, "_sink", ranges.OFF)
    # So that a small cache has chunks to evict.
    monkeypatch.setattr("uvm_kv.kvcache.spec.CHUNK_BYTES", 4 * KIB)
    yield tool
    assert not tool.opened, "every range is closed when the runner is"


def run(mechanism: str, tmp_path: Path) -> Any:
    folder = save_model(tmp_path / "model")
    model, axes, requests = load_model(folder, "float32"), axes_of(mechanism), ragged(5)
    context = context_for(model, folder, axes, tight_capacity(axes, requests, 16, 5), num_layers_ahead=1)
    return serve(model, context, axes, requests, batch_size=5, max_num_batched_tokens=64)


@pytest.mark.parametrize(
    ("mechanism", "op"),
    [
        ("pinned_prefetch_ahead", "layer 2/prefetch"),
        ("managed_demand_capped", "layer 1/evict"),
        ("pinned_swap", "move"),
    ],
)
def test_a_step_shows_its_layers_and_its_memory_ops(mechanism: str, op: str, tool: Tool, tmp_path: Path) -> None:
    ranges.to_nvtx()
    served = run(mechanism, tmp_path)
    steps = len(served.log)
    assert tool.paths.count("execute") == steps
    assert tool.paths.count("schedule") == steps, "the last one is closed with the runner"
    for layer in range(4):
        for inner in ("", "/append", "/attention"):
            assert tool.paths.count(f"execute/layer {layer}{inner}") == steps
    assert tool.paths.count("execute/sample") == steps
    assert f"execute/{op}" in tool.paths


def test_nothing_is_marked_on_the_cpu(tool: Tool, tmp_path: Path) -> None:
    run("pinned_prefetch_ahead", tmp_path)
    assert not tool.paths
    assert isinstance(ranges.mark("attention"), nullcontext)


def test_a_step_that_fails_leaves_no_range_open(tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges.to_nvtx()
    calls = 0

    def attend(*_: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 6:  # The probe has had four.
            raise RuntimeError("an error of CUDA")
        return inner(*_)

    from uvm_kv.runner.torch.cpu_kv import CpuKV

    inner = CpuKV.attend
    monkeypatch.setattr(CpuKV, "attend", attend)
    with pytest.raises(RuntimeError, match="an error of CUDA"):
        run("device_resident", tmp_path)


def test_a_profiler_takes_them_before_nvtx_does(tool: Tool, tmp_path: Path) -> None:
    with ranges.recorded():
        ranges.to_nvtx()
        run("device_resident", tmp_path)
    assert not tool.paths
