"""Where CPU-backed KV pays, over the size of the card's KV memory and the context length (`grid`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from uvm_kv.study.base import Drawn, Study
from uvm_kv.study.grid import Axis
from uvm_kv.study.grid_figure import draw_grid
from uvm_kv.study.kit import context_tokens
from uvm_kv.types import GIB


def _gib(run: pd.Series[Any]) -> tuple[float, str]:
    size = (run["setting"]["memory.device_kv_bytes"] or run["device_kv_bytes"]) / GIB
    return size, f"{size:g}"


def _context(run: pd.Series[Any]) -> tuple[float, str]:
    tokens = context_tokens(run, "phase_diagram")
    return tokens, str(tokens)


CONTEXT = Axis("context_tokens", "tokens per request", _context)
DEVICE_KV = Axis("device_kv_gib", "device KV (GiB)", _gib)


def draw(runs: pd.DataFrame, _: Sequence[dict[str, Any]]) -> Drawn:
    return draw_grid(runs, CONTEXT, DEVICE_KV)


STUDY = Study(
    name="phase_diagram",
    title="Where CPU-backed KV pays: device KV against context length",
    question="For which sizes of the card's KV memory and which contexts does CPU-backed KV pay, by which placement?",
    how_to_read=(
        "Each panel is a way to use CPU memory, each cell a size of the KV memory on the card and a length of the "
        "requests. The number is by how many per cent the best batch beyond the card's capacity is faster (blue) or "
        "slower (red) than the best batch on the card alone. It is of decode alone: runs begin in their steady state, "
        "no prompt is computed. The small number below it is what is left of the gain when the same requests start "
        "cold, with their prefill, over fewer working sets. Where a cell has \u2265, the largest "
        "batch tried was still the best, with all its requests running, and the gain is at least that. The lines are "
        "the closed form's bound on the gain, what the link can carry while a step computes: they part the cells whose "
        "bound is above the line's gain from the others. Beyond the dashed line, where so few requests fit that one "
        "more is already more than the link can carry, cells fall far below their bound."
    ),
    factors=("model", "mechanism", "device_kv_bytes", "prompt_tokens", "offered_batch", "start"),
    draw=draw,
    experiments=("phase_diagram", "phase_diagram_cold"),
)
