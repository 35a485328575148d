"""--dry-run: the jobs of a command, which of them are complete, and about how long the rest takes."""

from __future__ import annotations

import os
from math import inf
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from rich.console import Console
from rich.progress import Progress

from uvm_kv.config.command import compose_config
from uvm_kv.config.names import folders_of
from uvm_kv.job.build import Job, build_roofline, is_done, jobs_of, workload_of
from uvm_kv.job.recording import with_recorded_config
from uvm_kv.job.resolve import resolve
from uvm_kv.store.code import is_of_other_code
from uvm_kv.store.whole import read_run
from uvm_kv.types import MemoryKind
from uvm_kv.workload.lengths import mean_lengths

# Rough, of one core of a small server: what `make bench` measures, and the paging of an oversubscribed step.
JOB_S = 0.4
STEP_S = 20e-6
SEQUENCE_S = 0.6e-6
PAGED_STEP_S = 0.14e-3
THRASHING_STEP_S = 0.7e-3
COPIED_STEP_S = 0.5e-3
"""Wall time to simulate one step: managed memory within the device, managed memory beyond it, and copies ahead. Taken
from the durations in the manifests of results/reference/batch_sweep."""
CPU_TOKENS_PER_S = 100.0
GPU_JOB_S = 15.0
"""With runner=cuda: KV memory, graphs and its share of the process and the model, which a mechanism's jobs share."""


def estimate_s(job: Job) -> float:
    """About how long a job takes on one core; with runner=cuda, on the card that `hardware` describes."""
    config, capacity = job.resolved.config, job.resolved.capacity
    lengths = workload_of(job).lengths
    prompt, output = mean_lengths(lengths)
    if config.runner == "cpu":
        return JOB_S + len(lengths) * (prompt / 10 + output) / CPU_TOKENS_PER_S
    blocks = max(1, job.resolved.spec.num_blocks(round(prompt + output)))
    host = capacity.num_host_blocks if config.scheduler.admission == "worst_case" else 0
    running = max(1, min(config.batch_size, (capacity.num_device_blocks + host) // blocks))
    steps = len(lengths) * output / running
    if config.max_steps is not None:
        steps = min(steps, config.max_steps)
    if config.runner == "cuda":
        return GPU_JOB_S + _served_s(job, steps, running)
    beyond = running * blocks > capacity.num_device_blocks
    step_s = STEP_S + running * SEQUENCE_S
    if job.resolved.memory is MemoryKind.MANAGED:
        step_s += THRASHING_STEP_S if beyond else PAGED_STEP_S
    if beyond and config.placement.name == "prefetch_ahead":
        step_s += COPIED_STEP_S
    return JOB_S + steps * step_s


def _served_s(job: Job, steps: float, running: int) -> float:
    """Time of the steps on a card by its roofline, without the cost of memory traffic. Prompts are prefilled in whole
    chunks."""
    config, roofline = job.resolved.config, build_roofline(job.resolved)
    lengths = workload_of(job).lengths
    prompt, output = mean_lengths(lengths)
    chunk, layers = config.scheduler.max_num_batched_tokens, job.resolved.spec.num_layers
    decode_s = roofline.dense_s(running) + roofline.decode_attention_s(running * (prompt + output / 2))
    seconds = steps * (layers * decode_s + roofline.head_s(running, running))
    if config.workload.start == "cold":
        seconds += len(lengths) * prompt / chunk * layers * roofline.dense_s(chunk)
    return min(seconds, config.max_seconds or inf)


def list_jobs(overrides: list[Any], experiment: str) -> int:
    """Print one line per run, and the sum. Returns the exit status: 1 where a job is refused."""
    console = Console()
    combinations = BasicSweeper.split_arguments(overrides, None)[0]
    left = refused = complete = others = 0.0
    one_by_one = any(o.key_or_group == "hydra/launcher" and o.value() == "basic" for o in overrides)
    with Progress(console=Console(stderr=True), transient=True, disable=not console.is_terminal) as progress:
        for number, combination in enumerate(progress.track(combinations, description="composing")):
            name = " ".join(combination) or "(defaults)"
            try:
                composed = with_recorded_config(compose_config(list(combination)), combination)
                jobs = jobs_of(resolve(composed, folders_of(overrides)), experiment)
            except ValueError as error:
                refused += 1
                console.print(f"{number:4d}  refused   {name}: {error}", markup=False, highlight=False, soft_wrap=True)
                continue
            for job in jobs:
                one_by_one |= job.resolved.config.runner == "cuda"  # One process owns the GPU.
                done, seconds = is_done(job), estimate_s(job)
                complete += done
                left += 0.0 if done else seconds
                by_other_code = done and is_of_other_code(read_run(job.directory)[1], job.resolved.config.runner)
                others += by_other_code
                state = "complete, by other code" if by_other_code else "complete" if done else f"{seconds:6.1f} s"
                line = f"{number:4d}  {state:8s}  {name}  -> {job.directory.name}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    cores = 1 if one_by_one else os.cpu_count() or 1
    how = "one after another" if cores == 1 else f"on {cores} cores"
    console.print(
        f"{len(combinations)} jobs, {complete:.0f} runs complete"
        + (f" ({others:.0f} by other code; rerun=changed runs them again)" if others else "")
        + f", {refused:.0f} jobs refused; about "
        f"{left / cores:.0f} s left {how}",
        highlight=False,
        soft_wrap=True,
    )
    return 1 if refused else 0
