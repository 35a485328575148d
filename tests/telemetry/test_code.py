"""The hash of the code that a result rests on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import jobs
from tests.helpers import REPOSITORY
from uvm_kv.job.build import is_done, run_job
from uvm_kv.store.code import OF_RUNNERS, PACKAGE, WITHOUT_RESULT, code_files, code_sha256, hash_of

RUNNERS = ("sim", "cpu", "cuda", "replay")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, with what compilers leave."""
    copy = tmp_path_factory.mktemp("code") / "elsewhere"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "__pycache__").mkdir()
    (copy / "__pycache__" / "types.cpython-311.pyc").write_bytes(b"x")
    return copy


def test_it_is_the_same_wherever_the_package_lies(package: Path) -> None:
    for runner in RUNNERS:
        assert hash_of(code_files(package), runner) == hash_of(code_files(), runner)


def test_it_is_the_same_in_another_process() -> None:
    code = "from uvm_kv.store.code import code_sha256; print(code_sha256('sim'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == code_sha256("sim")


@pytest.mark.parametrize(
    ("name", "runners"),
    [
        ("hw/roofline.py", RUNNERS),
        ("types.py", RUNNERS),
        ("engine/__init__.py", RUNNERS),
        ("job/build.py", RUNNERS),
        ("telemetry/summary.py", RUNNERS),
        ("a_new_room/module.py", RUNNERS),
        ("runner/base.py", RUNNERS),
        ("runner/sim/runner.py", ("sim",)),
        ("runner/torch/runner.py", ("cpu", "cuda")),
        ("runner/replay/__init__.py", ("replay",)),
        ("memory/slab.py", ("cuda",)),
        ("report/write.py", ()),
        ("cli/runs.py", ()),
        ("config/names.py", ()),
        ("store/records.py", ()),
    ],
)
def test_a_file_counts_for_the_runners_whose_results_rest_on_it(name: str, runners: tuple[str, ...]) -> None:
    files = code_files() | {name: "edited"}
    assert tuple(runner for runner in RUNNERS if hash_of(files, runner) != hash_of(code_files(), runner)) == runners


def test_line_ends_do_not_count(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "crlf")
    for file in (tmp_path / "crlf").rglob("*.py"):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert code_files(tmp_path / "crlf") == code_files()


def test_what_is_left_out_is_there() -> None:
    for name in (*WITHOUT_RESULT, *OF_RUNNERS):
        assert (PACKAGE / name).exists(), name


def test_only_what_other_code_made_is_run_again_by_rerun_changed(tmp_path: Path) -> None:
    given = ("batch_size=2", "max_steps=3")
    one = jobs.job(tmp_path, *given)
    run_job(one, argv=["test"])
    changed = jobs.job(tmp_path, *given, "rerun=changed")
    manifest = one.directory / "manifest.json"
    told = json.loads(manifest.read_text())
    assert told["code_sha256"] == code_sha256("sim")
    assert (is_done(one), is_done(changed)) == (True, True)
    for code in ({"code_sha256": "0" * 64}, {}):
        manifest.write_text(json.dumps({key: it for key, it in told.items() if key != "code_sha256"} | code))
        assert (is_done(one), is_done(changed)) == (True, False)
    run_job(changed, argv=["again"])
    assert json.loads(manifest.read_text())["argv"] == ["again"]
    assert is_done(changed)
