"""Trace files: Azure's LLM inference format, or arrival_s, prompt_tokens, output_tokens."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from uvm_kv.types import NS_PER_S

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MAX_ARRIVAL_S = 1e9
PLAIN = ("arrival_s", "prompt_tokens", "output_tokens")


class TraceRow(NamedTuple):
    line: int
    arrival_ns: int
    """Since the first arrival of the file."""
    prompt_tokens: int
    output_tokens: int


def read_trace(path: str) -> list[TraceRow]:
    """Rows in order of arrival. ValueError names the file and the line of what cannot be read."""
    file = Path(path)
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        reader = csv.reader(stream)
        header = [name.strip() for name in next(reader, [])]
        columns = next((c for c in (AZURE, PLAIN) if set(c) <= set(header)), None)
        if columns is None:
            raise ValueError(
                f"workload.path={path}, line 1: the columns are {', '.join(header) or 'missing'}; they must be "
                f"{', '.join(PLAIN)} or {', '.join(AZURE)}"
            )
        index = [header.index(name) for name in columns]
        rows = []
        for cells in _rows(reader, path):
            if not any(cell.strip() for cell in cells):
                continue
            where = f"workload.path={path}, line {reader.line_num}"
            if len(cells) <= max(index):
                raise ValueError(f"{where}: {len(cells)} cells where the header has {len(header)}")
            arrival, prompt, output = (cells[i].strip() for i in index)
            rows.append(
                TraceRow(
                    reader.line_num,
                    _arrival_ns(arrival, columns is AZURE, f"{where}: {columns[0]}"),
                    _length(prompt, f"{where}: {columns[1]}"),
                    _length(output, f"{where}: {columns[2]}"),
                )
            )
    if not rows:
        raise ValueError(f"workload.path={path}: the trace has no rows")
    rows.sort(key=lambda row: row.arrival_ns)
    first = rows[0].arrival_ns
    return [row._replace(arrival_ns=row.arrival_ns - first) for row in rows]


def write_trace(path: Path, rows: Iterable[tuple[int, int, int]]) -> None:
    """Write (arrival_ns, prompt_tokens, output_tokens) so that `read_trace` gives the same."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(PLAIN)
        for arrival_ns, prompt, output in rows:
            seconds, rest = divmod(arrival_ns, NS_PER_S)
            writer.writerow((f"{seconds}.{rest:09d}", prompt, output))


def _rows(reader: Iterator[list[str]], path: str) -> Iterator[list[str]]:
    number = 1
    while True:
        number += 1
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"workload.path={path}, line {number}: not CSV ({error})") from None


def _length(text: str, where: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError(f"{where} is {text!r}; it must be a whole number of tokens")
    value = int(text)
    if value < 1:
        raise ValueError(f"{where} is {value}; it must be at least 1 token")
    return value


def _arrival_ns(text: str, is_timestamp: bool, where: str) -> int:
    try:
        if is_timestamp:
            moment = datetime.fromisoformat(text)  # Azure's 100 ns ticks are cut to microseconds.
            if moment.tzinfo is None:
                moment = moment.replace(tzinfo=UTC)
            since = moment - datetime(1970, 1, 1, tzinfo=UTC)
            return (since.days * 86_400 + since.seconds) * NS_PER_S + since.microseconds * 1000
        value = float(text)
    except (ValueError, TypeError):
        raise ValueError(f"{where} is {text!r}; it must be a {'date and time' if is_timestamp else 'number'}") from None
    if not 0 <= value <= MAX_ARRIVAL_S:
        raise ValueError(f"{where} is {text}; it must lie between 0 and {MAX_ARRIVAL_S:.0e} s")
    return round(value * NS_PER_S)
