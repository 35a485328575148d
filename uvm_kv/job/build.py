"""Assemble a job from a resolved config, run it, and write its run directory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from uvm_kv.config.schema import ConfigSchema
from uvm_kv.engine import Engine
from uvm_kv.hw.overlap import ceiling
from uvm_kv.hw.roofline import Roofline
from uvm_kv.job.cuda import build_kv, energy_meter, this_card
from uvm_kv.job.models import load_served
from uvm_kv.job.peers import is_peer, peer_identity
from uvm_kv.job.resolve import Resolved
from uvm_kv.job.serving import outputs, random_ids
from uvm_kv.job.workload import REQUESTS_PER_CLIENT, Workload, build_workload, further_lengths
from uvm_kv.kvcache.manager import KVCacheManager, largest_table
from uvm_kv.placement.base import PlacementContext, PlacementPolicy, empty_view
from uvm_kv.placement.registry import build_policy
from uvm_kv.runner.base import ModelRunner
from uvm_kv.runner.replay import ReplayRunner
from uvm_kv.runner.sim import SimRunner
from uvm_kv.runner.sim.uvm.block import Prefetcher, Rules
from uvm_kv.sched.batching import Batching, ContinuousBatching, StaticBatching
from uvm_kv.sched.request import Request
from uvm_kv.sched.scheduler import Scheduler, SchedulerConfig
from uvm_kv.store.checks import TEXT, short
from uvm_kv.store.code import code_sha256, is_of_other_code
from uvm_kv.store.directories import read_plans, run_id, write_run
from uvm_kv.store.provenance import manifest
from uvm_kv.store.whole import is_complete, read_run
from uvm_kv.telemetry.energy import PowerModel
from uvm_kv.telemetry.recorder import Recorder
from uvm_kv.telemetry.summary import SCHEMA_VERSION, summarize
from uvm_kv.types import DTYPE_BYTES, NS_PER_S, Allocation, Hints, MemoryKind, Reach, ceil_div
from uvm_kv.workload.draws import Purpose, entropy
from uvm_kv.workload.lengths import Lengths, mean_lengths
from uvm_kv.workload.source import ClosedLoop, OpenLoop, RequestSource, WithTokens, all_at_once, poisson
from uvm_kv.workload.steady import continued, nearest_to_mean, plan_without_runner, steady_start

SETTLED_OUTPUTS = 16
"""Lengths of an output after which the running batch of a loop that preempts has settled."""
MAX_WARMUP = 2_000_000
"""Most tokens that are planned to find the steady state: a few seconds."""


@dataclass(frozen=True)
class Job:
    """One run: resolved config, repeat number, and where it goes."""

    resolved: Resolved
    repeat: int
    directory: Path

    def entropy(self, purpose: Purpose, *more: int) -> list[int]:
        """What the run's random numbers for `purpose` are drawn from."""
        return entropy(self.resolved.config.seed, self.repeat, purpose, *more)

    @property
    def sampling_seed(self) -> int:
        """Seed of the tokens that a real model samples."""
        return int(np.random.SeedSequence(self.entropy(Purpose.SAMPLING)).generate_state(1)[0])


def jobs_of(resolved: Resolved, experiment: str) -> list[Job]:
    """The repeats of a config. ValueError for anything that would only show once they run."""
    jobs = repeats_of(resolved, experiment)
    check_fits(jobs[0])
    return jobs


def repeats_of(resolved: Resolved, experiment: str) -> list[Job]:
    """The same, whether or not their requests fit."""
    config, determining = resolved.config, resolved.determining()
    names = {"model": config.model.name, "hardware": config.hardware.name, "workload": config.workload.name}
    for key, name in names.items():
        if not TEXT.fits(name):  # What reads results would leave the run out.
            raise ValueError(f"{key}.name={short(name)} cannot name results; give {TEXT.words}")
    folder = Path(config.results_dir) / experiment
    numbers = range(config.first_repeat, config.first_repeat + config.num_repeats)
    return [Job(resolved, repeat, folder / run_id(determining, repeat)) for repeat in numbers]


def check_fits(job: Job) -> None:
    """ValueError if the longest request does not fit the KV budget."""
    if not is_peer(job.resolved.config):
        check_requests_fit(job.resolved, workload_of(job).all_lengths)


def is_done(job: Job) -> bool:
    """Whether the run of a job is whole, and not to be made again."""
    config = job.resolved.config
    if config.rerun == "true" or not is_complete(job.directory):
        return False
    return config.rerun == "false" or not is_of_other_code(read_run(job.directory)[1], config.runner)


