"""Run a job with a peer in the place of our engine, and write the same run directory.

The requests, their token ids and their arrivals are those of ours; the clock begins after the model is loaded, whatever
the peer allocates at its start is allocated, and a short generation has warmed it up.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf

from uvm_kv.config.schema import CONTINUOUS
from uvm_kv.job.build import Job, build_source, identity, run_job, workload_of
from uvm_kv.job.cuda import energy_meter
from uvm_kv.job.models import load_served
from uvm_kv.job.peers import cache_of, is_peer, page_size
from uvm_kv.job.resolve import Resolved
from uvm_kv.job.serving import outputs
from uvm_kv.job.workload import REQUESTS_PER_CLIENT
from uvm_kv.kvcache.manager import KVUsage
from uvm_kv.sched.request import Request
from uvm_kv.store.code import code_sha256
from uvm_kv.store.directories import write_run
from uvm_kv.store.provenance import manifest
from uvm_kv.telemetry.energy import EnergyMeter
from uvm_kv.telemetry.recorder import STEP_COLUMNS, Recorder, Table
from uvm_kv.telemetry.summary import summarize
from uvm_kv.types import NS_PER_S
from uvm_kv.workload.lengths import Lengths
from uvm_kv.workload.source import RequestSource

if TYPE_CHECKING:
    from uvm_kv.runner.torch.peers import Continuous, Generate

OnStep = Callable[[int, int, int], None]
LOOK_EVERY_S = 0.1
"""A peer with a thread of its own is asked so often whether a request has ended; energy is read then if it is due."""


@dataclass
class Served:
    """What a peer did, on a clock that begins at 0."""

    recorder: Recorder = field(default_factory=Recorder)
    steps: Table = field(default_factory=lambda: {name: [] for name in STEP_COLUMNS})
    """Empty for a peer that does not tell its steps."""
    tokens: list[tuple[Request, list[int]]] = field(default_factory=list)
    """For such a peer: each request, and the times of its tokens."""
    stopped_by: str = "done"
    summary: dict[str, Any] = field(default_factory=dict)
    """Fields that are the peer's own."""
    warnings: list[str] = field(default_factory=list)


def run_any_job(job: Job, **how: Any) -> dict[str, Any]:
    """Run and write one job, of our engine or of a peer; its summary. Called as `run_job` is."""
    return (run_peer_job if is_peer(job.resolved.config) else run_job)(job, **how)


def run_peer_job(
    job: Job,
    *,
    argv: list[str],
    on_step: OnStep | None = None,
    load: Callable[[Resolved], Any] = load_served,
) -> dict[str, Any]:
    """Run and write one job of a peer; its summary. Called as `run_job` is."""
    from uvm_kv.runner.torch.peers import own_attention

    resolved, config = job.resolved, job.resolved.config
    code = code_sha256(config.runner)  # Before it runs: files may be edited meanwhile.
    started, clock = datetime.now().astimezone().isoformat(timespec="seconds"), time.perf_counter()
    workload = workload_of(job)
    total, serving = len(workload.lengths), resolved.serving
    assert serving is not None
    serve = _serve_continuous if config.engine == CONTINUOUS else _serve_batches
    with energy_meter(config) as found, own_attention(load(resolved)) as model:
        meter = found or EnergyMeter(lambda: None)
        meter.rest()
        served = serve(job, model, workload.lengths, on_step or (lambda *_: None), meter)
    requests = served.recorder.requests()
    if served.tokens:
        unknown: list[int | None] = [None] * len(requests["request_id"])
        requests["num_preemptions"] = unknown
    told = [first is not None for first in requests["first_token_ns"]]
    taken: list[bool | None] = [bool(m and t) for m, t in zip(requests["measured"], told, strict=True)]
    requests["measured"] = taken
    if not all(told):
        served.warnings.append(
            f"{len(told) - sum(told)} requests were evicted and prefilled again; the peer does not tell when their "
            f"first token was there, so that no latency is taken of them"
        )
    if config.workload.arrival == "closed_loop" and total < REQUESTS_PER_CLIENT * config.batch_size:
        served.warnings.append(
            f"{total} requests for {config.batch_size} clients; {REQUESTS_PER_CLIENT} a client give a steady window"
        )
    measured = _measured(served, requests, meter)
    on_cpu = config.runner == "cpu"
    summary = {
        **identity(job),
        **measured,
        "warnings": [*measured["warnings"], *served.warnings],
        "stopped_by": served.stopped_by,
        "num_left_out": workload.num_left_out,
        "memory_budget": resolved.memory_account,
        "memory_emulated": on_cpu,
        "chat_template": None if resolved.serving is None else resolved.serving.chat_template,
        **dict.fromkeys(("eviction", "chunk_loss_bytes", "closed_form_ceiling", "closed_form")),
        **served.summary,
    }
    write_run(
        job.directory,
        config_yaml=OmegaConf.to_yaml(OmegaConf.structured(config)),
        manifest=manifest(
            code_sha256=code,
            memory_emulated=on_cpu,
            weights=config.model.weights,
            argv=argv,
            seed=config.seed,
            repeat=job.repeat,
            started=started,
            duration_s=time.perf_counter() - clock,
        ),
        steps=served.steps,
        requests=requests,
        summary=summary,
        outputs=outputs(served.recorder.finished, serving.tokenizer),
        replace=config.rerun != "false",
    )
    return summary


