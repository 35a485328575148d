"""Bad files among results: each is left out by a line, and no reader stops, is steered or takes text for code."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from uvm_kv.cli import main as uvm_kv
from uvm_kv.commands import figures, study, validate, validate_sweep
from uvm_kv.job.build import run_job
from uvm_kv.job.recording import work_key
from uvm_kv.report.load import find_runs
from uvm_kv.store.directories import read_outputs, read_plans, read_table
from uvm_kv.store.failures import write_failure
from uvm_kv.store.records import PACKED, PACKED_FAILURES, read_failures, read_records
from uvm_kv.study.publish import read_index
from uvm_kv.sweep.progress import SweepEnd
from uvm_kv.tracking import track
from uvm_kv.tracking.publish import _report_content, read_folders
from uvm_kv.validate.sweep_validation import read_written

Spoil = Callable[[Path], object]
DEEP = "[" * 5000 + "]" * 5000
IDENTITY = {"model": "m", "mechanism": "device_resident", "offered_batch": 4}
SHORT = ("workload.prompt_tokens=32", "workload.output_tokens=16", "workload.num_requests=24", "record_plans=true")
TRIED = {"error": "e", "tried": True, "failed": "2026-01-01T00:00:00+00:00", "argv": []}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<results>/energy with four runs."""
    folder = tmp_path_factory.mktemp("results")
    for mechanism in ("device_resident", "pinned_swap"):
        for batch in (4, 8):
            job = jobs.job(folder, f"mechanism={mechanism}", f"batch_size={batch}", *SHORT)
            run_job(job, argv=["test"])
    (next(folder.rglob("summary.json")).parent.parent).rename(folder / "energy")
    return folder


@pytest.fixture
def results(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "results")
    return tmp_path / "results"


def runs_of(results: Path) -> list[Path]:
    return sorted(path.parent for path in results.rglob("summary.json"))


def written(directory: Path, file: str = "summary.json", **values: Any) -> None:
    """Change it as if a run had written it so: the hash is right."""
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    manifest = directory / "manifest.json"
    sha = hashlib.sha256((directory / "summary.json").read_bytes()).hexdigest()
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"summary_sha256": sha}))


def summary(**values: Any) -> Spoil:
    return lambda directory: written(directory, **values)


def manifest(**values: Any) -> Spoil:
    return lambda directory: written(directory, "manifest.json", **values)


def without(file: str, field: str) -> Spoil:
    def spoil(directory: Path) -> None:
        content = json.loads((directory / file).read_text())
        del content[field]
        (directory / file).write_text(json.dumps(content))
        written(directory)

    return spoil


def content(file: str, text: str | bytes) -> Spoil:
    raw = text.encode() if isinstance(text, str) else text
    return lambda directory: (directory / file).write_bytes(raw)


