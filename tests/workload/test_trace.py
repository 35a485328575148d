"""Trace files: both formats, the untidy ones that people have, and errors that name the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from uvm_kv.workload.trace import read_trace, write_trace

PLAIN = "arrival_s,prompt_tokens,output_tokens\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def write(folder: Path, text: str, encoding: str = "utf-8") -> str:
    path = folder / "trace.csv"
    path.write_bytes(text.encode(encoding))
    return str(path)


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
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_both_formats_are_read(tmp_path: Path, text: str, rows: list[tuple[int, int, int]], encoding: str) -> None:
    assert [row[1:] for row in read_trace(write(tmp_path, text, encoding))] == rows


def test_what_is_written_is_read_to_the_nanosecond(tmp_path: Path) -> None:
    rows = [(0, 5, 6), (1, 1, 1), (999_999_999, 7, 8), (123_456_789_012_345, 2, 3)]
    write_trace(tmp_path / "trace.csv", rows)
    assert [row[1:] for row in read_trace(str(tmp_path / "trace.csv"))] == rows


def test_rows_keep_their_line(tmp_path: Path) -> None:
    assert [row.line for row in read_trace(write(tmp_path, PLAIN + "9,1,1\n\n0,2,2\n"))] == [4, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "line 1: the columns are missing", id="empty file"),
        pytest.param("a,b\n1,2\n", "line 1: the columns are a, b; they must be arrival_s", id="other columns"),
        pytest.param(
            "arrival_s,prompt_tokens\n0,1\n", "line 1: the columns are arrival_s, prompt", id="missing column"
        ),
        pytest.param(PLAIN, "has no rows", id="no rows"),
        pytest.param(PLAIN + "\n  \n", "has no rows", id="only blank lines"),
        pytest.param(PLAIN + "0,5,6\n1,-7,8\n", "line 3: prompt_tokens is -7", id="negative prompt"),
        pytest.param(PLAIN + "0,5,0\n", "line 2: output_tokens is 0", id="zero output"),
        pytest.param(PLAIN + "0,5,6\n\n1,7,x\n", "line 4: output_tokens is 'x'", id="not a number, after a blank line"),
        pytest.param(PLAIN + "0,5.5,6\n", "line 2: prompt_tokens is '5.5'", id="half a token"),
        pytest.param(PLAIN + "0,,6\n", "line 2: prompt_tokens is ''", id="empty cell"),
        pytest.param(PLAIN + "0,5,6\n1,7\n", "line 3: 2 cells where the header has 3", id="short row"),
        pytest.param(PLAIN + "-1,5,6\n", "line 2: arrival_s is -1", id="negative arrival"),
        pytest.param(PLAIN + "nan,5,6\n", "line 2: arrival_s is nan", id="nan"),
        pytest.param(PLAIN + "inf,5,6\n", "line 2: arrival_s is inf", id="inf"),
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
