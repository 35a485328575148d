"""Where a step's time goes: some steps of one job under torch's profiler, and the nsys and ncu commands for the rest.

    python -m experiments.profile runner=cpu model=smollm2_135m batch_size=8
    python -m experiments.profile --steps 16 --warmup 4 --output DIR runner=cuda mechanism=pinned_balanced

Overrides are those of experiments.run. Steps are recorded after the warm-up, to DIR/trace.json (chrome://tracing,
ui.perfetto.dev) with a table beside it. No run is written: profiled steps are slower than others (docs/profile.md).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

from experiments.gpu_kit.step_profile import kernel_line, layer_kernels, step_profile, table_lines
from uvm_kv.commands.run import preflight
from uvm_kv.config.command import compose_config
from uvm_kv.config.names import folders_of, with_implied
from uvm_kv.config.schema import register
from uvm_kv.engine import Engine
from uvm_kv.job.build import (
    Job,
    build_placement,
    build_roofline,
    build_runner,
    build_scheduler,
    build_source,
    check_requests_fit,
    jobs_of,
    workload_of,
)
from uvm_kv.job.resolve import resolve
from uvm_kv.sweep.worker import explain
from uvm_kv.telemetry.recorder import Recorder
from uvm_kv.types import OUR_ENGINE

FOLDER = Path("results/profiles")
OUR_KERNELS = "regex:^(attention|merge|append|copy)_kernel"
LAUNCHES = 12
"""Kernels that ncu measures: it runs each many times."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m experiments.profile", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=8, help="steps to record (8)")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them (4)")
    parser.add_argument("--output", type=Path, help="folder for the trace and the table (results/profiles/RUN)")
    parser.add_argument("--plain", action="store_true", help="no torch profiler: the process runs under nsys or ncu")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of experiments.run")
    given = parser.parse_intermixed_args(arguments)
    for name, least in (("steps", 1), ("warmup", 0)):
        if getattr(given, name) < least:
            raise ValueError(f"--{name} {getattr(given, name)}; it must be at least {least}")
    return given


def job_of(overrides: list[str]) -> Job:
    """ValueError for what is not one job of a real model."""
    request = preflight(with_implied(overrides))
    if request.num_jobs > 1:
        raise ValueError(f"{request.num_jobs} jobs are asked for; a profile is of one")
    composed = compose_config([o.input_line for o in request.overrides])
    if composed.engine != OUR_ENGINE:
        raise ValueError(
            f"engine={composed.engine}: its steps are transformers' own and have none of our ranges; drop engine, or "
            f"give experiments.run to nsys"
        )
    if composed.runner not in ("cpu", "cuda"):
        raise ValueError(f"runner={composed.runner} runs no model, so that nothing takes time; give runner=cpu or cuda")
    return jobs_of(resolve(composed, folders_of(request.overrides)), "profile")[0]


def run(job: Job, recorder: Any, *, num_steps: int, warmup: int) -> int:
    """Serve the job until `num_steps` are recorded after `warmup`, or it ends; how many were."""
    resolved = job.resolved
    roofline, workload = build_roofline(resolved), workload_of(job)
    check_requests_fit(resolved, workload.lengths)
    runner = build_runner(resolved, roofline, job.sampling_seed)
    steps = Recorder()
    scheduler = build_scheduler(resolved, build_placement(resolved, roofline))
    engine = Engine(scheduler, runner, build_source(job, workload), steps)
    recording = False
    try:
        engine.run(max_steps=warmup)
        if steps.num_steps == warmup:
            recorder.start()
            recording = True
            engine.run(max_steps=warmup + num_steps)
    finally:
        if recording:
            recorder.stop()
        runner.close()
    if steps.num_steps <= warmup:
        raise ValueError(f"the job ends after {steps.num_steps} steps, in its warm-up; lower --warmup")
    return steps.num_steps - warmup


def commands(job: Job, overrides: list[str], output: Path, *, num_steps: int, warmup: int) -> dict[str, str]:
    """Tool -> the command that shows what torch's profiler does not."""
    this = [sys.executable, "-m", "experiments.profile", "--plain", "--steps", str(num_steps), "--warmup", str(warmup)]
    this += ["runner=cuda" if o == "runner=cpu" else o for o in overrides]
    managed = job.resolved.config.memory.kind == "managed"
    faults = ["--cuda-um-gpu-page-faults=true", "--cuda-um-cpu-page-faults=true"] if managed else []
    nsys = ["nsys", "profile", "--trace=cuda,nvtx,osrt", "--cuda-graph-trace=node", *faults]
    nsys += ["--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--force-overwrite=true"]
    reports = "nvtx_sum,cuda_gpu_kern_sum,cuda_gpu_mem_size_sum" + (",um_total_sum" if managed else "")
    ncu = ["ncu", "--profile-from-start", "off", "--nvtx", "--kernel-name", OUR_KERNELS]
    ncu += ["--launch-count", str(LAUNCHES), "--set", "full", "--force-overwrite"]
    return {
        "timeline": shlex.join([*nsys, "--output", str(output / "nsys"), *this]),
        "its sums": shlex.join(["nsys", "stats", "--report", reports, str(output / "nsys.nsys-rep")]),
        "our kernels": shlex.join([*ncu, "--export", str(output / "ncu"), *this]),
    }


def main(arguments: list[str] | None = None) -> int:
    try:
        return _main(parse(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2


def _main(given: argparse.Namespace) -> int:
    register()
    job = job_of(given.overrides)
    config = job.resolved.config
    from uvm_kv.runner.torch import ranges
    from uvm_kv.runner.torch.profiling import ToolRange, TorchTrace

    if given.plain:
        if config.runner != "cuda":
            raise ValueError("--plain is for nsys and ncu, which see GPUs; it needs runner=cuda")
        num_steps = run(job, ToolRange(), num_steps=given.steps, warmup=given.warmup)
        print(f"{num_steps} steps of runner=cuda, without torch's profiler")
        return 0
    output: Path = given.output or FOLDER / job.directory.name
    output.mkdir(parents=True, exist_ok=True)
    trace = output / "trace.json"
    with ranges.recorded():
        num_steps = run(job, TorchTrace(trace), num_steps=given.steps, warmup=given.warmup)
    content = json.loads(trace.read_text())
    lines = table_lines(step_profile(content))
    if (kernels := layer_kernels(content)) is not None:
        lines.append(kernel_line(kernels))
    title = (
        f"{job.resolved.model.name} in {config.dtype}, {config.mechanism}, batch {config.batch_size}, "
        f"runner={config.runner}: {num_steps} steps after {given.warmup}"
    )
    text = "\n".join([title, *lines])
    (output / "table.txt").write_text(text + "\n")
    print(text)
    print(f"trace: {trace}")
    rest = commands(job, given.overrides, output, num_steps=given.steps, warmup=given.warmup)
    print("The rest" + ("" if config.runner == "cuda" else ", on a machine with a GPU, with runner=cuda") + ":")
    for what, command in rest.items():
        print(f"  {what}: {command}")
    return 0
