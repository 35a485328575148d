"""MHA, GQA and MQA with KV of 16, 8 and 4 bits, by size: tokens that fit, running batch, throughput, and the roof.

fp8 and int8 have the same bytes and are one point. Each variant is shown at the offered batch with the best throughput,
by the median over its repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import FuncFormatter

from uvm_kv.report.drawing import Look, draw_roof, handle, line_look, log_scale, log_ticks, plain_numbers
from uvm_kv.report.repeats import medians, one_of_each
from uvm_kv.report.style import PAGE_IN, SPARE
from uvm_kv.report.verdict import INDIFFERENT
from uvm_kv.study.base import Drawn, Study
from uvm_kv.study.kit import bracketed, judged, on_card, panel_title, percent, phases, served, span, throughput

MECHANISM = "device_resident"
KEY = ["kv_heads", "kv_bits"]
FULL = 0.9
"""A part of the tokens that fit: where the running batch reserves more, the memory is what limits the batch."""
BITS = {16: "fp16", 8: "fp8, int8", 4: "int4"}
PANELS = {
    "capacity_tokens": "tokens that fit the card",
    "running_batch_mean": "mean running batch",
    "throughput": "output tokens/s",
}
LOOKS = [line_look(SPARE[3], "-", "o"), line_look(SPARE[0], "-", "s"), line_look(SPARE[2], "-", "D"),
         line_look(SPARE[1], "-", "^")]  # fmt: skip
FILLS = {16: "full", 8: "left", 4: "none"}
COLUMNS = ["model", "hardware", "variant_name", *KEY, "kv_bytes_per_token", "weight_bytes_read", "capacity_tokens",
           "offered_batch", "num_runs", "running_batch_mean", "throughput", "tpot_s.p99", "attention_intensity",
           "step_intensity", "attained_ops_per_s", "roof_ops_per_s", "peak_ops_per_s", "hbm_bytes_per_s",
           "is_limited_by_capacity"]  # fmt: skip


def draw(runs: pd.DataFrame, _: Sequence[dict[str, Any]]) -> Drawn:
    """Three panels over the bits of KV, and the roof."""
    table = _table(runs)
    figure, axes = plt.subplots(1, 4, figsize=(PAGE_IN, 2.5))
    looks = dict(zip(dict.fromkeys(table["variant_name"]), LOOKS, strict=False))
    bits = sorted(table["kv_bits"].unique(), reverse=True)
    for axis, (column, label) in zip(axes, PANELS.items(), strict=False):
        for name, look in looks.items():
            part = table[table["variant_name"] == name]
            axis.plot(part["kv_bits"], part[column], **look)
        log_ticks(axis.xaxis, bits, [BITS.get(b, f"{b} bits").replace(", ", "\n") for b in bits])
        axis.invert_xaxis()
        _thousands(axis)
        axis.set_title(label)
        axis.set_xlabel("KV cache")
    axes[0].set_ylabel(panel_title(table))
    _draw_points(axes[-1], table, looks)
    handles = [handle(name, **look) for name, look in looks.items()]
    dot = line_look("black", "", "o")
    handles += [handle(BITS.get(b, str(b)), fillstyle=FILLS.get(b, "full"), **dot) for b in bits]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return Drawn(figure, table[COLUMNS], _claims(table, phases(runs), served(runs)))


def _table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per variant and width of KV. ValueError where steps cannot be told from the runs."""
    if "kv_bits" not in runs:
        raise ValueError("attention_variants: runs without kv_bits; run them again with this version")
    if (usable := runs[runs["prompt_tokens"].notna()]).empty:
        raise ValueError(
            "attention_variants: only runs with one length of prompts and outputs have a point on the roof"
        )
    if (usable := usable[usable["mechanism"] == MECHANISM]).empty:
        raise ValueError(f"attention_variants: no run of {MECHANISM}, on which all variants are compared")
    one_of_each(usable, ("model", "hardware", "origin"), "attention_variants")
    usable = usable.assign(
        throughput=throughput(usable),
        kv_bits=usable["kv_bits"].astype(int),
        kv_heads=[int(s["model.num_kv_heads"]) for s in usable["setting"]],
        variant_name=[_variant_name(s) for s in usable["setting"]],
        running_batch_mean=usable["running_batch_mean"].astype(float),
    )
    usable = medians(usable, [*KEY, "offered_batch"], keep=["throughput"], study="attention_variants")
    steps = pd.DataFrame([_step(run) for _, run in usable.iterrows()], index=usable.index)
    usable = pd.concat([usable, steps], axis=1)
    full = usable["prompt_tokens"] + usable["output_tokens"]
    usable["is_limited_by_capacity"] = usable["running_batch_mean"] * full >= FULL * usable["capacity_tokens"]
    best = usable.sort_values(["throughput", "offered_batch"], ascending=[False, True]).drop_duplicates(KEY)
    return best.sort_values(KEY, ascending=False).reset_index(drop=True)


