"""What a study is: from finished runs to a figure, the table that it draws, and sentences computed from it.

Each module beside this one holds one `STUDY`. A study never reads a file: it is given the runs of its experiments, one
row per run as `uvm_kv.report.load.load_runs` makes it, and the records of the jobs that failed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from uvm_kv.study.kit import DECODE_ALONE


@dataclass(frozen=True)
class Drawn:
    figure: Any
    """A matplotlib figure at the size of its print; None where the study is a table."""
    table: pd.DataFrame
    """Exactly what is drawn, or the table itself."""
    claims: list[str] = field(default_factory=list)
    """Sentences for a paper, each computed from the table, with the range in which they hold. The first is the
    headline: what a reader takes away who reads nothing else."""

    @property
    def headline(self) -> str | None:
        return self.claims[0] if self.claims else None


@dataclass(frozen=True)
class Study:
    name: str
    """The name of its files, and of conf/experiment/<name>.yaml unless `experiments` names others."""
    title: str
    question: str
    how_to_read: str
    """A plain-language paragraph for the report."""
    factors: tuple[str, ...]
    """Columns of a run whose values tell its points apart: missing points are named by them."""
    draw: Callable[[pd.DataFrame, Sequence[dict[str, Any]]], Drawn]
    """From the runs and the failure records; ValueError where the runs cannot answer the question."""
    experiments: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The experiments whose runs it draws."""
        return self.experiments or (self.name,)


OWN_ORIGIN = re.compile(r"\bon an? (simulated|measured|replayed|analytic)\b", re.IGNORECASE)
"""A claim that names the origin of its numbers itself: on a simulated rtx3090."""
OWN_PHASES = re.compile(r"\b(decode alone|decode steps?|prefills?|cold start)\b", re.IGNORECASE)
"""A claim that names the phases of its requests itself."""


def with_origin(claim: str, origins: Sequence[str], scope: str = "") -> str:
    """The claim, preceded by what it does not say itself: the origins of its runs, and that these are of decode alone
    (`scope`, as from `phases`; any other scope leaves nothing out)."""
    said = [] if OWN_ORIGIN.search(claim) else [" and ".join(origins)]
    said += [scope] if scope == DECODE_ALONE and not OWN_PHASES.search(claim) else []
    text = ", ".join(said)
    return f"{text[:1].upper()}{text[1:]}: {claim}" if said else claim
