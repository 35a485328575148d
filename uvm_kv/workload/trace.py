"""Trace files of many makers: csv, JSON lines, a JSON list, or a benchmark's result; gzipped or not (docs/traces.md).

A file is read from its top, and no further than the requests that are asked for; only JSON that is not one object per
line is read whole. A file that cannot be read is a ValueError of one short line, which repeats next to nothing of it.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from uvm_kv.types import NS_PER_S
from uvm_kv.workload.trace_formats import HOW_TO_CONVERT, PLAIN, Fits, recognise, request_of

MAX_SPAN_S = 10**9
"""Longest time between the first and the last arrival: 30 years."""
BINARY = {
    b"PAR1": "a parquet file; read it with pandas.read_parquet",
    b"PK\x03\x04": "a zip or Excel file; unpack it, or save it as csv",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it, or use gzip",
    b"BZh": "compressed with bzip2; unpack it, or use gzip",
    b"\xfd7zXZ": "compressed with xz; unpack it, or use gzip",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}
"""First bytes of common binary formats, with advice."""
GZIP = b"\x1f\x8b"


class TraceRow(NamedTuple):
    line: int
    arrival_ns: int
    """Time since the first arrival that was read."""
    prompt_tokens: int
    output_tokens: int


class Trace(NamedTuple):
    rows: list[TraceRow]
    """Requests in order of arrival."""
    num_unfit: int
    """Requests that `fits` did not take."""
    num_failed: int
    """Requests of a log that have no prompt or no output."""
    has_prefix_ids: bool
    """Whether the file says which prompts share a prefix."""


Record = tuple[int, Mapping[str, Any]]
"""Line, or number of the request, and its values by column."""


def read_trace(path: str, *, fits: Fits = lambda *_: True, most: int | None = None) -> Trace:
    """The first `most` requests of the file that fit; None: all. ValueError names the file and the line of what cannot
    be read."""
    where = f"workload.path={path}"
    rows: list[TraceRow] = []
    num_unfit = num_failed = 0
    first_ns: int | None = None
    has_prefix_ids = False
    with _text(Path(path), where) as stream:
        what, records = _records(stream, where)
        one = None
        for number, values in _readable(records, where):
            at = f"{where}, {what} {number}"
            if one is None:
                one = recognise(values, at)
                has_prefix_ids = "hash_ids" in values
            request = request_of(one, values, at)
            if request is None:
                num_failed += 1
                continue
            first_ns = request[0] if first_ns is None else min(first_ns, request[0])
            if fits(at, *request[1:]):
                rows.append(TraceRow(number, *request))
                if len(rows) == most:
                    break
            else:
                num_unfit += 1
    if not rows and not num_unfit:
        failed = f"; its {num_failed} requests have no prompt or no output" if num_failed else ""
        raise ValueError(f"{where}: the trace has no rows{failed}")
    rows.sort(key=lambda row: row.arrival_ns)
    assert first_ns is not None
    if rows and rows[-1].arrival_ns - first_ns > MAX_SPAN_S * NS_PER_S:
        span_s = (rows[-1].arrival_ns - first_ns) // NS_PER_S
        raise ValueError(f"{where}, {what} {rows[-1].line}: it arrives {span_s} s after the first, beyond {MAX_SPAN_S}")
    return Trace([r._replace(arrival_ns=r.arrival_ns - first_ns) for r in rows], num_unfit, num_failed, has_prefix_ids)


def write_trace(path: Path, rows: Iterable[tuple[int, int, int]]) -> None:
    """Write (arrival_ns, prompt_tokens, output_tokens) so that `read_trace` gives the same."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(PLAIN.columns)
        for arrival_ns, prompt, output in rows:
            seconds, rest = divmod(arrival_ns, NS_PER_S)
            writer.writerow((f"{seconds}.{rest:09d}", prompt, output))


def _text(file: Path, where: str) -> IO[str]:
    with file.open("rb") as stream:
        head = stream.read(4096)
    for magic, what in BINARY.items():
        if head.startswith(magic):
            raise ValueError(f"{where}: it is {what}; then {HOW_TO_CONVERT}")
    if head.startswith(GZIP):
        return gzip.open(file, "rt", newline="", encoding="utf-8-sig", errors="replace")
    if b"\0" in head:
        raise ValueError(f"{where}: it is no text; {HOW_TO_CONVERT}")
    return file.open(newline="", encoding="utf-8-sig", errors="replace")


