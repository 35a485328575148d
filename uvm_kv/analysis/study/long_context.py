"""One to four sequences whose KV exceeds the card: refused on the card alone, and how fast with each mechanism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import FuncFormatter, NullLocator

from uvm_kv.analysis.load import points
from uvm_kv.analysis.study.base import Drawn, Study
from uvm_kv.analysis.style import PAGE_IN, SMALL, STYLES, look
from uvm_kv.analysis.verdict import INDIFFERENT, is_cpu_backed
from uvm_kv.types import BASELINES, GIB, KIB

READING_SPEED = 5.0
"""Tokens per second of one sequence that keep up with a reader, about 250 words a minute: a line to compare with."""
SOME = 0.9
"""Below this part of the sequences not all run at once: the rest queue."""


def draw(runs: pd.DataFrame, failures: Sequence[dict[str, Any]]) -> Drawn:
    """A panel a number of sequences: output tokens per second of all of them, by context."""
    table = _table(runs, failures)
    served = table[table["throughput"].notna()]
    batches = sorted(set(table["offered_batch"]))
    figure, axes = plt.subplots(1, len(batches), figsize=(PAGE_IN, 2.7), sharey=True, squeeze=False)
    others = sorted(set(table["label"]) - set(STYLES))
    contexts = sorted(set(table["context_tokens"]))
    floor = float(served["throughput"].min()) / 3
    shown: dict[str, Any] = {}
    for axis, batch in zip(axes[0], batches, strict=True):
        part = table[table["offered_batch"] == batch]
        for label, line in part.groupby("label", sort=True):
            line = line.sort_values("context_tokens")
            shown[str(label)] = axis.plot(line["context_tokens"], line["throughput"], **look(str(label), others))[0]
        refused = part[part["refused"] & part["label"].isin(BASELINES)].drop_duplicates("context_tokens")
        axis.scatter(refused["context_tokens"], [floor] * len(refused), marker="x", color="black", s=16, clip_on=False)
        if len(refused):
            axis.text(refused["context_tokens"].max(), floor * 1.35, "card alone: refused", fontsize=SMALL, ha="right")
        axis.axhline(READING_SPEED * batch, color="black", linewidth=0.6, linestyle=(0, (1, 2)), zorder=0)
        axis.set_title(f"{batch:.0f} sequence{'s' if batch > 1 else ''}")
        axis.set_xlabel("tokens a sequence")
        axis.set_xscale("log", base=2)
        axis.set_xticks(contexts, [f"{c // KIB}Ki" if c % KIB == 0 else str(c) for c in contexts], rotation=45)
        axis.xaxis.set_minor_locator(NullLocator())
    axes[0, 0].set_yscale("log")
    axes[0, 0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes[0, 0].set_ylim(bottom=floor / 1.5)
    axes[0, 0].set_ylabel("output tokens/s, all sequences")
    order = [name for name in (*STYLES, *others) if name in shown]
    size = _gib(runs)
    figure.legend(
        [shown[name] for name in order],
        order,
        loc="outside upper center",
        ncols=4,
        title=f"{runs['model'].iloc[0]}, {runs['hardware'].iloc[0]}, {size:.1f} GiB of KV on the card; dotted: "
        f"{READING_SPEED:g} tokens/s a sequence",
    )
    return Drawn(figure, table, claims(table))


def _gib(runs: pd.DataFrame) -> float:
    return float(runs["device_kv_bytes"].max()) / GIB


def _context(run: pd.Series[Any] | dict[str, Any]) -> int:
    if pd.isna(run["prompt_tokens"]):
        raise ValueError(f"long_context: workload={run['workload']} has no one context length; it takes workload=fixed")
    return int(run["prompt_tokens"] + run["output_tokens"])


def _table(runs: pd.DataFrame, failures: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Medians by sequences, context and mechanism; a job that was refused is a row without a throughput."""
    used = runs.copy()
    used["context_tokens"] = [_context(run) for _, run in used.iterrows()]
    used["kv_gib"] = used["device_kv_bytes"].astype(float) * used["working_set_ratio"].astype(float) / GIB
    parts = []
    for context, part in used.groupby("context_tokens", sort=True):
        made = points(part)
        if made["title"].nunique() > 1:
            several = "; ".join(sorted(set(made["title"]))[:3])
            raise ValueError(
                f"long_context: {context} tokens are of several comparisons ({several}); draw them one by one"
            )
        parts.append(made.assign(context_tokens=context, cpu_backed=is_cpu_backed(made)))
    table = pd.concat(parts, ignore_index=True).assign(refused=False, why=None)
    lost = [
        {
            "model": record["model"],
            "offered_batch": record["offered_batch"],
            "label": record["mechanism"],
            "context_tokens": _context(record),
            "refused": bool(record.get("refused")),  # Else it failed.
            "cpu_backed": record["memory"] != "device",
            "why": record["error"].strip().splitlines()[-1],
        }
        for record in failures
    ]
    table = pd.concat([table, pd.DataFrame(lost)], ignore_index=True) if lost else table
    columns = ["model", "label", "offered_batch", "context_tokens", "throughput", "running_batch_mean", "refused"]
    columns += ["kv_gib", "working_set_ratio", "h2d_bytes", "d2h_bytes", "cpu_backed", "why"]
    return table[columns].sort_values(["offered_batch", "context_tokens", "label"]).reset_index(drop=True)


