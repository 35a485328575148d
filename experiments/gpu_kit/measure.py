"""The kit for the owner of a card: calibrate, measure, validate, and one archive to send or commit. docs/measure.md

    make measure                     asks before it oversubscribes the card
    make measure CONSENT=yes         does not ask; CONSENT=no leaves it out
    python -m experiments.measure --output DIR --parts sweep_llama_7b oversubscribed_llama_7b
    python -m experiments.measure --list

Everything goes to results/measured/<gpu>/. What a part took is kept: stopped or cut off, the same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.gpu_kit import gpu_check, measuring
from experiments.gpu_kit.gpu_check import MEASURE_PARTS, PARTS, Part, Report, check
from experiments.gpu_kit.measuring import SWEEPS, NotPossibleError, Sweep, query_card, run_command
from uvm_kv.hw.host import available_host_bytes
from uvm_kv.store.failures import reason
from uvm_kv.store.provenance import gpu
from uvm_kv.store.records import read_failures
from uvm_kv.store.whole import completed_runs
from uvm_kv.types import GIB

WATCHDOG_S = 180
"""Of one job, by the wall clock: its model loaded, its KV filled, at most 10 s of steps. A thrashing one needs more."""
OVERSUBSCRIBED_LIMIT_S = 1800
HOST_RESERVE_BYTES = 4 * GIB
DEMAND_BATCHES = (16, 20, 24, 32, 40)
DEMAND_HOST_BYTES = 12 * GIB
OVERSUBSCRIBED_BYTES = 22 * GIB
"""Of LLaMA-7B's KV at batch 40 and a little more: what may end up on the host."""
CONSENT = "CONSENT"
YES, NO = ("yes", "y"), ("no", "n")
QUESTION = """
Oversubscription: managed memory larger than the card is what this project is about, and what can hang it. While such a
job thrashes the desktop of a card that drives a display may freeze, and other programs on the card may fail. A job is
stopped after {seconds} s, and the rest of its mechanism is then left out. Close what else uses the card.
Oversubscribe this {card}? [yes/no] """


# ---- consent and the machine


def warnings() -> list[str]:
    """What the owner should know before anything runs."""
    found = []
    if (query_card("display_active") or "").lower() == "enabled":
        found.append(
            "warning: this card drives a display; its memory is not all free, timings are noisier, and the picture may "
            "freeze while it is oversubscribed. A text console, or a display on another card, is better."
        )
    used = query_card("memory.used")
    if used is not None and used.split()[0].isdigit() and int(used.split()[0]) > 1024:
        found.append(f"warning: {used} of the card are in use already (nvidia-smi shows by whom)")
    return found


def has_consent(card: str, environment: dict[str, str], ask: Callable[[str], str] | None) -> bool:
    """CONSENT=yes or no, or the answer on a terminal; without either, no. `ask` is None where nobody is there."""
    given = environment.get(CONSENT, "").strip().lower()
    if given:
        if given not in (*YES, *NO):
            raise ValueError(f"{CONSENT}={given}; it is yes or no")
        return given in YES
    if ask is None:
        return False
    try:
        return ask(QUESTION.format(seconds=WATCHDOG_S, card=card)).strip().lower() in YES
    except EOFError:
        return False


def check_room(sweep: Sweep) -> None:
    """Pages that leave the card go to the host, which without room swaps or kills. NotPossibleError without room."""
    if measuring.managed_fits(sweep, measuring.free_card_bytes()):
        raise NotPossibleError("its managed memory fits this card, so that there is nothing to oversubscribe")
    needed = OVERSUBSCRIBED_BYTES + HOST_RESERVE_BYTES
    if (available := available_host_bytes() or 0) < needed:
        raise NotPossibleError(
            f"oversubscription may put {OVERSUBSCRIBED_BYTES / GIB:.0f} GiB on the host, and {needed / GIB:.0f} GiB "
            f"must be free; {available / GIB:.1f} GiB are"
        )


# ---- parts


def oversubscribed_commands(sweep: Sweep, output: Path) -> list[list[str]]:
    """Managed mechanisms at every batch, each in a sweep of its own so that one which thrashes ends alone.

    A managed slab is not bound by a cap in software, so managed_demand plans with all that the card has."""
    check_room(sweep)
    shared = ["memory.allow_oversubscription=true", f"watchdog_s={WATCHDOG_S}", *measuring.profile_if_any(output)]
    whole_card = ["memory.device_kv_bytes=null", "memory.gpu_memory_utilization=1.0"]
    whole_card.append(f"memory.host_kv_bytes={DEMAND_HOST_BYTES}")
    experiment, results = f"gpu_sweep_{sweep.name}", output / "sweep" / "runs"
    commands = [run_command(experiment, results, f"mechanism={name}", *shared) for name in measuring.MANAGED]
    batches = ",".join(map(str, DEMAND_BATCHES))
    demand = ("mechanism=managed_demand", f"batch_size={batches}")
    return [*commands, run_command(experiment, results, *demand, *whole_card, *shared)]


