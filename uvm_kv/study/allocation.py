"""Shares of KV memory and mean running batch by how sequences get their memory, beside what vLLM's paper measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from uvm_kv.report.drawing import Look, line_look
from uvm_kv.report.statistics import judge
from uvm_kv.report.style import PAGE_IN, SMALL, SPARE
from uvm_kv.report.verdict import INDIFFERENT, MEASURED, interval
from uvm_kv.study.base import Drawn, Study
from uvm_kv.study.kit import ADMISSIONS, served

PARTS = {
    "token_states": "token states",
    "reservation": "reserved for the request's later tokens",
    "internal": "reserved, never used",
    "other": "outside (fragments, rest of a chunk, free)",
}
COLOURS = dict(zip(PARTS, (SPARE[2], SPARE[5], SPARE[1], "#BBBBBB"), strict=True))
SCHEMES = {
    "reserve_max": "reserve_max\n(FasterTransformer)",
    "orca_max": "orca_max",
    "orca_pow2": "orca_pow2",
    "orca_oracle": "orca_oracle",
    "on_demand": "on_demand",
    "paged": "paged\n(vLLM)",
}
TOLERANCE = 8.0
"""Percentage points of KV memory."""


class Published(NamedTuple):
    """Kwon et al., SOSP 2023: figure 2, in percent of KV memory; figure 13a, OPT-13B with ShareGPT at 2 requests/s."""

    token_states: float
    reservation: float | None
    internal: float | None
    other: float | None
    running_batch: float


PUBLISHED = {
    "orca_max": Published(20.4, 13.3, 57.3, 8.9, 7.00),
    "orca_pow2": Published(26.8, 17.9, 13.6, 41.6, 9.81),
    "orca_oracle": Published(38.2, 25.2, None, 36.6, 13.62),
    "paged": Published(96.3, None, None, None, 30.42),
}
PUBLISHED_RATE = 2.0
MARK = line_look("black", "none", "D", markersize=3.5)
"""A published number."""


def shares(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per allocation and request rate: medians over runs; shares in percent of the device's KV memory."""
    if "kv_bytes_mean.future" not in runs or runs["kv_bytes_mean.future"].isna().any():
        raise ValueError(
            "allocation: some runs are of a version that did not tell what is reserved for later tokens from what is "
            "never used; run experiment=allocation again"
        )
    settings = pd.DataFrame(list(runs["setting"]), index=runs.index)
    loads = settings.drop(columns=[c for c in ("allocation", "workload.request_rate") if c in settings])
    several = [str(c) for c in loads if loads[c].map(repr).nunique() > 1]
    several += [name for name in ("origin", "hardware", "model", "workload") if runs[name].nunique() > 1]
    if several:
        raise ValueError(
            f"allocation: the runs differ in more than allocation and request rate ({', '.join(several)}); "
            f"give it runs of one setting"
        )
    total = runs["device_kv_bytes"].astype(float)
    used, future, reserved = (runs[f"kv_bytes_mean.{name}"].astype(float) for name in ("used", "future", "reserved"))
    table = pd.DataFrame(
        {
            "allocation": runs["allocation"],
            "request_rate": runs["request_rate"].astype(float),
            "token_states": 100 * used / total,
            "reservation": 100 * future / total,
            "internal": 100 * (reserved - used - future) / total,
            "other": 100 * (1 - reserved / total),
            "running_batch": runs["running_batch_mean"].astype(float),
        }
        | {name: runs[name].astype(float) for name in ("output_tokens_per_s", "preemptions")}
    )
    table = table.groupby(["allocation", "request_rate"], as_index=False).median()
    for name in Published._fields:
        told = {scheme: getattr(row, name) for scheme, row in PUBLISHED.items()}
        table[f"published_{name}"] = pd.to_numeric(table["allocation"].map(told))
    order = [a for a in SCHEMES if a in set(table["allocation"])]
    order += sorted(set(table["allocation"]) - set(order))
    table["allocation"] = pd.Categorical(table["allocation"], order)
    table = table.sort_values(["request_rate", "allocation"], ascending=[False, True])
    return table.astype({"allocation": str}).reset_index(drop=True)


