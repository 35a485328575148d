"""How long each operator of a model's layers takes here: the `operators` curve of a calibration.

The modules are those that a real runner executes. A time is that of one execution among many in a row, as a CUDA graph
on a GPU, so that no launch is in it; each execution has weights of another layer, so that no cache holds them. The
addition of the residual is timed with the norm that follows it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from uvm_kv.hw.model import ModelGeometry
from uvm_kv.runner.torch.model import random_model

LAYERS = 8
"""Copies of every weight: even the narrow K projection of Llama-3-8B then exceeds the largest cache (60 MB)."""
WARM_UPS = 3


def operator_points(
    geometry: ModelGeometry, dtype: str, tokens: Sequence[int], *, repeats: int, device: str
) -> list[dict[str, Any]]:
    """One point per operator and number of tokens: layer_name, tokens, and the seconds of every repeat."""
    shape = dataclasses.replace(geometry, num_layers=LAYERS)
    model = random_model(shape, dtype, 0, device)
    found = []
    with torch.no_grad():
        for num_tokens in tokens:
            for name, calls in _calls(model, shape, num_tokens).items():
                seconds = [s / len(calls) for s in _time(calls, repeats, device)]
                found.append({"layer_name": name, "tokens": num_tokens, "seconds": seconds})
    return found


def _calls(model: Any, shape: ModelGeometry, num_tokens: int) -> dict[str, list[Callable[[], Any]]]:
    """Every operator's executions, one after another."""
    dtype, device = model.dtype, model.device

    def rows(width: int) -> Tensor:
        return torch.randn(1, num_tokens, width, dtype=dtype, device=device)

    def heads(num: int) -> Tensor:
        return torch.randn(1, num, num_tokens, shape.head_dim, dtype=dtype, device=device)

    hidden, inner, attended = rows(shape.hidden_size), rows(shape.intermediate_size), rows(shape.q_size)
    residual, gate = rows(shape.hidden_size), rows(shape.intermediate_size)
    q, k, v = heads(shape.num_heads), heads(shape.num_kv_heads), heads(shape.num_kv_heads)
    ids = torch.randint(shape.vocab_size, (1, num_tokens), device=device)
    cos, sin = model.model.rotary_emb(hidden, torch.arange(num_tokens, device=device)[None])
    grouped = shape.num_heads != shape.num_kv_heads
    attend = partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=grouped)
    layers = list(model.model.layers)

    def added(norm: Any) -> Callable[[], Tensor]:
        return lambda: norm(residual + hidden)

    def activated(mlp: Any) -> Callable[[], Tensor]:
        return lambda: mlp.act_fn(gate) * inner

    each: dict[str, Callable[[Any], Callable[[], Any]]] = {
        "input_layernorm": lambda layer: added(layer.input_layernorm),
        "q_proj": lambda layer: partial(layer.self_attn.q_proj, hidden),
        "k_proj": lambda layer: partial(layer.self_attn.k_proj, hidden),
        "v_proj": lambda layer: partial(layer.self_attn.v_proj, hidden),
        "rope": lambda _: partial(apply_rotary_pos_emb, q, k, cos, sin),
        "attn": lambda _: attend,
        "o_proj": lambda layer: partial(layer.self_attn.o_proj, attended),
        "post_layernorm": lambda layer: added(layer.post_attention_layernorm),
        "gate_proj": lambda layer: partial(layer.mlp.gate_proj, hidden),
        "up_proj": lambda layer: partial(layer.mlp.up_proj, hidden),
        "act_fn": lambda layer: activated(layer.mlp),
        "down_proj": lambda layer: partial(layer.mlp.down_proj, inner),
    }
    once: dict[str, Callable[[], Any]] = {
        "embedding": partial(model.model.embed_tokens, ids),
        "final_layernorm": added(model.model.norm),
        "lm_head": partial(model.lm_head, hidden),
    }
    calls = {name: [make(layer) for layer in layers] for name, make in each.items()}
    calls |= {name: [call] * LAYERS for name, call in once.items()}
    return calls


def _time(calls: Sequence[Callable[[], Any]], repeats: int, device: str) -> list[float]:
    """Seconds of all of them together, one value per repeat."""

    def run() -> None:
        for call in calls:
            call()

    if device != "cuda":
        return [_wall(run) for _ in range(WARM_UPS + repeats)][WARM_UPS:]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):  # Kernels are loaded and libraries make their handles, which a capture must not.
            run()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return [_replay(graph) for _ in range(WARM_UPS + repeats)][WARM_UPS:]


def _wall(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _replay(graph: Any) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3
