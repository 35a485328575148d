"""Peers: transformers' own generation, serving the same requests with the same weights.

`Generate` runs one static batch to its end, `Continuous` is `generate_batch` with requests that come one by one. Both
are watched through what transformers offers for it: a stopping criterion, and the time stamps of continuous batching.
Times are nanoseconds of `time.perf_counter_ns`; token ids and times go into the requests.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, StoppingCriteriaList
from transformers.generation.continuous_batching.utils import WorkloadHints

from uvm_kv.runner.torch.model import quiet
from uvm_kv.sched.request import Request

GIB = 2**30
PAD = 0
WARM_UP_TOKENS = 4
_WAIT_S = 0.5
_LOGGER = "ContinuousBatchingLogger"


@contextlib.contextmanager
def own_attention(model: Any) -> Iterator[Any]:
    """`model` with transformers' attention in place of ours, and a generation config of its own to change."""
    ours, generation = model.config._attn_implementation, model.generation_config
    model.set_attn_implementation("sdpa")
    model.generation_config = GenerationConfig(pad_token_id=PAD, do_sample=False)
    try:
        yield model
    finally:
        model.set_attn_implementation(ours)
        model.generation_config = generation


def reset_peak(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)


def peak_bytes(model: Any) -> int | None:
    """Most bytes that torch had allocated on the device since `reset_peak`; None where torch does not count."""
    return torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else None


class _Watch:
    """A stopping criterion that ends each row at its own length, and notes when each token of the batch was there.

    It waits for the device. `generate` itself does so right after, to learn whether any row is still unfinished.
    """

    def __init__(
        self, limits: Sequence[int], device: torch.device, deadline_ns: float, on_token: Callable[[], None]
    ) -> None:
        self._on_token = on_token
        self._limits = torch.tensor(limits, device=device)
        self._device = device
        self._deadline_ns = deadline_ns
        self.times_ns: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # noqa: ARG002
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now_ns = time.perf_counter_ns()
        self.times_ns.append(now_ns)
        self._on_token()
        if now_ns >= self._deadline_ns:
            return torch.ones_like(self._limits, dtype=torch.bool)
        return self._limits <= len(self.times_ns)


