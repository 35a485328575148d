"""The commands for a machine with a GPU: take parts, keep logs, tables and JSON in a folder and in one archive.

    make gpu-check OUT=dir                                          build, tests, speeds: within eight minutes
    make gpu-measure OUT=dir                                        the measured sweeps: calls of nine minutes at most
    make measure                                                    all of it for the owner of a card, who is asked
                                                                    before it is oversubscribed (or CONSENT=yes)
    python -m experiments.gpu_check --output dir --parts tests      one part of gpu-check or gpu-measure
    python -m experiments.measure --list

The network is not needed where `wheels/` holds what the machine lacks (`make wheels` fills it). What a part took is
kept, so that the command can be given again; docs/gpu_check.md, docs/measure.md. Needs the standard library only, since
it installs the rest.
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
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from experiments.gpu_kit.consent import failure_lines, has_consent, slug, warnings
from experiments.gpu_kit.parts import (
    CHECK,
    CONSENT,
    MEASURE,
    OWN,
    PATIENCE,
    ROOT,
    NotPossibleError,
    Part,
    parts_of,
)
from uvm_kv.store.family import end_children_with_me
from uvm_kv.store.provenance import git_state, gpu

SUMMARY = "summary.json"
SECONDS = {CHECK: 470, MEASURE: 530}
"""All parts of one call together; the command given again resumes."""
SOURCES = (".py", ".cpp", ".hpp", ".cu", ".cuh", ".txt")
TOOLKIT = "/usr/local/cuda/bin"
"""Where nvcc and compute-sanitizer are when they are not on the PATH."""
LEAST_SECONDS = 10
"""No part is begun with less."""

Status = Literal["ok", "failed", "not run"]


@dataclasses.dataclass(frozen=True)
class PartOutcome:
    status: Status
    seconds: float
    reason: str
    sources: str
    """Digest of what was built and run."""


def run_part(part: Part, output: Path, limit_s: float, sources: str) -> PartOutcome:
    """Its log is output/<part>/log.txt."""
    folder = output / part.name
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    status, reason = _run_commands(part, folder / "log.txt", begun + limit_s)
    return PartOutcome(status, round(time.monotonic() - begun, 1), reason, sources)


def _run_commands(part: Part, log: Path, deadline: float) -> tuple[Status, str]:
    if part.needs is not None and shutil.which(part.needs) is None:
        return "not run", f"{part.needs} is not on the PATH"
    log.unlink(missing_ok=True)
    try:
        commands = part.commands(log.parents[1])
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

    def __init__(self, output: Path, commit: str | None, archive: str = "gpu-check.tar.gz") -> None:
        self.output, self.commit, self.archive, self.sources = output, commit, archive, sources_digest()
        self.path = output / SUMMARY
        self.outcomes = self._earlier()

    def _earlier(self) -> dict[str, PartOutcome]:
        try:
            raw = json.loads(self.path.read_text())["parts"]
            return {name: PartOutcome(**fields) for name, fields in raw.items()}
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

    def add(self, part: Part, outcome: PartOutcome) -> None:
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


def check(parts: Sequence[Part], report: Report, *, seconds: float, force: bool) -> bool:
    """Runs the parts one after the other; whether none of them failed. Each is given what is left, or its own limit."""
    end = time.monotonic() + seconds
    for part in parts:
        left = end - time.monotonic()
        if report.kept(part) and not force:
            print(f"{part.name}: kept, taken with these sources", flush=True)
            continue
        if left < LEAST_SECONDS:
            outcome = PartOutcome("not run", 0.0, f"no time left of {seconds:g} s", report.sources)
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
    """Hash of every file that decides what a part does; it needs no git."""
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


def main(arguments: Sequence[str] | None = None, *, own: bool = False) -> int:
    """Exit status: 0 where no part failed, 1 where one did, 2 for a mistake in `arguments`, 3 without a GPU. `own`: the
    command is `measure`, for the owner of a card."""
    name = "measure" if own else "gpu_check"
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{name}", description=__doc__.splitlines()[0])
    where = "results/measured/<gpu>" if own else "results/gpu_check"
    parser.add_argument("--output", type=Path, help=f"folder for logs and results (default {where})")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these, in the usual order")
    parser.add_argument("--force", action="store_true", help="take again what these sources have taken")
    parser.add_argument("--commit", help="of these sources, where they are a copy without their history")
    parser.add_argument("--list", action="store_true", help="the parts")
    if not own:
        parser.add_argument("--measure", action="store_true", help="the build and the parts of gpu-measure")
        parser.add_argument("--seconds", type=float, help=f"for all of them together ({SECONDS})")
    options = parser.parse_args(arguments)
    patience = PATIENCE if own else 1
    if options.list:
        for command in (OWN,) if own else (CHECK, MEASURE):
            print(f"{command}:")
            for it in parts_of(command):
                print(f"  {it.name:<24}{it.limit_s * patience:>5} s at most  {it.about}")
        return 0
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), TOOLKIT])
    command = OWN if own else MEASURE if options.measure else CHECK
    try:
        parts = [dataclasses.replace(it, limit_s=it.limit_s * patience) for it in parts_of(command, options.parts)]
        commit, card = _commit(options.commit), gpu()
        if card is None:
            rest = "nothing to measure" if own else "nothing to check; make test runs without one"
            print(f"no NVIDIA GPU on this machine (nvidia-smi shows none): {rest}")
            return 3
        if own:
            print("".join(f"{line}\n" for line in warnings()), end="", file=sys.stderr)
            if any(it.name.startswith("oversubscribed") for it in parts):
                asked = input if sys.stdin.isatty() else None
                os.environ[CONSENT] = "yes" if has_consent(card["name"], os.environ, asked) else "no"
        default = ROOT / "results" / "measured" / slug(card["name"]) if own else Path("results/gpu_check")
        output = (options.output or default).resolve()
        output.mkdir(parents=True, exist_ok=True)
        report = Report(output, commit, *([f"measured-{output.name}.tar.gz"] if own else []))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = sum(it.limit_s for it in parts) + 60 if own else options.seconds or SECONDS[command]
    fine = check(parts, report, seconds=seconds, force=options.force)
    if own:
        print("\n".join(failure_lines(output)))
    print(f"all of it{', to be sent or committed' if own else ''}: {output / report.archive}")
    return 0 if fine else 1
