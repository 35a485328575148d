"""Card by card: the best that CPU-backed KV makes of it, over the best that the card does alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator, PercentFormatter

from uvm_kv.report.load import points
from uvm_kv.report.statistics import MIN_REPEATS
from uvm_kv.report.style import COLUMN_IN, look
from uvm_kv.report.verdict import INDIFFERENT, best_row, gain_of, is_cpu_backed, moved_kv
from uvm_kv.study.base import Drawn, Study
from uvm_kv.study.kit import bracketed, percent, served
from uvm_kv.types import BASELINES


def draw(runs: pd.DataFrame, _: Sequence[dict[str, Any]]) -> Drawn:
    """A bar per card and CPU-backed mechanism: its best throughput over that of a baseline, each at its own batch."""
    table = best_gains(runs)
    cards = list(dict.fromkeys(zip(table["hardware"], table["origin"], strict=True)))
    mechanisms = sorted(set(table["mechanism"]))
    figure, axis = plt.subplots(figsize=(COLUMN_IN, 0.28 * len(cards) * len(mechanisms) + 1.1))
    height = 0.8 / len(mechanisms)
    for place, mechanism in enumerate(mechanisms):
        rows = table[table["mechanism"] == mechanism].set_index(["hardware", "origin"]).reindex(cards)
        at = np.arange(len(cards)) + (place - (len(mechanisms) - 1) / 2) * height
        colour = look(mechanism, mechanisms)["color"]
        axis.barh(at, rows["gain"], height=0.9 * height, color=colour, label=mechanism, hatch=place * "//")
        spread = np.abs(rows[["gain_low", "gain_high"]].to_numpy(float).T - rows["gain"].to_numpy(float))
        axis.errorbar(rows["gain"], at, xerr=spread, fmt="none", ecolor="black", elinewidth=0.8)
        ends = zip(rows["gain"], rows["word"], rows["gain_low"], rows["gain_high"], strict=True)
        for y, (gain, word, low, high) in zip(at, ends, strict=True):
            if pd.notna(gain):
                end = np.nanmin([gain, low]) if gain < 0 else np.nanmax([gain, high])
                text = percent(gain) + (" ?" if word == "AMBIGUOUS" else "")
                axis.annotate(text, (end, y), (-2 if gain < 0 else 2, 0), textcoords="offset points", va="center",
                              ha="right" if gain < 0 else "left")  # fmt: skip
    axis.axvspan(-INDIFFERENT, INDIFFERENT, color="black", alpha=0.1, linewidth=0)
    axis.axvline(0, color="black", linewidth=0.8)
    several = table["origin"].nunique() > 1
    axis.set_yticks(range(len(cards)), [f"{card}\n{origin}" if several else card for card, origin in cards])
    axis.invert_yaxis()
    axis.margins(x=0.3)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    doubt = "; ?: AMBIGUOUS" if (table["word"] == "AMBIGUOUS").any() else ""
    axis.set_xlabel(f"gain over the best that the card does alone\n(grey: no difference{doubt})")
    axis.set_title(f"{table['model'].iloc[0]}, {table['lengths'].iloc[0]}")
    figure.legend(loc="outside upper center", ncols=len(mechanisms))
    return Drawn(figure, table, _claims(table, served(runs, [])))


def best_gains(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per card, its origin and a CPU-backed mechanism, in order of the cards' baselines; medians over repeats.
    ValueError where a card has no baseline, or the runs differ in more than the card."""
    found = points(runs)
    what = found["title"].str.partition(", on a ")[0]
    if what.nunique() > 1 or (found.groupby(["origin", "hardware"])["title"].nunique() > 1).any():
        raise ValueError("does_it_help_my_box: the runs are of several models or lengths; it compares cards only")
    rows = []
    for (origin, card), part in found.groupby(["origin", "hardware"], sort=False):
        alone = part[part["mechanism"].isin(BASELINES)]
        backed = part[is_cpu_backed(part) & moved_kv(part)]
        base = best_row(alone)
        if base is None:
            where = f"{card} ({origin})" if found["origin"].nunique() > 1 else str(card)
            raise ValueError(f"does_it_help_my_box: {where} has no run of {' or '.join(BASELINES)}; run one of them")
        for name, tried in backed.groupby("label", sort=True):
            best = best_row(tried)
            if best is None:
                continue
            found_gain = gain_of(best, base)
            rows.append(
                {
                    "hardware": str(card),
                    "origin": str(origin),
                    "model": str(base["model"]),
                    "lengths": what.iloc[0].partition(", ")[2],
                    "baseline": str(base["label"]),
                    "baseline_batch": int(base["offered_batch"]),
                    "baseline_throughput": float(base["throughput"]),
                    "baseline_num_runs": int(base["num_runs"]),
                    "mechanism": str(name),
                    "offered_batch": int(best["offered_batch"]),
                    "throughput": float(best["throughput"]),
                    "num_runs": int(best["num_runs"]),
                    "gain": found_gain.gain,
                    "gain_low": found_gain.low - 1,
                    "gain_high": found_gain.high - 1,
                    "word": found_gain.word,
                }
            )
    if not rows:
        raise ValueError("does_it_help_my_box: no run of a CPU-backed mechanism moved KV over the link; run one")
    table = pd.DataFrame(rows)
    # A card's origins stay together.
    table["slowest"] = table.groupby("hardware")["baseline_throughput"].transform("min")
    table = table.sort_values(["slowest", "hardware", "origin", "mechanism"], kind="stable")
    return table.drop(columns="slowest").reset_index(drop=True)