def workload_of(job: Job) -> Workload:
    resolved = job.resolved
    if resolved.trace is not None:
        return resolved.trace  # Every repeat serves it.
    prompts = None if resolved.serving is None else resolved.serving.prompts
    workload = build_workload(resolved.config, resolved.max_model_len, prompts, job.repeat)
    if prompts is not None or is_peer(resolved.config):
        return workload
    prompt, output = mean_lengths(workload.lengths)
    # A sequence holds half of its output on average.
    num_sequences = resolved.capacity.num_device_blocks // resolved.spec.num_blocks(round(prompt + output / 2))
    further = further_lengths(resolved.config, resolved.max_model_len, num_sequences, job.repeat)
    return dataclasses.replace(workload, if_preempted=further)


def build_source(job: Job, workload: Workload) -> RequestSource:
    resolved, config = job.resolved, job.resolved.config
    source: RequestSource
    match config.workload.arrival:
        case "closed_loop":
            steady = _steady_start(job, workload.lengths) if config.workload.start == "steady" else None
            source = ClosedLoop(workload.lengths, config.batch_size, steady=steady, if_preempted=workload.if_preempted)
        case "all_at_once":
            source = all_at_once(workload.lengths)
        case "poisson":
            assert config.workload.request_rate is not None
            rng = np.random.default_rng(job.entropy(Purpose.ARRIVALS))
            source = poisson(workload.lengths, config.workload.request_rate, rng)
        case _:
            assert workload.rows is not None
            source = OpenLoop(
                [Request(i, r.prompt_tokens, r.output_tokens, r.arrival_ns) for i, r in enumerate(workload.rows)]
            )
    serving = resolved.serving
    if serving is None:
        return source
    vocabulary, prompts = resolved.model.vocab_size, serving.prompts

    def ids_of(request: Request) -> tuple[int, ...]:
        if prompts is not None:
            return prompts[request.id].ids
        return random_ids(request.prompt_tokens, vocabulary, job.entropy(Purpose.TOKEN_IDS, request.id))

    return WithTokens(source, ids_of, serving.stop_tokens)