POISONED_RUNS: dict[str, tuple[Spoil, str]] = {
    "empty summary": (content("summary.json", ""), "damaged"),
    "half a summary": (content("summary.json", '{"a": '), "damaged"),
    "a list as summary": (content("summary.json", "[]"), "not of a run"),
    "null as summary": (content("summary.json", "null"), "not of a run"),
    "no UTF-8": (content("summary.json", b"\xff\xfe{}"), "damaged"),
    "depth without end": (content("summary.json", DEEP), "nested too deeply"),
    "a number of many digits": (content("summary.json", "9" * 5000), "damaged"),
    "NaN": (content("summary.json", '{"schema_version": NaN}'), "NaN"),
    "infinity": (content("summary.json", '{"duration_s": -Infinity}'), "-Infinity"),
    "a number that becomes infinite": (content("summary.json", '{"duration_s": 1e999}'), "1e999"),
    "throughput as text": (summary(output_tokens_per_s="fast"), "output_tokens_per_s is 'fast'; it must be a number"),
    "throughput as truth": (summary(output_tokens_per_s=True), "output_tokens_per_s is True"),
    "throughput as list": (summary(output_tokens_per_s=[1.0]), "output_tokens_per_s is [1.0]"),
    "negative throughput": (summary(output_tokens_per_s_whole_run=-1), "at least 0"),
    "a whole number beyond 64 bits": (summary(h2d_bytes=2**70), "h2d_bytes"),
    "batch 0": (summary(offered_batch=0), "offered_batch is 0; it must be a whole number, at least 1"),
    "batch null": (summary(offered_batch=None), "offered_batch is None"),
    "half a batch": (summary(offered_batch=4.5), "offered_batch is 4.5"),
    "mechanism null": (summary(mechanism=None), "mechanism is None"),
    "mechanism as number": (summary(mechanism=3), "mechanism is 3"),
    "mechanism empty": (summary(mechanism=""), "mechanism is ''"),
    "mechanism too long": (summary(mechanism="x" * 10000), "of 1 to 500 characters"),
    "mechanism that steers the terminal": (summary(mechanism="\x1b[31mred\x07"), r"\x1b[31mred\x07"),
    "mechanism in two lines": (summary(mechanism="a\nb"), r"'a\nb'"),
    "model that turns the text": (summary(model="abc\u202edef"), r"abc\u202edef"),
    "half a surrogate": (summary(model="\ud800"), r"\ud800"),
    "origin of nobody": (summary(origin="guessed"), "origin is 'guessed'"),
    "TPOT as number": (summary(tpot_s=0.1), "tpot_s is 0.1"),
    "TPOT without p99": (summary(tpot_s={"mean": 1.0}), "tpot_s is {'mean': 1.0}"),
    "TPOT of text": (summary(tpot_s={"mean": "a", "p50": 1, "p99": 1}), "tpot_s"),
    "warnings as text": (summary(warnings="late"), "warnings is 'late'"),
    "warnings of numbers": (summary(warnings=[1]), "warnings is [1]"),
    "memory without bytes": (summary(memory_budget=[["weights"]]), "memory_budget"),
    "memory of text": (summary(memory_budget=[["weights", "many"]]), "memory_budget"),
    "setting as list": (summary(setting=["seed"]), "setting is ['seed']"),
    "variant of depths": (summary(variant={"a": {"b": {"c": {"d": 1}}}}), "variant"),
    "steady window of one": (summary(steady_window_s=[1.0]), "steady_window_s"),
    "emulation as text": (summary(memory_emulated="no"), "memory_emulated is 'no'"),
    "a field with a dot": (summary(**{"tpot_s.p99": 0}), "'tpot_s.p99' is no name of a field"),
    "schema as truth": (summary(schema_version=True), "schema version True"),
    "schema as list": (summary(schema_version=[2]), "schema version [2]"),
    "no throughput": (without("summary.json", "output_tokens_per_s"), "has no output_tokens_per_s"),
    "no mechanism": (without("summary.json", "mechanism"), "has no mechanism"),
    "a list as manifest": (content("manifest.json", "[1]"), "not of a run"),
    "empty manifest": (content("manifest.json", ""), "damaged"),
    "argv as text": (manifest(argv="python"), "argv is 'python'"),
    "started at no time": (manifest(started="yesterday"), "started is 'yesterday'"),
    "started without a zone": (manifest(started="2026-01-01T00:00:00"), "started"),
    "commit as number": (manifest(git_sha=7), "git_sha is 7"),
    "repeat as text": (manifest(repeat="first"), "repeat is 'first'"),
    "manifest without argv": (without("manifest.json", "argv"), "has no argv"),
    "summary that is a folder": (
        lambda d: ((d / "summary.json").unlink(), (d / "summary.json").mkdir()),
        "damaged: it cannot be read (Is a directory)",
    ),
    "changed since": (content("summary.json", "{}"), "not of a run"),
}  # fmt: skip


@pytest.mark.parametrize("name", POISONED_RUNS)
def test_a_poisoned_run_is_left_out_by_a_line_that_says_what_is_wrong(results: Path, name: str) -> None:
    spoil, words = POISONED_RUNS[name]
    victim, *others = runs_of(results)
    spoil(victim)
    records, (left_out,) = read_records(results)
    assert [record.id for record in records] == [directory.name for directory in others]
    assert words in str(left_out) and victim.name in str(left_out)
    assert is_clean(str(left_out)) and len(str(left_out)) < 500


def is_clean(text: str) -> bool:
    return text.isprintable() or all(line.isprintable() for line in re.split(r"[\n\t]", text))


def poisoned(results: Path) -> int:
    """All of them beside the good ones, with bad failures, sets and tables; how many runs are left out."""
    (victim, *_), home = runs_of(results), results / "energy"
    for number, (spoil, _) in enumerate(POISONED_RUNS.values(), start=1):
        copy = home / f"{number:012x}-r0"
        shutil.copytree(victim, copy)
        spoil(copy)
    for number, (text, _) in enumerate(FAILURES.values(), start=1):
        (home / f"{number:012x}-r1.failed.json").write_bytes(text)
    with gzip.open(home / PACKED, "wt") as lines:
        lines.write('{"id": "\\u001b[1m", "summary": {}, "manifest": {}}\n[]\n3\n{"id": "a", "summary": 4}\n')
    (home / PACKED_FAILURES).write_bytes(b"no gzip")
    (home / "\x1b[31m-r0").mkdir()
    return len(POISONED_RUNS)