def _claims(table: pd.DataFrame, scope: str) -> list[str]:
    """One text, a sentence per origin. `scope`: what was served."""
    parts = [part for _, part in table.groupby("origin", sort=True)]
    return [" ".join(_sentence(part, scope, of_several=len(parts) > 1) for part in parts)]


def _sentence(table: pd.DataFrame, scope: str, *, of_several: bool) -> str:
    # For each card the largest gain that is certain; without any the largest.
    ranked = table.assign(certain=table["word"] == "HIGHER").sort_values(["certain", "gain"], kind="stable")
    best = ranked.groupby("hardware", sort=False).tail(1).set_index("hardware")
    best = best.loc[list(dict.fromkeys(table["hardware"]))]
    helped, unclear = int((best["word"] == "HIGHER").sum()), best[best["word"] == "AMBIGUOUS"]
    what = f"{table['model'].iloc[0]}, {table['lengths'].iloc[0]}{bracketed(scope)}"
    cards = f"{len(best)} {table['origin'].iloc[0]} cards" if of_several else f"{len(best)} cards"
    each = ", ".join(f"{card} {percent(row['gain'])} ({row['mechanism']})" for card, row in best.iterrows())
    text = (
        f"{what}: CPU-backed KV raises the best throughput of {helped or 'none'} of {cards} by more than "
        f"{INDIFFERENT:.0%}: {each}"
    )
    if len(unclear):
        doubts = [f"{card} {_range(row)}" for card, row in unclear.iterrows()]
        text += f"; AMBIGUOUS, and not counted: {', '.join(doubts)}"
    return text + "."


def _range(row: pd.Series[Any]) -> str:
    if pd.isna(row["gain_low"]):
        return f"(fewer than {MIN_REPEATS} repeats)"
    return f"({percent(row['gain_low'])} to {percent(row['gain_high'])})"


STUDY = Study(
    name="does_it_help_my_box",
    title="Does it help my card?",
    question="Card by card, does CPU-backed KV raise the best throughput of the same model and workload?",
    how_to_read=(
        "Each bar is the best that a mechanism with CPU-backed KV reached on that card, over the best that the card "
        "reached without it; both may choose their own batch. Bars inside the grey band are no difference; "
        "of measured runs a bar is the ratio of medians over repeats, with its 95 % interval where there are three and "
        "more. For one card, another model or workload, and with an uncertainty, ask uvm-kv advise."
    ),
    factors=("hardware", "mechanism", "working_set_ratio"),
    draw=draw,
)
