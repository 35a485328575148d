"""make figures and make study on small sets: files, hashes, what is missing, mixed or changed, agreement."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import figures, study
from experiments.progress import SweepEnd
from tests import jobs
from uvm_kv.analysis.study import STUDIES
from uvm_kv.config.build import run_job
from uvm_kv.telemetry.records import read_records

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
        manifest = directory / "manifest.json"
        sha = hashlib.sha256(file.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"summary_sha256": sha}))


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
            assert (figures.ROOT / "conf" / "experiment" / f"{source}.yaml").is_file() or source in study.COMPUTED


def test_agreement_is_run_by_run_and_within_the_tolerance(made: Path) -> None:
    reference, _ = read_records(made)
    assert study.compare(reference, reference).holds
    near = dataclasses.replace(reference[0], sha256="x", summary=reference[0].summary | {"h2d_bytes": 1000})
    far = dataclasses.replace(reference[0], sha256="y", summary=reference[0].summary | {"h2d_bytes": 1001.5})
    assert study.compare([far], [near]).differing == [f"{study._point(far)}: h2d_bytes 1001.5 instead of 1000"]
    assert study.compare([far], [near], tolerance=0.01).holds
    found = study.compare(reference[1:], reference[:-1])
    assert (len(found.missing), len(found.extra), found.holds) == (1, 1, False)
    unobserved = dataclasses.replace(reference[0], sha256="z", summary=reference[0].summary | {"h2d_bytes": None})
    assert not study.compare([unobserved], [near], tolerance=1.0).holds


def test_the_study_runs_compares_and_says_what_differs(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_experiment(name: str, folder: Path, *, rerun: bool) -> int:
        shutil.copytree(made / name, folder / name, dirs_exist_ok=True)
        SweepEnd(6, 6, 0, 0).write(folder / name)
        return 0

    monkeypatch.setattr(study, "run_experiment", run_experiment)
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
        assert left_out == [] and {r.id: r.sha256 for r in records} == hashes
        assert all(r.verified for r in records)
    assert set(index) == set(study.experiments_of(()))
