"""The speed lines: worked out by hand on runs of a known card, simulated here; what is missing is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from experiments.gpu_kit import gpu_speed, profile
from tests import jobs
from tests.config.curves import curves_of
from tests.helpers import vouch
from uvm_kv.calibrate.profile_file import load_profile
from uvm_kv.hw.overlap import ceiling
from uvm_kv.store.directories import read_json
from uvm_kv.types import GIB, Reach

POINT = ("experiment=gpu_sweep_llama3_8b", "runner=sim", "hardware=h100")


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As gpu-measure leaves it, but for who measured."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "microbench").mkdir()
    curves = curves_of(load_profile("h100"), ("link", "copy", "hbm"))
    (folder / "microbench" / "curves.json").write_text(json.dumps(curves))
    for batch in (16, 32, 48):
        for mechanism in ("device_resident", "pinned_balanced"):
            jobs.run(folder / "sweep" / "runs", *POINT, f"mechanism={mechanism}", f"batch_size={batch}")
    eager = jobs.job(folder / "decode_step" / "runs", *POINT, "mechanism=device_resident", "batch_size=32")
    jobs.run_any_job(eager, argv=["test"])
    compiled = eager.directory.with_name("0123456789ab-r0")
    shutil.copytree(eager.directory, compiled)
    config = compiled / "config.yaml"
    config.write_text(config.read_text().replace("compile: false", "compile: true"))
    return folder


def trace(attention_us: float, other_us: float) -> dict[str, Any]:
    def event(cat: str, name: str, ts: float, dur: float, **args: int) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

    events = [event("user_annotation", "execute", 0, 1000)]
    for layer in range(2):
        at = 100 + 200 * layer
        events += [event("user_annotation", f"layer {layer}", at, 200), event("user_annotation", "attention", at, 50)]
        for number, (ts, took) in enumerate(((at + 10, attention_us), (at + 100, other_us))):
            correlation = 10 * layer + number
            events.append(event("cuda_runtime", "cudaLaunchKernel", ts, 1, correlation=correlation))
            events.append(event("kernel", "kernel", ts + 500, took, correlation=correlation))
    return {"traceEvents": events}


def lines_of(folder: Path) -> dict[str, dict[str, Any]]:
    assert gpu_speed.main(["--folder", str(folder)]) == 0
    content = json.loads((folder / "speed" / "speed.json").read_text())
    return {line["name"]: line for line in content["lines"]}


def test_decode_steps_against_their_bytes(simulated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bytes are the weights without the embedding, of which a step reads 32 rows, and the KV in use."""
    lines = lines_of(simulated)
    (run,) = (r for r in gpu_speed.read_runs(simulated / "decode_step" / "runs", gpu_speed.config_of) if not r.compiled)
    embedding = 128256 * 4096 * 2
    assert run.embedding_bytes == embedding
    rate = load_profile("h100").gpu.hbm_bytes_per_s
    bound_s = (16_060_522_496 - embedding + run.kv_bytes) / rate
    assert run.step_s is not None
    line = lines["decode step / its bytes, the model as it is"]
    assert line["value"] == pytest.approx(run.step_s / bound_s, rel=0.02)
    assert line["value"] > 1, "faster than its bytes"
    assert (line["target"], lines["decode step / its bytes, torch.compile"]["target"]) == (1.5, 1.25)
    out = capsys.readouterr().out
    assert "llama3_8b, batch 32" in out
    assert (simulated / "speed" / "speed.txt").read_text() == out


def test_the_gain_is_held_against_the_ceiling_of_its_reach(simulated: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(simulated, tmp_path / "measured")
    name = "gain of pinned_balanced / ceiling of its reach, llama3_8b"
    without = lines_of(folder)[name]
    assert (without["value"], without["is_met"]) == (None, None)
    assert "the share of attention is missing" in without["detail"]
    (folder / "decode_step" / "eager").mkdir()
    (folder / "decode_step" / "eager" / "trace.json").write_text(json.dumps(trace(10.0, 90.0)))
    lines = lines_of(folder)
    runs = gpu_speed.read_runs(folder / "sweep" / "runs", gpu_speed.config_of)
    by = {(r.summary["mechanism"], r.batch): r for r in runs}
    base = max((by["device_resident", b] for b in (16, 32, 48)), key=lambda r: r.tokens_per_s)
    best = max(by["pinned_balanced", b].tokens_per_s for b in (16, 32, 48))
    assert base.step_s is not None
    card = load_profile("h100")
    limit = ceiling(
        Reach.BOTH,
        step_s=base.step_s,
        attention_s=0.1 * base.step_s,
        kv_bytes=base.kv_bytes,
        link_bytes_per_s=card.link.h2d_bytes_per_s,
        hbm_bytes_per_s=card.gpu.hbm_bytes_per_s,
    )
    assert lines[name]["value"] == pytest.approx((best / base.tokens_per_s - 1) / limit, rel=0.05)
    assert base.kv_bytes < GIB
    worst = lines["pinned_balanced / device_resident, worst batch, llama3_8b"]
    ratios = [by["pinned_balanced", b].tokens_per_s / by["device_resident", b].tokens_per_s for b in (16, 32, 48)]
    assert worst["value"] == pytest.approx(min(ratios))


def test_a_peer_is_held_against_our_better_baseline_on_the_same_work(simulated: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(simulated, tmp_path / "measured")
    ours = next(
        path.parent
        for path in (folder / "sweep" / "runs").rglob("summary.json")
        if read_json(path)["mechanism"] == "device_resident" and read_json(path)["offered_batch"] == 32
    )
    for number, (batch, factor) in enumerate(((32, 0.8), (40, 1.0))):
        peer = shutil.copytree(ours, ours.with_name(f"abcdefabcde{number}-r0"))
        summary = read_json(peer / "summary.json") | {"mechanism": "hf_continuous", "offered_batch": batch}
        summary["output_tokens_per_s"] *= factor
        (peer / "summary.json").write_text(json.dumps(summary))
        vouch(peer)
    lines = lines_of(folder)
    line = lines["tokens/s / generate_batch, llama3_8b, batch 32"]
    assert (line["value"], line["is_met"]) == (pytest.approx(1.25), True)
    alone = lines["tokens/s / generate_batch, llama3_8b, batch 40"]
    assert (alone["value"], alone["detail"]) == (None, "no run of ours on the same work")


def test_without_curves_it_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_speed.main(["--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "there are no curves; the parts microbench and operators take them" in error
    assert error.count("\n") == 1


def test_a_profile_takes_an_experiment_as_its_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the part decode_step profiles is one job, whatever the experiment sweeps."""
    given: list[str] = []

    def stop(composed: Any, _: Any) -> None:
        given.extend((composed.mechanism, str(composed.batch_size), composed.model.name, composed.workload.start))
        raise ValueError("enough")

    monkeypatch.setattr(profile, "resolve", stop)
    words = [*POINT[:1], "mechanism=device_resident", "batch_size=32", "compile=true", "cuda_graphs=false"]
    assert profile.main(words) == 2
    assert given == ["device_resident", "32", "llama3_8b", "steady"]
