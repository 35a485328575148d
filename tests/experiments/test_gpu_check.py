"""The one command for a machine with a GPU, where there is none: its parts are stood in for by small programs."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from experiments.gpu_kit import gpu_check
from experiments.gpu_kit.gpu_check import Report, check, main
from experiments.gpu_kit.parts import CHECK, Part, parts_of

CARD = {"name": "NVIDIA Test", "uuid": "GPU-0", "driver": "580.0"}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "gpu", lambda: CARD)


def part(name: str, *codes: str, limit_s: int = 30, **more: Any) -> Part:
    """A part whose commands are these Python programs; `{}` is its folder."""

    def commands(output: Path) -> list[list[str]]:
        return [[sys.executable, "-c", code.replace("{}", str(output / name))] for code in codes]

    return Part(name, "a test", limit_s, commands, **more)


def run(output: Path, *parts: Part, seconds: float = 60, force: bool = False) -> tuple[bool, dict[str, Any]]:
    output.mkdir(exist_ok=True)
    fine = check(parts, Report(output, "abc1234"), seconds=seconds, force=force)
    return fine, json.loads((output / "summary.json").read_text())


def test_parts_leave_logs_results_and_an_archive(card: None, tmp_path: Path) -> None:
    write = "import pathlib; pathlib.Path(r'{}/table.json').write_text('[1]'); print('took 3 things')"
    fine, summary = run(tmp_path, part("first", "print('a')", write), part("second", "print('b')"))
    assert fine
    assert summary["gpu"] == CARD
    assert summary["commit"] == "abc1234"
    assert {n: (p["status"], p["reason"]) for n, p in summary["parts"].items()} == {
        "first": ("ok", "took 3 things"),
        "second": ("ok", "b"),
    }
    assert (tmp_path / "first" / "log.txt").read_text().count("$ ") == 2
    with tarfile.open(tmp_path / "gpu-check.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["first/log.txt", "first/table.json", "second/log.txt", "summary.json"]


def test_a_failing_part_fails_the_check_and_the_others_run(card: None, tmp_path: Path) -> None:
    broken = part("broken", "print('no such thing'); raise SystemExit(7)", "print('never')")
    fine, summary = run(tmp_path, broken, part("after", "print('b')"))
    assert not fine
    assert (summary["parts"]["broken"]["status"], summary["parts"]["after"]["status"]) == ("failed", "ok")
    assert summary["parts"]["broken"]["reason"] == "status 7: no such thing"
    assert "never" not in (tmp_path / "broken" / "log.txt").read_text().splitlines()


def test_a_failing_build_ends_it(card: None, tmp_path: Path) -> None:
    fine, summary = run(tmp_path, part("build", "raise SystemExit(1)"), part("tests", "print('b')"))
    assert not fine
    assert list(summary["parts"]) == ["build"]


def test_a_part_past_its_limit_is_stopped_with_all_it_started(card: None, tmp_path: Path) -> None:
    sleeper = (
        "import subprocess, sys, time; c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    code = sleeper + "; print(c.pid, flush=True); time.sleep(60)"
    begun = time.monotonic()
    fine, summary = run(tmp_path, part("slow", code, limit_s=2))
    assert not fine
    assert time.monotonic() - begun < 30
    assert summary["parts"]["slow"]["reason"].startswith("stopped at its time limit")
    child = int((tmp_path / "slow" / "log.txt").read_text().splitlines()[-1])
    deadline = time.monotonic() + 20
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_tool_that_refuses_or_is_missing_is_not_run_and_no_failure(card: None, tmp_path: Path) -> None:
    refusing = part("refusing", "print('Device not supported'); raise SystemExit(1)", refused="Device not supported")
    missing = part("missing", "print('x')", needs="no-such-program-here")
    fine, summary = run(tmp_path, refusing, missing)
    assert fine
    assert [p["status"] for p in summary["parts"].values()] == ["not run", "not run"]
    assert summary["parts"]["missing"]["reason"] == "no-such-program-here is not on the PATH"


def test_no_part_is_begun_without_time(card: None, tmp_path: Path) -> None:
    fine, summary = run(tmp_path, part("late", "print('x')"), seconds=5)
    assert fine
    assert summary["parts"]["late"]["reason"] == "no time left of 5 s"
    assert not (tmp_path / "late").exists()


def test_what_was_taken_is_kept_until_sources_change_or_force(
    card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = "p = __import__('pathlib').Path(r'{}/n'); p.write_text(str(int(p.read_text()) + 1 if p.exists() else 1))"
    counting, failing = part("counting", count), part("failing", count, "raise SystemExit(1)")
    counts = lambda: [int((tmp_path / name / "n").read_text()) for name in ("counting", "failing")]  # noqa: E731
    for _ in range(2):
        run(tmp_path, counting, failing)
    assert counts() == [1, 2]
    run(tmp_path, counting, force=True)
    assert counts() == [2, 2]
    monkeypatch.setattr(gpu_check, "sources_digest", lambda: "changed")
    run(tmp_path, counting)
    assert counts() == [3, 2]


def test_a_summary_of_something_else_is_not_overwritten(card: None, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "summary.json").write_text("[]")
    assert main(["--output", str(tmp_path)]) == 2
    assert "is not a summary of gpu-check; give another OUT" in capsys.readouterr().err
    assert (tmp_path / "summary.json").read_text() == "[]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "bulid"], "--parts bulid: no such part; there are build, tests, microbench"),
        (["--commit", "HEAD"], "--commit HEAD; it is the hash of a commit"),
    ],
)
def test_mistakes_are_a_line(card: None, tmp_path: Path, capsys: Any, arguments: list[str], said: str) -> None:
    assert main([*arguments, "--output", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(gpu_check, "gpu", lambda: None)
    assert main(["--output", str(tmp_path / "new")]) == 3
    assert capsys.readouterr().out.startswith("no NVIDIA GPU on this machine")
    assert not (tmp_path / "new").exists()


def test_every_part_names_files_that_exist(tmp_path: Path) -> None:
    """What a command would touch on the GPU machine is in the repository, and its own programs in the Python path."""
    for listed in parts_of(CHECK):
        for command in listed.commands(tmp_path):
            for word in command:
                if word.startswith("tests/") or word.endswith((".cu", "/include")):
                    assert (gpu_check.ROOT / word.removeprefix("-I")).exists(), word
            if command[1:2] == ["-m"] and command[2].startswith(("uvm_kv", "experiments")):
                module = gpu_check.ROOT / command[2].replace(".", "/")
                assert (module / "__main__.py").exists() or module.with_suffix(".py").exists(), command[2]


def test_the_sanitizer_finds_its_tests(tmp_path: Path) -> None:
    """The sanitizer's selection is a word or two in test names, which a renamed test would silently make empty."""
    (sanitizer,) = parts_of(CHECK, ["sanitizer"])
    (command,) = sanitizer.commands(tmp_path)
    pytest_command = command[command.index(sys.executable) :]
    listed = subprocess.run(
        [*pytest_command, "--collect-only"], cwd=gpu_check.ROOT, capture_output=True, text=True, check=False
    )
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    assert 10 <= len(names) <= 40, listed.stdout[-2000:]
    assert {"test_attention.py", "test_copies.py"} <= {n.split("::")[0].rsplit("/", 1)[-1] for n in names}


