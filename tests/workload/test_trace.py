"""Trace files: every format that is known, the untidy ones that people have, and errors that name the line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import DATA
from uvm_kv.workload.trace import read_trace, write_trace
from uvm_kv.workload.trace_formats import FORMATS

PLAIN = "arrival_s,prompt_tokens,output_tokens\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def write(folder: Path, text: str, encoding: str = "utf-8") -> str:
    path = folder / "trace.csv"
    path.write_bytes(text.encode(encoding))
    return str(path)


def served(path: str, **how: Any) -> list[tuple[int, int, int]]:
    return [row[1:] for row in read_trace(path, **how).rows]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        pytest.param(PLAIN + "0,5,6\n1.5,7,8\n", [(0, 5, 6), (1_500_000_000, 7, 8)], id="plain"),
        pytest.param(PLAIN + "2.5,5,6\n0.5,7,8", [(0, 7, 8), (2_000_000_000, 5, 6)], id="unsorted, no newline at end"),
        pytest.param(PLAIN + "\n0,5,6\n , , \n\n1,7,8\n\n", [(0, 5, 6), (10**9, 7, 8)], id="blank lines"),
        pytest.param(
            AZURE + "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n",
            [(0, 4808, 10), (52_000_000, 3180, 8)],
            id="Azure, in ticks of 100 ns",
        ),
        pytest.param(
            AZURE + "2023-11-16 23:59:59.5,1,2\n2023-11-17 00:00:00,3,4\n",
            [(0, 1, 2), (500_000_000, 3, 4)],
            id="midnight",
        ),
        pytest.param(
            "user, output_tokens ,arrival_s,prompt_tokens\nx,6,0,5\n", [(0, 5, 6)], id="other columns and another order"
        ),
        pytest.param((PLAIN + "0,5,6\n").replace("\n", "\r\n"), [(0, 5, 6)], id="CRLF"),
        pytest.param("\n \n" + PLAIN + "0,5,6\n", [(0, 5, 6)], id="blank lines above"),
        pytest.param((PLAIN + "0,5,6\n").replace(",", ";"), [(0, 5, 6)], id="semicolons"),
        pytest.param((PLAIN + "0,5,6\n").replace(",", "\t"), [(0, 5, 6)], id="tabs"),
        pytest.param(PLAIN + "0.5,128.0,16.\n", [(0, 128, 16)], id="whole numbers as pandas writes them"),
        pytest.param(
            PLAIN + "1700000000.500000001,5,6\n1700000001.5,7,8\n",
            [(0, 5, 6), (999_999_999, 7, 8)],
            id="seconds since 1970, to the nanosecond",
        ),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_both_formats_are_read(tmp_path: Path, text: str, rows: list[tuple[int, int, int]], encoding: str) -> None:
    assert served(write(tmp_path, text, encoding)) == rows


def test_what_is_written_is_read_to_the_nanosecond(tmp_path: Path) -> None:
    rows = [(0, 5, 6), (1, 1, 1), (999_999_999, 7, 8), (123_456_789_012_345, 2, 3)]
    write_trace(tmp_path / "trace.csv", rows)
    assert served(str(tmp_path / "trace.csv")) == rows


def test_rows_keep_their_line(tmp_path: Path) -> None:
    assert [row.line for row in read_trace(write(tmp_path, PLAIN + "9,1,1\n\n0,2,2\n")).rows] == [4, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "line 1: there are no columns", id="empty file"),
        pytest.param("a,b\n1,2\n", "line 1: no known trace format has the columns a, b;", id="others"),
        pytest.param("arrival_s,prompt_tokens\n0,1\n", "line 1: output_tokens is missing beside", id="missing column"),
        pytest.param(PLAIN, "has no rows", id="no rows"),
        pytest.param(PLAIN + "\n  \n", "has no rows", id="only blank lines"),
        pytest.param(PLAIN + "0,5,6\n1,-7,8\n", "line 3: prompt_tokens is -7", id="negative prompt"),
        pytest.param(PLAIN + "0,5,0\n", "line 2: output_tokens is 0", id="zero output"),
        pytest.param(PLAIN + "0,5,6\n\n1,7,x\n", "line 4: output_tokens is 'x'", id="not a number, after a blank line"),
        pytest.param(PLAIN + "0,5.5,6\n", "line 2: prompt_tokens is '5.5'", id="half a token"),
        pytest.param(PLAIN + "0,,6\n", "line 2: prompt_tokens is ''", id="empty cell"),
        pytest.param(PLAIN + "0,5,6\n1,7\n", "line 3: 2 cells where the header has 3", id="short row"),
        pytest.param(PLAIN + "-1,5,6\n", "line 2: arrival_s is -1", id="negative arrival"),
        pytest.param(PLAIN + "nan,5,6\n", "line 2: arrival_s is 'nan'", id="nan"),
        pytest.param(PLAIN + "inf,5,6\n", "line 2: arrival_s is 'inf'", id="inf"),
        pytest.param(PLAIN + "soon,5,6\n", "line 2: arrival_s is 'soon'; it must be a number", id="arrival in words"),
        pytest.param(AZURE + "16.11.2023,5,6\n", "line 2: TIMESTAMP is '16.11.2023'", id="another date format"),
        pytest.param(PLAIN + "1e12,5,6\n", "line 2: arrival_s is 1e12; it must lie between", id="no such time"),
        pytest.param(PLAIN + "0,1_0,6\n", "line 2: prompt_tokens is '1_0'", id="a digit separator"),
        pytest.param(PLAIN + '0,"5,6\n' + "1,2,3\n" * 30_000, "trace.csv, line ", id="a quote that never closes"),
    ],
)
def test_an_error_names_the_file_and_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=r"trace\.csv") as error:
        read_trace(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The operating system says why; the entry points print it without a traceback."""
    with pytest.raises(FileNotFoundError) as missing:
        read_trace(str(tmp_path / "absent.csv"))
    assert str(missing.value.filename) == str(tmp_path / "absent.csv")
    with pytest.raises(IsADirectoryError):
        read_trace(str(tmp_path))


