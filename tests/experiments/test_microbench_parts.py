"""Every part of the microbenchmark from end to end on a CUDA runtime in host memory: no number is a measurement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.gpu_kit.microbench.cli import PARTS
from tests.helpers import REPOSITORY
from uvm_kv.calibrate.curves import FIELDS, read_curves

host_runtime: Any = pytest.importorskip("tests.host_runtime")
pytest.importorskip("torch")


@pytest.fixture(scope="module")
def module() -> str:
    if named := os.environ.get(host_runtime.VARIABLE):
        return named
    try:
        return str(host_runtime.build())
    except (host_runtime.CannotBuildError, ImportError) as error:
        pytest.skip(f"{error}")


def run(module: str, output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.host_runtime", "tests.experiments.small_microbench"]
    return subprocess.run(
        [*command, "--output", str(output), *arguments],
        env=os.environ | {host_runtime.VARIABLE: module, "CUDA_VISIBLE_DEVICES": ""},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def taken(module: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("microbench")
    done = run(module, output, "--minutes", "30", "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout


def part(output: Path, name: str) -> Any:
    return json.loads((output / f"{name}.json").read_text())


def test_every_part_comes_to_its_end_and_nothing_fails(taken: tuple[Path, str]) -> None:
    for name in PARTS:
        content = part(taken[0], name)
        assert content["status"] == "complete"
        assert not [case for case in content["cases"] if case["status"] == "failed"]
        assert not content["out_of_time"]
        assert all(value > 0 for case in content["cases"] if case["status"] == "ok" for value in case["seconds"])


def test_what_is_not_there_is_said(taken: tuple[Path, str]) -> None:
    """torch on the CPU has neither of those backends, and our cuda.core no prefetch."""
    missing = {case["name"]: case["why"] for name in PARTS for case in part(taken[0], name)["cases"] if "why" in case}
    assert len([name for name in missing if name.startswith("torch CUDNN")]) == 3
    assert missing["prefetch, cuda.core ManagedMemoryResource"] == "this version has no such call"
    assert all(name.startswith(("torch CUDNN", "torch EFFICIENT", "prefetch, cuda.core")) for name in missing)


def test_every_target_has_its_verdict(taken: tuple[Path, str]) -> None:
    ratios = [ratio for name in PARTS for ratio in part(taken[0], name)["ratios"] if ratio["target"] is not None]
    assert {ratio["target"] for ratio in ratios} == {0.85, 0.90, 0.95, 1.0}
    for kind in ("pinned", "vmm", "managed"):
        assert sum(f"in place / streaming read, {kind}, MHA" in ratio["name"] for ratio in ratios) == 1
        assert sum(f"link), {kind}" in ratio["name"] for ratio in ratios) == 2
    assert {ratio["verdict"] for ratio in ratios} <= {"met", "not met", "ambiguous"}
    tables = (taken[0] / "tables.txt").read_text()
    assert all(ratio["name"] in tables and ratio["name"] in taken[1] for ratio in ratios)


def test_the_curves_are_what_calibrate_reads(taken: tuple[Path, str]) -> None:
    found = read_curves(taken[0] / "curves.json")
    assert set(found.curves) == set(FIELDS) - {"operators"}
    assert found.origin == "measured"
    assert {point.at["case"] for point in found.curves["prefetch"]} == {"from_host", "resident"}
    assert all(point.at["working_set_ratio"] < 1 for point in found.curves["fault"])
    assert "calibrate reads it" in taken[1]


def test_the_manifest_names_no_host(taken: tuple[Path, str]) -> None:
    facts = json.loads((taken[0] / "manifest.json").read_text())
    assert "host" not in facts["machine"]
    assert {"name", "uuid", "driver", "cuda_driver", "pcie_now", "host_numa_node"} <= set(facts["gpu"])
    assert facts["git_sha"] and facts["limits_bytes"]["managed"] <= 24 * 10**9


def test_the_limits_were_kept(taken: tuple[Path, str]) -> None:
    limits = json.loads((taken[0] / "manifest.json").read_text())["limits_bytes"]
    for name in PARTS:
        for kind, peak in part(taken[0], name)["peak_bytes"].items():
            assert peak <= limits[kind], (name, kind)


def test_a_part_that_is_there_is_kept_unless_forced(taken: tuple[Path, str], module: str) -> None:
    before = (taken[0] / "peers.json").stat().st_mtime_ns
    done = run(module, taken[0], "--parts", "peers", "copies")
    assert done.stdout.count("kept as it is") == 2
    assert (taken[0] / "peers.json").stat().st_mtime_ns == before
    assert run(module, taken[0], "--parts", "peers", "--force").returncode == 0
    assert (taken[0] / "peers.json").stat().st_mtime_ns > before
    assert "kept as it is" not in run(module, taken[0], "--parts", "peers", "--quick").stdout


def test_no_case_begins_after_its_time(module: str, tmp_path: Path) -> None:
    done = run(module, tmp_path, "--parts", "copies", "--minutes", "0.00001")
    assert done.returncode == 0
    assert "not run" in done.stdout and "used up" in done.stdout
