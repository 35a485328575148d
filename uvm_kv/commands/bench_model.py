"""SmolLM2 on the CPU: our engine beside transformers' generate and generate_batch, in one process.

    python -m experiments.bench_model [--sizes 1 8 32 64] [--dtypes float32 bfloat16]

Prompts of 64 tokens, 64 new tokens each, greedy, no stop token. `generate` runs one static batch, with its dynamic and
its static cache; `generate_batch` is transformers' continuous batching. Each figure is the best of several runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from uvm_kv.config.grammar import parse
from uvm_kv.config.names import CONF_DIR
from uvm_kv.config.schema import register
from uvm_kv.engine import Engine
from uvm_kv.job.build import build_placement, build_roofline, build_runner, build_scheduler
from uvm_kv.job.models import load_served
from uvm_kv.job.resolve import Resolved, resolve
from uvm_kv.sched.request import Request
from uvm_kv.telemetry.recorder import Recorder
from uvm_kv.workload.source import OpenLoop

PROMPT_TOKENS = NEW_TOKENS = 64
REPEATS = 2


def best_rates(ways: dict[str, Callable[[], object]], num_tokens: int) -> dict[str, float]:
    """Tokens per second of the fastest run of each, after one to warm up. They take turns, so that what else the
    machine does meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + REPEATS):
        for name, run in ways.items():
            clock = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - clock)
    return {name: num_tokens / min(times[1:]) for name, times in seconds.items()}


def our_job(num_seqs: int, dtype: str) -> Resolved:
    overrides = ["runner=cpu", "model=smollm2_135m", "mechanism=device_resident", f"batch_size={num_seqs}"]
    overrides += [f"dtype={dtype}", f"workload.prompt_tokens={PROMPT_TOKENS}", f"workload.output_tokens={NEW_TOKENS}"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return resolve(compose("config", [*overrides, "scheduler.max_num_batched_tokens=4096"]))


def requests_of(prompts: list[list[int]]) -> list[Request]:
    return [Request(i, len(p), NEW_TOKENS, prompt_ids=tuple(p)) for i, p in enumerate(prompts)]


def serve(job: Resolved, runner: Any, prompts: list[list[int]]) -> list[list[int]]:
    """All prompts at once through scheduler, engine and runner; the output ids."""
    requests = requests_of(prompts)
    scheduler = build_scheduler(job, build_placement(job, build_roofline(job)))
    Engine(scheduler, runner, OpenLoop(requests), Recorder()).run()
    return [r.token_ids for r in requests]


def generate_batch(model: Any, prompts: list[list[int]]) -> None:
    """All prompts at once through transformers' continuous batching, its start and end included."""
    from uvm_kv.runner.torch.peers import Continuous, ContinuousOptions

    peer = Continuous(
        model,
        ContinuousOptions(),
        max_prompt_tokens=PROMPT_TOKENS,
        max_output_tokens=NEW_TOKENS,
        num_requests=len(prompts),
    )
    for request in requests_of(prompts):
        peer.submit(request)
    left = len(prompts)
    while left:
        left -= peer.finished(1.0) is not None
    peer.close()


def measure(num_seqs: int, dtype: str) -> dict[str, float]:
    """Tokens per second of each way."""
    # torch lives in runner.torch; what is compared with is transformers' own, asked for by that room.
    from uvm_kv.runner.torch.peers import Generate, own_attention

    job = our_job(num_seqs, dtype)
    rng = np.random.default_rng(0)
    prompts = rng.integers(5, job.model.vocab_size, (num_seqs, PROMPT_TOKENS)).tolist()
    runner = build_runner(job, build_roofline(job))
    with own_attention(load_served(job)) as model:
        dynamic, static = Generate(model, "dynamic"), Generate(model, "static")
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda: serve(job, runner, prompts),
            "generate, dynamic cache": lambda: dynamic.serve(requests_of(prompts)),
            "generate, static cache": lambda: static.serve(requests_of(prompts)),
            "generate_batch": lambda: generate_batch(model, prompts),
        }
        rates = best_rates(ways, num_seqs * NEW_TOKENS)
    runner.close()
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(description="SmolLM2 on the CPU, ours beside transformers'.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", action="store_true", help="tokens per second, as a list of objects")
    arguments = parse(parser)
    register()
    console, found = Console(width=120, quiet=arguments.json), []
    table = Table(title=f"Tokens per second, {PROMPT_TOKENS} prompt and {NEW_TOKENS} new tokens, on this machine, now")
    table.add_column("dtype, sequences")
    names = ("ours", "generate, dynamic cache", "generate, static cache", "generate_batch", "x generate", "x batch")
    for name in names:
        table.add_column(name, justify="right")
    for dtype in arguments.dtypes:
        for num_seqs in arguments.sizes:
            rates = measure(num_seqs, dtype)
            found.append({"dtype": dtype, "num_seqs": num_seqs, **rates})
            ours, *others = (rates[name] for name in names[:4])
            cells = [f"{rates[name]:.0f}" for name in names[:4]]
            ratios = (ours / max(others[:2]), ours / others[2])
            table.add_row(f"{dtype}, {num_seqs}", *cells, *(f"{ratio:.2f}" for ratio in ratios))
            console.print(f"{dtype}, {num_seqs} sequences: {', '.join(cells)} tokens/s", style="dim")
    console.print(table)
    if arguments.json:
        print(json.dumps(found, indent=1))
    return 0
