"""What the owner of a card is asked and told by `make measure`; docs/measure.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from experiments.gpu_kit.parts import CONSENT, WATCHDOG_S, YES, query_card

NO = ("no", "n")
QUESTION = """
Oversubscription: managed memory larger than the card is what this project is about, and what can hang it. While such a
job thrashes the desktop of a card that drives a display may freeze, and other programs on the card may fail. A job is
stopped after {seconds} s, and the rest of its mechanism is then left out. Close what else uses the card.
Oversubscribe this {card}? [yes/no] """


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


def has_consent(card: str, environment: Mapping[str, str], ask: Callable[[str], str] | None) -> bool:
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


def slug(name: str) -> str:
    """results/measured/<this>: the card as nvidia-smi names it, for a folder."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower().removeprefix("nvidia ").removeprefix("geforce ")).strip("_")


def failure_lines(output: Path) -> list[str]:
    """Points that are missing, and why: what a watchdog stopped among them."""
    from uvm_kv.store.failures import reason
    from uvm_kv.store.records import read_failures

    records, left_out = read_failures(output / "sweep" / "runs")
    return [
        f"missing: {r['model']}, {r['mechanism']}, batch {r['offered_batch']}: {reason(r)}" for r in records.values()
    ] + [f"left out: {it}" for it in left_out]
