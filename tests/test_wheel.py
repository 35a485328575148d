"""The package as a user has it: a wheel in its own environment, and an editable install that two checkouts share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

KEPT = ("uvm_kv", "conf", "experiments", "cuda_ext/build_backend", "results/reference", "pyproject.toml", "README.md")
SMALL = ("max_steps=3", "workload.prompt_tokens=64", "workload.output_tokens=16")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"UVM_KV_NO_CUDA": "1"}


def call(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


def said(folder: Path, *command: str | Path) -> str:
    done = call(folder, *command)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def install(wheel: Path, folder: Path) -> Path:
    """bin/ of a new environment with the wheel. It sees the packages of this one, but not its editable install, since
    .pth files count in an environment's own site-packages alone."""
    said(folder.parent, sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    site = Path(said(folder, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "present.pth").write_text(sysconfig.get_path("purelib") + "\n")
    said(folder, sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    return python.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder)
    said(folder, *pip, REPOSITORY)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def uvm_kv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("wheel") / "env") / "uvm-kv"


def test_the_wheel_has_one_package_with_configs_and_reference_set(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {Path(name) for name in archive.namelist()}
    assert {file.parts[0].partition("-")[0] for file in files} == {"uvm_kv"}
    for folder, ending in (("conf", "yaml"), ("conf", "jsonl"), ("results/reference", "gz")):
        here = {file.relative_to(REPOSITORY) for file in (REPOSITORY / folder).rglob(f"*.{ending}")}
        assert here and {Path("uvm_kv/shipped") / file for file in here} <= files


def test_an_installed_wheel_works_in_an_empty_folder(uvm_kv: Path, tmp_path: Path) -> None:
    assert said(tmp_path, uvm_kv, "--version") == "uvm-kv 0.1.0\n"
    doctor = json.loads(said(tmp_path, uvm_kv, "doctor", "--json"))
    assert Path(doctor["package"]).is_relative_to(uvm_kv.parents[1])
    assert (doctor["git_sha"], doctor["warning"]) == (None, None)
    (run,) = json.loads(said(tmp_path, uvm_kv, "run", "batch_size=2", *SMALL, "--json"))["runs"]
    assert Path(run["place"]).parent == Path("results/runs/adhoc")
    assert "1 runs in results/runs" in said(tmp_path, uvm_kv, "runs")
    drawn = json.loads(said(tmp_path, uvm_kv, "figures", "energy", "output=mine", "--json"))
    (figure,) = drawn["figures"]
    assert figure["remarks"] == [], "its runs are those of the reference set"
    assert all((tmp_path / file).is_file() for file in (*figure["files"], drawn["report"]))
    assert json.loads(said(tmp_path, uvm_kv, "roofline", "figure=false", "--json"))["hardware"] == "rtx3090"
    asked = ("mechanism=pinned_balanced", "batch_size=2", "workload.num_requests=4", *SMALL[1:])
    assert "\n  uvm-kv run " in said(tmp_path, uvm_kv, "advise", *asked)
    assert {file.name for file in tmp_path.iterdir()} == {"results", "mine"}


def test_an_installed_wheel_does_not_write_into_itself(uvm_kv: Path, tmp_path: Path) -> None:
    done = call(tmp_path, uvm_kv, "calibrate", "curves=none.json", "name=mine")
    assert (done.returncode, done.stdout) == (2, "")
    assert "give output=DIR/hardware/mine.yaml, which hydra.searchpath=[DIR] finds" in done.stderr


def test_a_second_checkout_runs_its_own_code_on_a_shared_environment(tmp_path: Path) -> None:
    """The editable install is of the first; workers of a sweep are new processes and run the second's too."""
    first, second = tmp_path / "first", tmp_path / "second"
    for name in KEPT:
        source, target = REPOSITORY / name, first / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
    shutil.copytree(first, second)
    with (second / "uvm_kv" / "types.py").open("a") as file:
        file.write("# Another line.\n")
    build = "import sys; sys.path.insert(0, 'cuda_ext/build_backend'); import uvm_kv_build as b; b.build_editable('..')"
    said(first, sys.executable, "-c", build)
    python = install(next(tmp_path.glob("*.whl")), tmp_path / "env") / "python"

    code = "from uvm_kv.store.code import PACKAGE, hash_of, code_files as files;"
    code += "print(*[hash_of(files(PACKAGE.parents[1] / name / 'uvm_kv'), 'sim') for name in ('first', 'second')])"
    ours, theirs = said(second, python, "-c", code).split()
    swept = json.loads(said(second, python, "-m", "experiments.run", "-m", "batch_size=2,4", *SMALL, "--json"))
    manifests = [json.loads((second / run["place"] / "manifest.json").read_text()) for run in swept["runs"]]
    assert [manifest["code_sha256"] for manifest in manifests] == [theirs] * 2 and ours != theirs
    asked = ("-m", "uvm_kv.cli", "doctor", "--json")
    for folder, expected in ((first, first), (second, second), (tmp_path, first)):
        doctor = json.loads(said(folder, python, *asked))
        assert (doctor["package"], doctor["warning"]) == (str(expected / "uvm_kv"), None)
    line = f"warning: this runs {first / 'uvm_kv'}, not the uvm_kv of the current folder"
    assert line in said(second, python.with_name("uvm-kv"), "doctor")
    assert line in call(second, python.with_name("uvm-kv"), "run", *SMALL).stderr