FAILURES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "damaged"),
    "a list": (b"[]", "not an object"),
    "no error": (b'{"model": "m"}', "has no error"),
    "error as list": (
        json.dumps(IDENTITY | TRIED | {"error": [1]}).encode(),
        "error is [1]",
    ),
    "batch as text": (
        json.dumps(
            IDENTITY | TRIED | {"offered_batch": "many"}
        ).encode(),
        "offered_batch is 'many'",
    ),
    "no UTF-8": (b"\xff", "damaged"),
    "depth": (DEEP.encode(), "nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_poisoned_record_of_a_failure_is_left_out(tmp_path: Path, name: str) -> None:
    content, words = FAILURES[name]
    (tmp_path / "0123456789ab-r0.failed.json").write_bytes(content)
    failures, (left_out,) = read_failures(tmp_path)
    assert failures == {} and words in str(left_out) and is_clean(str(left_out))


def test_a_failure_cannot_steer_the_terminal(tmp_path: Path) -> None:
    at = tmp_path / "0123456789ab-r0"
    write_failure(at, identity=IDENTITY, error="\x1b[2Jgone\nline 2", tried=True, argv=["\x07"], git_sha=None)
    (record,) = read_failures(tmp_path)[0].values()
    assert record["error"] == "\\x1b[2Jgone\nline 2" and record["argv"] == ["\\x07"]


def readers(results: Path, out: Path) -> dict[str, Callable[[], object]]:
    """Whatever reads finished runs, as commands where they are quick; each gives 0 where it did its work."""
    home = results / "energy"

    def published() -> int:
        found, left_out = read_folders([results])
        for place, records in found.items():
            (out / "set").mkdir(exist_ok=True)
            for number, record in enumerate(records):
                (out / f"content{number}").mkdir()
                track._content(record, out / f"content{number}")
            _report_content(place, records, read_failures(place)[0], left_out, [], out / "set", "0" * 64)
        return 0

    def studied() -> int:
        (records, _), (failures, _) = read_records(home), read_failures(home)
        study.compare(records, records)
        study.compare_failures(failures, failures)
        SweepEnd(1, 1, 0, 0).write(home)
        study.unfinished(home, failures, 0)
        return 0

    first = runs_of(results)[-1].name
    return {
        "report": lambda: uvm_kv(["report", str(home), "--out", str(out / "report")]),
        "runs": lambda: uvm_kv(["runs", "--folder", str(results)]),
        "one run": lambda: uvm_kv(["runs", first, "--folder", str(results)]),
        "filtered runs": lambda: uvm_kv(["runs", "--folder", str(results), "--where", "offered_batch=8"]),
        "figures": lambda: figures.main(
            ["energy", "--results", str(results), "--output", str(out / "figures"), "--reference", str(results)]
        ),
        "publish": published,
        "study": studied,
        "validate": lambda: validate.parse([f"recorded={home}", f"out={out}"]) and 0,
        "predict": lambda: validate_sweep.main(
            ["predict", "--runs", str(results), "--output", str(out / "predictions.json")]
        ),
    }


def test_every_reader_does_its_work_beside_poisoned_runs(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [directory.name for directory in runs_of(results)]
    num_left_out = poisoned(results)
    records, left_out = find_runs(results)
    assert [record.id for record in records] == good
    assert len(left_out) >= num_left_out
    for name, read in readers(results, tmp_path).items():
        status = read()
        told = capsys.readouterr()
        assert status == 0, (name, told.err)
        assert is_clean(told.out + told.err), name
    with (tmp_path / "report" / "points.csv").open() as lines:
        assert len(list(csv.DictReader(lines))) == len(good)


NAMES = {
    "mechanism": "[/red] [bold]=cmd()|'/c'!A1 $\\frac{$ :smile:",
    "model": "=HYPERLINK(\"x\") </script><script>alert(1)</script> $x_{$",
    "hardware": "@card <img src=x onerror=alert(1)> $_$^$",
    "workload": "+a&b;\"'`",
    "warnings": ["[/] <b>$\\badcommand$</b> \x1b[31m"],
}  # fmt: skip
"""Names that are text to us, and code to others."""


def test_names_are_text_wherever_they_are_shown(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = NAMES | {"warnings": ["[/] <b>$\\badcommand$</b>"]}
    for directory in runs_of(results):
        written(
            directory, **(names if "swap" in json.loads((directory / "summary.json").read_text())["mechanism"] else {})
        )
    error = "[/x] <script>alert(2)</script> $y_{$"
    at = results / "energy" / "0123456789ab-r0"
    write_failure(at, identity=IDENTITY, error=error, tried=True, argv=["a"], git_sha=None)
    for name, read in readers(results, tmp_path).items():
        status, told = read(), None
        told = capsys.readouterr()
        assert status == 0 and is_clean(told.out + told.err), (name, told.err)
        if name == "runs":
            assert names["mechanism"][:12] in told.out
    for page in (tmp_path / "report" / "report.html", tmp_path / "figures" / "report.html"):
        html = page.read_text()
        assert "<script>alert" not in html and "<img src=x" not in html and "</script><script>" not in html
    for table in (tmp_path / "report" / "points.csv", tmp_path / "figures" / "energy.csv"):
        with table.open() as lines:
            cells = [cell for row in csv.reader(lines) for cell in row]
        assert any("cmd()" in cell or "HYPERLINK" in cell for cell in cells)
        assert not [cell for cell in cells if re.match(r"[=@]|[+-](?![\d.])", cell)]


@pytest.mark.parametrize("file", ["steps.parquet", "requests.parquet", "steps.jsonl.gz", "requests.jsonl.gz"])
@pytest.mark.parametrize(
    "rows",
    [
        b"",
        b"no table at all",
        b'{"step": "one"}\n',
        b"[1, 2]\n",
        b'{"step": NaN}\n',
        b'{"step": 1}\n{"start_ns": 2}\n',
    ],
)
def test_a_poisoned_table_is_refused_by_a_line(results: Path, file: str, rows: bytes) -> None:
    directory, name = runs_of(results)[0], file.partition(".")[0]
    (directory / f"{name}.parquet").unlink(missing_ok=True)
    (directory / file).write_bytes(gzip.compress(rows) if file.endswith("gz") else rows)
    with pytest.raises(ValueError, match=re.escape(str(directory))) as error:
        read_table(directory, name)
    assert is_clean(str(error.value)) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "change", [("num_running", "many"), ("num_running", None), ("num_running", -1), ("end_ns", 0.5), ("end_ns", 2**70)]
)
def test_a_cell_of_the_wrong_type_is_named_with_its_row(results: Path, change: tuple[str, Any]) -> None:
    directory, (column, value) = runs_of(results)[0], change
    table = read_table(directory, "steps")
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    rows[2][column] = value
    (directory / "steps.parquet").unlink()
    (directory / "steps.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    with pytest.raises(ValueError, match=f"row 2: {column} is "):
        read_table(directory, "steps")


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b"[1, 2]", b"[{}, {}]", b"[null, null]", b'["a", "b"]', b"3", DEEP.encode(), b"\xff"],
)
def test_a_poisoned_recording_is_refused_by_file_and_line(results: Path, line: bytes) -> None:
    directory = runs_of(results)[0]
    (directory / "plans.jsonl.gz").write_bytes(gzip.compress(line + b"\n"))
    with pytest.raises(ValueError, match=r"plans.jsonl.gz, line [01]: not a recorded step"):
        list(read_plans(directory))


@pytest.mark.parametrize("counters", [[1], ["a"] * 8, None, {}])
def test_a_recorded_step_of_wrong_types_is_refused(results: Path, counters: Any) -> None:
    directory = runs_of(results)[0]
    with gzip.open(directory / "plans.jsonl.gz", "rt") as lines:
        plan, output = json.loads(next(lines))
    line = json.dumps([plan, output | {"counters": counters}]).encode()
    (directory / "plans.jsonl.gz").write_bytes(gzip.compress(line))
    with pytest.raises(ValueError, match="counters"):
        list(read_plans(directory))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "a: [",
        "a: !!python/object/apply:os.system [x]",
        "a: &a [1]\nb: *a",
        "\x00",
        "${",
    ],
)
def test_a_poisoned_config_is_refused_by_a_line(results: Path, text: str) -> None:
    directory = runs_of(results)[0]
    (directory / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config.yaml") as error:
        work_key(directory)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"jobs": "a"}', '{"jobs": NaN}', '{"jobs": -1}', DEEP])
