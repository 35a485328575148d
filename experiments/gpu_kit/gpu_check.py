"""One command for a machine with a GPU: build, test, benchmark; logs, tables and JSON in a folder and one archive.

    make gpu-check OUT=dir                                          build, tests, speeds: within eight minutes
    make gpu-measure OUT=dir                                        the measured sweeps: calls of nine minutes at most
    python -m experiments.gpu_check --output dir --parts tests      one part of either
    python -m experiments.gpu_check --list

The network is not needed where `wheels/` holds what the machine lacks (`make wheels` fills it). Parts go most valuable
first; what a part took is kept, so that the command can be given again; docs/gpu_check.md. Needs the standard library
only, since it installs the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from experiments.gpu_kit import measuring
from experiments.gpu_kit.measuring import NotPossibleError
from uvm_kv.store.family import end_children_with_me
from uvm_kv.store.provenance import git_state, gpu

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / "wheels"
ARCHIVE = "gpu-check.tar.gz"
SUMMARY = "summary.json"
SECONDS = 470
"""Of all parts of gpu-check together."""
MEASURE_SECONDS = 530
"""Of one call of gpu-measure; the command given again goes on."""
SOURCES = (".py", ".cpp", ".hpp", ".cu", ".cuh", ".txt")
TOOLKIT = "/usr/local/cuda/bin"
"""Where nvcc and compute-sanitizer are when they are not on the PATH."""
LEAST_SECONDS = 10
"""No part is begun with less."""

Status = Literal["ok", "failed", "not run"]


@dataclasses.dataclass(frozen=True)
class Part:
    """`commands`: what it runs, in order, stopping at the first that fails. `limit_s`: of all of them together.

    `refused`: a tool that says this does not take the device; the part is then not run, which is no failure.
    """

    name: str
    about: str
    limit_s: int
    commands: Callable[[Path], list[list[str]]]
    refused: str | None = None
    needs: str | None = None
    """A program that must be on the PATH."""
    goes_on: bool = False
    """A command that fails does not keep the next from being run."""
    always: bool = False
    """Taken anew each time: it is short, and what it reads may have grown."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    status: Status
    seconds: float
    reason: str
    sources: str
    """Digest of what was built and run."""


def _build(_: Path) -> list[list[str]]:
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
    missing = [str(wheel) for wheel in sorted(WHEELS.glob("*.whl")) if not _installed(wheel)]
    carried = [[*pip, "--no-index", *missing]] if missing else []
    isolated = [] if not WHEELS.is_dir() else ["--no-build-isolation"]  # With a network pip fetches what a build needs.
    return [*carried, [*pip, *isolated, "--verbose", "-e", str(ROOT)]]


def _installed(wheel: Path) -> bool:
    try:
        metadata.version(wheel.name.split("-")[0])
    except metadata.PackageNotFoundError:
        return False
    return True


def _doctor(_: Path) -> list[list[str]]:
    return [[sys.executable, "-m", "uvm_kv.cli", "doctor"]]


def _pytest(folder: Path, *more: str) -> list[str]:
    junit = f"--junitxml={folder / 'junit.xml'}"
    # Warnings of torch and CuPy on a machine that is not ours must not fail a test.
    options = ["-p", "no:cacheprovider", "-W", "default", "--durations=15", "-rs"]
    return [sys.executable, "-m", "pytest", *options, junit, *more]


def _tests(folder: Path) -> list[list[str]]:
    return [_pytest(folder, "tests/cuda")]


def _microbench(folder: Path) -> list[list[str]]:
    return [[sys.executable, "-m", "experiments.microbench", "--output", str(folder)]]


def _sanitizer(folder: Path) -> list[list[str]]:
    """One shape of attention over each kind of memory, append, and the copies' kernel."""
    tool = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "86"]
    some = "float16-128-8q2kv-16 or float32-64-8q2kv or test_append or any_alignment"
    return [[*tool, *_pytest(folder, "-k", some, "tests/cuda/test_attention.py", "tests/cuda/test_copies.py")]]


def _ladder(folder: Path) -> list[list[str]]:
    program, source = folder / "attention_ladder", ROOT / "cuda_ext"
    sources = [str(source / "dev" / "attention_ladder.cu"), str(source / "src" / "paged_attention.cu")]
    build = ["nvcc", "-std=c++20", "-O3", "-arch=native", "-t", "0", f"-I{source / 'include'}"]
    gqa = ["--q-heads", "32", "--kv-heads", "8", "--repeats", "10"]
    return [[*build, "-o", str(program), *sources], [str(program), *gqa], [str(program), *gqa, "--host-percent", "10"]]