def test_bytes_that_are_no_text_are_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(PLAIN.encode() + b"0,\xff\xfe,6\n")
    with pytest.raises(ValueError, match="line 2: prompt_tokens"):
        read_trace(str(path))


def test_every_format_is_known_by_its_columns(tmp_path: Path) -> None:
    """The same two requests, 1.5 s apart, as each maker writes them: as csv and, one object per line, as JSON."""
    for one in FORMATS[:-1]:
        times = (
            ["2024-05-10 00:00:00.25+00:00", "2024-05-10 00:00:01.75+00:00"]
            if one.ns_per_unit is None
            else [round(t * 1e9) / one.ns_per_unit for t in (0.25, 1.75)]
        )
        more = {} if one.mark is None else {one.mark: 7}
        requests = [{**more, one.arrival: t, one.prompt: p, one.output: 3} for t, p in zip(times, (5, 6), strict=True)]
        lines = [",".join(requests[0]), *(",".join(map(str, request.values())) for request in requests)]
        for text in (
            "\n".join(lines),
            "\n".join(map(json.dumps, requests)),
            json.dumps(requests),
            json.dumps(requests, indent=1),
        ):
            assert served(write(tmp_path, text)) == [(0, 5, 3), (1_500_000_000, 6, 3)], (one.name, text)


BURSTGPT = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def test_failed_requests_of_a_log_are_left_out_and_counted(tmp_path: Path) -> None:
    log = BURSTGPT + "5,a,1.5,ChatGPT,472,18,490,Conversation log\n45,a,2,ChatGPT,9,0,9,API log\n"
    trace = read_trace(write(tmp_path, log))
    assert ([row[1:] for row in trace.rows], trace.num_failed, trace.has_prefix_ids) == ([(0, 472, 18)], 1, False)
    azure = read_trace(write(tmp_path, AZURE + "2024-05-10 00:00:00.009930+00:00,216,5\n2024-05-10 00:00:01,239,0\n"))
    assert (len(azure.rows), azure.num_failed) == (1, 1)
    with pytest.raises(ValueError, match=r"no rows; its 1 requests have no prompt or no output"):
        read_trace(write(tmp_path, AZURE + "2024-05-10 00:00:01,239,0\n"))


def test_times_of_mooncake_and_of_bailian_differ_by_their_unit(tmp_path: Path) -> None:
    rows = [{"timestamp": t, "input_length": 8, "output_length": 2, "hash_ids": [0, t]} for t in (0, 3000)]
    for more, ns in ({}, 3 * 10**9), ({"chat_id": 1, "turn": 1}, 3000 * 10**9):
        trace = read_trace(write(tmp_path, "\n".join(json.dumps(row | more) for row in rows)))
        assert trace.rows[1].arrival_ns == ns
        assert trace.has_prefix_ids


RESULT: dict[str, Any] = {
    "backend": "vllm",
    "total_input_tokens": 30,
    "input_lens": [20, 10, 5],
    "output_lens": [4, 2, 0],
    "ttfts": [0.1, 0.2, 0.0],
    "itls": [[0.1], [0.2], []],
    "start_times": [101.5, 100.0, 102.0],
}


@pytest.mark.parametrize("indent", [None, 2])
def test_a_result_of_vllm_serves_its_requests_as_they_were_sent(tmp_path: Path, indent: int | None) -> None:
    trace = read_trace(write(tmp_path, json.dumps(RESULT, indent=indent)))
    assert [row[1:] for row in trace.rows] == [(0, 10, 2), (1_500_000_000, 20, 4)]
    assert trace.num_failed == 1


def line(timestamp: object, input_length: object = 5) -> str:
    return f'{{"timestamp": {timestamp}, "input_length": {input_length}, "output_length": 6}}\n'


