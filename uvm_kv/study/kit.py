"""What the studies share beside the drawing (`uvm_kv.report.drawing`): checks of runs, comparisons, words of claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from uvm_kv.report.repeats import REPEATS
from uvm_kv.report.statistics import Ratio, judge
from uvm_kv.report.verdict import INDIFFERENT, MEASURED

DECODE_ALONE = "decode alone, no prefill"
ADMISSIONS = {"worst_case": "worst-case", "optimistic": "optimistic"}


def throughput(runs: pd.DataFrame) -> pd.Series[float]:
    """Output tokens per second over the steady window, or of the whole run where it has none."""
    steady = runs["output_tokens_per_s"].astype(float)
    return steady.fillna(runs["output_tokens_per_s_whole_run"].astype(float))


def one_comparison(table: pd.DataFrame, what: str) -> None:
    """ValueError where the points are of several comparisons; `what`: the study, and what of it is."""
    if table["title"].nunique() > 1:
        several = "; ".join(sorted(set(table["title"]))[:3])
        raise ValueError(f"{what} are of several comparisons ({several}); draw them one by one")


def context_tokens(run: pd.Series[Any] | dict[str, Any], study: str) -> int:
    """Tokens of prompt and output; ValueError where requests have no one length."""
    if pd.isna(run["prompt_tokens"]):
        raise ValueError(f"{study}: workload={run['workload']} has no one context length; it takes workload=fixed")
    return int(run["prompt_tokens"] + run["output_tokens"])


def judged(one: pd.Series[Any], other: pd.Series[Any], column: str, tolerance: float = INDIFFERENT) -> Ratio:
    """One point over another by the repeats of `column`, as `medians` and `points` keep them."""
    name = f"{column}{REPEATS}"
    return judge(one[name], other[name], tolerance, measured=one["origin"] == MEASURED)


def argmax(table: pd.DataFrame, column: str) -> pd.Series[Any]:
    """The first row with the largest value."""
    return table.iloc[int(table[column].argmax())]


def argmin(table: pd.DataFrame, column: str) -> pd.Series[Any]:
    return table.iloc[int(table[column].argmin())]


def percent(value: float, digits: int = 1) -> str:
    """A gain as people write it: +12.3 %."""
    return f"{100 * value:+.{digits}f} %"


def count(num: int, what: str) -> str:
    """1 run, 2 runs."""
    return f"{num} {what}{'' if num == 1 else 's'}"


def span(values: pd.Series[Any], say: Callable[[Any], str] = str) -> str:
    """3 to 5, or 3 where all are said alike."""
    low, high = say(values.min()), say(values.max())
    return low if low == high else f"{low} to {high}"


def on_card(table: pd.DataFrame) -> str:
    """llama_7b on a simulated rtx3090; `table` is of one model and card."""
    first = table.iloc[0]
    return f"{first['model']} on a {first['origin']} {first['hardware']}"


def panel_title(table: pd.DataFrame) -> str:
    """The same without the origin, which the footer of a figure says."""
    return f"{table['model'].iloc[0]} on {table['hardware'].iloc[0]}"


def phases(runs: pd.DataFrame) -> str:
    """What was run of the requests, for a claim: decode alone, or prefill and decode. Empty where runs do not say, or
    are of both kinds while a claim is about one."""
    starts = set(runs["start"].dropna()) if "start" in runs else set()
    if not starts or (len(starts) > 1 and "steady" in starts):
        return ""
    return DECODE_ALONE if starts == {"steady"} else "prefill and decode"


def served(runs: pd.DataFrame, lengths: Sequence[str] = ("prompt", "output")) -> str:
    """What a claim rests on: the phases that were run, the `lengths` of requests where they are given, admission, and
    the number of draws where lengths or arrivals are drawn."""
    said = [phases(runs)]
    tokens = {name: runs.get(f"{name}_tokens", pd.Series(dtype=float)).dropna().astype(int) for name in lengths}
    spans = [f"{span(found)} {name}" for name, found in tokens.items() if len(found)]
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


def bracketed(text: str) -> str:
    """A text in brackets after a space; nothing where there is none."""
    return f" ({text})" if text else ""