PARTS = (
    Part("build", "what the machine lacks from wheels/, and the extension for its card", 180, _build),
    Part("tests", "tests/cuda: every resource, copy, hint, kernel and graph", 150, _tests),
    Part("microbench", "speeds as ratios of one run", 240, _microbench),
    Part(
        "sanitizer",
        "compute-sanitizer over a few of the tests",
        90,
        _sanitizer,
        "Device not supported",
        "compute-sanitizer",
    ),
    Part("ladder", "versions of the attention kernel", 90, _ladder, needs="nvcc"),
    Part("doctor", "what this machine has", 30, _doctor),
)


def _of_sweeps(commands: Callable[[Path], list[list[str]]]) -> Callable[[Path], list[list[str]]]:
    """Parts of the sweeps read what others left: they are given the whole output folder."""
    return lambda folder: commands(folder.parent)


def _sweep(name: str) -> Callable[[Path], list[list[str]]]:
    return _of_sweeps(lambda output: measuring.measure_commands(measuring.sweep_named(name), output))


MEASURE_PARTS = (
    Part(
        "operators", "times of a model's operators, for the calibration", 150, _of_sweeps(measuring.operator_commands)
    ),
    Part("calibrate", "the profile of this card", 60, _of_sweeps(measuring.calibrate_commands)),
    Part("predict", "what the simulator says of every point", 130, _of_sweeps(measuring.predict_commands)),
    Part("sweep_llama_7b", "8 GiB of device KV, 0.5x to 2x", 320, _sweep("llama_7b"), goes_on=True),
    Part("sweep_llama3_8b", "1 GiB of device KV, 0.5x to 2x", 260, _sweep("llama3_8b"), goes_on=True),
    Part(
        "repeats",
        "five of each point that the verdict rests on",
        200,
        _of_sweeps(measuring.repeat_commands),
        goes_on=True,
    ),
    Part("peers", "other engines at the same batches", 150, _of_sweeps(measuring.all_peer_commands), goes_on=True),
    Part(
        "decode_step",
        "a decode step, eager and compiled, and its kernels",
        180,
        _of_sweeps(measuring.decode_step_commands),
        goes_on=True,
    ),
    Part("validate", "the simulator against every point", 30, _of_sweeps(measuring.validate_commands), always=True),
    Part("speed", "ratios with their targets", 20, _of_sweeps(measuring.speed_commands), always=True),
)
"""25 minutes together; each goes on where its time was up, since finished runs are kept."""


def run_part(part: Part, output: Path, limit_s: float, sources: str) -> Outcome:
    """Its log is output/<part>/log.txt."""
    folder = output / part.name
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    status, reason = _run_commands(part, folder, begun + limit_s)
    return Outcome(status, round(time.monotonic() - begun, 1), reason, sources)


def _run_commands(part: Part, folder: Path, deadline: float) -> tuple[Status, str]:
    if part.needs is not None and shutil.which(part.needs) is None:
        return "not run", f"{part.needs} is not on the PATH"
    log = folder / "log.txt"
    log.unlink(missing_ok=True)
    try:
        commands = part.commands(folder)
    except NotPossibleError as error:
        return "not run", str(error)
    failures = []
    for command in commands:
        code = _run_logged(command, log, deadline)
        said = log.read_text(errors="replace")
        if part.refused is not None and part.refused in said:
            return "not run", f"{command[0]}: {part.refused}"
        if code is None:
            return "failed", f"stopped at its time limit: {shlex.join(command)[:120]}"
        if code != 0:
            failures.append(f"status {code}: {_last_line(said)}")
            if not part.goes_on:
                break
    if failures:
        return "failed", "; ".join(failures)
    return "ok", _last_line(log.read_text(errors="replace"))


