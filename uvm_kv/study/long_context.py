"""One to four sequences whose KV exceeds the card: refused on the card alone, and how fast with each mechanism.

Rates are of decode alone: the runs start in their steady state, with the KV there. What a prompt of that length takes
first is in the time to first token of runs that start cold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import LogLocator, NullLocator

from uvm_kv.report.drawing import REFERENCE, log_scale, log_ticks, mechanism_legend, mechanism_lines, without_look
from uvm_kv.report.load import points
from uvm_kv.report.repeats import medians, one_of_each
from uvm_kv.report.style import PAGE_IN, SMALL
from uvm_kv.report.verdict import INDIFFERENT, is_cpu_backed
from uvm_kv.study.base import Drawn, Study
from uvm_kv.study.kit import argmax, argmin, context_tokens, count, one_comparison
from uvm_kv.types import BASELINES, GIB, KIB

KEY = ["label", "offered_batch", "context_tokens"]
READING_SPEED = 5.0
"""Tokens per second of one sequence that keep up with a reader, about 250 words a minute: a line to compare with."""
TTFT, COLD_TTFT = "ttft_s.p50", "cold_ttft_s"
SOME = 0.9
"""Below this part of the sequences not all run at once: the rest queue."""


COLUMNS = ["model", *KEY, "throughput", "running_batch_mean", "refused", "num_steps", COLD_TTFT, "num_runs", "kv_gib",
           "working_set_ratio", "h2d_bytes", "d2h_bytes", "cpu_backed", "why"]  # fmt: skip


def draw(runs: pd.DataFrame, failures: Sequence[dict[str, Any]]) -> Drawn:
    """A panel per number of sequences: their output tokens per second in decode, by context; and the time to the first
    token of one that starts cold, where there are runs of it."""
    table = _table(runs, failures)
    served, cold = table[table["throughput"].notna()], table[table[COLD_TTFT].notna()]
    batches = sorted(set(table["offered_batch"]))
    figure, axes = plt.subplots(1, len(batches) + (not cold.empty), figsize=(PAGE_IN, 2.7), squeeze=False)
    others = without_look(table["label"])
    contexts = sorted(set(table["context_tokens"]))
    floor = float(served["throughput"].min()) / 3
    for axis, batch in zip(axes[0], batches, strict=False):
        part = table[table["offered_batch"] == batch]
        mechanism_lines(axis, part, "context_tokens", "throughput", others)
        refused = part[part["refused"] & part["label"].isin(BASELINES)].drop_duplicates("context_tokens")
        axis.scatter(refused["context_tokens"], [floor] * len(refused), marker="x", color="black", s=16, clip_on=False)
        if len(refused):
            axis.text(refused["context_tokens"].max(), floor * 1.35, "card alone: refused", fontsize=SMALL, ha="right")
        axis.axhline(READING_SPEED * batch, **REFERENCE)
        axis.set_title(count(int(batch), "sequence"))
        log_scale(axis.yaxis)
        axis.set_ylim(floor / 1.5, 1.4 * float(served["throughput"].max()))
        axis.tick_params(labelleft=axis is axes[0, 0])
    axes[0, 0].set_ylabel("output tokens/s of all sequences,\ndecode alone")
    if not cold.empty:
        axis = axes[0, -1]
        mechanism_lines(axis, cold, "context_tokens", COLD_TTFT, others)
        axis.set_title("1 sequence, cold start")
        log_scale(axis.yaxis)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_ylabel("time to first token (s)")
    for axis in axes[0]:
        axis.set_xlabel("tokens per sequence")
        log_ticks(axis.xaxis, contexts, [f"{c // KIB}Ki" if c % KIB == 0 else str(c) for c in contexts], rotation=90)
    size = float(runs["device_kv_bytes"].max()) / GIB
    title = f"{runs['model'].iloc[0]}, {runs['hardware'].iloc[0]}, {size:.1f} GiB of KV on the card; dotted: "
    title += f"{READING_SPEED:g} tokens/s per sequence"
    mechanism_legend(figure, table["label"], mark_baselines=False, title=title)
    return Drawn(figure, table, claims(table))


def _table(runs: pd.DataFrame, failures: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Medians by sequences, context and mechanism; a job that was refused is a row without a throughput. A run that
    starts cold gives no rate, but the time to the first token of its row."""
    one_of_each(runs, ("model", "hardware", "origin"), "long_context")
    used = runs.assign(context_tokens=[context_tokens(run, "long_context") for _, run in runs.iterrows()])
    is_cold = used["start"] == "cold"
    cold, used = used[is_cold], used[~is_cold]
    if used.empty:
        raise ValueError("long_context: no run with workload.start=steady; the rates of cold ones are not of decode")
    used = used.assign(kv_gib=used["device_kv_bytes"].astype(float) * used["working_set_ratio"].astype(float) / GIB)
    parts = []
    for context, part in used.groupby("context_tokens", sort=True):
        made = points(part)
        one_comparison(made, f"long_context: {context} tokens")
        parts.append(made.assign(context_tokens=context, cpu_backed=is_cpu_backed(made)))
    table = pd.concat(parts, ignore_index=True).copy().assign(refused=False, why=None)
    table = table.merge(_cold(cold), how="left", on=KEY)
    lost = [
        {
            "model": record["model"],
            "offered_batch": record["offered_batch"],
            "label": record["mechanism"],
            "context_tokens": context_tokens(record, "long_context"),
            "refused": bool(record.get("refused")),  # Else it failed.
            "cpu_backed": record["memory"] != "device",
            "why": record["error"].strip().splitlines()[-1],
        }
        for record in failures
        if record.get("start") != "cold"
    ]
    table = pd.concat([table, pd.DataFrame(lost)], ignore_index=True) if lost else table
    return table[COLUMNS].sort_values(["offered_batch", "context_tokens", "label"]).reset_index(drop=True)


