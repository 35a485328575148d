"""make figures and make study on small sets: files, hashes, what is missing, mixed or changed, agreement."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import html
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from tests.helpers import REPOSITORY, vouch
from uvm_kv.commands import figures, study
from uvm_kv.job.build import run_job
from uvm_kv.store.failures import failure_sha256, write_failure
from uvm_kv.store.records import PACKED_FAILURES, Record, pack, read_failures, read_records
from uvm_kv.study import STUDIES
from uvm_kv.study.base import OWN_ORIGIN, with_origin
from uvm_kv.sweep.progress import SweepEnd

MECHANISMS = ("device_resident", "device_recompute", "pinned_swap")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six runs of a small batch_sweep: <folder>/batch_sweep/<id>."""
    folder = tmp_path_factory.mktemp("runs")
    for mechanism in MECHANISMS:
        for batch in (4, 20):
            short = ("workload.prompt_tokens=64", "workload.output_tokens=32", "memory.device_kv_bytes=1073741824")
            host = ("memory.host_kv_bytes=1073741824",) if mechanism == "pinned_swap" else ()
            job = jobs.job(folder, f"mechanism={mechanism}", f"batch_size={batch}", *short, *host)
            job = dataclasses.replace(job, directory=folder / "batch_sweep" / job.directory.name)
            run_job(job, argv=["test"])
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "batch_sweep", tmp_path / "runs" / "batch_sweep")
    return tmp_path / "runs"


@pytest.fixture
def reference(made: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "reference"
    study.update_reference("batch_sweep", read_records(made)[0], {}, folder)
    return folder


@pytest.fixture
def draw(tmp_path: Path, reference: Path) -> Callable[..., tuple[int, Path, dict[str, Any]]]:
    def run(results: Path, *more: str, out: str = "out") -> tuple[int, Path, dict[str, Any]]:
        folder = tmp_path / out
        where = ("--results", str(results), "--output", str(folder), "--reference", str(reference))
        status = figures.main(["batch_sweep", *where, *more])
        file = folder / "batch_sweep.json"
        return status, folder, json.loads(file.read_text()) if file.is_file() else {}

    return run


def rewrite(directory: Path, *, honest: bool, **values: Any) -> None:
    """Change a summary, with (`honest`) or without its hash in the manifest."""
    file = directory / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values, indent=2) + "\n")
    if honest:
        vouch(directory)


def test_figures_from_the_reference_are_the_same_to_the_byte_from_run_to_run(draw: Any, reference: Path) -> None:
    status, first, content = draw(reference)
    assert status == 0 and content["runs_not_in_the_reference"] == [] and content["missing_points"] == []
    assert content["origins"] == ["simulated"] and len(content["runs"]) == 6
    again = draw(reference, out="again")[1]
    names = sorted(path.name for path in first.iterdir())
    assert names == [*(f"batch_sweep{suffix}" for suffix in (".csv", ".json", ".pdf", ".png")), "report.html"]
    assert [(first / n).read_bytes() for n in names] == [(again / n).read_bytes() for n in names]
    assert hashlib.sha256((first / "batch_sweep.csv").read_bytes()).hexdigest() == content["csv_sha256"]


def test_the_same_runs_from_directories_give_the_same_picture(draw: Any, reference: Path, runs: Path) -> None:
    packed, loose = draw(reference)[1], draw(runs, out="loose")[1]
    for name in ("batch_sweep.png", "batch_sweep.pdf", "batch_sweep.csv"):
        assert (packed / name).read_bytes() == (loose / name).read_bytes()


