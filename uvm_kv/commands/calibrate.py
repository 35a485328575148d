"""From measured curves of a machine to the profile of its card, conf/hardware/<name>.yaml: docs/calibration.md.

    python -m experiments.calibrate curves=FILE.json name=my_3090
    python -m experiments.calibrate curves=FILE.json name=my_3090 base=a30 output=DIR/my_3090.yaml force=true

Every number of the profile has a source: the curve, its noise and the fit, or that it is the base's. Without curves=
this machine's GPU would be measured; that is said, and refused, where it cannot be. --json prints one object: profile,
written (the file), quantities and curves.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import NoReturn

from hydra.errors import HydraException
from rich.console import Console
from rich.table import Table

from uvm_kv.calibrate.calibration import Calibration, Quantity, calibrate
from uvm_kv.calibrate.curves import Curves, plan_lines, read_curves
from uvm_kv.calibrate.profile_file import check_name, check_output, load_profile, profile_yaml, write_profile
from uvm_kv.commands.ending import say_why
from uvm_kv.config import names
from uvm_kv.config.command import compose_command
from uvm_kv.config.grammar import take_json
from uvm_kv.config.schema import CalibrateSchema
from uvm_kv.config.shipped import in_wheel
from uvm_kv.store.provenance import gpu


def refuse_to_measure() -> NoReturn:
    """Say what a calibration of this machine would measure; ValueError because it cannot."""
    print("A calibration of this machine would measure, each point several times:")
    for line in plan_lines():
        print(f"  {line}")
    card = gpu()
    why = "no NVIDIA GPU here" if card is None else f"python -m experiments.microbench measures this {card['name']}"
    raise ValueError(f"{why}; nothing was measured: give curves=FILE.json and name=NAME (docs/calibration.md)")


def run(config: CalibrateSchema, *, as_json: bool = False) -> None:
    if config.curves is None:
        refuse_to_measure()
    if config.name is None:
        raise ValueError("the new profile needs a name: name=my_3090")
    check_name(config.name)
    if config.output is None and in_wheel():
        raise ValueError(f"give output=DIR/hardware/{config.name}.yaml, which hydra.searchpath=[DIR] finds afterwards")
    output = names.CONF_DIR / "hardware" / f"{config.name}.yaml" if config.output is None else Path(config.output)
    check_output(output, force=config.force)
    base = load_profile(config.base)
    curves = read_curves(Path(config.curves))
    found = calibrate(curves, base, config.name)
    measured_on = curves.card if curves.origin == "measured" else None
    write_profile(output, profile_yaml(found.profile, _comment(curves, config.base), measured_on))
    if as_json:
        told = {
            "profile": found.profile.name,
            "written": str(output),
            "quantities": [dataclasses.asdict(row) for row in found.quantities],
            "curves": [dataclasses.asdict(row) for row in found.reports],
        }
        print(json.dumps(told, indent=1))
        return
    _print(found, curves, config.base)
    print(f"written: {output}")
    if output.resolve().parent != names.CONF_DIR / "hardware":
        print(
            f"hardware={config.name} finds it in conf/hardware; put it there to use it, or give hydra.searchpath=[DIR]"
        )


def _comment(curves: Curves, base: str) -> list[str]:
    is_measured = curves.origin == "measured"
    return [
        f"{curves.card}: {'measured' if is_measured else 'generated curves, not measured'}, {curves.date}, with "
        f"{curves.tool} at commit {curves.commit or 'unknown'}.",
        f"Written by python -m experiments.calibrate from {curves.file}, base {base};",
        f"sha256 of that file: {curves.sha256}.",
    ]


def _print(found: Calibration, curves: Curves, base: str) -> None:
    console = Console()
    origin = "" if curves.origin == "measured" else " (generated, not measured)"
    title = f"{found.profile.name} from {curves.file}{origin}"
    _print_quantities([row for row in found.quantities if not _is_operator(row)], title, base, found, console)
    _print_operators([row for row in found.quantities if _is_operator(row) and row.fitted], base, console)
    table = _table("Curves", ["curve"], ["points", "repeats", "spread", "residual"])
    table.caption = "residual: of the fit, root mean square, relative"
    for report in found.reports:
        counts = (str(report.num_points), str(report.num_repeats))
        table.add_row(report.curve, *counts, _percent(report.spread), _percent(report.residual))
    console.print(table)
    for row in found.quantities:
        if row.curve is not None and row.note and not _is_operator(row):
            console.print(f"note: {row.path}: {row.note}", soft_wrap=True, markup=False, highlight=False)


def _print_quantities(rows: list[Quantity], title: str, base: str, found: Calibration, console: Console) -> None:
    spreads = {report.curve: report.spread for report in found.reports}
    table = _table(title, ["quantity"], ["fitted", base, "spread", "error"])
    table.caption = "spread: of the repeats; error: standard error of the fit; both relative"
    for row in rows:
        spread = max((s for c in (row.curve or "").split(" and ") if (s := spreads.get(c)) is not None), default=None)
        fitted = "" if row.fitted is None else _text(row.fitted)
        table.add_row(row.path, fitted, _text(row.base), _percent(spread) if fitted else "", _percent(row.error))
    console.print(table)


def _print_operators(rows: list[Quantity], base: str, console: Console) -> None:
    if not rows:
        return
    costs = ("overhead_us", "compute_efficiency", "memory_efficiency", "knee")
    table = _table(f"Operators: fitted ({base})", ["operator"], ["overhead us", "compute", "memory", "knee"])
    for row in rows:
        old = [f" ({getattr(row.base, name):g})" if row.base is not None else "" for name in costs]
        new = [f"{getattr(row.fitted, name):g}" for name in costs]
        table.add_row(row.path.removeprefix("operators."), *map(str.__add__, new, old))
    console.print(table)


def _table(title: str, left: list[str], right: list[str]) -> Table:
    table = Table(title=title)
    for column in left:
        table.add_column(column, no_wrap=True)
    for column in right:
        table.add_column(column, justify="right")
    return table


def _is_operator(row: Quantity) -> bool:
    return row.path.startswith("operators.")


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "\n".join(f"{v:g}" for v in value)
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 2 for a mistake in `arguments` (default: the command line's) or in the file, said in a line."""
    arguments, as_json = take_json(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        run(compose_command("calibrate", CalibrateSchema, arguments), as_json=as_json)
    except (ValueError, HydraException, OSError) as error:
        return say_why(error)
    return 0