def _variant_name(setting: dict[str, Any]) -> str:
    heads, kv_heads = setting["model.num_heads"], setting["model.num_kv_heads"]
    if kv_heads == heads:
        return f"MHA ({kv_heads} KV heads)"
    return "MQA (1 KV head)" if kv_heads == 1 else f"GQA ({kv_heads} KV heads)"


def _step(run: pd.Series[Any]) -> dict[str, float]:
    """The mean decode step of a run: operations and bytes of its weights and of the KV of its running batch, contexts
    in the middle of their range. As in the roofline's exact counting, without norms, activations and scales."""
    s, bits = run["setting"], int(run["kv_bits"])
    hidden, layers, head = s["model.hidden_size"], s["model.num_layers"], s["model.head_dim"]
    q, kv = s["model.num_heads"] * head, s["model.num_kv_heads"] * head
    mlp = (3 if s["model.gated_mlp"] else 2) * hidden * s["model.intermediate_size"]
    in_layers, in_head = layers * (hidden * (2 * q + 2 * kv) + mlp), hidden * s["model.vocab_size"]
    weights = in_layers + in_head
    weight_bytes = (in_layers * run["weight_bits"] + in_head * max(16, run["weight_bits"])) / 8
    context = run["prompt_tokens"] + run["output_tokens"] / 2
    batch, kv_token_bytes = run["running_batch_mean"], 2 * layers * kv * bits / 8
    attention_ops, kv_bytes = 4.0 * layers * q * context, kv_token_bytes * context
    step_bytes = weight_bytes + batch * kv_bytes
    ops_per_token = 2.0 * weights + attention_ops
    intensity = batch * ops_per_token / step_bytes
    peak, hbm = s["hardware.gpu.tensor_tflop_per_s"] * 1e12, s["hardware.gpu.hbm_gb_per_s"] * 1e9
    return {
        "kv_bytes_per_token": kv_token_bytes,
        "weight_bytes_read": weight_bytes,
        "capacity_tokens": float(run["device_kv_bytes"] // kv_token_bytes),
        "attention_intensity": attention_ops / kv_bytes,
        "step_intensity": intensity,
        "attained_ops_per_s": run["throughput"] * ops_per_token,
        "roof_ops_per_s": min(peak, intensity * hbm),
        "peak_ops_per_s": peak,
        "hbm_bytes_per_s": hbm,
    }


def _thousands(axis: Any) -> None:
    """A logarithmic y axis whose numbers have k and M for thousands and millions."""

    def told(value: float, _: int) -> str:
        return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"

    log_scale(axis.yaxis)
    axis.yaxis.set_major_formatter(FuncFormatter(told))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda v, p: told(v, p) if f"{v:e}"[0] == "3" else ""))


def _draw_points(axis: Any, table: pd.DataFrame, looks: dict[str, Look]) -> None:
    """The roof, and what each variant's decode step attains."""
    peak, hbm = float(table["peak_ops_per_s"].iloc[0]), float(table["hbm_bytes_per_s"].iloc[0])
    right = 5 * max(peak / hbm, table["step_intensity"].max())
    draw_roof(axis, peak, hbm, 0.5 * table["step_intensity"].min(), right, unit=1e12)
    for _, row in table.iterrows():
        look = looks[row["variant_name"]] | {"fillstyle": FILLS.get(row["kv_bits"], "full"), "linestyle": ""}
        axis.plot(row["step_intensity"], row["attained_ops_per_s"] / 1e12, markersize=4.5, **look)
    plain_numbers(axis.xaxis)
    plain_numbers(axis.yaxis, minor="3")
    axis.set_title("decode step, TOP/s attained")
    axis.set_xlabel("operations per byte")


def _claims(table: pd.DataFrame, scope: str, details: str) -> list[str]:
    """`scope`: what was run of the requests, which every claim says; `details`: with lengths and admission, which the
    first one says."""
    base = table.sort_values("kv_bytes_per_token", ascending=False).iloc[0]
    first, title = (f"{on_card(table)}{bracketed(text)}" for text in (details, scope))
    claims: list[str] = []
    for _, row in table.iterrows():
        if row["variant_name"] == base["variant_name"] and row["kv_bits"] == base["kv_bits"]:
            continue
        claims.append(
            f"{title if claims else first}: {_told(row)} takes {row['kv_bytes_per_token'] / 1024:g} KiB per token, 1/"
            f"{base['kv_bytes_per_token'] / row['kv_bytes_per_token']:g} of {_told(base)}; {_room(row, base)}, "
            f"{row['running_batch_mean']:.0f} sequences run instead of {base['running_batch_mean']:.0f}, at "
            f"{row['throughput']:.0f} instead of {base['throughput']:.0f} tokens/s: {_gain(row, base)}."
        )
    claims.append(_where_it_ends(title, table))
    claims.append(_roof_claim(title, table))
    return claims