def test_a_poisoned_end_of_a_sweep_makes_it_unfinished(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ValueError, match=r"sweep\.json|NaN|nested|line 1"):
        SweepEnd.read(tmp_path)
    assert "its end is not known" in str(study.unfinished(tmp_path, {}, 0))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"a": []}', '{"a": {"runs": {}}}', '{"a": {"runs": [], "failed": {}}}', DEEP]
)
def test_a_poisoned_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index.json is damaged \(.*\); take it from the repository again"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "uvm-kv sweep points", "points": 3, "written": "now"}',
        '{"format": "uvm-kv sweep points", "points": [[]], "written": "2026-01-01T00:00:00+00:00"}',
        '{"format": "uvm-kv sweep points", "points": [{"identity": 1}], "written": "2026-01-01T00:00:00+00:00"}',
        '{"format": "uvm-kv sweep points", "points": [], "written": "now"}',
        DEEP,
    ],
)
def test_poisoned_predictions_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match="is not a file of predictions"):
        read_written(tmp_path / "p.json")


@pytest.mark.parametrize("line", ["{", "[]", '{"request_id": 1}', '{"request_id": "a", "output_ids": []}'])
def test_poisoned_outputs_are_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "outputs.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"outputs.jsonl: not readable"):
        read_outputs(tmp_path)