def draw(runs: pd.DataFrame, _: Sequence[dict[str, Any]]) -> Drawn:
    """Shares under the highest rate, at which requests queue at any time; running batches at every rate."""
    table = shares(runs)
    rates = sorted(table["request_rate"].unique(), reverse=True)
    by_rate = {rate: table[table["request_rate"] == rate].set_index("allocation") for rate in rates}
    full = by_rate[rates[0]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE_IN, 3.1), width_ratios=(1.35, 1), sharey=True)
    rows = np.arange(len(full))
    start = np.zeros(len(full))
    for part, label in PARTS.items():
        left.barh(rows, full[part], left=start, height=0.7, color=COLOURS[part], label=label)
        start = start + full[part].to_numpy()
    left.plot(full["published_token_states"], rows, label="token states, published", **MARK)
    for row, value in zip(rows, full["token_states"], strict=True):
        left.text(1.5, row, f"{value:.1f}", va="center", color="white", fontweight="bold")
    left.set_yticks(rows, [SCHEMES.get(str(a), str(a)) for a in full.index])
    left.invert_yaxis()
    left.set(xlim=(0, 100), xlabel="share of KV memory (%)")
    height = 0.7 / len(rates)
    for i, (rate, part) in enumerate(by_rate.items()):
        at = rows + (i - (len(rates) - 1) / 2) * height
        values = part["running_batch"].reindex(full.index)
        look: Look = {"color": "white" if i else "#0072B2", "edgecolor": "#0072B2", "linewidth": 0.6}
        right.barh(at, values, height=height * 0.9, label=f"{rate:g} requests/s", **look)
        for y, value in zip(at, values, strict=True):
            right.text(0.4, y, f"{value:.1f}", va="center", fontsize=SMALL, color="black" if i else "white")
    right.plot(full["published_running_batch"], rows, label=f"published, {PUBLISHED_RATE:g} requests/s", **MARK)
    most = max(table["running_batch"].max(), full["published_running_batch"].max())
    right.set(xlim=(0, 1.15 * most), xlabel="mean running batch (requests)")
    for axis in (left, right):
        axis.grid(visible=False, axis="y")
        mark, *bars = axis.get_legend_handles_labels()[0]
        axis.legend(handles=[*bars, mark], loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return Drawn(figure, table, _claims(table, runs))


def _claims(table: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    saturated = table["request_rate"].max()
    full = table[table["request_rate"] == saturated].set_index("allocation")
    known = [a for a in PUBLISHED if a in full.index]
    if not known:
        return []
    ours, theirs = (full.loc[known, f"{side}token_states"] for side in ("", "published_"))
    off = (ours - theirs).abs()
    within = list(off[off <= TOLERANCE].index)
    same_order = list(ours.sort_values().index) == list(theirs.sort_values().index)
    listed = ", ".join(f"{a} {ours[a]:.1f} ({theirs[a]:.1f})" for a in known)
    claims = [
        f"On a {runs['origin'].iloc[0]} {runs['hardware'].iloc[0]} serving {runs['model'].iloc[0]} with lengths of "
        f"{runs['workload'].iloc[0]} ({_admitted(runs)}), token states take {listed} % of KV memory (published in "
        f"brackets): {len(within)} of {len(known)} within {TOLERANCE:g} points, the largest difference {off.max():.1f} "
        f"({off.idxmax()}), {'in' if same_order else 'not in'} the same order."
    ]
    if far := [a for a in known if a not in within]:
        claims.append(f"Not within {TOLERANCE:g} points: {', '.join(f'{a} by {off[a]:.1f}' for a in far)}.")
    for part in ("reservation", "internal", "other"):
        gap = (full.loc[known, part] - full.loc[known, f"published_{part}"]).dropna()
        if len(gap):
            values = ", ".join(f"{a} {full[part][a]:.1f} ({full[f'published_{part}'][a]:.1f})" for a in gap.index)
            verdict = "all" if (gap.abs() <= TOLERANCE).all() else "not all"
            claims.append(f"{PARTS[part].capitalize()}: {values} %; {verdict} within {TOLERANCE:g} points.")
    batches = full.loc[known, ["running_batch", "published_running_batch"]]
    claims.append(
        f"With a queue at any time ({saturated:g} requests/s) the mean running batch is "
        + ", ".join(f"{a} {b:.2f} ({p:.2f})" for a, b, p in batches.itertuples())
        + f"; the largest difference is {(batches.iloc[:, 0] / batches.iloc[:, 1] - 1).abs().max():.0%}."
    )
    slow = table[table["request_rate"] == PUBLISHED_RATE].set_index("allocation")
    if saturated != PUBLISHED_RATE and (here := [a for a in known if a in slow.index]):
        idle = [a for a in here if slow["running_batch"][a] < 0.9 * full["running_batch"][a]]
        listed = ", ".join(f"{a} {slow['running_batch'][a]:.2f}" for a in here)
        text = f"At {PUBLISHED_RATE:g} requests/s it is {listed}"
        if idle:
            text += f"; {', '.join(idle)} keeps up with that rate here, and so has fewer requests than memory allows"
        claims.append(text + ".")
    if {"on_demand", "paged"} <= set(full.index):
        at_rate = runs[runs["request_rate"].astype(float) == saturated].groupby("allocation")["output_tokens_per_s"]
        sides = [at_rate.get_group(name).to_numpy(float) for name in ("paged", "on_demand")]
        gain = judge(sides[0], sides[1], INDIFFERENT, measured=runs["origin"].iloc[0] == MEASURED)
        doubt = f" (AMBIGUOUS{interval(gain)})" if gain.word == "AMBIGUOUS" else ""
        claims.append(
            f"A run of blocks that grows (on_demand) fills {full['token_states']['on_demand']:.1f} % of memory with "
            f"token states, but what cannot grow in place moves or is preempted "
            f"({full['preemptions']['on_demand']:.0f} times, paged {full['preemptions']['paged']:.0f}); "
            f"paged puts out {gain.ratio:.1f} times the tokens per second{doubt}."
        )
    return claims


def _admitted(runs: pd.DataFrame) -> str:
    """How requests are admitted, which differs between the schemes, and how many draws of them there are."""
    by_kind = dict(list(runs.groupby("admission"))) if "admission" in runs else {}
    if len(by_kind) < 2:
        return served(runs)
    each = " and ".join(
        f"{ADMISSIONS.get(str(kind), str(kind))} admission of {', '.join(sorted(set(part['allocation'])))}"
        for kind, part in sorted(by_kind.items(), reverse=True)
    )
    return f"{served(runs.drop(columns='admission'))}, {each}"


STUDY = Study(
    name="allocation",
    title="What KV memory holds, and how many requests run, by allocation scheme",
    question="How much of the KV memory holds tokens, and how many requests run, by how sequences get their memory?",
    how_to_read=(
        "Each bar on the left is the KV memory of one card while requests wait in line. Green is what tokens fill. "
        "Light blue is set aside for tokens that the same request will still produce; orange is set aside and never "
        "filled, because the length was not known; grey belongs to nobody: pieces that are too small, what a "
        "power-of-two chunk is too large, and what is just free. On the right is how many requests run at once. "
        "Diamonds are what the authors of vLLM measured on a real card. Request lengths have the published means; "
        "their distribution is assumed to be exponential."
    ),
    factors=("allocation", "request_rate"),
    draw=draw,
)
