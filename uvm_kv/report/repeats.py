"""Runs to points where a study has no comparison of mechanisms and batches: medians over repeats of one setting.

What tells points apart is the study's; runs of one point are repeats and nothing else, or it is an error. Comparisons
of mechanisms over batches have `load.points`.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Number

import pandas as pd

SHARED = (
    *("origin", "runner", "engine", "hardware", "model", "workload", "mechanism", "offered_batch", "setting"),
    "variant",
)
"""What repeats have in common; they differ in seed and in what came out."""
REPEATS = ".repeats"


def one_per_draw(runs: pd.DataFrame, key: Sequence[str]) -> pd.DataFrame:
    """The runs without those of a point that have the draw of another, which would make the point look surer than it
    is. Of equal ones the first seed and repeat stay, so that those of two points still pair."""
    if "draw" not in runs:
        return runs
    order = runs.sort_values([name for name in ("seed", "repeat") if name in runs], kind="stable")
    return runs[~order.duplicated([*key, "draw"]).reindex(runs.index)]


def medians(runs: pd.DataFrame, key: Sequence[str], keep: Sequence[str] = (), study: str = "") -> pd.DataFrame:
    """A row per point, in `runs`' order: numbers are medians over its repeats (`one_per_draw`), the rest as in the
    first; `num_runs`; and for each column in `keep` a tuple of all repeats, `<column>.repeats`, in order of size.

    ValueError, which begins with `study`, where the runs of a point differ in anything of SHARED.
    """
    names = list(key)
    for column in [c for c in SHARED if c in runs and c not in names]:
        told = runs[names].assign(value=runs[column].map(repr)).drop_duplicates()
        if len(several := told[told.duplicated(names)]):
            point = ", ".join(f"{name} {several[name].iloc[0]}" for name in names)
            what = f"{study}: " if study else ""
            raise ValueError(
                f"{what}several runs of {point} differ in {column}; only repeats of one setting are a point"
            )
    runs = one_per_draw(runs, names)
    grouped = runs.groupby(names, sort=False, dropna=False)
    numbers = [str(c) for c in runs if c not in names and runs[c].dropna().map(_is_number).all()]
    numeric = runs[numbers].apply(pd.to_numeric)
    table = runs.drop_duplicates(names).set_index(names)
    table[numbers] = numeric.groupby([runs[name] for name in names], sort=False, dropna=False).median()
    table["num_runs"] = grouped.size()
    for column in keep:
        table[f"{column}{REPEATS}"] = grouped[column].apply(lambda repeats: tuple(sorted(repeats.astype(float))))
    return table.reset_index()


def _is_number(value: object) -> bool:
    return isinstance(value, Number) and not isinstance(value, bool)


def one_of_each(runs: pd.DataFrame, columns: Sequence[str], study: str) -> None:
    """ValueError, with what there is, where a column has several values that one picture cannot hold."""
    for column in columns:
        if len(found := sorted(set(runs[column].astype(str)))) > 1:
            raise ValueError(f"{study}: runs of several {column}s ({', '.join(found)}); give those of one")