class Generate:
    """`model.generate`, greedy. `cache`: transformers' cache_implementation (dynamic, static, offloaded,
    offloaded_static)."""

    def __init__(self, model: Any, cache: str = "dynamic", stop_tokens: frozenset[int] = frozenset()) -> None:
        self._model = model
        self._cache = cache
        self._stop_tokens = stop_tokens

    def warm_up(self, requests: Sequence[Request]) -> None:
        """A batch of the same shapes, cut after a few tokens: a static cache is compiled for its shapes."""
        self._run(requests, [min(r.output_tokens, WARM_UP_TOKENS) for r in requests])

    def serve(
        self,
        requests: Sequence[Request],
        deadline_ns: float = float("inf"),
        on_token: Callable[[], None] = lambda: None,
    ) -> list[int]:
        """One batch, padded on the left, until its last row ends or the deadline; when each of its tokens was there.
        `on_token` is called with each of them, between two steps."""
        ids, times_ns = self._run(requests, [r.output_tokens for r in requests], deadline_ns, on_token)
        for request, row in zip(requests, ids, strict=True):
            length = min(request.output_tokens, len(row))
            ends = [i + 1 for i, token in enumerate(row[:length]) if token in self._stop_tokens]
            request.token_ids = row[: min(ends, default=length)]
            done = len(request.token_ids)
            request.num_tokens = request.prompt_tokens + done
            request.first_token_ns = times_ns[0]
            if ends or done == request.output_tokens:
                request.finish_ns = times_ns[done - 1]
        return times_ns

    def _run(
        self,
        requests: Sequence[Request],
        limits: list[int],
        deadline_ns: float = float("inf"),
        on_token: Callable[[], None] = lambda: None,
    ) -> tuple[list[list[int]], list[int]]:
        prompts = [r.prompt_ids or () for r in requests]
        longest, device = max(map(len, prompts)), self._model.device
        ids = torch.tensor([[PAD] * (longest - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        watch = _Watch(limits, device, deadline_ns, on_token)
        with quiet():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                # Not the limits: a warm-up takes the cache of the batch that follows.
                max_new_tokens=max(r.output_tokens for r in requests),
                eos_token_id=sorted(self._stop_tokens) or None,
                cache_implementation=self._cache,
                stopping_criteria=StoppingCriteriaList([watch]),
            )
        return out[:, longest:].tolist(), watch.times_ns


@dataclass(frozen=True)
class ContinuousOptions:
    """Fields of transformers' ContinuousBatchingConfig; None: it decides."""

    page_size: int = 256
    num_blocks: int | None = None
    max_batch_tokens: int | None = None
    max_requests_per_batch: int | None = None
    use_cuda_graph: bool | None = None
    cpu_offload_bytes: int = 0


class Continuous:
    """transformers' continuous batching, greedy, as a manager that runs until `close`."""

    def __init__(
        self,
        model: Any,
        options: ContinuousOptions,
        *,
        max_prompt_tokens: int,
        max_output_tokens: int,
        num_requests: int,
        stop_tokens: frozenset[int] = frozenset(),
    ) -> None:
        self._model = model
        self._under_way: dict[str, Request] = {}
        self._level = logging.getLogger(_LOGGER).level
        logging.getLogger(_LOGGER).setLevel(logging.CRITICAL)  # Errors are raised here.
        generation = GenerationConfig(
            pad_token_id=PAD,
            do_sample=False,
            eos_token_id=sorted(stop_tokens) or -1,
            max_new_tokens=max_output_tokens,
        )
        config = ContinuousBatchingConfig(
            page_size=options.page_size,
            num_blocks=options.num_blocks,
            max_batch_tokens=options.max_batch_tokens,
            max_requests_per_batch=options.max_requests_per_batch,
            use_cuda_graph=options.use_cuda_graph,
            cpu_offload_space=options.cpu_offload_bytes / GIB,
        )
        hints = WorkloadHints(
            max_prompt_length=max_prompt_tokens, max_generated_length=max_output_tokens, num_requests=num_requests
        )
        self._running = False
        try:
            with quiet(), torch.no_grad():
                self._manager = model.init_continuous_batching(generation, config, hints)
                self._manager.warmup()
                self._manager.start()
            self._running = True
        finally:
            if not self._running:
                logging.getLogger(_LOGGER).setLevel(self._level)

    def settings(self) -> dict[str, Any]:
        """What transformers made of the options."""
        config = self._manager.continuous_batching_config
        return {
            "page_size": config.page_size,
            "num_blocks": config.num_blocks,
            "max_batch_tokens": config.max_batch_tokens,
            "max_requests_per_batch": config.max_requests_per_batch,
            "use_cuda_graph": list(config.use_cuda_graph),
            "use_async_batching": config.use_async_batching,
            "allow_block_sharing": config.allow_block_sharing,
            "cpu_offload_bytes": round(config.cpu_offload_space * GIB),
            "attention": self._model.config._attn_implementation,
        }

    def warm_up(self, request: Request, vocabulary: int) -> None:
        """A short generation from a prompt of this length; of other tokens, so that no block of it can be shared."""
        prompt = tuple((token + 1) % vocabulary for token in request.prompt_ids or ())
        self.submit(Request(-1, len(prompt), min(request.output_tokens, WARM_UP_TOKENS), prompt_ids=prompt))
        while self._under_way:
            self.finished(_WAIT_S)

    def submit(self, request: Request) -> None:
        name = str(request.id)
        self._under_way[name] = request
        self._manager.add_request(
            list(request.prompt_ids or ()),
            request_id=name,
            max_new_tokens=request.output_tokens,
            record_timestamps=True,
            eos_token_id=self._manager.generation_config.eos_token_id,
        )

    def finished(self, timeout_s: float) -> tuple[Request, list[int]] | None:
        """The next request that ended, and the times of its tokens; None if none does within the timeout. Of one that
        was evicted and prefilled again, transformers knows only the times since."""
        result = self._manager.get_result(timeout=timeout_s)
        if result is None:
            if not self._manager.is_running():
                self._fail("it ended by itself")
            return None
        if result.error is not None:
            self._fail(result.error)
        return self._take(result)

    def _take(self, result: Any) -> tuple[Request, list[int]]:
        request = self._under_way.pop(result.request_id)
        times_ns = [round(t * 1e9) for t in result.timestamps]
        request.token_ids = list(result.generated_tokens)
        request.num_tokens = request.prompt_tokens + len(request.token_ids)
        if times_ns and len(times_ns) == len(request.token_ids):
            request.admitted_ns = round(result.lifespan[0] * 1e9)
            request.first_token_ns = times_ns[0]
        if result.error is None:
            request.finish_ns = times_ns[-1]
        return request, times_ns

    def _fail(self, error: str) -> None:
        status, until = self._manager.background_thread_status, time.monotonic() + 5 * _WAIT_S
        while status.fatal_error is None and self._manager.is_running() and time.monotonic() < until:
            time.sleep(0.01)  # What it died of is noted after its requests were told.
        raise RuntimeError(f"transformers' continuous batching failed: {error}") from status.fatal_error

    def interrupt(self) -> list[tuple[Request, list[int]]]:
        """End at once; what was under way, with the tokens that it has."""
        self._manager.stop(block=True, hard_stop=True)
        self._running = False
        cut = []
        while not self._manager.output_router.output_queue.empty():
            cut.append(self._take(self._manager.output_router.output_queue.get()))
        return cut

    def close(self) -> None:
        if self._running:
            self._running = False
            self._manager.stop(block=True, hard_stop=True)
        self._manager.destroy()
        logging.getLogger(_LOGGER).setLevel(self._level)
