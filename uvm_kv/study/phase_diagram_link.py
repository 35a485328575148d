"""The same diagram for links of other machines and for smaller KV: link bandwidth against bytes of KV per token, for
one model whose KV heads and bits are varied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from uvm_kv.study.base import Drawn, Study
from uvm_kv.study.grid import Axis
from uvm_kv.study.grid_figure import draw_grid
from uvm_kv.types import KIB

LINKS = {11.5: "PCIe 3", 25.0: "PCIe 4", 56.0: "PCIe 5", 375.0: "NVLink-C2C"}
"""Names of conf/link by their GB/s from host to device; any other rate is written as its number."""


def _link(run: pd.Series[Any]) -> tuple[float, str]:
    rate = float(run["setting"]["hardware.link.h2d_gb_per_s"])
    return rate, f"{LINKS[rate]}\n{rate:g}" if rate in LINKS else f"{rate:g}"


def _kv(run: pd.Series[Any]) -> tuple[float, str]:
    setting, bits = run["setting"], int(run["kv_bits"])
    kv_heads = int(setting["model.num_kv_heads"])
    size = 2 * int(setting["model.num_layers"]) * kv_heads * int(setting["model.head_dim"]) * bits / 8 / KIB
    return size, f"{_kind(setting)}\n{bits} bit\n{size:g}"


def _kind(setting: dict[str, Any]) -> str:
    kv_heads = int(setting["model.num_kv_heads"])
    return "MHA" if kv_heads == int(setting["model.num_heads"]) else "MQA" if kv_heads == 1 else "GQA"


def _kinds(runs: pd.DataFrame) -> str:
    """The number of KV heads of each kind of attention there is."""
    found = {(int(s["model.num_kv_heads"]), _kind(s)) for s in runs["setting"]}
    return ", ".join(f"{kind}: {heads} KV heads" for heads, kind in sorted(found, reverse=True) if kind != "MQA")


KV = Axis("kv_kib_per_token", "KV per token (KiB)", _kv)
LINK = Axis("link_gb_per_s", "link, host to device (GB/s)", _link)


def draw(runs: pd.DataFrame, _: Sequence[dict[str, Any]]) -> Drawn:
    return draw_grid(runs, KV, LINK, _kinds(runs))


STUDY = Study(
    name="phase_diagram_link",
    title="Where CPU-backed KV pays: link bandwidth against KV size",
    question="What would a faster link, or a smaller KV cache, change?",
    how_to_read=(
        "As the diagram before, decode alone too, with the same card, one size of KV memory on it and one model, but "
        "another link to the CPU (rows), and another size of a token's KV (columns): the model's shapes with all their "
        "KV heads (multi-head attention, MHA) or with fewer (grouped-query, GQA), at 16 bits or fewer. Fewer KV heads "
        "leave smaller K and V projections among the weights, too. A faster link moves every bound up. The bound "
        "counts the link alone: where a small KV lets hundreds of requests run, a step is held up by arithmetic, and "
        "the gain stays far below it."
    ),
    factors=("model", "mechanism", "link_h2d_gb_per_s", "kv_bits", "offered_batch"),
    draw=draw,
    experiments=("phase_diagram_link", "phase_diagram_link_far"),
)
