"""What the columns of a trace are called, by who wrote it, and how one request is read from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from uvm_kv.types import NS_PER_S

MAX_ARRIVAL_S = 10**10
"""Beyond the year 2286: a time in milliseconds that is read as seconds."""
MAX_SHOWN = 40
"""Characters of the file that an error repeats of one value."""
MAX_COLUMNS = 8
"""Names of columns that an error repeats."""


class TraceFormat(NamedTuple):
    name: str
    arrival: str
    prompt: str
    output: str
    ns_per_unit: int | None
    """Nanoseconds per unit of the arrival time; None: the arrival is a date and time."""
    is_log: bool = True
    """Requests without tokens failed and are left out; in a file that somebody wrote by hand they are mistakes."""
    mark: str | None = None
    """A further column that tells it from a format with the same three."""

    @property
    def columns(self) -> tuple[str, str, str]:
        return (self.arrival, self.prompt, self.output)


PLAIN = TraceFormat("plain", "arrival_s", "prompt_tokens", "output_tokens", NS_PER_S, is_log=False)
FORMATS = (
    PLAIN,
    TraceFormat("Azure", "TIMESTAMP", "ContextTokens", "GeneratedTokens", None),
    TraceFormat("BurstGPT", "Timestamp", "Request tokens", "Response tokens", NS_PER_S),
    # Both have the same columns: Alibaba's times are in seconds, Mooncake's in milliseconds.
    TraceFormat("Alibaba Bailian", "timestamp", "input_length", "output_length", NS_PER_S, mark="chat_id"),
    TraceFormat("Mooncake", "timestamp", "input_length", "output_length", NS_PER_S // 1000),
    TraceFormat("timed requests of vLLM", "arrival_time", "input_toks", "output_toks", NS_PER_S),
    TraceFormat("LLMServingSim", "arrival_time_ns", "input_toks", "output_toks", 1),
    TraceFormat("Vidur", "arrived_at", "num_prefill_tokens", "num_decode_tokens", NS_PER_S),
    TraceFormat("Splitwise's simulator", "arrival_timestamp", "prompt_size", "token_size", NS_PER_S),
    TraceFormat("vLLM benchmark result", "start_times", "input_lens", "output_lens", NS_PER_S),
)
HOW_TO_CONVERT = f"write a csv with the columns {','.join(PLAIN.columns)} (docs/traces.md)"


def recognise(columns: Iterable[str], where: str) -> TraceFormat:
    """The format with these columns. ValueError, which names what is there or what is missing, for none."""
    names = [str(name) for name in columns]
    for one in FORMATS:
        if set(one.columns) <= set(names) and (one.mark is None or one.mark in names):
            return one
    nearest = max(FORMATS, key=lambda one: sum(column in names for column in one.columns))
    absent = [column for column in nearest.columns if column not in names]
    if len(absent) == 1:
        raise ValueError(f"{where}: {absent[0]} is missing beside {' and '.join(set(nearest.columns) & set(names))}")
    if not names:
        raise ValueError(f"{where}: there are no columns; {HOW_TO_CONVERT}")
    shown = ", ".join(short(name) for name in names[:MAX_COLUMNS])
    more = f" and {len(names) - MAX_COLUMNS} more" if len(names) > MAX_COLUMNS else ""
    raise ValueError(f"{where}: no known trace format has the columns {shown}{more}; {HOW_TO_CONVERT}")


def request_of(one: TraceFormat, values: Mapping[str, Any], where: str) -> tuple[int, int, int] | None:
    """(arrival in ns, prompt tokens, output tokens); None for a request of a log that failed. ValueError for a value
    that is missing or is not one."""
    absent = next((column for column in one.columns if column not in values), None)
    if absent is not None:
        raise ValueError(f"{where}: {absent} is missing")
    arrival_ns = _arrival_ns(values[one.arrival], one, f"{where}: {one.arrival}")
    least = 0 if one.is_log else 1
    prompt, output = (_tokens(values[column], least, f"{where}: {column}") for column in (one.prompt, one.output))
    return (arrival_ns, prompt, output) if prompt and output else None


def short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def _tokens(value: Any, least: int, where: str) -> int:
    """Whole numbers, also as pandas writes them beside a gap (128.0)."""
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?[0-9]{1,18}(\.0*)?", text):
        raise ValueError(f"{where} is {short(text)!r}; it must be a whole number of tokens")
    number = int(text.partition(".")[0])
    if number < least:
        raise ValueError(f"{where} is {number}; it must be at least {least} token{'' if least == 1 else 's'}")
    return number


def _arrival_ns(value: Any, one: TraceFormat, where: str) -> int:
    text = str(value).strip()
    if one.ns_per_unit is None:
        return _moment_ns(text, where)
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", text):
        raise ValueError(f"{where} is {short(text)!r}; it must be a number")
    arrival_ns = Decimal(text) * one.ns_per_unit
    if not 0 <= arrival_ns <= MAX_ARRIVAL_S * NS_PER_S:
        unit = {NS_PER_S: "seconds", NS_PER_S // 1000: "milliseconds", 1: "nanoseconds"}[one.ns_per_unit]
        raise ValueError(f"{where} is {short(text)}; it must lie between 0 and {MAX_ARRIVAL_S:.0e} s, in {unit}")
    return round(arrival_ns)


def _moment_ns(text: str, where: str) -> int:
    try:
        moment = datetime.fromisoformat(text)  # Azure's 100 ns ticks are cut to microseconds.
    except ValueError:
        raise ValueError(f"{where} is {short(text)!r}; it must be a date and time") from None
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * NS_PER_S + since.microseconds * 1000


Fits = Callable[[str, int, int], bool]
"""(where, prompt tokens, output tokens): whether a request is taken; it may raise a ValueError."""