def test_fonts_are_embedded_and_the_figure_fits_a_page(draw: Any, reference: Path) -> None:
    pdf = (draw(reference)[1] / "batch_sweep.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf and b"CreationDate" not in pdf
    box = pdf.partition(b"/MediaBox [")[2].split()[:4]
    assert float(box[2]) <= 7.01 * 72


def test_changed_data_changes_the_figure_which_says_that_its_hash_is_unknown(
    draw: Any, reference: Path, runs: Path
) -> None:
    before = draw(reference)[1]
    changed = next(p.parent for p in sorted(runs.rglob("summary.json")))
    rewrite(changed, honest=True, output_tokens_per_s=5.0)
    status, after, content = draw(runs, out="after")
    assert status == 0 and content["runs_not_in_the_reference"] == [changed.name]
    for name in ("batch_sweep.png", "batch_sweep.csv"):
        assert (before / name).read_bytes() != (after / name).read_bytes()


def test_what_is_tampered_half_written_or_foreign_is_left_out_listed_and_missing(
    draw: Any, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, three = sorted(p.parent for p in runs.rglob("summary.json"))[:3]
    rewrite(one, honest=False, output_tokens_per_s=5.0)
    (two / "summary.json").unlink()
    (three / "summary.json").write_text("{}")
    status, _, content = draw(runs)
    out = capsys.readouterr().out
    assert (
        status == 0 and len(content["runs"]) == 3 and content["left_out"] == 3 and len(content["missing_points"]) == 3
    )
    assert all(f"left out: {directory}" in out for directory in (one, two, three))
    assert "missing: model=llama_7b workload=fixed mechanism=" in out
    assert one.is_dir() and two.is_dir() and three.is_dir()


def test_what_the_index_lists_and_the_reference_lacks_is_missing(
    draw: Any, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """This holds also where the reference itself is drawn, as by make figures: only the index says what should be
    there."""
    records, _ = read_records(reference)
    pack(records[1:], {}, reference / "batch_sweep")
    status, _, content = draw(reference)
    line = f"run {records[0].id} of batch_sweep, which is in index.json"
    assert status == 0 and content["missing_points"] == [line] and len(content["runs"]) == 5
    out = capsys.readouterr().out
    assert f"missing: {line}" in out and "1 point missing" in out


REFUSED = "0" * 12 + "-r0"


def refuse(runs: Path, error: str = "no room") -> None:
    summary = json.loads(next(iter(sorted(runs.rglob("summary.json")))).read_text())
    identity = {key: summary[key] for key in ("origin", "model", "workload", "mechanism")} | {"offered_batch": 40}
    directory = runs / "batch_sweep" / REFUSED
    write_failure(directory, identity=identity, error=error, tried=False, argv=[], git_sha=None, refused=True)


def test_refused_points_are_checked_as_runs_are(
    draw: Any, reference: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost, strange = ("missing_points", "failures_not_in_the_reference")
    refuse(runs)
    assert draw(runs)[2][strange] == [REFUSED]
    assert "1 refused or failed point not of the reference set" in capsys.readouterr().out
    study.update_reference("batch_sweep", read_records(runs)[0], read_failures(runs)[0], reference)
    packed = reference / "batch_sweep" / PACKED_FAILURES
    for results in (runs, reference):
        content = draw(results)[2]
        assert content[lost] == content[strange] == [] and list(content["failures"]) == [REFUSED]
    refuse(runs, error="another reason")
    content = draw(runs)[2]
    assert (content[lost], content[strange]) == ([], [REFUSED])
    (runs / "batch_sweep" / f"{REFUSED}.failed.json").unlink()
    (line,) = draw(runs)[2][lost]
    assert "offered_batch=40" in line and line.endswith(", refused or failed in the reference set")
    packed.unlink()
    (line,) = draw(reference)[2][lost]
    assert line == f"refused or failed point {REFUSED} of batch_sweep, which is in index.json"


def test_one_of_two_runs_that_the_factors_do_not_tell_apart_is_missing_too(
    draw: Any, reference: Path, runs: Path
) -> None:
    one, two = (p.parent for p in sorted(runs.rglob("summary.json"))[:2])
    factors = {key: json.loads((one / "summary.json").read_text())[key] for key in ("mechanism", "offered_batch")}
    rewrite(two, honest=True, **factors)
    study.update_reference("batch_sweep", read_records(runs)[0], {}, reference)
    assert draw(runs)[2]["missing_points"] == []
    vouch(Path(shutil.move(two, two.with_name("f" * 12 + "-r0"))))
    assert draw(runs)[2]["missing_points"] == [], "of another setting at the same point"
    shutil.rmtree(two.with_name("f" * 12 + "-r0"))
    (line,) = draw(runs)[2]["missing_points"]
    assert line.endswith(f"(run {two.name})")


def test_every_claim_carries_its_origin(draw: Any, reference: Path, runs: Path) -> None:
    def carry(content: dict[str, Any], prefix: str) -> bool:
        return all(claim.startswith(prefix) or OWN_ORIGIN.search(claim) for claim in content["claims"])

    _, folder, content = draw(reference)
    assert content["claims"] and carry(content, "Simulated: ")
    page = (folder / "report.html").read_text()
    assert all(html.escape(claim) in page for claim in content["claims"])
    for directory in sorted(p.parent for p in runs.rglob("summary.json"))[:3]:
        setting = json.loads((directory / "summary.json").read_text())["setting"] | {"runner": "cuda"}
        rewrite(directory, honest=True, origin="measured", hardware="NVIDIA GeForce RTX 3090", setting=setting)
    content = draw(runs, "--allow-mixed")[2]
    assert content["origins"] == ["measured", "simulated"] and carry(content, "Measured and simulated: ")


def test_a_claim_gets_the_origins_that_it_does_not_say() -> None:
    assert with_origin("It pays.", ["simulated"]) == "Simulated: It pays."
    alone = "decode alone, no prefill"
    assert with_origin("It pays.", ["simulated"], alone) == "Simulated, decode alone, no prefill: It pays."
    assert with_origin("It pays.", ["simulated"], "prefill and decode") == "Simulated: It pays.", "nothing is left out"
    assert with_origin("It pays on a simulated a30.", ["simulated"], alone).startswith("Decode alone, no prefill: It")
    assert with_origin("In decode alone it pays.", ["simulated"], alone) == "Simulated: In decode alone it pays."
    assert with_origin("It pays.", ["measured", "simulated"]) == "Measured and simulated: It pays."
    for claim in ("On a simulated rtx3090, it pays.", "llama_7b, on a measured A100: no."):
        assert with_origin(claim, ["measured", "simulated"]) == claim


def test_origins_and_schema_versions_are_not_mixed_unless_told(
    draw: Any, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = sorted(p.parent for p in runs.rglob("summary.json"))[:2]
    rewrite(one, honest=True, origin="measured")
    status, _, content = draw(runs)
    assert status == 1 and content == {}
    assert "runs of several origins (1 measured, 5 simulated); --origin takes one" in capsys.readouterr().err
    assert draw(runs, "--origin", "simulated")[0] == 0
    assert draw(runs, "--allow-mixed")[2]["origins"] == ["measured", "simulated"]
    rewrite(one, honest=True, origin="simulated")
    rewrite(two, honest=True, schema_version=0)
    assert len(draw(runs)[2]["runs"]) == 5 and len(draw(runs, "--allow-mixed")[2]["runs"]) == 6


def test_mistakes_are_a_line(draw: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert figures.main(["no_such"]) == 2
    assert "no_such: no such figure; there are batch_sweep" in capsys.readouterr().err
    assert draw(tmp_path / "nowhere")[0] == 1
    assert "python -m experiments.run -m experiment=batch_sweep" in capsys.readouterr().err
    (tmp_path / "empty" / "batch_sweep").mkdir(parents=True)
    assert draw(tmp_path / "empty")[0] == 1
    assert "no usable run below" in capsys.readouterr().err
    (tmp_path / "reference" / "index.json").write_text("{")
    assert draw(tmp_path / "runs")[0] == 1


def test_every_study_has_its_experiment_and_says_what_it_asks() -> None:
    for name, it in STUDIES.items():
        assert it.name == name and it.question.endswith("?") and len(it.how_to_read) > 100 and it.factors
        for source in it.sources:
            assert (REPOSITORY / "conf" / "experiment" / f"{source}.yaml").is_file() or source in study.COMPUTED


def test_agreement_is_run_by_run_and_within_the_tolerance(made: Path) -> None:
    reference, _ = read_records(made)
    assert study.compare(reference, reference).holds
    near = dataclasses.replace(reference[0], sha256="x", summary=reference[0].summary | {"h2d_bytes": 1000})
    far = dataclasses.replace(reference[0], sha256="y", summary=reference[0].summary | {"h2d_bytes": 1001.5})
    assert study.compare([far], [near]).differing == [
        f"{study._name(far.summary, far.id)}: h2d_bytes 1001.5 instead of 1000"
    ]
    assert study.compare([far], [near], tolerance=0.01).holds
    found = study.compare(reference[1:], reference[:-1])
    assert (len(found.missing), len(found.extra), found.holds) == (1, 1, False)
    unobserved = dataclasses.replace(reference[0], sha256="z", summary=reference[0].summary | {"h2d_bytes": None})
    assert not study.compare([unobserved], [near], tolerance=1.0).holds


def with_leaf(record: Record, path: str, value: Any) -> Record:
    summary = copy.deepcopy(record.summary)
    *parents, last = path.split(".")
    node = summary
    for name in parents:
        node = node[name]
    node[last] = value
    return dataclasses.replace(record, sha256=f"of {path} {value}", summary=summary)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("kv_bytes_mean.used", 1.0, "kv_bytes_mean.used 1.0 instead of "),
        ("normalized_latency_s.p90", 1.0, "normalized_latency_s.p90 1.0 instead of "),
        ("energy_j_per_output_token_above_idle", 99.0, "above_idle 99.0 instead of "),
        ("stall_s", None, "stall_s None instead of "),
        ("stall_s", float("nan"), "stall_s nan instead of "),
        ("memory_emulated", 0, "memory_emulated 0 instead of False"),
        ("stopped_by", "steps", "stopped_by steps instead of done"),
        ("warnings", ["so slow"], "warnings[0] so slow instead of nothing"),
        ("power_w_of_another_version", 1, "power_w_of_another_version 1 instead of nothing"),
    ],
)  # fmt: skip
def test_every_leaf_of_a_summary_is_compared(made: Path, path: str, value: Any, said: str) -> None:
    one = read_records(made)[0][0]
    found = study.compare([with_leaf(one, path, value)], [one])
    (line,) = found.differing
    assert said in line and not found.holds and not found.exact
    assert study.compare([one], [with_leaf(one, path, value)]).differing, "the other way round too"


def test_only_equal_bytes_are_bit_for_bit(made: Path) -> None:
    one = read_records(made)[0][0]
    assert study.compare([one], [one]).exact
    for value in (one.summary["num_steps"] * 1.0, one.summary["num_steps"] * 1.0001):
        found = study.compare([with_leaf(one, "num_steps", value)], [one])
        assert found.holds and not found.exact
    zero, dust = with_leaf(one, "stall_s", 0.0), with_leaf(one, "stall_s", 1e-15)
    assert study.compare([dust], [zero]).worst == 0
    nans = [dataclasses.replace(with_leaf(one, "stall_s", float("nan")), sha256=sha) for sha in "ab"]
    assert study.compare(nans[:1], nans[1:]).holds
    names = ("h2d_bytes", "d2h_bytes", "stall_s", "num_steps", "num_requests")
    many = dataclasses.replace(one, sha256="m", summary=one.summary | dict.fromkeys(names, -1))
    assert study.compare([many], [one]).differing[0].endswith(", 2 more")


def test_refused_points_agree_by_what_they_say(runs: Path) -> None:
    refuse(runs)
    one, _ = read_failures(runs)
    refuse(runs, error="another reason")
    other, _ = read_failures(runs)
    assert study.compare_failures(one, one) == [] == study.compare_failures({}, {})
    (line,) = study.compare_failures(one, other)
    assert line.endswith("refused or failed, no room; in the reference refused or failed, another reason")
    assert study.compare_failures({}, one)[0].endswith("not so; in the reference refused or failed, no room")


def test_the_study_runs_compares_and_says_what_differs(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_experiment(name: str, folder: Path) -> int:
        shutil.copytree(made / "batch_sweep", folder / name, dirs_exist_ok=True)
        SweepEnd(6, 6, 0, 0).write(folder / name)
        return 0

    monkeypatch.setattr(study, "run_experiment", run_experiment)
    monkeypatch.setattr(study, "git_state", lambda: {"git_sha": "0" * 40, "git_dirty": False})
    where = ("--results", str(tmp_path / "runs"), "--reference", str(tmp_path / "reference"))
    assert study.main(["batch_sweep", *where]) == 1
    assert "there is no reference of it: --update makes one" in capsys.readouterr().err
    assert study.main(["batch_sweep", *where, "--update"]) == 0
    assert study.main(["batch_sweep", *where]) == 0
    assert "6 points agree with the reference bit for bit" in capsys.readouterr().out
    one = next(p.parent for p in sorted((tmp_path / "runs").rglob("summary.json")))
    rewrite(one, honest=True, output_tokens_per_s=5.0)
    monkeypatch.setattr(study, "run_experiment", lambda *_, **__: 0)
    assert study.main(["batch_sweep", *where]) == 1
    assert "output_tokens_per_s 5.0 instead of" in capsys.readouterr().err
    assert study.main(["no_such"]) == 2


def test_the_committed_reference_is_whole() -> None:
    """Every run that the index names is there with its hash, and nothing else; together under 20 MB."""
    if not figures.REFERENCE.is_dir():
        pytest.skip("no reference set in this checkout")
    index = json.loads((figures.REFERENCE / "index.json").read_text())
    assert sum(f.stat().st_size for f in figures.REFERENCE.rglob("*") if f.is_file()) < 20e6
    for name, hashes in index.items():
        records, left_out = read_records(figures.REFERENCE / name)
        assert left_out == [] and {r.id: r.sha256 for r in records} == hashes["runs"]
        failures, left_out = read_failures(figures.REFERENCE / name)
        assert left_out == [] and {key: failure_sha256(it) for key, it in failures.items()} == hashes["failed"]
    assert set(index) == set(study.experiments_of(()))
