"""uvm-kv advise: would CPU-backed KV help this machine? The answer in a few lines, or as one JSON object."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable
from itertools import groupby

from rich.console import Console

from uvm_kv.advise.advisor import Advice, Effect, Point, advise
from uvm_kv.types import GIB

BOUNDS = {
    "link": "the link to the CPU, which the GPU waits for",
    "capacity": "KV memory (requests wait for it)",
    "HBM": "the card's memory bandwidth",
    "operators": "operators and launches, no one bandwidth",
}


def main() -> int:
    """ValueError for a mistake in the overrides."""
    parser = argparse.ArgumentParser(prog="uvm-kv advise", description=__doc__)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="hardware=rtx3090 model=llama_7b workload=fixed ..."
    )
    parser.add_argument("--json", action="store_true", help="one JSON object (docs/advise.md) instead of lines")
    options = parser.parse_intermixed_args()
    print_advice(options.overrides, as_json=options.json)
    return 0


def print_advice(overrides: list[str], *, as_json: bool) -> None:
    """ValueError for a mistake in the overrides."""
    with Console(stderr=True).status("composing", spinner="line") as status:
        advice = advise(overrides, progress=status.update)
    print(json.dumps(dataclasses.asdict(advice), indent=1) if as_json else "\n".join(lines(advice)))


def lines(advice: Advice) -> list[str]:
    """The verdict first, the commands last."""
    made = f"calibrated on {advice.measured_on}" if advice.measured_on else "not calibrated"
    seqs = f"{advice.num_device_seqs or 'not one'} such request{'' if advice.num_device_seqs <= 1 else 's'}"
    out = [
        f"{_verdict(advice)} [{advice.origin}]",
        f"  asked:   {advice.hardware} ({made}), {advice.model}, {advice.workload}; "
        f"{_gib(advice.device_kv_bytes)} of device KV, room for {seqs}",
        f"  with:    {_point(advice.best)}",
        f"  without: {_point(advice.baseline)}",
    ]
    if advice.equal_tpot is not None:
        point = dataclasses.replace(advice.equal_tpot, host_kv_bytes=0)  # It was tried with more than it needs.
        out.append(f"  at most its p99 TPOT: {advice.gain_equal_tpot:+.1%}, {_point(point)}")
    elif advice.gain is not None:
        out.append("  at most its p99 TPOT: no CPU-backed point")
    out.append(f"  why:     {_why(advice)}")
    if advice.uncertainty:
        out.append(f"  range:   {_effects(advice.uncertainty)}")
    out += [f"  no source: {_without_source(advice)}"] if advice.no_source else []
    out += [f"  not tried: {m}: {why}" for m, why in advice.left_out.items() if why != advice.refused]
    return out + [f"  {command}" for command in (advice.best_command, advice.baseline_command) if command]


def _verdict(advice: Advice) -> str:
    best, base = advice.best, advice.baseline
    if best is None:
        return "no: no CPU-backed mechanism serves this workload"
    if base is None:
        return f"yes: device only refuses this workload; {best.mechanism} serves it at {best.tokens_per_s:.1f} tok/s"
    assert advice.gain is not None and advice.gain_range is not None
    gain = f"{advice.gain:+.1%} tokens/s (range {advice.gain_range[0]:+.1%} to {advice.gain_range[1]:+.1%})"
    if advice.answer == "yes":
        return f"yes: {best.mechanism} with {_gib(best.host_kv_bytes)} of CPU memory, {gain}"
    if advice.answer == "no":
        return f"no: device only; the best CPU-backed mechanism, {best.mechanism}, gives {gain}"
    return f"cannot tell (AMBIGUOUS): {best.mechanism} with {_gib(best.host_kv_bytes)} of CPU memory, {gain}"


def _point(point: Point | None) -> str:
    if point is None:
        return "refused"
    host = f" with {_gib(point.host_kv_bytes)}" if point.host_kv_bytes else ""
    tpot = "" if point.tpot_p99_s is None else f", p99 TPOT {point.tpot_p99_s * 1e3:.1f} ms"
    return f"{point.mechanism}{host} at batch {point.batch_size}: {point.tokens_per_s:.1f} tok/s{tpot}"


def _why(advice: Advice) -> str:
    best, base = advice.best, advice.baseline
    if best is None or base is None:
        return str(advice.refused)
    told = f"device only runs {base.running_batch:.1f} sequences at once, bound by {BOUNDS[base.bound]}; "
    if not best.moved_kv:
        if not base.limited:
            return f"{told}the workload never fills the card's KV memory, which holds {advice.num_device_seqs} requests"
        return f"{told}no CPU-backed mechanism that was tried moved KV over the link"
    return f"{told}{best.mechanism} runs {best.running_batch:.1f}, bound by {BOUNDS[best.bound]}"


def _effects(uncertainty: Iterable[Effect]) -> str:
    parts = []
    for why, effects in groupby(uncertainty, key=lambda effect: effect.why):
        told = []
        for effect in effects:
            moved = "" if effect.quantity == "lengths" else f" +-{100 * effect.uncertainty:.2g} %"
            low, high = 100 * min(0.0, *effect.gains), 100 * max(0.0, *effect.gains)
            told.append(f"{effect.quantity}{moved}: {low:+.1f} to {high:+.1f}")
        parts.append(f"{', '.join(told)} points ({why})")
    return "; ".join(parts)


def _without_source(advice: Advice) -> str:
    """Numbers by who gave them; those that the range moves are assumed to be as uncertain as any."""
    by_giver = [f"{', '.join(p for p, by in advice.no_source.items() if by == giver)} (given by {giver})"
                for giver in dict.fromkeys(advice.no_source.values())]  # fmt: skip
    return f"{', '.join(by_giver)}; the range leaves out how far off they may be, beyond what it assumes of any card"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.{0 if num_bytes % GIB == 0 else 1}f} GiB"
