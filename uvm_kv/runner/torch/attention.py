"""Paged attention as a function of transformers' AttentionInterface: the model's own code runs unmodified around it.

The tokens of all sequences are packed into one row. What a step is about is ambient, in `StepContext` and its KV
backend, because some models drop keywords that they do not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from uvm_kv.runner.torch import ranges

NAME = "uvm_kv_paged"
HARMLESS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "is_causal",
    "sliding_window",
}
"""Keywords that do not change what we compute, or that `check_keywords` looks into; the rest must be None."""
REFUSED = {
    "softcap": "attention logit soft-capping",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "head_mask": "head masks",
    "position_bias": "position biases",
}
"""What some of the rest mean."""


class Attends(Protocol):
    """What a model's attention needs: a KVBackend is one."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor: ...


@dataclass
class StepContext:
    kv: Attends
    max_tokens: int
    """Longest sequence of the run: a sliding window at least as long changes nothing."""
    probing: bool = False
    """The forward at load, which also looks at the masks that the model asks for."""
    calls: list[int] = field(default_factory=list)
    """Layers whose attention has run."""

    def enter(self, layer: int) -> None:
        if self.calls:
            ranges.pop()
        ranges.push(f"layer {layer}")
        self.calls.append(layer)


_current: StepContext | None = None


@contextmanager
def step_context(context: StepContext) -> Iterator[StepContext]:
    global _current
    assert _current is None, "steps do not nest"
    _current = context
    try:
        yield context
    finally:
        _current = None
        if context.calls:
            ranges.pop()


def register() -> None:
    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_: Any, mask_function: Callable[..., Tensor], local_size: int | None = None, **__: Any) -> Any:
    """Masks are ours: a mask over packed rows would be tokens squared. At the probe, a mask that is not causal over the
    longest sequence is an error, which the layer that is given it raises; some models build masks that no layer uses.
    """
    step = _current
    if step is None or not step.probing:
        return None
    zero, positions = torch.tensor(0), torch.arange(step.max_tokens)
    if not mask_function(zero, zero, positions[-1], positions).all():
        return _window_error(local_size, step.max_tokens)
    if mask_function(zero, zero, positions[0], positions[1:]).any():
        return ValueError("the model attends to later tokens too; uvm-kv serves causal models")
    return None


def _window_error(window: int | None, max_tokens: int) -> ValueError:
    if window is None:
        return ValueError("the model masks out a part of the context, which uvm-kv does not serve")
    return ValueError(
        f"the model attends to a sliding window of {window} tokens, shorter than the longest sequence of "
        f"{max_tokens}; shorten the requests and set max_model_len={window}"
    )


def check_positions(config: Any, max_tokens: int) -> None:
    """ValueError for rotary embeddings that depend on the longest sequence of a step, hence on the batch."""
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") in ("dynamic", "longrope"):
            limit = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
            if max_tokens > limit:
                raise ValueError(
                    f"the model's {parameters['rope_type']} rotary embedding changes beyond {limit} tokens, and the "
                    f"longest sequence has {max_tokens}; shorten the requests and set max_model_len={limit}"
                )


def check_keywords(keywords: dict[str, Any], max_tokens: int) -> None:
    """ValueError for what would change the result and is not served."""
    for name, value in keywords.items():
        if value is not None and name not in HARMLESS:
            meaning = REFUSED.get(name, "an attention keyword unknown here")
            raise ValueError(f"the model uses {meaning} ({name}), which uvm-kv does not serve")
    if keywords.get("is_causal") is False:
        raise ValueError("the model attends to later tokens too (is_causal=False); uvm-kv serves causal models")
    window = keywords.get("sliding_window")
    if window is not None and window < max_tokens:
        raise _window_error(window, max_tokens)


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """query [1, head, token, dim], key and value [1, kv_head, token, dim] -> ([1, token, head, dim], None)."""
    compiling = torch.compiler.is_compiling()
    if not compiling:  # The probe, which is never compiled, has seen them all.
        step = _current
        assert step is not None, "paged attention is called outside a step"
        if isinstance(attention_mask, ValueError):
            raise attention_mask
        assert attention_mask is None, "the packed row has no mask of its own"
        assert not dropout, "serving has no dropout"
        check_keywords(keywords, step.max_tokens)
    query, key, value = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    attend = torch.ops.uvm_kv.attend if compiling else _attend
    return attend(query, key, value, module.layer_idx, scaling)[None], None


def _attend(query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float | None) -> Tensor:
    step = _current
    assert step is not None, "paged attention is called outside a step"
    step.enter(layer)
    return step.kv.attend(layer, query, key, value, scaling)


# What a compiled model calls. The KV that it reads and writes is not among its arguments: calls differ by layer, and no
# two of a step could be one.
_attend_op = torch.library.custom_op("uvm_kv::attend", _attend, mutates_args=())


_attend_op.register_fake(lambda query, *_: query.new_empty(query.shape))


def eagerly() -> Any:
    """What a compiled model does inside runs as it was written."""
    return torch.compiler.set_stance("force_eager")


def compile_layers(model: torch.nn.Module, num_layers: int, **options: Any) -> None:
    """torch.compile of each decoder layer, in place. ValueError for a model whose layers are not in one list."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == num_layers]
    if len(lists) != 1:
        raise ValueError(f"compile=true: {type(model).__name__} has no one list of {num_layers} layers; drop it")
    # A layer's number is part of its code, so each is compiled by itself, for one row and for many.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * num_layers)
    for layer in lists[0]:
        layer.compile(dynamic=True, **options)