def _run_logged(command: Sequence[str], log: Path, deadline: float) -> int | None:
    """The exit status; None where time ran out, and then nothing that it started is left running."""
    end_children_with_me()
    with log.open("a") as out:
        out.write(f"$ {shlex.join(command)}\n")
        out.flush()
        environment = os.environ | {"UVM_KV_REQUIRE_GPU": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


class Report:
    """output/summary.json and the archive, both complete after every part."""

    def __init__(self, output: Path, commit: str | None, archive: str = ARCHIVE) -> None:
        self.output, self.commit, self.archive, self.sources = output, commit, archive, sources_digest()
        self.path = output / SUMMARY
        self.outcomes = self._earlier()

    def _earlier(self) -> dict[str, Outcome]:
        try:
            raw = json.loads(self.path.read_text())["parts"]
            return {name: Outcome(**fields) for name, fields in raw.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{self.path} is not a summary of gpu-check; give another OUT, or delete it") from None

    def kept(self, part: Part) -> bool:
        """Taken earlier, with these very sources. The build is of this machine, which may be another one now."""
        found = self.outcomes.get(part.name)
        if found is None or found.status != "ok" or found.sources != self.sources or part.always:
            return False
        return part.name != "build" or _is_built()

    def add(self, part: Part, outcome: Outcome) -> None:
        self.outcomes[part.name] = outcome
        about: dict[str, Any] = {
            "gpu": gpu(),
            "commit": self.commit,
            "python": sys.version.split()[0],
            "taken": datetime.now(UTC).isoformat(timespec="seconds"),
            "parts": {name: dataclasses.asdict(o) for name, o in self.outcomes.items()},
        }
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps(about, indent=2) + "\n")
        scratch.replace(self.path)
        self._pack()

    def _pack(self) -> None:
        scratch = self.output / (self.archive + ".tmp")
        with tarfile.open(scratch, "w:gz") as archive:
            for path in sorted(self.output.rglob("*")):
                if path.is_file() and not path.name.startswith(self.archive) and not os.access(path, os.X_OK):
                    archive.add(path, arcname=str(path.relative_to(self.output)))
        scratch.replace(self.output / self.archive)


def _is_built() -> bool:
    """Whether this machine's Python has the extension; asked in a process of its own."""
    code = "from uvm_kv.memory import extension; extension()"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


def chosen_parts(names: Sequence[str] | None, *, measure: bool = False) -> list[Part]:
    if not names:
        return [PARTS[0], *MEASURE_PARTS] if measure else list(PARTS)
    known = {part.name: part for part in (*PARTS, *MEASURE_PARTS)}
    for name in names:
        if name not in known:
            raise ValueError(f"--parts {name}: no such part; there are {', '.join(known)}")
    return [known[name] for name in known if name in names]


def check(parts: Sequence[Part], report: Report, *, seconds: float, force: bool) -> bool:
    """Runs the parts one after the other; whether none of them failed. Each is given what is left, or its own limit."""
    end = time.monotonic() + seconds
    for part in parts:
        left = end - time.monotonic()
        if report.kept(part) and not force:
            print(f"{part.name}: kept, taken with these sources", flush=True)
            continue
        if left < LEAST_SECONDS:
            outcome = Outcome("not run", 0.0, f"no time left of {seconds:g} s", report.sources)
        else:
            print(f"{part.name}: {part.about} ...", flush=True)
            outcome = run_part(part, report.output, min(part.limit_s, left), report.sources)
        report.add(part, outcome)
        print(f"{part.name}: {outcome.status} in {outcome.seconds:g} s: {outcome.reason}", flush=True)
        if part.name == "build" and outcome.status == "failed":
            print("without the extension the rest says nothing")
            break
    return all(report.outcomes[p.name].status != "failed" for p in parts if p.name in report.outcomes)


def sources_digest() -> str:
    """Of every file that decides what a part does; also where there is no git."""
    digest = hashlib.sha256()
    for folder in ("cuda_ext", "uvm_kv", "experiments", "tests/cuda"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SOURCES and path.is_file() and not path.name.startswith("_C"):
                digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _commit(given: str | None) -> str | None:
    """`given` is for a copy of the sources without their history. None where the sources differ from any commit."""
    state = git_state()
    if given is not None:
        if not re.fullmatch(r"[0-9a-f]{7,40}", given):
            raise ValueError(f"--commit {given}; it is the hash of a commit, 7 to 40 hex digits")
        return given
    sha: str | None = state["git_sha"]
    return sha if state["git_dirty"] is False else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 where no part failed, 1 where one did, 2 for a mistake in `arguments`, 3 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/gpu_check"), help="folder for logs and results")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these, in the usual order")
    parser.add_argument("--measure", action="store_true", help="the build and the parts of gpu-measure")
    parser.add_argument(
        "--seconds", type=float, help=f"for all of them together ({SECONDS}; with --measure {MEASURE_SECONDS})"
    )
    parser.add_argument("--force", action="store_true", help="take again what these sources have taken")
    parser.add_argument("--commit", help="of these sources, where they are a copy without their history")
    parser.add_argument("--list", action="store_true", help="the parts")
    options = parser.parse_args(arguments)
    if options.list:
        for title, listed in (("gpu-check", PARTS), ("gpu-measure", MEASURE_PARTS)):
            print(f"{title}:")
            print("\n".join(f"  {part.name:<16}{part.limit_s:>4} s at most  {part.about}" for part in listed))
        return 0
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), TOOLKIT])
    try:
        parts = chosen_parts(options.parts, measure=options.measure)
        commit = _commit(options.commit)
        if gpu() is None:
            print("no NVIDIA GPU on this machine (nvidia-smi shows none): nothing to check; make test runs without one")
            return 3
        options.output.mkdir(parents=True, exist_ok=True)
        report = Report(options.output.resolve(), commit)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = options.seconds or (MEASURE_SECONDS if options.measure else SECONDS)
    fine = check(parts, report, seconds=seconds, force=options.force)
    print(f"all of it: {report.output / ARCHIVE}")
    return 0 if fine else 1