def _arrivals(job: Job, lengths: list[Lengths]) -> RequestSource:
    return build_source(job, dataclasses.replace(workload_of(job), lengths=lengths))


def _first_requests(job: Job, lengths: list[Lengths]) -> list[Request]:
    """The first batch, as a source of its own would bring it: to warm up with."""
    return _arrivals(job, lengths).arrivals(0)[: job.resolved.config.batch_size]


def _deadline_ns(job: Job) -> float:
    seconds = job.resolved.config.max_seconds
    return inf if seconds is None else seconds * NS_PER_S


def _said(settings: dict[str, Any], *, device: int | None, host: int | None, warm_up: str) -> dict[str, Any]:
    return {
        "kv_budget": "not settable" if device is None else "set",
        "device_kv_bytes": device,
        "host_kv_bytes": host,
        "warm_up": f"{warm_up}, before the clock starts",
        "peer": {"library": f"transformers {importlib.metadata.version('transformers')}", **settings},
    }


# ---- generate: one static batch after another


def _serve_batches(job: Job, model: Any, lengths: list[Lengths], on_step: OnStep, meter: EnergyMeter) -> Served:
    from uvm_kv.runner.torch.peers import WARM_UP_TOKENS, Generate, peak_bytes, reset_peak

    config, serving = job.resolved.config, job.resolved.serving
    assert serving is not None
    cache = cache_of(config)
    peer, served = Generate(model, cache, serving.stop_tokens), Served()
    settings = {"call": "generate", "cache": cache, "attention": model.config._attn_implementation}
    peer.warm_up(_first_requests(job, lengths))
    reset_peak(model)
    largest = _serve_in_order(peer, job, lengths, served, on_step, meter)
    token_bytes, budget = job.resolved.spec.token_bytes, config.memory.device_kv_bytes
    settings["kv_bytes_of_largest_batch"] = largest * token_bytes
    settings["peak_memory_bytes"] = peak_bytes(model)
    served.summary = _said(
        settings,
        device=None,
        host=None,
        warm_up=f"{WARM_UP_TOKENS} tokens of a batch like the first",
    )
    if budget is not None and largest * token_bytes > budget and config.engine == "hf_generate":
        served.warnings.append(
            f"its KV took {largest * token_bytes} bytes, beyond the job's {budget}, which it cannot be given"
        )
    return served