def _room(row: pd.Series[Any], base: pd.Series[Any]) -> str:
    """How many tokens fit, and what of it is not the KV's: fewer KV heads have smaller projections of K and V too."""
    text = f"{row['capacity_tokens']:.0f} tokens fit instead of {base['capacity_tokens']:.0f}"
    less = base["weight_bytes_read"] - row["weight_bytes_read"]
    if less <= 0:
        return text
    tokens = row["capacity_tokens"] / base["capacity_tokens"]
    alone = base["kv_bytes_per_token"] / row["kv_bytes_per_token"]
    return (
        f"{text}, x{tokens:.2f}: x{alone:g} by the KV alone, x{tokens / alone:.2f} by {less / 1e9:.2f} GB less of K "
        f"and V projections among the weights, which no step has to read either"
    )


def _gain(row: pd.Series[Any], base: pd.Series[Any]) -> str:
    """The factor in throughput, beside that in tokens that fit."""
    found = judged(row, base, "throughput")
    fits = row["capacity_tokens"] / base["capacity_tokens"]
    if found.word == "AMBIGUOUS":
        word = "AMBIGUOUS"
    elif found.word != "HIGHER":
        word = "nothing of what fits"
    else:
        word = "as much as fits" if found.ratio >= (1 - INDIFFERENT) * fits else "a part of what fits"
    return f"x{found.ratio:.2f}, {word}"


def _told(row: pd.Series[Any]) -> str:
    return f"{row['variant_name'].partition(' ')[0]} with {BITS.get(row['kv_bits'], row['kv_bits'])} KV"


def _where_it_ends(title: str, table: pd.DataFrame) -> str:
    """Whether halving the bytes still pays for the smallest KV."""
    ordered = table.sort_values("kv_bytes_per_token")
    last = ordered.iloc[0]
    free = [_told(row) for _, row in table.iterrows() if not row["is_limited_by_capacity"]]
    twice = ordered[ordered["kv_bytes_per_token"] == 2 * last["kv_bytes_per_token"]]
    line = f"{title}: "
    if len(twice):
        gain = judged(last, twice.iloc[0], "throughput")
        change = percent(gain.ratio - 1) + bracketed("AMBIGUOUS" if gain.word == "AMBIGUOUS" else "")
        line += f"the last halving of the KV ({_told(twice.iloc[0])} to {_told(last)}) brings {change}; "
    if free:
        return f"{line}the card's KV memory is not what limits the batch of {', '.join(free)}."
    return f"{line}the card's KV memory limits the running batch of all variants."


def _roof_claim(title: str, table: pd.DataFrame) -> str:
    ridge = table["peak_ops_per_s"].iloc[0] / table["hbm_bytes_per_s"].iloc[0]
    beyond = table[table["step_intensity"] >= ridge]
    three = "{:.3g}".format
    share = table["attained_ops_per_s"] / table["roof_ops_per_s"]
    names = ", ".join(_told(row) for _, row in beyond.iterrows())
    side = f"{len(beyond)} of {len(table)} lie right of it ({names})" if len(beyond) else "all lie left of it"
    return (
        f"{title}: attention does {span(table['attention_intensity'], three)} operations per byte of KV, whole decode "
        f"steps {span(table['step_intensity'], three)}; the ridge is at {ridge:.0f}, and {side}. They attain "
        f"{100 * share.min():.0f} to {100 * share.max():.0f} % of the roof."
    )


STUDY = Study(
    name="attention_variants",
    title="Attention variants and KV precision by size",
    question="What do fewer KV heads and fewer bits bring: how many tokens fit, how many sequences run, how fast?",
    how_to_read=(
        "The same model with all its KV heads (MHA), with groups that share one (GQA) and with one for all (MQA), and "
        "with KV of 16, 8 and 4 bits. Fewer KV heads also leave smaller K and V projections among the weights, "
        "which makes room too. Only sizes differ, quality and the cost of unpacking are not looked at. Less KV "
        "per token lets more tokens fit, hence more sequences run at once. On the right, each one's decode step under "
        "the card's roof: a larger batch moves it to the right, until computing bounds it and less KV brings no more."
    ),
    factors=("model", "kv_bits", "offered_batch"),
    draw=draw,
)
