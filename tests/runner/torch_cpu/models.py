"""Small random models, their reference tokens from `generate`, and engines that serve them. Skips without torch."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from tests.helpers import CONF, drive, make_profile, make_scheduler
from uvm_kv.hw.hf_config import read_geometry
from uvm_kv.hw.roofline import Roofline
from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.kvcache.ops import OpKind
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.placement.base import PlacementContext
from uvm_kv.sched.plan import StepOutput, StepPlan
from uvm_kv.sched.request import Request
from uvm_kv.sched.scheduler import Scheduler
from uvm_kv.types import DTYPE_BYTES, Layout, MemoryKind, ceil_div

torch = pytest.importorskip("torch", reason="the real model needs torch, the extra 'torch'")
transformers = pytest.importorskip("transformers", reason="the real model needs transformers, the extra 'torch'")

from uvm_kv.runner.torch import Sampling, TorchRunner, load_model  # noqa: E402
from uvm_kv.runner.torch.model import quiet  # noqa: E402

torch.set_num_threads(1)

Log = list[tuple[StepPlan, StepOutput]]

MECHANISMS = sorted(file.stem for file in (CONF / "mechanism").glob("*.yaml") if file.stem != "custom")
VOCABULARY = 128
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    # Weights large enough that every token depends on its whole context, hence on the right KV.
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = {"num_key_value_heads": 2, "intermediate_size": 96}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GQA),
    "qwen2": ("Qwen2Config", GQA),
    "qwen3": ("Qwen3Config", GQA | {"head_dim": 32}),
    "mistral": ("MistralConfig", GQA | {"sliding_window": None}),
    "gemma": ("GemmaConfig", GQA | {"num_key_value_heads": 1, "head_dim": 32}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.25}),
    "gpt_neox": ("GPTNeoXConfig", {"intermediate_size": 96}),
}


def save_model(folder: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A random model of a family in Hugging Face format."""
    name, extra = FAMILIES[family]
    torch.manual_seed(seed)
    with quiet():
        config = getattr(transformers, name)(**SHAPE | extra | changes)
        model = transformers.AutoModelForCausalLM.from_config(config)
        # Biases and norms start as zeros and ones; these differ by place.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return folder


class Reference:
    """The same weights under transformers' own attention and `generate`, one sequence at a time."""

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        with quiet():
            config = copy.deepcopy(transformers.AutoConfig.from_pretrained(str(folder)))
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), config=config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
            ).eval()
        assert self.model.config._attn_implementation in ("sdpa", "eager")
        self._known: dict[tuple[tuple[int, ...], int | None], list[int]] = {}

    def tokens(self, prompt: tuple[int, ...], num_tokens: int, eos: int | None = None) -> list[int]:
        """Greedy tokens up to `num_tokens`, or to `eos` where it is given."""
        known = self._known.get((prompt, eos), [])
        if len(known) < num_tokens and (eos is None or eos not in known):
            self.model.generation_config.eos_token_id = eos
            ids = torch.tensor([prompt])
            with torch.inference_mode(), quiet():
                output = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=num_tokens,
                    eos_token_id=eos,
                    pad_token_id=0,
                )
            known = self._known[prompt, eos] = output[0, len(prompt) :].tolist()
        return known[:num_tokens]

    def logits(self, ids: list[int]) -> Any:
        """Logits of every position, [token, vocabulary], without a cache."""
        with torch.inference_mode():
            row = torch.tensor([ids])
            return self.model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0]


def ragged(num_seqs: int, *, longest_prompt: int = 40, longest_output: int = 48, seed: int = 1) -> list[Request]:
    """Requests with prompts and outputs of all lengths, the extremes among the first ones."""
    rng = random.Random(seed)
    requests = []
    for i in range(num_seqs):
        prompt = (longest_prompt, 1, longest_prompt // 2)[i] if i < 3 else rng.randint(1, longest_prompt)
        output = (longest_output, longest_output, 1)[i] if i < 3 else rng.randint(1, longest_output)
        requests.append(Request(i, prompt, output, prompt_ids=random_ids(rng, prompt)))
    return requests


def random_ids(rng: random.Random, num_tokens: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, VOCABULARY) for _ in range(num_tokens))


@dataclass(frozen=True)
class Axes:
    """What a mechanism says, as in conf/mechanism."""

    memory: MemoryKind
    placement: str
    admission: Any
    preemption: Any


@functools.cache
def axes_of(mechanism: str) -> Axes:
    config = jobs.composed(f"mechanism={mechanism}")
    scheduler = config.scheduler
    return Axes(MemoryKind(config.memory.kind), config.placement.name, scheduler.admission, scheduler.preemption)


