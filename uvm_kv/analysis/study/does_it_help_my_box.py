"""Card by card: the best that CPU-backed KV makes of it, over the best that the card does alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator, PercentFormatter

from uvm_kv.analysis.study.base import Drawn, Study, percent, throughput
from uvm_kv.analysis.style import COLUMN_IN, style_of
from uvm_kv.analysis.verdict import BASELINES, INDIFFERENT


def draw(runs: pd.DataFrame, failures: Sequence[dict[str, Any]]) -> Drawn:
    """A bar a card and CPU-backed mechanism: its best throughput over the best of a baseline, each at its own batch."""
    del failures
    table = best_gains(runs)
    cards = list(dict.fromkeys(table["hardware"]))
    mechanisms = sorted(set(table["mechanism"]))
    figure, axis = plt.subplots(figsize=(COLUMN_IN, 0.28 * len(cards) * len(mechanisms) + 1.1))
    height = 0.8 / len(mechanisms)
    for place, mechanism in enumerate(mechanisms):
        rows = table[table["mechanism"] == mechanism].set_index("hardware").reindex(cards)
        at = np.arange(len(cards)) + (place - (len(mechanisms) - 1) / 2) * height
        colour = style_of(mechanism, mechanisms)[0]
        bars = axis.barh(at, rows["gain"], height=0.9 * height, color=colour, label=mechanism, hatch=place * "//")
        axis.bar_label(bars, [percent(gain) if pd.notna(gain) else "" for gain in rows["gain"]], padding=2)
    axis.axvspan(-INDIFFERENT, INDIFFERENT, color="black", alpha=0.1, linewidth=0)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(cards)), cards)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlabel("gain over the best that the card does alone\n(grey: no difference)")
    axis.set_title(f"{table['model'].iloc[0]}, {table['lengths'].iloc[0]}")
    figure.legend(loc="outside upper center", ncols=len(mechanisms))
    return Drawn(figure, table, _claims(table))


def best_gains(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a card and CPU-backed mechanism, in order of the cards' baselines; ValueError where a card has none."""
    runs = runs.assign(throughput=throughput(runs))
    lengths = [f"{p:.0f}+{o:.0f} tokens" for p, o in zip(runs["prompt_tokens"], runs["output_tokens"], strict=True)]
    if len(set(lengths)) > 1 or runs["model"].nunique() > 1:
        raise ValueError("does_it_help_my_box: the runs are of several models or lengths; it compares cards only")
    rows = []
    for card, part in runs.groupby("hardware", sort=False):
        alone = part[part["mechanism"].isin(BASELINES)]
        if alone.empty:
            raise ValueError(f"does_it_help_my_box: {card} has no run of {' or '.join(BASELINES)}; run one of them")
        base = alone.sort_values("throughput", kind="stable").iloc[-1]
        for name, backed in part[~part["mechanism"].isin(BASELINES)].groupby("mechanism", sort=True):
            best = backed.sort_values("throughput", kind="stable").iloc[-1]
            rows.append(
                {
                    "hardware": str(card),
                    "model": str(base["model"]),
                    "lengths": lengths[0],
                    "baseline": str(base["mechanism"]),
                    "baseline_batch": int(base["offered_batch"]),
                    "baseline_throughput": float(base["throughput"]),
                    "mechanism": str(name),
                    "batch": int(best["offered_batch"]),
                    "throughput": float(best["throughput"]),
                    "gain": float(best["throughput"] / base["throughput"] - 1),
                }
            )
    if not rows:
        raise ValueError("does_it_help_my_box: there is no run of a CPU-backed mechanism; run one")
    return pd.DataFrame(rows).sort_values(["baseline_throughput", "mechanism"], kind="stable").reset_index(drop=True)


def _claims(table: pd.DataFrame) -> list[str]:
    best = table.loc[table.groupby("hardware", sort=False)["gain"].idxmax()]
    helped = best[best["gain"] > INDIFFERENT]
    what = f"{table['model'].iloc[0]}, {table['lengths'].iloc[0]}"
    rows = zip(best["hardware"], best["gain"].astype(float), best["mechanism"], strict=True)
    each = ", ".join(f"{card} {percent(gain)} ({mechanism})" for card, gain, mechanism in rows)
    if helped.empty:
        head = f"{what}: CPU-backed KV raises the best throughput of none of {len(best)} cards by more than "
    else:
        head = f"{what}: CPU-backed KV raises the best throughput of {len(helped)} of {len(best)} cards by more than "
    return [f"{head}{INDIFFERENT:.0%}: {each}."]


STUDY = Study(
    name="does_it_help_my_box",
    title="Does it help my card?",
    question="Card by card, does CPU-backed KV raise the best throughput of the same model and workload?",
    how_to_read=(
        "Each bar is the best that a mechanism with CPU-backed KV reached on that card, over the best that the card "
        "reached without it; both may choose their own batch. Bars inside the grey band are no difference. For one "
        "card, another model or workload, and with an uncertainty, ask uvm-kv advise."
    ),
    factors=("hardware", "mechanism", "working_set_ratio"),
    draw=draw,
)
