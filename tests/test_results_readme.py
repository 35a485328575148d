"""results/README.md explains every field that a run writes, and every column of a figure's CSV."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from tests import jobs
from uvm_kv.commands.figures import REFERENCE, make
from uvm_kv.job.build import run_job
from uvm_kv.store.directories import read_table
from uvm_kv.study import STUDIES

README = (Path(__file__).parent.parent / "results" / "README.md").read_text()
# Words of the explanations that are values and no columns.
VALUES = {"AMBIGUOUS", "decode", "device_resident", "drawn_in", "exact", "llm_viewer", "means", "neither", "prefill"}
VALUES |= {"closed_form_ceiling", "recompute", "swap", "w16a16kv16", "working_set_ratio"}


def names(text: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", text)


def test_every_column_is_explained(tmp_path: Path) -> None:
    job = jobs.job(tmp_path, "mechanism=pinned_swap", "batch_size=4", "max_steps=20")
    summary = run_job(job, argv=["test"])
    explained = set(names(README.partition("## A figure's CSV")[0]))
    nested = [key for name in ("kv_bytes_mean", "preemptions_by_kind") for key in summary[name]]
    assert {*summary, *nested} - explained == set()
    columns = [*read_table(job.directory, "steps"), *read_table(job.directory, "requests")]
    patterns = [r"kv_\w+_bytes", r"(h2d|d2h)_\w+_bytes"]
    left = [c for c in columns if c not in explained and not any(re.fullmatch(p, c) for p in patterns)]
    assert left == []


@pytest.mark.parametrize("name", STUDIES)
def test_every_column_of_a_figure_is_explained(name: str, tmp_path: Path) -> None:
    """A column is explained in its figure's section, as a field of summary.json or as a column of all figures; a dotted
    one by its parts."""
    if not all((REFERENCE / source).is_dir() for source in STUDIES[name].sources):
        pytest.skip(f"the reference set has no {name}")
    common, *sections = README.split("\n### ")
    own = {title: set(names(text)) for title, _, text in (section.partition("\n") for section in sections)}
    own["phase_diagram_link"] |= own["phase_diagram"]
    explained = set(names(common)) | own[name]
    columns = list(make(name, REFERENCE, tmp_path, REFERENCE).drawn.table)
    plt.close("all")
    assert [c for c in columns if c not in explained and not set(c.split(".")) <= explained] == []
    if name != "phase_diagram_link":  # What is explained is there: no column of an older version.
        assert sorted(own[name] - set(columns) - VALUES) == []
