"""The command: which parts, where to, in what time; each part in a process of its own, so that one that breaks or
hangs takes nothing else with it."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from experiments.gpu_kit.microbench import attention, copies, curves, faults, in_place, peers, prefetch
from experiments.gpu_kit.microbench.bench import Bench, Settings
from experiments.gpu_kit.microbench.curves import curves_file
from experiments.gpu_kit.microbench.limits import Ledger, Limits, limits_for
from experiments.gpu_kit.microbench.manifest import gpu_facts, manifest
from experiments.gpu_kit.microbench.nominal import Prediction, card_of, predict
from experiments.gpu_kit.microbench.record import (
    FAILED,
    STOPPED,
    PartRecord,
    is_kept,
    part_lines,
    percent,
    read_part,
    text_table,
    write_json,
)
from uvm_kv.hw.host import available_host_bytes
from uvm_kv.memory import ExtensionMissingError, capabilities, num_devices
from uvm_kv.store.family import end_children_with_me

MINUTES, QUICK_MINUTES = 3.5, 1.0
GRACE_S, OVERTIME_S = 45.0, 20.0
"""After its time a part may finish the case that it is in; what all parts together may be over their time."""
WENT_WRONG, BAD_ARGUMENTS, NO_GPU = 1, 2, 3
NO_EVICTION = "not taken anywhere: `evicting` prefetches and faults above capacity, since nothing here oversubscribes"


class Part(NamedTuple):
    run: Callable[[Bench], None]
    most_s: float
    """Seconds of its own, at most."""
    what: str
    targets: str


PARTS: dict[str, Part] = {
    "attention": Part(
        attention.run, 80, "decode attention, KV in HBM", "0.85 of a large device copy; 1.0 of torch's attention"
    ),
    "in_place": Part(
        in_place.run, 80, "KV on the host or in both tiers", "0.95 of a streaming read; 0.90 of HBM plus link"
    ),
    "copies": Part(copies.run, 45, "copies of 2 MiB blocks, run lengths", "0.95 of one large cudaMemcpyAsync"),
    "prefetch": Part(
        prefetch.run, 45, "prefetch of 1 GiB, cost of a call", "0.85 of one large cudaMemcpyAsync, batched"
    ),
    "faults": Part(faults.run, 45, "fault-driven migration, a time a chunk", "none: reported"),
    "peers": Part(peers.run, 45, "CuPy, cuda.core and torch beside ours", "none: reported"),
    "link": Part(curves.run, 40, "link, copy and HBM points for a calibration", "none: reported"),
}
"""The most valuable first."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (--help says more)", file=sys.stderr)
        raise SystemExit(BAD_ARGUMENTS)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m experiments.microbench", description="Speed of the CUDA extension on this GPU.")
    parser.add_argument("--parts", nargs="+", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--output", type=Path, default=Path("results/microbench"), metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    parser.add_argument("--device", type=int, default=0, help="ordinal of the GPU")
    parser.add_argument("--minutes", type=float, help=f"for all parts; default {MINUTES}, with --quick {QUICK_MINUTES}")
    parser.add_argument("--force", action="store_true", help="take a part again that is there already")
    parser.add_argument("--commit", help="of this code, where the repository is not at hand")
    parser.add_argument("--list", action="store_true", help="say what the parts are, and stop")
    parser.add_argument("--child", type=float, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for part in options.parts or ():
        if part not in PARTS:
            parser.error(f"part {part!r} is unknown; allowed: {', '.join(PARTS)}")
    if options.device < 0:
        parser.error(f"--device {options.device}: it is 0 or more")
    if options.minutes is not None and not 0 < options.minutes < 1e4:
        parser.error(f"--minutes {options.minutes}: it must be positive")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output {options.output} is a file; give a folder")
    options.parts = [part for part in PARTS if part in (options.parts or PARTS)]
    if options.minutes is None:
        options.minutes = QUICK_MINUTES if options.quick else MINUTES
    return options


def see_only(device: int) -> None:
    """Makes this process and its children see one GPU, as device 0. Before the driver is loaded."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
        return
    visible = [name for name in given.split(",") if name]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[device] if device < len(visible) else ""  # What is hidden stays so.


def why_not() -> str | None:
    """Why nothing can be measured here, in a line."""
    try:
        found = num_devices()
    except ExtensionMissingError as error:
        return str(error)
    except RuntimeError as error:  # The extension's CudaError is one.
        return f"the GPU cannot be asked: {error}"
    return None if found else "no NVIDIA GPU here, so there is nothing to measure (--list says what would be)"


def list_lines() -> list[str]:
    rows = [[name, part.what, part.targets, f"{part.most_s:.0f}"] for name, part in PARTS.items()]
    return [*text_table(("part", "measures", "target", "at most s"), rows, num_left=3), NO_EVICTION]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 where a part failed or gave wrong results, 2 for a mistake in the command, 3 without a GPU."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = parse(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    if options.list:
        print("\n".join(list_lines()))
        return 0
    if options.child is None:
        see_only(options.device)
    if (why := why_not()) is not None:
        print(f"error: {why}", file=sys.stderr)
        return NO_GPU
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        return _child(options) if options.child is not None else _all(options, arguments)
    except OSError as error:
        print(f"error: {error.filename or options.output}: {error.strerror or error}", file=sys.stderr)
        return WENT_WRONG


def settings_of(options: argparse.Namespace, gpu: Mapping[str, Any]) -> dict[str, Any]:
    """What a part must have been taken with to be kept."""
    return {**Settings.of(quick=options.quick)._asdict(), "gpu": gpu["uuid"] or gpu["name"]}


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _setup() -> tuple[dict[str, Any], Limits, Prediction]:
    gpu = gpu_facts()
    limits = limits_for(gpu["free_bytes"], available_host_bytes() or 0)  # Unknown: none.
    return gpu, limits, predict(card_of(gpu["name"]), capabilities(0).max_link.generation)


def _child(options: argparse.Namespace) -> int:
    """One part, in this process; `options.child` is its time in seconds."""
    (name,) = options.parts
    begin = time.monotonic()
    gpu, limits, prediction = _setup()
    record = PartRecord(options.output / f"{name}.json", name, settings_of(options, gpu), _now())
    settings = Settings.of(quick=options.quick)
    bench = Bench(record, Ledger(limits), prediction, settings, begin + options.child)
    PARTS[name].run(bench)
    record.content["peak_bytes"] = dict(bench.ledger.peak)
    record.finish(time.monotonic() - begin)
    return 0


def _all(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    gpu, limits, prediction = _setup()
    facts = manifest(gpu, limits, prediction, argv=arguments, date=_now(), commit=options.commit)
    write_json(options.output / "manifest.json", facts)
    head = head_lines(facts, limits, prediction)
    print("\n".join(head), flush=True)
    settings = settings_of(options, gpu)
    end = time.monotonic() + 60 * options.minutes
    went_wrong = False
    for name in options.parts:
        path = options.output / f"{name}.json"
        if not options.force and is_kept(read_part(path), settings):
            print(f"== {name}: kept as it is in {path} (--force takes it again)\n", flush=True)
            continue
        left = min(PARTS[name].most_s * (0.5 if options.quick else 1.0), end - time.monotonic())
        if left <= 0:
            print(f"== {name}: not run, the {options.minutes:g} minutes are used up (--minutes)\n", flush=True)
            continue
        went_wrong |= not _run_part(options, name, path, left, end - time.monotonic() + OVERTIME_S)
        _write_tables(options.output, head)  # After every part: whoever stops us keeps what there is.
        _write_curves(options.output, facts, settings)
    print("\n".join(_write_tables(options.output, head)), flush=True)
    print(_write_curves(options.output, facts, settings))
    return WENT_WRONG if went_wrong else 0


def _run_part(options: argparse.Namespace, name: str, path: Path, seconds: float, at_most: float) -> bool:
    """True where it came to its end and nothing in it failed. `seconds`: no case is begun after them; `at_most`: that
    is left to the whole command."""
    limit = min(seconds + GRACE_S, at_most)
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "experiments.microbench", "--parts", name, "--output", str(options.output)]
    command += ["--child", f"{seconds:.1f}", *(["--quick"] if options.quick else [])]
    why = None
    end_children_with_me()
    try:
        code = subprocess.run(command, timeout=limit, check=False, stdin=subprocess.DEVNULL).returncode
        why = None if code == 0 else f"its process ended with status {code}"
    except subprocess.TimeoutExpired:
        why = f"it was stopped after {limit:.0f} s"
    content = read_part(path)
    if content is None:
        print(f"== {name}: failed, {why or 'it left no result'}\n", flush=True)
        return False
    if why is not None or content["status"] == STOPPED:
        content["notes"].append(f"incomplete: {why or 'it ended before its end'}")
        write_json(path, content)
    print("\n".join(part_lines(content)), flush=True)
    return why is None and all(case["status"] != FAILED for case in content["cases"])


def head_lines(facts: Mapping[str, Any], limits: Limits, prediction: Prediction) -> list[str]:
    gpu = facts["gpu"]
    sha, dirty = facts["git_sha"], facts["git_dirty"]
    code = "unknown" if sha is None else sha[:12] + (" and uncommitted changes" if dirty else "")
    known = {name: f"{value:g}" for name, value in prediction._asdict().items() if value is not None}
    return [
        f"{gpu['name']}, driver {gpu['driver'] or 'unknown'}, CUDA {gpu['cuda_driver']}, code {code}, {facts['date']}",
        f"extension with CUDA {gpu['cuda_runtime']}, built for {gpu['built_for']}",
        f"PCIe generation, width: {gpu['pcie_now']} now, {gpu['pcie_most']} at most; NUMA node {gpu['host_numa_node']}",
        "limits in GB: " + ", ".join(f"{name} {value / 1e9:.1f}" for name, value in limits._asdict().items()),
        "predicted, GB/s and us: " + (", ".join(f"{k} {v}" for k, v in known.items()) or "nothing for this card"),
        NO_EVICTION,
        "",
    ]


def target_lines(contents: Sequence[Mapping[str, Any]]) -> list[str]:
    """All verdicts in one table."""
    rows = [
        [r["name"], f"{r['median']:.3f}", percent(r["spread"]), f"{r['target']:.2f}", r["verdict"]]
        for content in contents
        for r in content["ratios"]
        if r["target"] is not None
    ]
    return [*text_table(("target", "median", "spread", "target", "verdict"), rows), ""] if rows else []


def _write_tables(output: Path, head: Sequence[str]) -> list[str]:
    """Write the tables of the finished parts; returns the table of the targets."""
    contents = [content for name in PARTS if (content := read_part(output / f"{name}.json")) is not None]
    targets = target_lines(contents)
    lines = [*head, *targets, *(line for content in contents for line in part_lines(content))]
    (output / "tables.txt").write_text("\n".join(lines))
    return targets


def _write_curves(output: Path, facts: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """From every part of this GPU, taken now or kept; returns what became of it, in a line."""
    path, gpu = output / "curves.json", facts["gpu"]
    contents = [content for name in PARTS if (content := read_part(output / f"{name}.json")) is not None]
    same = [content for content in contents if content["settings"]["gpu"] == settings["gpu"]]
    found = curves_file(same, card_of(gpu["name"]), gpu, facts["date"][:10], facts["git_sha"])
    if found is None:
        return (
            "no curves.json: no points, or a card whose nominal figures experiments/gpu_kit/microbench/nominal.py lacks"
        )
    write_json(path, found)
    points = ", ".join(f"{name} {len(points)}" for name, points in found["curves"].items())
    return f"{path}: {points}; {_checked(path)}"


def _checked(path: Path) -> str:
    """Whether calibrate would take it; its reader needs Hydra, which the machine with the GPU may lack."""
    try:
        reader = importlib.import_module("uvm_kv.calibrate.curves")
    except ImportError:
        return "not read back, which needs Hydra"
    try:
        reader.read_curves(path)
    except ValueError as error:
        return f"calibrate refuses it: {error}"
    return "calibrate reads it"