def _steady_start(job: Job, lengths: list[Lengths]) -> list[Request]:
    """The first requests of a closed loop that has run for long, as the job's own scheduler and policy leave them.
    Plans need no clock, so they are made without a runner.

    Under optimistic admission the running batch swings with the length of an output, and a short run sees a part of the
    swing: it begins where the running batch of its steps is nearest to the mean, which settles slowly. Requests whose
    tables have the most host blocks come last, so that a policy that fills the device first gives each the tier that it
    had.
    """
    resolved, num_clients = job.resolved, job.resolved.config.batch_size
    outputs = [output for _, output in lengths]
    swing = max(outputs)
    window = min(resolved.config.max_steps or swing, swing)

    def planned(num_running: int, num_steps: int) -> tuple[Scheduler, list[int]]:
        # Enough of them that the loop does not run dry.
        many = lengths * ceil_div(2 * num_clients * (num_steps + 3 * swing), sum(outputs))
        scheduler = build_scheduler(resolved, build_placement(resolved, build_roofline(resolved)))
        first = steady_start(many, num_clients, num_running, np.random.default_rng(job.entropy(Purpose.STEADY_START)))
        return scheduler, plan_without_runner(scheduler, ClosedLoop(many, num_clients, steady=first), num_steps)

    num_warm, most = 2 * swing, ceil_div(MAX_WARMUP, num_clients)
    scheduler, counts = planned(num_clients, min(num_warm, most))
    if scheduler.num_recomputed or scheduler.num_swapped_out:
        num_warm = SETTLED_OUTPUTS * swing
        _, counts = planned(num_clients, min(num_warm, most))
    num_warm = len(counts)
    num_running = round(float(np.mean(counts[num_warm // 2 :])))
    _, counts = planned(num_running, num_warm + swing + window)
    begin = num_warm + nearest_to_mean(counts[num_warm:], window)
    scheduler, _ = planned(num_running, begin)
    first_host = resolved.capacity.num_device_blocks
    running = sorted(scheduler.running, key=lambda r: sum(b >= first_host for b in scheduler.kv.blocks(r.id)))
    left = [*running, *scheduler.swapped, *scheduler.waiting][: len(lengths)]
    return [continued(i, request) for i, request in enumerate(left)]


def build_roofline(resolved: Resolved) -> Roofline:
    return Roofline(resolved.profile, resolved.model, DTYPE_BYTES[resolved.config.dtype], resolved.precision)


def build_placement(resolved: Resolved, roofline: Roofline) -> PlacementPolicy:
    placement = resolved.config.placement
    context = PlacementContext(
        resolved.spec,
        resolved.capacity,
        resolved.memory,
        roofline,
        vars(placement),
        grows=resolved.config.scheduler.admission == "optimistic",
    )
    return build_policy(placement.name, context)


def build_scheduler(resolved: Resolved, policy: PlacementPolicy) -> Scheduler:
    config, options = resolved.config, resolved.config.scheduler
    kv = KVCacheManager(resolved.spec, resolved.capacity, Allocation(config.allocation))
    batching: Batching
    match options.name:
        case "static":
            batching = StaticBatching(config.batch_size)
        case "dynamic":
            batching = StaticBatching(config.batch_size, round(options.window_s * NS_PER_S))
        case _:
            batching = ContinuousBatching(config.batch_size)
    return Scheduler(
        SchedulerConfig(
            options.max_num_batched_tokens,
            options.admission,  # type: ignore[arg-type]
            options.preemption,  # type: ignore[arg-type]
            options.watermark,
            resolved.max_model_len,
            options.chunked_prefill,
        ),
        batching,
        kv,
        policy,
    )


def build_runner(
    resolved: Resolved, roofline: Roofline, seed: int = 0, load: Callable[[Resolved], Any] = load_served
) -> ModelRunner:
    """`load` gives the model of a job that serves a real one."""
    config = resolved.config
    if config.runner == "replay":
        assert config.replay.path is not None
        return ReplayRunner(resolved.capacity, read_plans(Path(config.replay.path)))
    if resolved.serving is not None:
        from uvm_kv.runner.torch import Sampling, TorchRunner

        model = load(resolved)
        return TorchRunner(
            model,
            resolved.spec,
            resolved.capacity,
            resolved.memory,
            max_tokens=resolved.longest_request,
            kv=build_kv(resolved, model) if config.runner == "cuda" else None,
            graph_seqs=config.batch_size if config.runner == "cuda" and config.cuda_graphs else 0,
            sampling=Sampling(config.sampling.temperature, seed),
        )
    hints = Hints(**dataclasses.asdict(config.hints))
    rules = Rules(Prefetcher(config.driver.prefetcher), config.driver.prefetch_threshold_percent)
    memory = resolved.memory
    if memory is MemoryKind.MANAGED and not config.driver.concurrent_managed_access:
        memory = MemoryKind.DEVICE  # All of it is on the card before a kernel starts, and nothing faults.
    return SimRunner(
        roofline,
        resolved.spec,
        resolved.capacity,
        memory,
        hints,
        rules,
        managed_device_bytes=config.memory.device_kv_bytes,
        pageable=config.memory.pageable,
    )


def check_requests_fit(resolved: Resolved, lengths: list[Lengths]) -> None:
    """ValueError if the longest request does not fit the KV budget."""
    allocation = Allocation(resolved.config.allocation)
    tokens = max(allocation.claim_tokens(*pair, resolved.max_model_len) for pair in lengths)
    needed = resolved.spec.num_blocks(tokens)
    policy = build_placement(resolved, build_roofline(resolved))
    device, host = capacity = largest_table(resolved.capacity, allocation)
    have = device + host if policy.uses_host else device
    if needed > have or policy.place(empty_view(capacity), needed, admitting=True) is None:
        block = resolved.spec.block_bytes
        holder = "largest chunk of the KV budget" if allocation.is_buddy else "KV budget"
        raise ValueError(
            f"the {holder} holds {have} blocks ({have * block / 1e9:.2f} GB), the longest request of {tokens} tokens "
            f"needs {needed} ({needed * block / 1e9:.2f} GB); raise memory.device_kv_bytes"
            + (
                " or memory.host_kv_bytes"
                if policy.uses_host
                else ", use a memory with a host tier, or shorter requests"
            )
        )


def closed_form(
    resolved: Resolved, roofline: Roofline, policy: PlacementPolicy, lengths: list[Lengths]
) -> dict[str, float] | None:
    """The ceiling on the gain over device-only serving under worst-case admission, for the placement's reach.

    A device-only run of n sequences (as many as fit with prompt plus output) reads C = n * mean context bytes of KV in
    a step of length t, prefill of n prompts per output included where there is any. `link`: what the reach can carry in
    that step (`uvm_kv.hw.overlap.ceiling`). `stranded`: the device blocks that n whole requests leave over, too few for
    another, which a placement that may split a request fills. Both tiers' claims fill at the same pace
    (`KVCacheManager`), so n' sequences need n' C / n <= C (1 + stranded) + BW_link t' bytes, and n' t / (n t') - 1 is
    at most stranded + link. None without a reach or chunked prefill, or where not even one request fits the device.
    """
    prompt, output = mean_lengths(lengths)
    spec, profile = resolved.spec, resolved.profile
    blocks = spec.num_blocks(round(prompt + output))
    n = resolved.capacity.num_device_blocks // blocks
    if policy.reach is None or n == 0 or not resolved.config.scheduler.chunked_prefill:
        return None
    context = prompt + output / 2
    # n / output prompts are prefilled a step, and share its pass over the weights.
    prefills, tokens = 0.0 if resolved.config.workload.start == "steady" else n / output, round(prompt)
    dense_s = roofline.dense_s(n)
    if prefills <= 1:
        dense_s += prefills * (roofline.dense_s(n + tokens) - dense_s)
    else:
        dense_s = roofline.dense_s(n + round(prefills * tokens))
    layer_s = dense_s + prefills * roofline.prefill_attention_s(tokens, 0)
    attention_s = spec.num_layers * roofline.decode_attention_s(n * context)
    step_s = spec.num_layers * layer_s + attention_s + roofline.head_s(n, n)
    kv_bytes = n * context * spec.token_bytes
    link_bytes_per_s = profile.link.h2d_bytes_per_s
    if policy.reach is Reach.IN_PLACE:
        link_bytes_per_s = profile.link.zero_copy_bytes_per_s(0)
    link = ceiling(
        policy.reach,
        step_s=step_s,
        attention_s=attention_s,
        kv_bytes=kv_bytes,
        link_bytes_per_s=link_bytes_per_s,
        hbm_bytes_per_s=profile.gpu.hbm_bytes_per_s,
    )
    stranded = resolved.capacity.num_device_blocks / (n * blocks) - 1
    return {"total": link + stranded, "link": link, "stranded": stranded, "num_seqs": n, "step_s": step_s}


def run_job(
    job: Job,
    *,
    argv: list[str],
    on_step: Callable[[int, int, int], None] | None = None,
    load: Callable[[Resolved], Any] = load_served,
) -> dict[str, Any]:
    """Run and write one job of our engine; its summary. `on_step` gets steps done, requests done and all requests."""
    resolved, config = job.resolved, job.resolved.config
    code = code_sha256(config.runner)  # Before it runs: files may be edited meanwhile.
    started, clock = datetime.now().astimezone().isoformat(timespec="seconds"), time.perf_counter()
    roofline = build_roofline(resolved)
    policy = build_placement(resolved, roofline)
    workload = workload_of(job)
    check_requests_fit(resolved, workload.all_lengths)
    recorder = Recorder()
    if config.record_plans:
        recorder.keep_plans()
    total = len(workload.lengths)
    with energy_meter(config) as meter:

        def loaded_and_rested(resolved: Resolved) -> Any:
            model = load(resolved)
            if meter is not None:
                meter.rest()  # Before the runner is there, whose clock has begun then.
            return model

        def hook(steps: int) -> None:
            if meter is not None:
                meter.step()
            if on_step is not None:
                done = recorder.num_requests
                on_step(steps, done, total if done <= total else total + len(workload.if_preempted))

        runner = build_runner(resolved, roofline, job.sampling_seed, loaded_and_rested)
        engine = Engine(build_scheduler(resolved, policy), runner, build_source(job, workload), recorder)
        try:
            if meter is not None:
                meter.start(runner.now_ns)
            stopped_by = engine.run(
                max_steps=config.max_steps or inf,
                max_ns=inf if config.max_seconds is None else round(config.max_seconds * NS_PER_S),
                on_step=None if meter is None and on_step is None else hook,
            )
            if meter is not None:
                meter.stop()
        finally:
            runner.close()
    steps, requests, serving = recorder.steps(), recorder.requests(), resolved.serving
    power = PowerModel(**dataclasses.asdict(resolved.profile.power))
    simulated = config.runner == "sim"
    steady = config.workload.start == "steady"
    measured = summarize(
        steps,
        requests,
        power=power if simulated else None,
        complete=stopped_by == "done",
        num_warm_up=min(config.batch_size, total) if config.workload.arrival == "closed_loop" and not steady else 0,
        steady_until_ns=_steady_until_ns(engine) if steady else None,
        meter=meter,
    )
    bound = closed_form(resolved, roofline, policy, workload.lengths) if simulated else None
    if config.workload.arrival == "closed_loop" and not steady and total < REQUESTS_PER_CLIENT * config.batch_size:
        measured["warnings"].append(
            f"{total} requests for {config.batch_size} clients; {REQUESTS_PER_CLIENT} a client give a steady window"
        )
    measured["warnings"] += workload.notes
    eviction = "planned" if config.placement.name == "demand_capped" else None
    summary = {
        **identity(job),
        **measured,
        "stopped_by": stopped_by,
        "num_left_out": workload.num_left_out,
        "memory_budget": resolved.memory_account,
        "device_kv_bytes": resolved.capacity.num_device_blocks * resolved.spec.block_bytes,
        "host_kv_bytes": resolved.capacity.num_host_blocks * resolved.spec.block_bytes,
        "memory_emulated": config.runner == "cpu",
        "chat_template": None if serving is None else serving.chat_template,
        "eviction": eviction,
        "chunk_loss_bytes": resolved.spec.chunk_loss_bytes(sum(resolved.capacity))
        if resolved.memory == "managed" and simulated
        else None,
        "closed_form_ceiling": None if bound is None else bound["total"],
        "closed_form": bound,
    }
    write_run(
        job.directory,
        config_yaml=OmegaConf.to_yaml(OmegaConf.structured(config)),
        manifest=manifest(
            code_sha256=code,
            memory_emulated=config.runner == "cpu",
            weights=None if serving is None else config.model.weights,
            argv=argv,
            seed=config.seed,
            repeat=job.repeat,
            started=started,
            duration_s=time.perf_counter() - clock,
            eviction=eviction,
        ),
        steps=steps,
        requests=requests,
        summary=summary,
        plans=recorder.plans,
        outputs=None if serving is None else outputs(recorder.finished, serving.tokenizer),
        replace=config.rerun != "false",
    )
    return summary


def _steady_until_ns(engine: Engine) -> int:
    """Until when a run that began in its steady state stays there: to its end, or to the last admission where no
    request is left to take the place of one that ends."""
    scheduler, recorder = engine.scheduler, engine.recorder
    if engine.source.more_to_come() or scheduler.waiting:
        return recorder.last_end_ns
    admissions = (r.admitted_ns for r in (*recorder.finished, *scheduler.running, *scheduler.swapped))
    return max((time_ns for time_ns in admissions if time_ns is not None), default=0)


def _hardware(config: ConfigSchema) -> str:
    """What the run ran on: the simulated card, the CPU, or this machine's card by its own name."""
    if config.runner == "cpu":
        return "cpu"
    return this_card().name if config.runner == "cuda" else config.hardware.name


def identity(job: Job) -> dict[str, Any]:
    """What the run is of: the first fields of its summary."""
    config = job.resolved.config
    setting, variant = job.resolved.comparison()
    return {
        "schema_version": SCHEMA_VERSION,
        "origin": {"sim": "simulated", "replay": "replayed"}.get(config.runner, "measured"),
        "runner": config.runner,
        "engine": config.engine,
        "hardware": _hardware(config),
        "link_h2d_gb_per_s": config.hardware.link.h2d_gb_per_s if config.runner == "sim" else None,
        "model": job.resolved.model.name,
        "weights": None if job.resolved.serving is None else config.model.weights,
        "mechanism": config.mechanism,
        "memory": config.memory.kind,
        "placement": config.placement.name,
        "reach": config.placement.reach if config.placement.name == "bandwidth_balanced" else None,
        "hints": dataclasses.asdict(config.hints),
        "scheduler": config.scheduler.name,
        "window_s": config.scheduler.window_s if config.scheduler.name == "dynamic" else None,
        "chunked_prefill": config.scheduler.chunked_prefill,
        "admission": config.scheduler.admission,
        "preemption": config.scheduler.preemption,
        "workload": config.workload.name,
        "arrival": config.workload.arrival,
        "request_rate": config.workload.request_rate,
        "start": config.workload.start,
        "prompt_tokens": config.workload.prompt_tokens,
        "output_tokens": config.workload.output_tokens,
        "layout": config.layout,
        "block_size": config.block_size,
        "allocation": config.allocation,
        "dtype": config.dtype,
        "weight_bits": job.resolved.precision.weight_bits,
        "kv_bits": job.resolved.precision.kv_bits,
        "offered_batch": config.batch_size,
        "working_set_ratio": job.resolved.working_set_ratio(),
        "drawn": config.workload.lengths is not None or config.workload.arrival == "poisson",
        "seed": config.seed,
        "repeat": job.repeat,
        "setting": setting,
        "variant": variant,
        **peer_identity(config),
    }
