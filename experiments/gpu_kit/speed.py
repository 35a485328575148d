"""What the runs of a card say of our speed on it, as ratios: decode steps against the bytes they must read, throughput
beside transformers' continuous batching, and the gain of pinned_balanced against the ceiling of its reach.

Every line has its target; value None, with the reason, where a run that it needs is missing.
"""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uvm_kv.hw.overlap import ceiling
from uvm_kv.store.directories import read_summary, read_table
from uvm_kv.store.whole import completed_runs
from uvm_kv.types import BASELINES, GIB, Reach

EAGER_TARGET, COMPILED_TARGET = 1.5, 1.25
"""Most that a decode step may take over the time of its bytes: with the model's code untouched, and compiled."""
PEER_TARGET = 1.0
GAIN_TARGET, NEVER_BELOW = 0.8, 0.98
PEER = "hf_continuous"
BALANCED = "pinned_balanced"


@dataclass(frozen=True)
class Run:
    summary: dict[str, Any]
    compiled: bool
    step_s: float | None
    """Median of the steps in which every sequence had one token."""
    embedding_bytes: int
    """Size of the embedding table, of which a step reads a few rows; 0 where the head shares it."""

    @property
    def tokens_per_s(self) -> float:
        steady: float | None = self.summary["output_tokens_per_s"]
        return float(self.summary["output_tokens_per_s_whole_run"] if steady is None else steady)

    @property
    def batch(self) -> int:
        return int(self.summary["offered_batch"])

    @property
    def kv_bytes(self) -> float:
        return float(self.summary["kv_bytes_mean"]["used"])


@dataclass(frozen=True)
class Line:
    name: str
    value: float | None
    target: float
    at_most: bool
    detail: str

    @property
    def is_met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def text(self) -> str:
        value = "-" if self.value is None else f"{self.value:.3f}"
        verdict = {None: "not measured", True: "met", False: "MISSED"}[self.is_met]
        return f"{self.name:<58}{value:>8}  {'<=' if self.at_most else '>='} {self.target:<5g} {verdict}: {self.detail}"


def read_runs(folder: Path, config_of: Callable[[Path], dict[str, Any]]) -> list[Run]:
    """Finished runs below a folder. `config_of`: a run directory's config.yaml, as nested dicts."""
    return [_read(directory, config_of(directory)) for directory in completed_runs(folder)] if folder.is_dir() else []


def _read(directory: Path, config: dict[str, Any]) -> Run:
    summary, steps = read_summary(directory), read_table(directory, "steps")
    start, end, tokens, running = (
        np.array(steps[name], float) for name in ("start_ns", "end_ns", "num_scheduled_tokens", "num_running")
    )
    took = (end - start)[tokens == running]
    model, width = config["model"], 4 if summary["dtype"] == "float32" else 2
    embedding = 0 if model["tied_embeddings"] else model["vocab_size"] * model["hidden_size"] * width
    step_s = float(np.median(took)) * 1e-9 if len(took) else None
    return Run(summary, bool(config["compile"]), step_s, embedding)


def decode_lines(runs: Iterable[Run], copy_bytes_per_s: float) -> list[Line]:
    """Lines on decode steps of device_resident, eager and compiled. The copy rate counts bytes read and written."""
    found = []
    for compiled, target in ((False, EAGER_TARGET), (True, COMPILED_TARGET)):
        name = f"decode step / its bytes, {'torch.compile' if compiled else 'the model as it is'}"
        run = next((r for r in runs if r.compiled == compiled and r.summary["mechanism"] == "device_resident"), None)
        if run is None or run.step_s is None:
            found.append(Line(name, None, target, True, "no such run"))
            continue
        weights = -dict(run.summary["memory_budget"])["weights"] - run.embedding_bytes
        bound_s = (weights + run.kv_bytes) / copy_bytes_per_s
        detail = (
            f"{run.summary['model']}, batch {run.batch}: {run.step_s * 1e3:.2f} ms; weights {weights / 1e9:.2f} GB and "
            f"KV {run.kv_bytes / 1e9:.2f} GB at {copy_bytes_per_s / 1e9:.0f} GB/s are {bound_s * 1e3:.2f} ms"
        )
        found.append(Line(name, run.step_s / bound_s, target, True, detail))
    return found


