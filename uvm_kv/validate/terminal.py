"""The error table of a validation on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from uvm_kv.report.terminal import LOOK
from uvm_kv.validate.comparison import METRICS, Comparison


def print_comparison(title: str, rows: Sequence[Comparison], tolerance: float, console: Console) -> None:
    """The error table of a validation; with noise where runs were repeated."""
    console.print(title, style="italic", soft_wrap=True)
    table = Table(**LOOK)
    repeated = any(row.noise is not None for row in rows)
    for name in ("metric", "recorded", "simulated", "error", *(["noise"] if repeated else []), "verdict"):
        table.add_column(name, justify="left" if name in ("metric", "verdict") else "right", no_wrap=True)
    for row in rows:
        sides = (row.recorded, row.simulated)
        largest = max(value for value in sides if value is not None)
        cells = [METRICS[row.metric].label, *(_quantity(value, row.unit, largest) for value in sides)]
        cells.append(_share(row.error, "+"))
        if repeated:
            cells.append(_share(row.noise, ""))
        table.add_row(*cells, row.verdict)
    console.print(table)
    noise = "; noise: half the error's 95 % interval over the repeats" if repeated else ""
    console.print(
        f"error: simulated / recorded - 1{noise}; SAME: within {tolerance:.0%}; -: not observed, or of 0",
        style="dim",
        soft_wrap=True,
    )


def _share(value: float | None, sign: str) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:{sign}.1%}" if abs(value) < 10 else f"{value:{sign}.0%}"


def _quantity(value: float | None, unit: str, largest: float) -> str:
    """A quantity with about four digits, in the unit that suits the largest value of the row."""
    if value is None:
        return "-"
    if unit == "s":
        return f"{value:.2f} s" if largest >= 10 else f"{value * 1e3:.4g} ms"
    if unit == "bytes":
        return f"{value * 1e-9:.4g} GB" if largest >= 1e8 else f"{value * 1e-6:.4g} MB"
    return f"{value:.1f} {unit}".rstrip() if largest % 1 else f"{value:.0f} {unit}".rstrip()
