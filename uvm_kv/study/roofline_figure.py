"""Figure of one step: its operators under the card's roof, and where its time goes."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from uvm_kv.hw.counting import Counting
from uvm_kv.hw.step import Operator, StepAnalysis
from uvm_kv.report.drawing import draw_roof, handle, line_look, plain_numbers
from uvm_kv.report.style import PAGE_IN, save_figure

# Kinds of operators in Okabe and Ito's colours, each with a marker of its own for print without colour.
KINDS: dict[str, tuple[str, str]] = {
    "projections and MLP": ("#0072B2", "o"),
    "attention": ("#D55E00", "s"),
    "norms, activation, RoPE": ("#009E73", "^"),
    "embedding and head": ("#CC79A7", "D"),
}
SAME_POINT = 0.12
"""Decades within which operators share one label."""


def kind_of(name: str) -> str:
    if name in ("embedding", "final_layernorm", "lm_head"):
        return "embedding and head"
    if name in ("attn", "qk_matmul", "sv_matmul", "softmax"):
        return "attention"
    return "projections and MLP" if name.endswith("_proj") else "norms, activation, RoPE"


def write_roofline(step: StepAnalysis, folder: Path) -> list[Path]:
    """Draw it into `folder`, named after what it shows; the paths. OSError where that cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    bits = step.precision
    name = (
        f"roofline_{step.model.name}_{step.profile.name}_{step.stage.value}_b{step.batch_size}"
        f"_s{step.sequence_length}_w{bits.weight_bits}a{bits.activation_bits}kv{bits.kv_bits}_{step.counting.value}"
    )
    return save_figure(roofline_figure(step), folder / name.replace(".", "_"))  # A dot would begin a suffix.


def roofline_figure(step: StepAnalysis) -> Any:
    figure, (roof, time) = plt.subplots(1, 2, figsize=(PAGE_IN, 3.2), width_ratios=(1.65, 1))
    _draw_roof(roof, step)
    _draw_time(time, step)
    bits = step.precision
    figure.suptitle(
        f"{step.model.name}, {step.stage.value}, batch {step.batch_size}, {step.sequence_length} tokens, "
        f"w{bits.weight_bits} a{bits.activation_bits} kv{bits.kv_bits} on {step.profile.name}: "
        f"{step.total_s * 1e3:.4g} ms{'' if step.fits else ', does not fit the card'}",
        x=0.01,
        ha="left",
    )
    kinds = [handle(name, **line_look(colour, "", marker)) for name, (colour, marker) in KINDS.items()]
    figure.legend(handles=kinds, loc="outside lower center", ncols=len(kinds))
    return figure


def _draw_roof(axis: Any, step: StepAnalysis) -> None:
    """The card's roof, and every operator at what it attains (open) and at what it is charged (filled)."""
    shown = [op for op in step.operators if op.ops > 0]  # Copies have no place on a logarithmic axis.
    reached = {op.name: op.ops / op.time_s for op in shown}
    hbm, peaks = shown[0].hbm_bytes_per_s, sorted({op.peak_ops_per_s for op in shown})
    left = min(0.1, 0.5 * min(op.intensity for op in shown))
    right = max(20 * peaks[-1] / hbm, 60 * max(op.intensity for op in shown))  # Room for the labels.
    for peak in peaks:
        draw_roof(axis, peak, hbm, left, right)
        note = f"{peak / 1e12:.4g} TOP/s"
        axis.annotate(note, (right, peak), (-3, 4), textcoords="offset points", ha="right")
    middle = (left * peaks[0] / hbm) ** 0.5
    note = f"{hbm / 1e9:.4g} GB/s"
    axis.annotate(note, (middle, hbm * middle), (-6, 4), textcoords="offset points", ha="right")
    axis.set(xlim=(left, right), ylim=(0.1 * min(reached.values()), 4 * peaks[-1]))
    for op in shown:
        colour, marker = KINDS[kind_of(op.name)]
        roof = op.attainable_ops_per_s
        axis.plot([op.intensity] * 2, [roof, reached[op.name]], color=colour, linewidth=0.8, zorder=2)
        axis.plot(op.intensity, roof, marker, markersize=6, color=colour, fillstyle="none", zorder=3)
        axis.plot(op.intensity, reached[op.name], marker, markersize=6, color=colour, zorder=4)
    _draw_labels(axis, _clusters(shown, reached))
    axis.set_xlabel("operations per byte")
    axis.set_ylabel("operations per second")
    if step.counting is Counting.EXACT:
        axis.set_title("open: attainable, filled: charged (exact counting)")
    else:
        axis.set_title("LLM-Viewer's counting: every operator at its roof")


def _clusters(shown: list[Operator], reached: dict[str, float]) -> list[tuple[list[str], float, float]]:
    """Names of operators whose points nearly coincide, with where the rightmost of them lies, from the top down."""
    clusters: list[tuple[list[str], float, float]] = []
    for op in sorted(shown, key=lambda op: op.intensity, reverse=True):
        for names, intensity, rate in clusters:
            if max(abs(np.log10([op.intensity / intensity, reached[op.name] / rate]))) < SAME_POINT:
                names.append(op.name)
                break
        else:
            clusters.append(([op.name], op.intensity, reached[op.name]))
    order = {op.name: place for place, op in enumerate(shown)}
    for names, _, _ in clusters:
        names.sort(key=order.__getitem__)
    return sorted(clusters, key=lambda cluster: cluster[2], reverse=True)


def _draw_labels(axis: Any, clusters: list[tuple[list[str], float, float]]) -> None:
    """To the right of all points that stand close together, and a little below; no two on the same place."""
    line, near = 0.034, 0.1  # Height of a line of text, and what is close, as shares of the axis.
    to_axis = axis.transData + axis.transAxes.inverted()
    places = [tuple(map(float, to_axis.transform((intensity, rate)))) for _, intensity, rate in clusters]
    below = 1.0
    for (names, intensity, rate), (x, y) in zip(clusters, places, strict=True):
        for other in sorted(px for px, _ in places):
            x = other if x < other < x + near else x
        text = textwrap.wrap(_label(names), 30)
        top = min(y, below) - 0.012
        below = top - line * len(text)
        axis.annotate(
            "\n".join(text),
            (intensity, rate),
            (x + 0.035, top),
            textcoords="axes fraction",
            va="top",
            linespacing=1.05,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.6, "relpos": (0, 1), "shrinkA": 0},
        )


def _label(names: list[str]) -> str:
    """q, k, v, o_proj"""
    linear = [name for name in names if name.endswith("_proj")]
    short = [name.removesuffix("_proj") for name in linear[:-1]] + linear[-1:]
    return ", ".join(short + [name for name in names if name not in linear])


def _draw_time(axis: Any, step: StepAnalysis) -> None:
    """Time of all executions of each operator, in the order of the step."""
    times = [op.count * op.time_s * 1e3 for op in step.operators]
    bars = axis.barh(range(len(times)), times, color=[KINDS[kind_of(op.name)][0] for op in step.operators])
    shares = [f"{t / (step.total_s * 1e3):.1%}" for t in times]
    axis.bar_label(bars, shares, padding=3)
    names = [op.name if op.count == 1 else f"{op.name} x{op.count}" for op in step.operators]
    axis.set_yticks(range(len(times)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * max(times))
    plain_numbers(axis.xaxis)
    axis.set_xlabel("time in the step (ms)")
    axis.set_title("share of the step's time")
