"""The same diagram for links of other machines and for smaller KV: link bandwidth against bytes of KV a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from uvm_kv.analysis.study.base import Drawn, Study
from uvm_kv.analysis.study.phase_diagram import Axis, draw_grid
from uvm_kv.types import KIB

LINKS = {11.5: "PCIe 3", 25.0: "PCIe 4", 56.0: "PCIe 5", 375.0: "NVLink-C2C"}
"""conf/link by the GB/s from host to device that it says; any other is written as its number."""


def _link(run: pd.Series[Any]) -> tuple[float, str]:
    rate = float(run["setting"]["hardware.link.h2d_gb_per_s"])
    return rate, f"{LINKS[rate]}\n{rate:g}" if rate in LINKS else f"{rate:g}"


def _kv(run: pd.Series[Any]) -> tuple[float, str]:
    setting, bits = run["setting"], int(run["kv_bits"])
    heads, kv_heads = int(setting["model.num_heads"]), int(setting["model.num_kv_heads"])
    values = 2 * int(setting["model.num_layers"]) * kv_heads * int(setting["model.head_dim"])
    kind = "MHA" if kv_heads == heads else "MQA" if kv_heads == 1 else "GQA"
    size = values * bits / 8 / KIB
    return size, f"{kind}\n{bits} bit\n{size:g}"


KV = Axis("kv_kib_per_token", "KV a token (KiB)", _kv)
LINK = Axis("link_gb_per_s", "link, host to device (GB/s)", _link)


def draw(runs: pd.DataFrame, failures: Sequence[dict[str, Any]]) -> Drawn:
    del failures
    return draw_grid(runs, KV, LINK)


STUDY = Study(
    name="phase_diagram_link",
    title="Where CPU-backed KV pays: link bandwidth against KV size",
    question="What would a faster link, or a smaller KV cache, change?",
    how_to_read=(
        "As the diagram before, with the same card and the same KV memory on it, but another link to the CPU (rows), "
        "and another size of a token's KV (columns): multi-head or grouped-query attention, at 16 bits or fewer. A "
        "faster link moves every bound up. The bound counts the link alone: where a small KV lets hundreds of requests "
        "run, a step is held up by arithmetic, and the gain stays far below it."
    ),
    factors=("model", "mechanism", "link_h2d_gb_per_s", "kv_bits", "offered_batch"),
    draw=draw,
    experiments=("phase_diagram_link", "phase_diagram_link_far"),
)
