"""Print a report, a memory account and one run's summary to the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # pandas and matplotlib, which a single run does without
    from uvm_kv.hw.step import StepAnalysis
    from uvm_kv.report.write import Report

MAX_WARNINGS = 5
MAX_OUTPUTS = 16
LOOK: dict[str, Any] = {
    "title_justify": "left",
    "box": SIMPLE_HEAD,
    "padding": (0, 1, 0, 0),
    "show_edge": False,
}
BEST_COLUMNS = ["mechanism", "batch", "running", "tok/s", "gain", "own", "ceiling", "TPOT p99"]
"""What fits 80 columns; the HTML page and points.csv have all."""
LEGEND = (
    "gain: over the best device-only point; own: over the best device-only point of the same admission, which the "
    "ceiling bounds"
)


def plain_console(**options: Any) -> Console:
    """A console that takes text as it is: names in results may hold brackets and colons, which would be markup."""
    return Console(markup=False, emoji=False, **options)


def print_memory(title: str, rows: list[tuple[str, int]], console: Console, notes: Sequence[str] = ()) -> None:
    """Where the memory of a card, or of the machine, goes. `notes`: lines above the table."""
    table = Table(show_header=False, **LOOK)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(f"  {name}", f"{value / 1e9:.2f} GB")
    console.print(f"Memory: {title}", style="italic")
    for note in notes:
        console.print(f"  {note}", markup=False, highlight=False, soft_wrap=True)
    console.print(table)


def print_report(report: Report, console: Console) -> None:
    """Tables, verdicts and paths. Lines that people copy are printed unwrapped."""
    for title, account in report.memory:
        print_memory(title, account, console)
    for title, rows in report.best.items():
        table = Table(title=f"Best point tried of each mechanism: {title}", **LOOK)
        for name in BEST_COLUMNS:
            table.add_column(name, justify="left" if name == "mechanism" else "right", no_wrap=True)
        for cells in rows[BEST_COLUMNS].itertuples(index=False):
            table.add_row(*cells)
        console.print(table)
    console.print(LEGEND, style="dim")
    for text in report.warnings[:MAX_WARNINGS]:
        console.print(f"warning: {text}", markup=False, soft_wrap=True)
    if len(report.warnings) > MAX_WARNINGS:
        console.print(f"warning: {len(report.warnings) - MAX_WARNINGS} more in the report", markup=False)
    for gap in report.gaps:
        console.print(f"not measured: {gap}", markup=False, soft_wrap=True)
    for verdict in report.verdicts:
        console.print(verdict.line(), markup=False, highlight=False, soft_wrap=True)
    for name, paths in (("figure", report.figure), ("table", [report.table]), ("report", [report.page])):
        console.print(f"{name}: {'  '.join(map(str, paths))}", markup=False, highlight=False, soft_wrap=True)


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """One run: what was asked, and its main numbers."""
    title = (
        f"{summary['mechanism']} at batch {summary['offered_batch']}: {summary['model']}, {summary['workload']}, "
        f"{summary['origin']} {summary['hardware']}"
    )
    table = Table(show_header=False, **LOOK)
    table.add_column()
    table.add_column(justify="right")

    def row(name: str, value: float | None, spec: str, unit: str) -> None:
        table.add_row(f"  {name}", "not observed" if value is None else f"{value:{spec}} {unit}".rstrip())

    row("output tokens/s, steady window", summary["output_tokens_per_s"], ".1f", "")
    row("output tokens/s, whole run", summary["output_tokens_per_s_whole_run"], ".1f", "")
    row("running batch, mean", summary["running_batch_mean"], ".1f", "")
    for name in ("ttft_s", "tpot_s"):
        for point in ("p50", "p99"):
            value = summary[name][point]
            row(f"{name[:4].upper()} {point}", None if value is None else value * 1e3, ".1f", "ms")
    row("link, host to device", _scaled(summary["h2d_bytes"], 1e-9), ".2f", "GB")
    row("link, device to host", _scaled(summary["d2h_bytes"], 1e-9), ".2f", "GB")
    row("GPU fault groups", summary["gpu_fault_groups"], "d", "")
    row("evicted 2 MiB chunks", summary["evicted_chunks"], "d", "")
    row("preemptions", summary["preemptions"], "d", "")
    row("stall", summary["stall_s"], ".2f", f"s of {summary['duration_s']:.2f} s")
    row("energy", summary["energy_j_per_output_token"], ".2f", "J per output token")
    row("idle power", summary["idle_power_w"], ".1f", "W")
    if summary["closed_form_ceiling"] is not None:
        row("closed-form ceiling of the gain", summary["closed_form_ceiling"], "+.1%", "")
    console.print(title, style="italic", soft_wrap=True)
    console.print(table)
    for text in summary["warnings"]:
        console.print(f"warning: {text}", markup=False, soft_wrap=True)


def print_outputs(outputs: list[dict[str, Any]], console: Console) -> None:
    """The generated text of each request, or its token ids where there is no tokenizer."""
    for row in outputs[:MAX_OUTPUTS]:
        text = row.get("text", " ".join(map(str, row["output_ids"])))
        console.print(f"request {row['request_id']}: {text!r}", markup=False, highlight=False, soft_wrap=True)
    if len(outputs) > MAX_OUTPUTS:
        console.print(f"and {len(outputs) - MAX_OUTPUTS} more in outputs.jsonl")


def print_roofline(step: StepAnalysis, console: Console) -> None:
    """One step, operator by operator; operations, bytes and time are of one execution."""
    bits = step.precision
    console.print(
        f"{step.stage.value} of {step.model.name} on {step.profile.name}: batch {step.batch_size}, "
        f"{step.sequence_length} tokens, w{bits.weight_bits} a{bits.activation_bits} kv{bits.kv_bits}, "
        f"counting {step.counting.value}",
        style="italic",
        soft_wrap=True,
    )
    table = Table(**LOOK | {"padding": 0})  # Ten columns in 80 characters.
    for name in ("operator", "x", "ops", "bytes", "ops/B", "bound", "attainable", "time", "roof", "share"):
        table.add_column(name, justify="left" if name in ("operator", "bound") else "right", no_wrap=True)
    for op in step.operators:
        table.add_row(
            op.name,
            str(op.count),
            si(op.ops),
            f"{si(op.num_bytes)}B",
            f"{op.intensity:.3g}" if op.intensity < 1000 else f"{op.intensity:.0f}",
            op.bound,
            f"{si(op.attainable_ops_per_s)}/s" if op.ops else "-",
            f"{si(op.time_s)}s",
            f"{op.roof_s / op.time_s:.0%}",
            f"{op.count * op.time_s / step.total_s:.1%}",
        )
    console.print(table)
    console.print("x: times a step; roof: time at the roof over time; share: of the step's time", style="dim")
    console.print(
        f"step: {step.total_s * 1e3:.3f} ms, {si(step.total_ops)} operations, {si(step.total_bytes)}B moved",
        highlight=False,
    )
    card = step.profile.gpu.memory_bytes
    console.print(
        f"memory: weights {step.weight_bytes / 1e9:.2f} + KV {step.kv_bytes / 1e9:.2f} + activations "
        f"{step.activation_bytes / 1e9:.2f} GB; needs {step.required_bytes / 1e9:.2f} of {card / 1e9:.2f} GB: "
        f"{'fits' if step.fits else 'DOES NOT FIT'}",
        highlight=False,
        soft_wrap=True,
    )
    for text in step.warnings:
        console.print(f"warning: {text}", markup=False, soft_wrap=True)


def si(value: float) -> str:
    """Three digits and a decimal prefix: 67.1 M."""
    for factor, prefix in (
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
        (1, ""),
        (1e-3, "m"),
        (1e-6, "u"),
    ):
        if value >= factor * 0.9995:
            return f"{value / factor:.3g} {prefix}"
    return "0 " if value == 0 else f"{value * 1e9:.3g} n"


def _scaled(value: int | None, factor: float) -> float | None:
    return None if value is None else value * factor
