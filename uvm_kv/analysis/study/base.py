"""What a study is: from finished runs to a figure, the table that it draws, and sentences computed from it.

Each module beside this one holds one `STUDY`. A study never reads a file: it is given the runs of its experiments, one
row a run as `uvm_kv.analysis.load.load_runs` makes it, and the records of the jobs that failed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Drawn:
    figure: Any
    """A matplotlib figure at the size of its print; None where the study is a table."""
    table: pd.DataFrame
    """Exactly what is drawn, or the table itself."""
    claims: list[str] = field(default_factory=list)
    """Sentences for a paper, each computed from the table; they say where they end to hold. The first is the headline:
    what a reader takes away who reads nothing else."""

    @property
    def headline(self) -> str | None:
        return self.claims[0] if self.claims else None


@dataclass(frozen=True)
class Study:
    name: str
    """Of the files, and of conf/experiment/<name>.yaml unless `experiments` says otherwise."""
    title: str
    question: str
    how_to_read: str
    """A plain-language paragraph for the report."""
    factors: tuple[str, ...]
    """Columns of a run whose values tell its points apart: what is missing is said in these."""
    draw: Callable[[pd.DataFrame, Sequence[dict[str, Any]]], Drawn]
    """From the runs and the failure records; ValueError where the runs cannot answer the question."""
    experiments: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The experiments whose runs it draws."""
        return self.experiments or (self.name,)


OWN_ORIGIN = re.compile(r"\bon an? (simulated|measured|replayed|analytic)\b", re.IGNORECASE)
"""A claim that says itself where its numbers come from: on a simulated rtx3090."""


def with_origin(claim: str, origins: Sequence[str]) -> str:
    """The claim, with the origins of the runs that it is computed from before it where it does not say its own."""
    return claim if OWN_ORIGIN.search(claim) else f"{' and '.join(origins).capitalize()}: {claim}"


def throughput(runs: pd.DataFrame) -> pd.Series[float]:
    """Output tokens per second over the steady window, or of the whole run where it has none."""
    steady = runs["output_tokens_per_s"].astype(float)
    return steady.fillna(runs["output_tokens_per_s_whole_run"].astype(float))


def percent(value: float, digits: int = 1) -> str:
    """A gain as people write it: +12.3 %."""
    return f"{100 * value:+.{digits}f} %"
