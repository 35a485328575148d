"""What a grid of gains says: where each placement pays, how that compares to the closed form, which is best where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from uvm_kv.report.verdict import INDIFFERENT
from uvm_kv.study.grid import BASELINE, COLD, Axis
from uvm_kv.study.kit import argmax, argmin, count, inserted, percent

MAX_CELLS = 4
"""Cells without a baseline that are named."""


def claims(table: pd.DataFrame, x: Axis, y: Axis, scope: str = "", details: str = "") -> list[str]:
    """Where each placement pays, how that compares to the closed form, and which is best where. `scope`: what was run
    of the requests, which every claim says; `details`: the same with lengths and admission, for the first one."""
    said = [_best(table, x, y, details)]
    for label, part in table.groupby("label", sort=True):
        said += [_pays(f"{label}{inserted(scope)}", part, x, y)]
        said += [_agrees(f"{label}, {scope}" if scope else str(label), part, x, y)]
    absent = table[table["gain"].isna()].drop_duplicates(["x_rank", "y_rank"])
    if len(absent):
        places = "; ".join(_cell(cell, x, y) for _, cell in absent.head(MAX_CELLS).iterrows())
        more = f" and {len(absent) - MAX_CELLS} more" if len(absent) > MAX_CELLS else ""
        said.append(f"{BASELINE} has no run in {len(absent)} cells, where no gain can be named ({places}{more}).")
    return said


def _cell(cell: pd.Series[Any], x: Axis, y: Axis) -> str:
    return f"{y.title} {cell[y.name]}, {x.title} {cell[x.name]}".replace("\n", " ")


def _gains(paying: pd.DataFrame, top: pd.Series[Any], where: str) -> str:
    """By how much, in the median and at the top. A gain that still rose is a lower bound."""
    rising = paying["at_least"]
    median = f"by {'at least ' if rising.any() else ''}{percent(float(paying['gain'].median()))} in their median"
    if not rising.any():
        return f"{median} and at most {percent(top['gain'])} ({where})"
    return (
        f"{median}, the largest {'at least ' if top['at_least'] else ''}{percent(top['gain'])} ({where}); in "
        f"{rising.sum()} of them it still rose at the largest batch tried, and is at least that"
    )


def _served_cold(paying: pd.DataFrame, known: pd.DataFrame) -> str:
    """What the cells that pay in decode gain from a cold start, and in how many of all it pays then."""
    both, num = paying[paying["cold_gain"].notna()], int(known["cold_gain"].notna().sum())
    if both.empty:
        return ""
    same = f"the same {count(len(both), 'cell')}"
    which = same if len(both) == len(paying) else f"the {len(both)} of them that were run so"
    one = len(both) == 1
    its = "its" if one else "their"
    rising = "at least " if both["cold_at_least"].astype(bool).any() else ""
    gains = both["cold_gain"].astype(float)
    num_paying = int((known["cold_word"] == "HIGHER").sum())
    return (
        f"; served cold, with {its} prefill, {which} gain{'s' * one} "
        f"{rising}{percent(float(gains.median()))} in {its} median and "
        f"{rising or 'at most '}{percent(float(gains.max()))}, and {num_paying or 'none'} of {num} cells "
        f"pay{'s' if num_paying == 1 else ''}"
    )


def _unclear(known: pd.DataFrame) -> str:
    num = int((known["word"] == "AMBIGUOUS").sum())
    return f"; AMBIGUOUS over its repeats, and not counted, in {num}" if num else ""


def _pays(label: str, part: pd.DataFrame, x: Axis, y: Axis) -> str:
    known = part.dropna(subset=["gain"])
    if known.empty:
        return f"{label} has no cell with a {BASELINE} run to compare with."
    pays, loses = known[known["word"] == "HIGHER"], known[known["word"] == "LOWER"]
    margin, unclear = f"{INDIFFERENT:.0%}", _unclear(known)
    if pays.empty:
        top = argmax(known, "gain")
        return (
            f"{label} pays in none of {len(known)} cells (loses more than {margin} in {len(loses)}){unclear}; its best "
            f"is {percent(top['gain'])}, at {_cell(top, x, y)}."
        )
    top = argmax(pays, "gain")
    where = (
        f"at {_cell(top, x, y)}, with {top['offered_batch']:.0f} requests where the card alone holds "
        f"{top['closed_form.num_seqs']:.0f}"
    )
    text = (
        f"{label} pays (more than {margin}) in {len(pays)} of {len(known)} cells ({len(pays) / len(known):.0%}), "
        f"{_gains(pays, top, where)}{unclear}{_served_cold(pays, known)}"
    )
    if loses.empty:
        return f"{text}; it loses more than {margin} in none."
    low = argmin(loses, "gain")
    return (
        f"{text}; it loses more than {margin} in {len(loses)}, at worst {percent(low['gain'])}, at {_cell(low, x, y)}."
    )


def _agrees(label: str, part: pd.DataFrame, x: Axis, y: Axis) -> str:
    known = part.dropna(subset=["gain", "closed_form_ceiling"])
    if known.empty:
        return f"{label}: no closed form to compare with."
    bound, gain, pays = known["closed_form_ceiling"], known["gain"], known["word"] == "HIGHER"
    promised = known[(bound > INDIFFERENT) & ~pays]
    beyond = known[(bound <= INDIFFERENT) & pays]
    # The bound is of a batch that could grow by any part of a request.
    allowed = promised["closed_form.num_seqs"] * (1 + promised["closed_form_ceiling"])
    coarse = int((allowed < promised["least_batch"]).sum())
    differ = len(promised) + len(beyond)
    widest = known.iloc[int((bound - gain).abs().argmax())]
    above = int((gain > bound + INDIFFERENT).sum())
    text = f"{label}: closed form and simulation differ on whether it pays in {differ} of {len(known)} cells"
    if differ:
        text += f" ({len(promised)} where only the closed form says so, {len(beyond)} where only the simulation does"
        small = f"; in {coarse} of the former the bound is below the smallest batch that was tried beyond the card"
        text += f"{small if coarse else ''})"
    return (
        f"{text}; the simulated gain is above the bound in {above}; they are "
        f"{100 * float((bound - gain).abs().median()):.1f} points apart in the median and at most "
        f"{100 * abs(widest['closed_form_ceiling'] - widest['gain']):.0f}, at {_cell(widest, x, y)} "
        f"({percent(widest['gain'])} of {percent(widest['closed_form_ceiling'])})."
    )


def _best(table: pd.DataFrame, x: Axis, y: Axis, details: str) -> str:
    across = f"{y.title} x {x.title}".replace("\n", " ")
    first = table.iloc[0]
    start = f"On a {first['origin']} {first['hardware']} with {first['model']}{inserted(details) or ','} over {across},"
    known = table.dropna(subset=["gain"])
    if known.empty:
        return f"{start} no cell has a {BASELINE} run, and no placement can be called the best."
    at = ["y_rank", "x_rank"]
    num = len(known[at].drop_duplicates())
    # Another placement of the cell might rise above the best.
    known = known.assign(at_least=known.groupby(at)["at_least"].transform("any"))
    paying = known[known["word"] == "HIGHER"]
    unclear = _unclear(known[~known.set_index(at).index.isin(paying.set_index(at).index)].drop_duplicates(at))
    if paying.empty:
        return f"{start} no placement of KV in CPU memory pays in any of {num} cells{unclear}."
    paying = paying.loc[paying.groupby(at)["gain"].idxmax()]
    cold = _cold_of_cells(known, at)
    both = paying.drop(columns=COLD).merge(cold, how="left", on=at)
    shares = ", ".join(f"{name} in {count}" for name, count in paying["label"].value_counts().sort_index().items())
    top = argmax(paying, "gain")
    where = f"{top['label']} at {_cell(top, x, y)}"
    return (
        f"{start} some placement of KV in CPU memory beats {BASELINE} in {len(paying)} of {num} cells "
        f"({len(paying) / num:.0%}), {_gains(paying, top, where)}{unclear}{_served_cold(both, cold)}; "
        f"the best is {shares}."
    )


def _cold_of_cells(known: pd.DataFrame, at: list[str]) -> pd.DataFrame:
    """A row per cell: the best that any placement gains in it from a cold start."""
    gain = known["cold_gain"].astype(float)
    best = known.assign(cold_gain=gain, order=gain.fillna(-np.inf)).groupby(at)["order"].idxmax()
    return known.loc[best, [*at, *COLD]]