@dataclass
class Served:
    """What a run left behind."""

    log: Log
    scheduler: Scheduler
    requests: list[Request]

    def ops(self, kind: OpKind, *, staged: bool | None = None) -> int:
        return sum(
            op.kind is kind and (staged is None or staged != bool(op.targets))
            for plan, _ in self.log
            for op in plan.ops
        )

    @property
    def host_blocks(self) -> set[int]:
        """Host blocks that were in a table."""
        device = self.scheduler.kv.capacity.num_device_blocks
        return {b for plan, _ in self.log for s in plan.scheduled for b in s.new_blocks if b >= device}

    @property
    def num_chunked(self) -> int:
        """Prefill chunks behind cached tokens."""
        return sum(s.context_len > 0 and s.num_new_tokens > 1 for plan, _ in self.log for s in plan.scheduled)


def context_for(
    model: Any,
    folder: Path,
    axes: Axes,
    capacity: KVCapacity,
    *,
    block_size: int = 16,
    layout: Layout = Layout.LAYER_MAJOR,
    dtype: str = "float32",
    num_layers_ahead: int = 2,
    link_gb_per_s: float = 25.0,
) -> PlacementContext:
    geometry = read_geometry(str(folder), counted=False)
    size = DTYPE_BYTES[dtype]
    spec = KVCacheSpec(geometry.num_layers, geometry.num_kv_heads, geometry.head_dim, size, block_size, layout)
    roofline = Roofline(make_profile(link_gb_per_s), geometry, size)
    return PlacementContext(spec, capacity, axes.memory, roofline, {"num_layers_ahead": num_layers_ahead})


def serve(
    model: Any,
    context: PlacementContext,
    axes: Axes,
    requests: list[Request],
    *,
    batch_size: int,
    max_num_batched_tokens: int,
    sampling: Sampling | None = None,
    on_logits: Any = None,
    runner: Any = None,
    cancel: Mapping[int, Iterable[int]] | None = None,
    check: Callable[[Scheduler, Any], None] | None = None,
) -> Served:
    """`cancel`: number of steps done -> ids that are then cancelled. `check` sees scheduler and runner after a step."""
    if runner is None:
        runner = TorchRunner(
            model,
            context.spec,
            context.capacity,
            context.memory,
            max_tokens=max(r.max_tokens for r in requests),
            sampling=sampling,
            on_logits=on_logits,
        )
    scheduler = make_scheduler(
        context,
        placement=axes.placement,
        batch_size=batch_size,
        max_num_batched_tokens=max_num_batched_tokens,
        admission=axes.admission,
        preemption=axes.preemption,
    )
    checked = None if check is None else functools.partial(check, scheduler, runner)
    log = drive(scheduler, runner, requests, cancel=cancel, check=checked)
    runner.close()
    return Served(log, scheduler, requests)


def tight_capacity(axes: Axes, requests: list[Request], block_size: int, batch_size: int) -> KVCapacity:
    """Tiers too small for the batch, but not for the longest request: what a mechanism does when memory is short."""
    sizes = [ceil_div(r.max_tokens, block_size) for r in requests]
    longest, wanted = max(sizes), sum(sizes) * min(batch_size, len(sizes)) // len(sizes)
    if axes.admission == "optimistic":  # Preempted in the middle of their outputs.
        host = 0 if axes.memory is MemoryKind.DEVICE else longest + wanted // 3
        return KVCapacity(max(longest, wanted // 3), host)
    if axes.memory is MemoryKind.DEVICE:
        return KVCapacity(max(longest, wanted // 2), 0)
    return KVCapacity(max(2, wanted // 3), longest + wanted)


def assert_same_tokens(reference: Reference, requests: list[Request], eos: int | None = None) -> None:
    wrong = {}
    for request in requests:
        assert request.prompt_ids is not None
        expected = reference.tokens(request.prompt_ids, request.output_tokens, eos)
        if request.token_ids != expected:
            wrong[request.id] = (request.token_ids, expected)
    assert not wrong, f"{len(wrong)} of {len(requests)} sequences differ, the first: {next(iter(wrong.items()))}"


__all__ = [
    "FAMILIES",
    "GQA",
    "MECHANISMS",
    "VOCABULARY",
    "Axes",
    "Reference",
    "Sampling",
    "Served",
    "TorchRunner",
    "assert_same_tokens",
    "axes_of",
    "context_for",
    "load_model",
    "quiet",
    "ragged",
    "random_ids",
    "save_model",
    "serve",
    "tight_capacity",
    "torch",
    "transformers",
]