def _serve_in_order(
    peer: Generate, job: Job, lengths: list[Lengths], served: Served, on_step: OnStep, meter: EnergyMeter
) -> int:
    """Batches of `batch_size` in the order of arrival, the last one smaller. The most tokens that one held KV of,
    padding included."""
    source, waiting, largest = _arrivals(job, lengths), list[Request](), 0
    size, total, deadline = job.resolved.config.batch_size, len(lengths), _deadline_ns(job)
    start = time.perf_counter_ns()
    meter.start(lambda: time.perf_counter_ns() - start)
    while True:
        now = time.perf_counter_ns() - start
        waiting += source.arrivals(now)
        over = not waiting and not source.more_to_come()
        if over or now >= deadline:  # In the middle of a batch, perhaps, of which no request has ended.
            served.stopped_by = "done" if over else "seconds"
            meter.stop()
            return largest
        assert waiting, "a batch was served and its clients sent nothing"
        batch, waiting = waiting[:size], waiting[size:]
        times = peer.serve(batch, start + deadline, meter.step)
        ended = [t - start for t in times]
        _book_batch(served, batch, now, ended, num_waiting=len(waiting))
        rows = max(len(r.prompt_ids or ()) for r in batch) + len(ended) - 1
        largest = max(largest, len(batch) * rows)
        for request in batch:
            request.admitted_ns = now
            assert request.first_token_ns is not None
            request.first_token_ns -= start
            if request.finish_ns is not None:
                request.finish_ns -= start
                served.recorder.request(request)
                source.finished(request, request.finish_ns)
        on_step(0, served.recorder.num_requests, total)


def _book_batch(served: Served, batch: list[Request], begun: int, ended: list[int], *, num_waiting: int) -> None:
    """A row a step of the batch, of the rows that still had a token to put out."""
    before = begun
    for i, end in enumerate(ended):
        running = sum(r.num_generated > i for r in batch)
        row = dict.fromkeys(STEP_COLUMNS) | {
            "step": len(served.steps["step"]),
            "start_ns": before,
            "end_ns": end,
            "num_running": running,
            "num_waiting": num_waiting,
            "num_swapped": 0,
            "num_scheduled_tokens": running if i else sum(r.prompt_tokens for r in batch),
            "num_output_tokens": running,
            "preemptions_recompute": 0,
            "preemptions_swap": 0,
        }
        for name in STEP_COLUMNS:
            served.steps[name].append(row[name])
        before = end


# ---- continuous batching


def _serve_continuous(job: Job, model: Any, lengths: list[Lengths], on_step: OnStep, meter: EnergyMeter) -> Served:
    from uvm_kv.runner.torch.peers import WARM_UP_TOKENS, Continuous, ContinuousOptions, peak_bytes, reset_peak

    config, serving, served = job.resolved.config, job.resolved.serving, Served()
    assert serving is not None
    unit = dataclasses.replace(job.resolved.spec, block_size=page_size(config))
    device, host = config.memory.device_kv_bytes, config.memory.host_kv_bytes
    assert device is not None and host is not None
    num_blocks, needed = device // unit.block_bytes, max(unit.num_blocks(sum(pair)) for pair in lengths)
    if num_blocks < needed:
        raise ValueError(
            f"memory.device_kv_bytes={device} holds {num_blocks} pages of {page_size(config)} tokens, the longest "
            f"request takes {needed}; raise it, or lower peer.page_size"
        )
    peer = Continuous(
        model,
        ContinuousOptions(
            page_size=page_size(config),
            num_blocks=num_blocks,
            max_batch_tokens=config.peer.max_batch_tokens,
            max_requests_per_batch=config.batch_size,
            use_cuda_graph=config.peer.use_cuda_graph,
            cpu_offload_bytes=host,
        ),
        max_prompt_tokens=max(p for p, _ in lengths),
        max_output_tokens=max(o for _, o in lengths),
        num_requests=len(lengths),
        stop_tokens=serving.stop_tokens,
    )
    try:
        peer.warm_up(_first_requests(job, lengths)[0], job.resolved.model.vocab_size)
        settings = {"call": "generate_batch", **peer.settings()}
        reset_peak(model)
        _serve_as_they_come(peer, job, lengths, served, on_step, meter)
        settings["peak_memory_bytes"] = peak_bytes(model)
    finally:
        peer.close()
    served.summary = _said(
        settings,
        device=settings["num_blocks"] * unit.block_bytes,
        host=settings["cpu_offload_bytes"],
        warm_up=f"its own, and one request of {WARM_UP_TOKENS} tokens",
    )
    return served