def without(*names: str) -> str:
    return json.dumps({name: value for name, value in RESULT.items() if name not in names})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (without("start_times"), "a benchmark's result without start_times; take it with a vLLM that writes"),
        (without("input_lens", "output_lens"), "a benchmark's result without its requests; take it again with --sav"),
        (json.dumps(RESULT) + "\n" + json.dumps(RESULT), "it holds several results; keep one of its lines"),
        (json.dumps(RESULT | {"start_times": [1, 2]}), "have 2, 3, 3 entries, and must have as many"),
        (json.dumps(RESULT | {"start_times": ["a", 1, 2]}), "request 1: start_times is 'a'; it must be a number"),
        ('[{"x": "' + "z" * 140_000 + '"}]', "request 1: no known trace format has the columns x;"),
        ("z" * 140_000, "line 1: no known trace format has the columns zzz"),
        ("," * 140_000, "line 1: no known trace format has the columns "),
        ('{"x": 1}\n{"x": 2}\n', "line 1: no known trace format has the columns x;"),
        ('{\n "x": 1\n}\n', "request 1: no known trace format has the columns x;"),
        ('{"' + "k" * 140_000 + '": 1}\n', "line 1: no known trace format has the columns kkk"),
        (json.dumps({f"column{i}": i for i in range(5000)}), "column7 and 4992 more;"),
        ('{"timestamp": 1, "input_length": 2', "line 1: not JSON"),
        ('{"timestamp": 1, "input_length": 2}\n', "line 1: output_length is missing beside"),
        ("[1, 2]", "request 1: it is no object"),
        ("[]", "the trace has no rows"),
        ("[" * 100_000, "not JSON that can be read"),
        ("hello\nworld\n", "line 1: no known trace format has the columns hello;"),
        (line(0) + '{"timestamp": 0}\n', "line 2: input_length is missing"),
        (line(0) + '{"a\n', "line 2: not JSON"),
        (line("true"), "line 1: timestamp is 'True'; it must be a number"),
        (line("NaN"), "timestamp is 'nan'; it must be a number"),
        (line(0, 5.5), "input_length is '5.5'; it must be a whole number of tokens"),
        (line(0, -5), "input_length is -5; it must be at least 0 tokens"),
        (PLAIN + "0,5,6\n1700000000,5,6\n", "line 3: it arrives 1700000000 s after the first"),
        (PLAIN + "1700000000000,5,6\n", "must lie between 0 and 1e+10 s, in seconds"),
        (PLAIN + f"0,{'9' * 5000},6\n", "it must be a whole number of tokens"),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_one_short_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=r"trace\.csv") as error:
        read_trace(path)
    said = str(error.value).removeprefix(f"workload.path={path}")
    assert message in said
    assert "\n" not in said and len(said) < 500


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"PAR1....", "a parquet file; read it with pandas"),
        (b"PK\x03\x04", "a zip or Excel file"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
        (PLAIN.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        (b"a\0b", "it is no text"),
        (b"\x1f\x8b\x08garbage", "the gzip file is damaged"),
        (gzip.compress((PLAIN + "0,5,6\n" * 9000).encode())[:-20], "the gzip file is damaged or cut off"),
    ],
)
def test_what_is_no_text_is_said_to_be_what_it_is(tmp_path: Path, head: bytes, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(head)
    with pytest.raises(ValueError, match=message):
        read_trace(str(path))


def test_gzip_is_known_by_its_content(tmp_path: Path) -> None:
    for text in (PLAIN + "0,5,6\n", '{"timestamp": 0, "input_length": 5, "output_length": 6}\n'):
        path = tmp_path / "trace"
        path.write_bytes(gzip.compress(text.encode()))
        assert served(str(path)) == [(0, 5, 6)]


def test_a_trace_is_read_no_further_than_it_is_needed(tmp_path: Path) -> None:
    broken = PLAIN + "0,5,6\n1,50,6\n2,7,8\nno number,1,1\n"
    path = write(tmp_path, broken)
    trace = read_trace(path, fits=lambda _, prompt, output: prompt + output < 20, most=2)
    assert ([row[1:] for row in trace.rows], trace.num_unfit) == ([(0, 5, 6), (2 * 10**9, 7, 8)], 1)
    with pytest.raises(ValueError, match="line 5: arrival_s is 'no number'"):
        read_trace(path, most=4)


@pytest.mark.parametrize(
    ("name", "num_rows", "tokens"),
    [
        ("mooncake_conversation_trace.jsonl.gz", 12_031, 144_793_823),
        ("mooncake_synthetic_trace.jsonl.gz", 3_993, None),
        ("mooncake_conversation_1of16_sessions.jsonl", 778, None),
        ("AzureLLMInferenceTrace_conv.csv", 19_366, None),
        ("rtxpro6000_llama31_8b_vllm_requests.csv", 300, None),
    ],
)
def test_published_traces_are_read(name: str, num_rows: int, tokens: int | None) -> None:
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is not there: traces are not part of the project")
    rows = read_trace(str(DATA / name)).rows
    assert len(rows) == num_rows
    assert rows[0].arrival_ns == 0
    if tokens is not None:
        assert sum(row.prompt_tokens for row in rows) == tokens