def _cold(runs: pd.DataFrame) -> pd.DataFrame:
    """Time to the first token, the prefill included, by mechanism, sequences and context; medians over repeats."""
    runs = runs.assign(label=runs["mechanism"])
    if TTFT not in runs or runs[TTFT].dropna().empty:
        return pd.DataFrame({name: runs[name][:0] for name in KEY} | {COLD_TTFT: []})
    table = medians(runs[runs[TTFT].notna()], KEY, study="long_context, from a cold start")
    return table[[*KEY, TTFT]].rename(columns={TTFT: COLD_TTFT})


def claims(table: pd.DataFrame) -> list[str]:
    """What the card alone refuses, what serves it, how fast, and what that costs against what the card holds."""
    base = table[table["label"].isin(BASELINES)]
    if base.empty:
        return ["No device-only job is among the results, so that it is not known what the card alone refuses."]
    said = []
    refused = base[base["refused"]].drop_duplicates(KEY[1:])
    if refused.empty:
        said.append("The card alone refused none of these.")
    else:
        least = int(refused["context_tokens"].min())
        most = base[base["throughput"].notna()]["context_tokens"].max()
        text = f"Without CPU-backed KV a sequence of {least} tokens or more is refused"
        text += f"; the longest that is served has {int(most)}." if pd.notna(most) else "."
        said.append(f"{text}{_longest(table, least)}")
    unserved = base[base["throughput"].isna() & base["refused"]]
    alone = base.groupby(KEY[1:])["throughput"].max()
    backed = table[table["cpu_backed"].astype(bool) & table["throughput"].notna()]
    for batch in sorted(set(backed["offered_batch"].astype(int))):
        part = backed[backed["offered_batch"] == batch]
        beyond = sorted(
            set(unserved[unserved["offered_batch"] == batch]["context_tokens"]) & set(part["context_tokens"])
        )
        if beyond:
            at = "; ".join(_served(part[part["context_tokens"] == context]) for context in beyond)
            said.append(f"{count(batch, 'sequence')} that the card alone refuses, decode alone: {at}.")
    best = backed.loc[backed.groupby(KEY[1:])["throughput"].idxmax()]
    ratio = best["throughput"] / best.join(alone.rename("alone"), on=KEY[1:])["alone"]
    if ratio.notna().any():
        top, num = best.iloc[int(ratio.argmax())], int((ratio > 1 + INDIFFERENT).sum())
        where = f"{count(int(top['offered_batch']), 'sequence')} of {int(top['context_tokens'])} tokens"
        said.append(
            f"Of {int(ratio.notna().sum())} points that the card alone serves too, decode alone, CPU-backed KV is "
            f"faster in {num}; at most {100 * (ratio.max() - 1):+.1f} %, {top['label']} at {where}."
        )
    return said + _first_tokens(table)