def test_a_part_that_goes_on_runs_what_follows_a_failure(card: None, tmp_path: Path) -> None:
    several = part("several", "print('a'); raise SystemExit(1)", "print('b')", goes_on=True)
    fine, summary = run(tmp_path, several)
    assert not fine
    assert summary["parts"]["several"]["reason"] == "status 1: a"
    assert (tmp_path / "several" / "log.txt").read_text().splitlines()[-1] == "b"


def test_what_is_always_taken_is_taken_again(card: None, tmp_path: Path) -> None:
    count = "p = __import__('pathlib').Path(r'{}/n'); p.write_text(str(int(p.read_text()) + 1 if p.exists() else 1))"
    for _ in range(2):
        run(tmp_path, part("counting", count, always=True))
    assert (tmp_path / "counting" / "n").read_text() == "2"


def test_a_build_is_kept_only_where_the_extension_is(
    card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = "p = __import__('pathlib').Path(r'{}/n'); p.write_text(str(int(p.read_text()) + 1 if p.exists() else 1))"
    for built, expected in ((False, "1"), (True, "1"), (False, "2")):
        monkeypatch.setattr(gpu_check, "_is_built", lambda built=built: built)
        run(tmp_path, part("build", count))
        assert (tmp_path / "build" / "n").read_text() == expected
