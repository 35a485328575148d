"""Speed of the simulator and the engine, each beside its target. Nothing here asserts: machines are noisy.

    python -m experiments.bench

The yardstick is Vidur, which counts blocks instead of placing them: about 7,000 steps a second on such a machine (300
ShareGPT requests at 10/s, Llama-2-7B on an A100: 2,924 batches in 0.41 s), after 12 minutes of training its predictors
once, in 1 GB. Times are the best of several runs in this process; start-up and memory are those of a fresh one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from uvm_kv.config.grammar import parse
from uvm_kv.config.names import CONF_DIR
from uvm_kv.config.schema import register
from uvm_kv.engine import Engine
from uvm_kv.job.build import build_placement, build_roofline, build_runner, build_scheduler
from uvm_kv.job.resolve import Resolved, resolve
from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.ops import NO_TRAFFIC
from uvm_kv.runner.base import ModelRunner
from uvm_kv.sched.plan import StepOutput, StepPlan, StepTiming
from uvm_kv.sched.request import Request
from uvm_kv.telemetry.recorder import Recorder
from uvm_kv.types import GIB
from uvm_kv.workload.lengths import Lengths
from uvm_kv.workload.source import all_at_once

REPEATS = 3


class ScriptedRunner(ModelRunner):
    """Does nothing in one nanosecond: what is left of a step's time is the engine's."""

    def __init__(self, capacity: KVCapacity) -> None:
        self._capacity, self._now = capacity, 0

    def capacity(self) -> KVCapacity:
        return self._capacity

    def add(self, request: Request) -> None:
        pass

    def remove(self, request_id: int) -> None:
        pass

    def now_ns(self) -> int:
        return self._now

    def wait_until_ns(self, time_ns: int) -> None:
        self._now = max(self._now, time_ns)

    def execute(self, plan: StepPlan) -> StepOutput:
        self._now += 1
        return StepOutput(StepTiming(self._now - 1, self._now), NO_TRAFFIC)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Result:
    name: str
    value: float
    unit: str
    target: float
    at_least: bool

    @property
    def ratio(self) -> float:
        """Above 1 is better than the target."""
        return self.value / self.target if self.at_least else self.target / self.value


def compose_job(*overrides: str) -> Resolved:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return resolve(compose("config", list(overrides)))


def seconds_per_step(job: Resolved, num_seqs: int, *, scripted: bool = False, max_steps: int = 2000) -> float:
    """Best of several runs of `num_seqs` equal requests that start at once, with the whole engine around them."""
    workload = job.config.workload
    assert workload.prompt_tokens is not None and workload.output_tokens is not None
    best = float("inf")
    for _ in range(REPEATS):
        roofline = build_roofline(job)
        scheduler = build_scheduler(job, build_placement(job, roofline))
        runner = ScriptedRunner(job.capacity) if scripted else build_runner(job, roofline)
        source = all_at_once([Lengths(workload.prompt_tokens, workload.output_tokens)] * num_seqs)
        recorder = Recorder()
        engine = Engine(scheduler, runner, source, recorder)
        engine.run(max_steps=8)  # The prefills.
        clock, before = time.perf_counter(), recorder.num_steps
        engine.run(max_steps=max_steps)
        best = min(best, (time.perf_counter() - clock) / (recorder.num_steps - before))
    return best


def fresh_process() -> tuple[float, float]:
    """Wall seconds of a run that stops after one step, and peak megabytes of a whole run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "uvm_kv.cli", "run", f"results_dir={folder}", "mechanism=managed_demand"]
        clock = time.perf_counter()
        subprocess.run([*command, "max_steps=1"], check=True, capture_output=True)
        start_up = time.perf_counter() - clock
        subprocess.run([*command, "batch_size=64"], check=True, capture_output=True)
    return start_up, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3


def managed_memory_mb() -> float:
    """Peak megabytes of a process that thrashes over 64 GiB of managed memory."""
    code = (
        "import resource, numpy as np\n"
        "from uvm_kv.runner.sim.uvm.block import FULL, Access\n"
        "from uvm_kv.runner.sim.uvm.driver import UvmDriver\n"
        "driver = UvmDriver(32768, 4096)\n"
        "for _ in range(3): driver.do(range(32768), Access(FULL, True, 5))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(done.stdout) / 1e3


def demo_sweep() -> float:
    with tempfile.TemporaryDirectory() as folder:
        clock = time.perf_counter()
        command = [sys.executable, "-m", "uvm_kv.cli", "run", "-m", "experiment=demo", f"results_dir={folder}"]
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - clock


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    options = parse(parser)
    register()
    lengths = ("workload.prompt_tokens=128", "workload.output_tokens=192")
    results = []
    for num_seqs, target in ((30, 7000), (64, 4000)):
        # Room for all of them, or for all but what the host holds.
        most = num_seqs * 320 * 2**19 * 95 // 100
        for mechanism, kv_bytes in (("device_resident", 12_000_000_000), ("pinned_balanced", most)):
            size = f"memory.device_kv_bytes={kv_bytes}"
            job = compose_job(f"mechanism={mechanism}", f"batch_size={num_seqs}", size, *lengths)
            rate = 1 / seconds_per_step(job, num_seqs)
            results.append(Result(f"simulated steps, {num_seqs} sequences, {mechanism}", rate, "1/s", target, True))
    managed = ("mechanism=managed_demand", "batch_size=40", "workload.prompt_tokens=768", "workload.output_tokens=512")
    size = f"memory.device_kv_bytes={8 * GIB}"
    for what, layout, num_seqs, target in (
        ("thrashing", "layer_major", 40, 500),
        ("thrashing", "block_major", 40, 50),
        ("resident", "layer_major", 12, 7000),
    ):
        rate = 1 / seconds_per_step(compose_job(*managed, size, f"layout={layout}"), num_seqs, max_steps=400)
        name = f"simulated steps, managed_demand over 8 GiB, {num_seqs} sequences, {layout}, {what}"
        results.append(Result(name, rate, "1/s", target, True))
    results.append(Result("peak memory of a run with 64 GiB of managed memory", managed_memory_mb(), "MB", 200, False))
    engine = compose_job(
        "mechanism=device_resident",
        "batch_size=128",
        "memory.device_kv_bytes=12000000000",
        "workload.prompt_tokens=32",
        "workload.output_tokens=144",
    )
    per_sequence = seconds_per_step(engine, 128, scripted=True) / 128 * 1e6
    results.append(
        Result("engine, scheduler and blocks per sequence and step, batch 128", per_sequence, "us", 2, False)
    )
    start_up, peak = fresh_process()
    results.append(Result("start-up: a run of one step", start_up, "s", 1.5, False))
    results.append(Result("peak memory of a run", peak, "MB", 300, False))
    results.append(Result("sweep of make demo", demo_sweep(), "s", 120, False))
    if options.json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=1))
        return 0
    table = Table(title="Speed, on this machine, now")
    for name in ("what", "measured", "target", "times better"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for r in results:
        bound = "at least" if r.at_least else "under"
        measured = format(r.value, ",.0f" if r.value >= 100 else ".3g")
        table.add_row(r.name, f"{measured} {r.unit}", f"{bound} {r.target:,g} {r.unit}", f"{r.ratio:.1f}")
    Console(width=120).print(table)
    return 0
