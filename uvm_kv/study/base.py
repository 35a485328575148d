"""What a study is: from finished runs to a figure, the table that it draws, and sentences computed from it.

Each module beside this one holds one `STUDY`. A study never reads a file: it is given the runs of its experiments, one
row a run as `uvm_kv.report.load.load_runs` makes it, and the records of the jobs that failed.
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


DECODE_ALONE = "decode alone, no prefill"
OWN_PHASES = re.compile(r"\b(decode alone|decode steps?|prefills?|cold start)\b", re.IGNORECASE)
"""A claim that says itself what was run of the requests."""


def with_origin(claim: str, origins: Sequence[str], scope: str = "") -> str:
    """The claim, with what it does not say itself before it: the origins of the runs that it is computed from, and
    that these are of decode alone (`scope`, as of `phases`). What leaves nothing out need not be said."""
    said = [] if OWN_ORIGIN.search(claim) else [" and ".join(origins)]
    said += [scope] if scope == DECODE_ALONE and not OWN_PHASES.search(claim) else []
    text = ", ".join(said)
    return f"{text[:1].upper()}{text[1:]}: {claim}" if said else claim


def throughput(runs: pd.DataFrame) -> pd.Series[float]:
    """Output tokens per second over the steady window, or of the whole run where it has none."""
    steady = runs["output_tokens_per_s"].astype(float)
    return steady.fillna(runs["output_tokens_per_s_whole_run"].astype(float))


def percent(value: float, digits: int = 1) -> str:
    """A gain as people write it: +12.3 %."""
    return f"{100 * value:+.{digits}f} %"


ADMISSIONS = {"worst_case": "worst-case", "optimistic": "optimistic"}


def phases(runs: pd.DataFrame) -> str:
    """What was run of the requests, for a claim: decode alone, or prefill and decode. Empty where runs do not say, or
    are of both kinds, of which a claim is about one."""
    starts = set(runs["start"].dropna()) if "start" in runs else set()
    if not starts or (len(starts) > 1 and "steady" in starts):
        return ""
    return DECODE_ALONE if starts == {"steady"} else "prefill and decode"


def served(runs: pd.DataFrame, lengths: Sequence[str] = ("prompt", "output")) -> str:
    """What a claim rests on and would leave out: the phases that were run, those lengths of requests that are asked for
    and given, admission, and how many draws there are where lengths or arrivals are drawn."""
    said = [phases(runs)]
    spans = []
    for name in lengths:
        tokens = runs.get(f"{name}_tokens", pd.Series(dtype=float)).dropna().astype(int)
        if len(tokens):
            spans.append(f"{tokens.min()}{f' to {tokens.max()}' if tokens.min() < tokens.max() else ''} {name}")
    said += [f"{' and '.join(spans)} tokens per request"] if spans else []
    found = sorted(set(runs["admission"].dropna()), reverse=True) if "admission" in runs else []
    said += [f"{' or '.join(ADMISSIONS.get(name, str(name)) for name in found)} admission"] if found else []
    if "drawn" in runs and runs["drawn"].any():
        num = runs["seed"].nunique()
        said.append(f"{num} draws" if num > 1 else "one draw")
    return ", ".join(text for text in said if text)


def inserted(text: str) -> str:
    """A text as an insertion between commas; nothing where there is none."""
    return f", {text}," if text else ""