def _readable(records: Iterator[Record], where: str) -> Iterator[Record]:
    try:
        yield from records
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise ValueError(f"{where}: the gzip file is damaged or cut off; fetch it again") from None


def _records(stream: IO[str], where: str) -> tuple[str, Iterator[Record]]:
    """(what the numbers count, records) of a file in any of the forms."""
    try:
        first = next((c for c in iter(lambda: stream.read(1), "") if not c.isspace()), "")
        stream.seek(0)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise ValueError(f"{where}: the gzip file is damaged or cut off; fetch it again") from None
    if first == "[":
        return "request", _json_list(stream, where)
    if first == "{":
        return _json_objects(stream, where)
    return "line", _csv_rows(stream, where)


def _csv_rows(stream: IO[str], where: str) -> Iterator[Record]:
    line = 1
    try:
        header = stream.readline(csv.field_size_limit())
        while header.isspace():
            header, line = stream.readline(csv.field_size_limit()), line + 1
        delimiter = max(",;\t", key=header.count)
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
        recognise(names, f"{where}, line {line}")
        above, reader = line, csv.reader(stream, delimiter=delimiter)
        for cells in reader:
            line = above + reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) < len(names):
                raise ValueError(f"{where}, line {line}: {len(cells)} cells where the header has {len(names)}")
            yield line, dict(zip(names, cells, strict=False))
    except csv.Error as error:
        raise ValueError(f"{where}, line {line + 1}: not a csv file ({error}); {HOW_TO_CONVERT}") from None


def _json_list(stream: IO[str], where: str) -> Iterator[Record]:
    for number, item in enumerate(_loads(stream.read(), where, 1), 1):
        yield number, _object(item, f"{where}, request {number}")


def _json_objects(stream: IO[str], where: str) -> tuple[str, Iterator[Record]]:
    """One object per line, or one object in all."""
    line = stream.readline()
    while line.isspace():
        line = stream.readline()
    one_a_line = True
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        stream.seek(0)
        first, one_a_line = _loads(stream.read(), where, 1), False
    if isinstance(first.get("input_lens"), list) or isinstance(first.get("output_lens"), list):
        if one_a_line and any(not rest.isspace() for rest in stream):
            raise ValueError(f"{where}: it holds several results; keep one of its lines")
        return "request", _benchmark(first, where)
    if "total_input_tokens" in first and "input_lens" not in first:
        raise ValueError(
            f"{where}: it is a benchmark's result without its requests; take it again with --save-detailed, or "
            f"{HOW_TO_CONVERT}"
        )
    if not one_a_line:
        return "request", iter([(1, first)])
    stream.seek(0)
    lines = ((number, text) for number, text in enumerate(stream, 1) if not text.isspace())
    return "line", ((n, _object(_loads(text, f"{where}, line {n}", None), f"{where}, line {n}")) for n, text in lines)


def _benchmark(result: Mapping[str, Any], where: str) -> Iterator[Record]:
    """The requests of `vllm bench serve --save-result --save-detailed`, one list per quantity, by time of sending."""
    names = ("start_times", "input_lens", "output_lens")
    absent = [name for name in names if not isinstance(result.get(name), list)]
    if absent:
        raise ValueError(
            f"{where}: it is a benchmark's result without {' and '.join(absent)}; take it with a vLLM that writes "
            f"start_times (--save-detailed), or {HOW_TO_CONVERT}"
        )
    columns = [result[name] for name in names]
    if len(set(map(len, columns))) != 1:
        counts = ", ".join(str(len(column)) for column in columns)
        raise ValueError(f"{where}: {', '.join(names)} have {counts} entries, and must have as many")
    requests = enumerate(zip(*columns, strict=True), 1)
    if all(isinstance(time, int | float) for time in columns[0]):
        requests = iter(sorted(requests, key=lambda request: request[1][0]))  # type: ignore[assignment]
    for number, values in requests:
        yield number, dict(zip(names, values, strict=True))


def _loads(text: str, where: str, first_line: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if first_line is None else f", line {error.lineno}"
        raise ValueError(f"{where}{line}: not JSON ({error.msg}); {HOW_TO_CONVERT}") from None
    except (ValueError, RecursionError):  # A number of thousands of digits, or lists within lists without end.
        raise ValueError(f"{where}: not JSON that can be read; {HOW_TO_CONVERT}") from None


def _object(item: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(item, dict):
        raise ValueError(f"{where}: it is no object with names and values; {HOW_TO_CONVERT}")
    return item