def _longest(table: pd.DataFrame, least: int) -> str:
    """What the longest refused sequence gets from the best mechanism, when it decodes and before."""
    one = table[table["cpu_backed"].astype(bool) & table["throughput"].notna() & (table["offered_batch"] == 1)]
    if one.empty or one["context_tokens"].max() < least:
        return ""
    longest = one[one["context_tokens"] == one["context_tokens"].max()]
    best = longest.loc[longest["throughput"].idxmax()]
    text = f" With it one of {int(best['context_tokens'])} is served, at {best['throughput']:.3g} tok/s in decode alone"
    text += f" ({best['label']})"
    # Where several are as fast, any that was also run from a cold start tells what comes before.
    equal = longest[longest["throughput"] >= (1 - INDIFFERENT) * best["throughput"]]
    cold = equal[COLD_TTFT].min()
    return f"{text}, after {cold:.3g} s to its first token from a cold start." if pd.notna(cold) else f"{text}."


def _first_tokens(table: pd.DataFrame) -> list[str]:
    """What the rates leave out."""
    steps = f"{table['num_steps'].dropna().median():.0f}"
    said = [f"Rates are of decode alone, over {steps} steps of sequences whose KV is there from the start: no prefill."]
    for _, part in table[table[COLD_TTFT].notna()].groupby(["offered_batch", "label"], sort=True):
        batch, label = int(part["offered_batch"].iloc[0]), part["label"].iloc[0]
        each = ", ".join(
            f"{row[COLD_TTFT]:.3g} s at {int(row['context_tokens'])}"
            for _, row in part.sort_values("context_tokens").iterrows()
        )
        said.append(
            f"From a cold start, prefill included, the first token of {count(batch, 'sequence')} comes after {each} "
            f"tokens ({label})."
        )
    return said


def _served(rows: pd.DataFrame) -> str:
    best, worst = argmax(rows, "throughput"), argmin(rows, "throughput")
    text = f"{int(best['context_tokens'])} tokens ({best['kv_gib']:.0f} GiB of KV) at {best['throughput']:.3g} tok/s"
    text += f" with {best['label']}"
    if best["running_batch_mean"] < SOME * best["offered_batch"]:
        text += f" ({best['running_batch_mean']:.2g} at a time)"
    if (ratio := best["throughput"] / worst["throughput"]) > 1 + INDIFFERENT:
        text += f", {ratio:.3g} times {worst['label']}"
    return text


STUDY = Study(
    name="long_context",
    title="Sequences longer than the card's memory",
    question="What does CPU-backed KV make possible that the card alone refuses, and how slow is it?",
    how_to_read=(
        "One, two or four sequences, longer from left to right. A cross at the bottom: the card alone refuses them, "
        "because not even one fits its KV memory. Each line is a mechanism that serves them all the same, at the rate "
        "of the link. These are rates of decode alone, over a few steps with the KV already there; what comes before "
        "is in the last panel: the time until one sequence that starts cold has its first token, hence its prefill. "
        "The dotted line is about as fast as people read, for each sequence."
    ),
    factors=("model", "mechanism", "offered_batch", "prompt_tokens", "start"),
    experiments=("long_context", "long_context_cold"),
    draw=draw,
)