def peer_lines(runs: Sequence[Run]) -> list[Line]:
    """At every batch at which the peer was measured and a baseline of ours on the same work."""
    found = []
    for peer in sorted(_of(runs, PEER), key=lambda r: (r.summary["model"], r.batch)):
        same = [r for name in BASELINES for r in _of(runs, name) if _work(r) == _work(peer)]
        name = f"tokens/s / generate_batch, {peer.summary['model']}, batch {peer.batch}"
        if not same:
            found.append(Line(name, None, PEER_TARGET, False, "no run of ours on the same work"))
            continue
        best = max(same, key=lambda r: r.tokens_per_s)
        detail = f"{best.summary['mechanism']} {best.tokens_per_s:.0f} against {peer.tokens_per_s:.0f} tok/s"
        found.append(Line(name, best.tokens_per_s / peer.tokens_per_s, PEER_TARGET, False, detail))
    return found


def balanced_lines(
    runs: Sequence[Run], *, attention_share: float | None, link_bytes_per_s: float, copy_bytes_per_s: float
) -> list[Line]:
    """A line a model: the worst batch of pinned_balanced beside device_resident, and its gain at its best over theirs
    as a share of the ceiling. `attention_share`: of a device_resident step, measured; None: no ceiling."""
    found = []
    steady = [r for r in runs if r.summary["start"] == "steady"]
    for model in dict.fromkeys(r.summary["model"] for r in _of(steady, BALANCED)):
        ours, theirs = (
            _by_batch(r for r in _of(steady, name) if r.summary["model"] == model) for name in (BALANCED, BASELINES[0])
        )
        both = sorted(set(ours) & set(theirs))
        name = f"pinned_balanced / device_resident, worst batch, {model}"
        if not both:
            found.append(Line(name, None, NEVER_BELOW, False, "no batch with both"))
            continue
        ratios = {batch: ours[batch][0] / theirs[batch][0] for batch in both}
        worst = min(ratios, key=lambda batch: ratios[batch])
        found.append(Line(name, ratios[worst], NEVER_BELOW, False, f"batch {worst}"))
        best, run = max(theirs.values(), key=operator.itemgetter(0))
        gain = max(throughput for throughput, _ in ours.values()) / best - 1
        name = f"gain of pinned_balanced / ceiling of its reach, {model}"
        if attention_share is None or run.step_s is None:
            found.append(Line(name, None, GAIN_TARGET, False, f"gain {gain:+.1%}; the share of attention is missing"))
            continue
        limit = ceiling(
            Reach.BOTH,
            step_s=run.step_s,
            attention_s=attention_share * run.step_s,
            kv_bytes=run.kv_bytes,
            link_bytes_per_s=link_bytes_per_s,
            hbm_bytes_per_s=copy_bytes_per_s,
        )
        detail = f"gain {gain:+.1%}, ceiling {limit:+.1%} with {run.kv_bytes / GIB:.2f} GiB of KV in use"
        found.append(Line(name, gain / limit, GAIN_TARGET, False, detail))
    return found


def _of(runs: Iterable[Run], mechanism: str) -> list[Run]:
    return [r for r in runs if r.summary["mechanism"] == mechanism and not r.compiled]


def _work(run: Run) -> tuple[Any, ...]:
    names = ("model", "offered_batch", "prompt_tokens", "output_tokens", "arrival", "start", "dtype")
    return tuple(run.summary[name] for name in names)


def _by_batch(runs: Iterable[Run]) -> dict[int, tuple[float, Run]]:
    """Batch -> median throughput of its repeats, and one of them."""
    groups: dict[int, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.batch, []).append(run)
    return {batch: (statistics.median(r.tokens_per_s for r in group), group[0]) for batch, group in groups.items()}