def _serve_as_they_come(
    peer: Continuous, job: Job, lengths: list[Lengths], served: Served, on_step: OnStep, meter: EnergyMeter
) -> None:
    source, total, deadline = _arrivals(job, lengths), len(lengths), _deadline_ns(job)
    under_way = 0
    start = time.perf_counter_ns()
    meter.start(lambda: time.perf_counter_ns() - start)

    def book(request: Request, times: list[int]) -> None:
        served.tokens.append((request, [t - start for t in times]))
        for name in ("admitted_ns", "first_token_ns", "finish_ns"):
            value = getattr(request, name)
            if value is not None:
                setattr(request, name, value - start)

    while True:
        now = time.perf_counter_ns() - start
        meter.step()
        if now >= deadline:
            served.stopped_by = "seconds"
            meter.stop()
            for request, times in peer.interrupt():
                book(request, times)
                if request.finish_ns is not None:
                    served.recorder.request(request)
            return
        for request in source.arrivals(now):
            peer.submit(request)
            under_way += 1
        if not under_way:
            assert not source.more_to_come(), "all requests were served and their clients sent nothing"
            meter.stop()
            return
        ended = peer.finished(min(LOOK_EVERY_S, (deadline - now) / NS_PER_S))
        if ended is None:
            continue
        under_way -= 1
        request, times = ended
        book(request, times)
        assert request.finish_ns is not None
        served.recorder.request(request)
        source.finished(request, request.finish_ns)
        on_step(0, served.recorder.num_requests, total)


# ---- the summary's numbers


def _measured(served: Served, requests: Table, meter: EnergyMeter) -> dict[str, Any]:
    """As of ours; where a peer does not tell its steps, its tokens' times stand in for them."""
    steps = served.steps if served.steps["step"] else _from_tokens(served.tokens)
    zeros: list[int | None] = [0] * len(steps["step"])  # They are not told, and taken out again below.
    measured = summarize(
        steps | {f"kv_{name}_bytes": zeros for name in KVUsage._fields},
        requests,
        power=None,
        complete=served.stopped_by == "done",
        meter=meter,
    )
    measured["kv_bytes_mean"] = dict.fromkeys(KVUsage._fields)
    if not served.steps["step"]:
        measured |= {"num_steps": None, "preemptions": None, "preemptions_by_kind": None}
    return measured


def _from_tokens(tokens: list[tuple[Request, list[int]]]) -> Table:
    """A row for every time at which a token was there: those since the row before it, and the requests that were being
    served meanwhile. A token without a time, of a request that was evicted, counts with the next one of its request."""
    weights: dict[int, int] = {}
    for request, times in tokens:
        untold = len(request.token_ids) - len(times)
        for i, t in enumerate(times):
            weights[t] = weights.get(t, 0) + 1 + (untold if i == 0 else 0)
    ends = np.array(sorted(weights), np.int64)
    begun = np.sort([_begun(request, times) for request, times in tokens if times])
    last = np.sort([times[-1] for _, times in tokens if times])
    starts = np.concatenate([begun[:1], ends[:-1]]).astype(np.int64)
    running = np.searchsorted(begun, ends, "left") - np.searchsorted(last, ends, "left")
    columns: dict[str, list[Any]] = {name: [None] * len(ends) for name in STEP_COLUMNS}
    columns["step"] = list(range(len(ends)))
    columns["start_ns"], columns["end_ns"] = starts.tolist(), ends.tolist()
    columns["num_running"] = running.tolist()
    columns["num_output_tokens"] = [weights[int(t)] for t in ends]
    return columns


def _begun(request: Request, times: list[int]) -> int:
    return times[0] if request.admitted_ns is None else request.admitted_ns