def report_commands(output: Path) -> list[list[str]]:
    runs = output / "sweep" / "runs"
    if not completed_runs(runs):
        raise NotPossibleError("there are no runs to report; the parts sweep_* make them")
    return [[sys.executable, "-m", "uvm_kv.cli", "report", str(runs)]]


def parts_of(consent: bool) -> list[Part]:
    """In order, with limits for a card that is slower than a data centre's and has all the time."""
    patient = {part.name: dataclasses.replace(part, limit_s=4 * part.limit_s) for part in (*PARTS, *MEASURE_PARTS)}

    def oversubscribed(sweep: Sweep) -> Part:
        def commands(folder: Path) -> list[list[str]]:
            if not consent:
                raise NotPossibleError(f"no consent to oversubscribe the card ({CONSENT}=yes gives it)")
            return oversubscribed_commands(sweep, folder.parent)

        name = f"oversubscribed_{sweep.name}"
        return Part(name, "managed memory beyond the card", OVERSUBSCRIBED_LIMIT_S, commands, goes_on=True)

    predict_published = Part(
        "predict_published",
        "the same, with the profile of this card in conf/hardware",
        520,
        lambda folder: measuring.predict_commands(folder.parent, published=True),
    )
    validate_published = Part(
        "validate_published",
        "that one against every point",
        120,
        lambda folder: measuring.validate_commands(folder.parent, published=True),
        always=True,
    )
    before = ("doctor", "microbench", "operators", "calibrate", "predict")
    sweeps = ("sweep_llama_7b", "sweep_llama3_8b", "repeats")
    report = Part(
        "report", "tables and figure of all runs", 300, lambda folder: report_commands(folder.parent), always=True
    )
    return [
        *(patient[name] for name in before),
        predict_published,
        *(patient[name] for name in sweeps),
        *(oversubscribed(sweep) for sweep in SWEEPS),
        patient["peers"],
        patient["decode_step"],
        patient["validate"],
        validate_published,
        patient["speed"],
        report,
    ]


def slug(name: str) -> str:
    """results/measured/<this>: the card as nvidia-smi names it, for a folder."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower().removeprefix("nvidia ").removeprefix("geforce ")).strip("_")


def failure_lines(output: Path) -> list[str]:
    """Points that are missing, and why: what a watchdog stopped among them."""
    records, left_out = read_failures(output / "sweep" / "runs")
    return [
        f"missing: {r['model']}, {r['mechanism']}, batch {r['offered_batch']}: {reason(r)}" for r in records.values()
    ] + [f"left out: {it}" for it in left_out]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 where no part failed, 1 where one did, 2 for a mistake in `arguments`, 3 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m experiments.measure", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder (default results/measured/<gpu>)")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these, in the usual order")
    parser.add_argument("--force", action="store_true", help="take again what these sources have taken")
    parser.add_argument("--list", action="store_true", help="the parts")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{part.name:<24}{part.limit_s:>5} s at most  {part.about}" for part in parts_of(True)))
        return 0
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), gpu_check.TOOLKIT])
    card = gpu()
    if card is None:
        print("no NVIDIA GPU on this machine (nvidia-smi shows none): nothing to measure")
        return 3
    try:
        names = [part.name for part in parts_of(False)]
        if unknown := [name for name in options.parts or () if name not in names]:
            raise ValueError(f"--parts {unknown[0]}: no such part; there are {', '.join(names)}")
        wanted = options.parts or names
        for line in warnings():
            print(line, file=sys.stderr)
        consent = False
        if any(name.startswith("oversubscribed") for name in wanted):
            consent = has_consent(card["name"], dict(os.environ), input if sys.stdin.isatty() else None)
        output = (options.output or gpu_check.ROOT / "results" / "measured" / slug(card["name"])).resolve()
        output.mkdir(parents=True, exist_ok=True)
        report = Report(output, gpu_check._commit(None), f"measured-{output.name}.tar.gz")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parts = [part for part in parts_of(consent) if part.name in wanted]
    fine = check(parts, report, seconds=sum(part.limit_s for part in parts) + 60, force=options.force)
    print("\n".join(failure_lines(output)))
    print(f"all of it, to be sent or committed: {output / report.archive}")
    return 0 if fine else 1
