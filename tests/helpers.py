"""Builders of small systems, and a runner that holds every plan to the runner contract."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from uvm_kv.engine import Engine
from uvm_kv.hw.fit import all_work
from uvm_kv.hw.model import ModelGeometry
from uvm_kv.hw.profile import Gpu, HardwareProfile, Link, ManagedDriver, OperatorCost, Power
from uvm_kv.hw.roofline import Roofline
from uvm_kv.kvcache.manager import KVCacheManager, KVCapacity
from uvm_kv.kvcache.ops import NO_TRAFFIC, MemoryOp, OpKind
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.placement.base import PlacementContext
from uvm_kv.placement.registry import build_policy
from uvm_kv.runner.base import ModelRunner
from uvm_kv.runner.sim import SimRunner
from uvm_kv.sched.batching import Batching, ContinuousBatching
from uvm_kv.sched.plan import StepOutput, StepPlan, StepTiming
from uvm_kv.sched.request import Request
from uvm_kv.sched.scheduler import Scheduler, SchedulerConfig
from uvm_kv.telemetry.recorder import Recorder
from uvm_kv.types import Allocation, Hints, Layout, MemoryKind, Phase, Reach
from uvm_kv.workload.source import OpenLoop, RequestSource

REPOSITORY = Path(__file__).parent.parent
CONF = REPOSITORY / "conf"
DATA = REPOSITORY.parent / "shared" / "data"

Admission = Literal["worst_case", "optimistic"]
Preemption = Literal["none", "recompute", "swap"]

built_schedulers: list[Scheduler] = []
"""Those of the running test; its teardown checks them all."""


def make_geometry(num_layers: int = 4) -> ModelGeometry:
    """LLaMA-7B with fewer layers: 16 KiB of KV per token and layer."""
    return ModelGeometry("tiny", num_layers, 4096, 32, 32, 128, 11008, 32000, 4096)


def make_profile(link_gb_per_s: float = 25.0) -> HardwareProfile:
    """A card in the manner of an RTX 3090, with one cost for all operators."""
    operators = dict.fromkeys(all_work(make_geometry(), 1, 2), OperatorCost(2.0, 0.8, 0.8, 2.0))
    return HardwareProfile(
        "test_card",
        Gpu(24 << 30, 936.0, 0.9, 71.0, 284.0, 400_000_000, 35.5),
        Link(link_gb_per_s, link_gb_per_s, 0.9, 0.9, (1.0, 10.0), (1.0, 0.7), 0.95, 0.5, 6.0, 10.0, 20.0),
        ManagedDriver(5, 80.0, 20.0, 0.05, 0.05, 50.0, 0.5),
        Power(30.0, 350.0, 120.0),
        operators,
        dict.fromkeys(("gpu", "link", "managed", "power", "operators"), "made up for tests"),
    )


def make_spec(num_layers: int = 4, block_size: int = 4, layout: Layout = Layout.LAYER_MAJOR) -> KVCacheSpec:
    return KVCacheSpec(num_layers, 32, 128, 2, block_size, layout)


def make_context(
    num_device: int,
    num_host: int = 0,
    *,
    memory: MemoryKind = MemoryKind.PINNED,
    num_layers: int = 4,
    block_size: int = 4,
    layout: Layout = Layout.LAYER_MAJOR,
    reach: Reach = Reach.BOTH,
    num_layers_ahead: int = 1,
    link_gb_per_s: float = 25.0,
) -> PlacementContext:
    """Spec, capacity, memory and card of a small system; schedulers and runners are built from it."""
    roofline = Roofline(make_profile(link_gb_per_s), make_geometry(num_layers), 2)
    spec = make_spec(num_layers, block_size, layout)
    options = {"num_layers_ahead": num_layers_ahead, "reach": reach}
    return PlacementContext(spec, KVCapacity(num_device, num_host), memory, roofline, options)


def make_scheduler(
    context: PlacementContext,
    *,
    placement: str = "resident",
    batch_size: int = 8,
    max_num_batched_tokens: int = 64,
    admission: Admission = "worst_case",
    preemption: Preemption = "none",
    batching: Batching | None = None,
    allocation: Allocation = Allocation.PAGED,
    max_model_len: int = 0,
    chunked_prefill: bool = True,
    watermark: float = 0.0,
) -> Scheduler:
    kv = KVCacheManager(context.spec, context.capacity, allocation)
    config = SchedulerConfig(max_num_batched_tokens, admission, preemption, watermark, max_model_len, chunked_prefill)
    policy = build_policy(placement, replace(context, grows=admission == "optimistic"))
    scheduler = Scheduler(config, batching or ContinuousBatching(batch_size), kv, policy)
    built_schedulers.append(scheduler)
    return scheduler


def make_request(
    request_id: int,
    prompt_tokens: int = 4,
    output_tokens: int = 4,
    arrival_ns: int = 0,
    *,
    stop_token: int | None = None,
) -> Request:
    return Request(
        request_id,
        prompt_tokens,
        output_tokens,
        arrival_ns,
        stop_tokens=frozenset() if stop_token is None else frozenset({stop_token}),
    )


def make_requests(lengths: Iterable[tuple[int, int]]) -> list[Request]:
    """One request a (prompt, output) pair, all arriving at 0."""
    return [make_request(i, *pair) for i, pair in enumerate(lengths)]


def make_sim(context: PlacementContext, hints: Hints | None = None) -> SimRunner:
    return SimRunner(context.roofline, context.spec, context.capacity, context.memory, hints)


class ScriptedRunner(ModelRunner):
    """Takes `step_ns` a step, and fails on a plan that no real runner could carry out.

    It takes the contract of `ModelRunner` by its letter. It knows what every slot of every block holds, as (request id,
    position): moves copy it, a new block that no move has written loses it, and so do the blocks of a removed request.
    Each scheduled sequence must find its context in its block table, and what is called a decode must sample.
    """

    def __init__(
        self, context: PlacementContext, *, step_ns: int = 1_000, token_of: Callable[[int, int], int] | None = None
    ) -> None:
        self._capacity = context.capacity
        self._block_size = context.spec.block_size
        self._step_ns = step_ns
        self._token_of = token_of
        self._now_ns = 0
        self._known_tokens: dict[int, int] = {}
        self._to_fill: dict[int, int] = {}
        self._tables: dict[int, list[int]] = {}
        self._slots: list[list[tuple[int, int] | None]] = [
            [None] * self._block_size for _ in range(sum(self._capacity))
        ]

    def capacity(self) -> KVCapacity:
        return self._capacity

    def add(self, request: Request) -> None:
        self._known_tokens[request.id] = request.num_tokens
        self._to_fill[request.id] = request.num_filled_tokens
        self._tables[request.id] = []

    def remove(self, request_id: int) -> None:
        self._clear(self._tables.pop(request_id))
        del self._known_tokens[request_id]
        self._to_fill.pop(request_id, None)

    def now_ns(self) -> int:
        return self._now_ns

    def wait_until_ns(self, time_ns: int) -> None:
        self._now_ns = max(self._now_ns, time_ns)

    def execute(self, plan: StepPlan) -> StepOutput:
        for request_id in plan.dropped:
            self._tables[request_id] = []
        for op in plan.ops:
            self._move(op)
        moved = {block for op in plan.ops for block in op.targets}
        for sequence in plan.scheduled:
            self._tables[sequence.request_id].extend(sequence.new_blocks)
            self._clear(block for block in sequence.new_blocks if block not in moved)
            for position in range(self._to_fill.pop(sequence.request_id, 0)):
                self._write(sequence.request_id, position)
        token_ids = []
        for request_id, phase, num_new, context, _ in plan.scheduled:
            table, end = self._tables[request_id], context + num_new
            held = [slot for block in table for slot in self._slots[block]]
            assert held[:context] == [(request_id, i) for i in range(context)], f"request {request_id} lost its KV"
            assert 0 < num_new <= self._known_tokens[request_id] - context, "tokens that do not exist are scheduled"
            assert end <= len(held), f"request {request_id} has no slot for its new tokens"
            for position in range(context, end):
                self._write(request_id, position)
            samples = end == self._known_tokens[request_id]
            assert phase is Phase.PREFILL or (num_new == 1 and samples), (
                f"request {request_id}: a decode yields nothing"
            )
            if samples:
                token_ids.append(self._token_of(request_id, end) if self._token_of else 0)
                self._known_tokens[request_id] += 1
        timing = StepTiming(self._now_ns, self._now_ns + self._step_ns)
        self._now_ns = timing.end_ns
        return StepOutput(timing, NO_TRAFFIC, tuple(token_ids) if self._token_of else None)

    def _write(self, request_id: int, position: int) -> None:
        block = self._tables[request_id][position // self._block_size]
        self._slots[block][position % self._block_size] = (request_id, position)

    def _clear(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._slots[block] = [None] * self._block_size

    def _move(self, op: MemoryOp) -> None:
        """All blocks at once, as a copy through a buffer would; an op without targets moves no table."""
        if op.targets:
            assert op.kind in (OpKind.COPY_IN, OpKind.COPY_OUT)
            content = [list(self._slots[source]) for source in op.blocks]
            for target, slots in zip(op.targets, content, strict=True):
                self._slots[target] = slots

    def close(self) -> None:
        self._tables.clear()


def submit(scheduler: Scheduler, runner: ModelRunner, *requests: Request) -> None:
    for request in requests:
        scheduler.add(request)
        runner.add(request)


def step(scheduler: Scheduler, runner: ModelRunner, *, more_to_come: bool = False) -> StepPlan | None:
    """One step of the engine, with the integrity checked after it."""
    plan = scheduler.schedule(runner.now_ns(), more_to_come=more_to_come)
    if plan is not None:
        for request in scheduler.update(plan, runner.execute(plan)):
            runner.remove(request.id)
    scheduler.check_integrity()
    return plan


def drive(
    scheduler: Scheduler,
    runner: ModelRunner,
    work: RequestSource | Iterable[Request],
    *,
    max_steps: int = 5_000,
    cancel: Mapping[int, Iterable[int]] | None = None,
    check: Callable[[], None] | None = None,
) -> list[tuple[StepPlan, StepOutput]]:
    """Serve all of `work` through the engine, checking the integrity (and `check`) after every step; its plans and
    outputs. `cancel`: number of steps done -> ids of the requests that are then cancelled."""
    source = work if isinstance(work, RequestSource) else OpenLoop(list(work))
    recorder = Recorder()
    recorder.keep_plans()
    engine = Engine(scheduler, runner, source, recorder)

    def on_step(num_steps: int) -> None:
        scheduler.check_integrity()
        if check is not None:
            check()
        for request_id in (cancel or {}).get(num_steps, ()):
            engine.cancel(request_id)

    stopped_by = engine.run(max_steps=max_steps, on_step=on_step)
    assert stopped_by == "done", "not served in time"
    assert recorder.plans is not None
    return recorder.plans


def plans_of(log: Iterable[tuple[StepPlan, StepOutput]]) -> list[StepPlan]:
    return [plan for plan, _ in log]


def vouch(directory: Path) -> None:
    """Bring a run's manifest up to what its files hold, and the run is called, after a test changed them."""
    file = directory / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["id"] = directory.name

    def sha256(name: str) -> str:
        return hashlib.sha256((directory / name).read_bytes()).hexdigest()

    manifest["summary_sha256"] = sha256("summary.json")
    manifest["files_sha256"] = {name: sha256(name) for name in manifest["files_sha256"]}
    file.write_text(json.dumps(manifest, indent=2) + "\n")