def claims(table: pd.DataFrame) -> list[str]:
    """What the card alone refuses, what serves it, how fast, and what that costs against what the card holds."""
    base = table[table["label"].isin(BASELINES)]
    if base.empty:
        return ["No device-only job is among the results, so that it is not known what the card alone refuses."]
    said = []
    refused = base[base["refused"]].drop_duplicates(["offered_batch", "context_tokens"])
    if refused.empty:
        said.append("The card alone refused none of these.")
    else:
        least = int(refused["context_tokens"].min())
        most = base[base["throughput"].notna()]["context_tokens"].max()
        text = f"Without CPU-backed KV a sequence of {least} tokens or more is refused"
        said.append(f"{text}; the longest that is served has {int(most)}." if pd.notna(most) else f"{text}.")
    unserved = base[base["throughput"].isna() & base["refused"]]
    alone = base.groupby(["offered_batch", "context_tokens"])["throughput"].max()
    backed = table[table["cpu_backed"].astype(bool) & table["throughput"].notna()]
    for batch in sorted(set(backed["offered_batch"].astype(int))):
        part = backed[backed["offered_batch"] == batch]
        beyond = sorted(
            set(unserved[unserved["offered_batch"] == batch]["context_tokens"]) & set(part["context_tokens"])
        )
        if beyond:
            at = "; ".join(_served(part[part["context_tokens"] == context]) for context in beyond)
            said.append(f"{_sequences(batch)} that the card alone refuses: {at}.")
    best = backed.loc[backed.groupby(["offered_batch", "context_tokens"])["throughput"].idxmax()]
    ratio = best["throughput"] / [alone.get(key, float("nan")) for key in zip(*_keys(best), strict=True)]
    if ratio.notna().any():
        top, num = best.iloc[int(ratio.argmax())], int((ratio > 1 + INDIFFERENT).sum())
        said.append(
            f"Of {int(ratio.notna().sum())} points that the card alone serves too, CPU-backed KV is faster in {num}; "
            f"at most {100 * (ratio.max() - 1):+.1f} %, {top['label']} at {_sequences(int(top['offered_batch']))} of "
            f"{int(top['context_tokens'])} tokens."
        )
    return said


def _keys(table: pd.DataFrame) -> tuple[list[int], list[int]]:
    return list(table["offered_batch"]), list(table["context_tokens"])


def _sequences(batch: int) -> str:
    return f"{batch} sequence{'s' if batch > 1 else ''}"


def _served(rows: pd.DataFrame) -> str:
    best, worst = rows.iloc[int(rows["throughput"].argmax())], rows.iloc[int(rows["throughput"].argmin())]
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
        "of the link. The dotted line is about as fast as people read, for each sequence."
    ),
    factors=("model", "mechanism", "offered_batch", "prompt_tokens"),
    draw=draw,
)
