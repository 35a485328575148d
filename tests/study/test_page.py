"""The report of the study: whole without a network, computed sentences, and its filter in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from uvm_kv.store.records import LeftOut, Record
from uvm_kv.study.base import Drawn, Study
from uvm_kv.study.page import run_table, write_page
from uvm_kv.study.publish import Published

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def published(folder: Path, *, table_only: bool = False) -> list[Published]:
    """One study of twelve runs: three mechanisms at four batches."""
    records = []
    for mechanism in ("device_resident", "pinned_swap", "managed_<demand>"):
        for batch in (4, 8, 16, 32):
            summary = {"origin": "simulated", "hardware": "rtx3090", "model": "llama_7b", "mechanism": mechanism,
                       "offered_batch": batch, "output_tokens_per_s": 10.0 * batch,
                       "output_tokens_per_s_whole_run": 9.0 * batch, "tpot_s": {"p99": None}}  # fmt: skip
            place = folder / "demo" / f"{len(records):012x}-r0"
            records.append(Record(place.name, place, summary, {}, "sha"))
    study = Study("demo", "Title & all", "Does it?", "How to read it.", (), lambda *_: Drawn(None, pd.DataFrame()))
    drawn = Drawn(None, pd.DataFrame({"a": [1.5, None], "b": ["x", "<y>"]}), ["It <does>, by +3.0 %.", "And more."])
    picture = folder / "demo.png"
    plt.imsave(picture, [[0.0]])
    files = [folder / "demo.csv"] if table_only else [picture, folder / "demo.csv"]
    left_out = [LeftOut("runs/x", "half-written")]
    return [
        Published(
            study=study,
            drawn=drawn,
            records=records,
            origins=["simulated"],
            unknown=["000000000000-r0"],
            unknown_failures=["0000000000ff-r0"],
            missing=["batch=64"],
            left_out=left_out,
            files=files,
        )
    ]


def test_the_page_leads_with_the_answer_and_needs_nothing_else(tmp_path: Path) -> None:
    page = write_page(published(tmp_path), tmp_path).read_text()
    assert page.index("It &lt;does&gt;, by +3.0 %.") < page.index("<h2>Title &amp; all</h2>")
    assert not re.findall(r"(?:src|href)=\"(?!data:|#|demo\.)", page) and "http" not in page
    assert "missing: batch=64" in page and "1 of 12 runs not of the reference set (hash unknown)" in page
    assert "1 refused or failed point not of the reference set" in page
    assert "1 run directories were left out, such as runs/x: half-written" in page
    assert "prefers-color-scheme: dark" in page


def test_equal_runs_give_an_equal_page(tmp_path: Path) -> None:
    first = write_page(published(tmp_path), tmp_path).read_bytes()
    assert write_page(published(tmp_path), tmp_path).read_bytes() == first


def test_a_study_that_is_a_table_is_shown_as_one(tmp_path: Path) -> None:
    page = write_page(published(tmp_path, table_only=True), tmp_path).read_text()
    assert '<td class="text">1.5</td><td class="text">x</td>' in page and "&lt;y&gt;" in page


def test_the_run_table_has_what_tells_runs_apart(tmp_path: Path) -> None:
    table = run_table(published(tmp_path))
    assert len(table["rows"]) == 12
    assert table["columns"] == [
        *("experiment", "model", "hardware", "mechanism", "batch"),
        "tokens_per_s",
        "origin",
        "run",
    ]
    assert table["rows"][3][4:6] == [32, 320]


def dom(page: Path, words: str, profile: Path, *more: str) -> str:
    """The page's DOM after its scripts have run. A new profile each time: a browser at work locks its own."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *more, "--dump-dom", f"{page.as_uri()}#runs?{words}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


@browser
@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("", "12 of 12 runs"),
        ("pinned_swap", "4 of 12 runs"),
        ("mechanism=pinned_swap&batch>8", "2 of 12 runs"),
        ("tokens_per_s<100", "6 of 12 runs"),
        ("PINNED&batch=16", "1 of 12 runs"),
        ("no_such_word", "0 of 12 runs"),
    ],
)  # fmt: skip
def test_the_filter_in_a_browser(tmp_path: Path, words: str, count: str) -> None:
    page = write_page(published(tmp_path), tmp_path)
    shown = dom(page, words, tmp_path / "profile")
    assert f'<p id="count" role="status">{count}</p>' in shown
    body = shown.partition("<tbody>")[2].partition("</tbody>")[0]
    assert body.count("<tr>") == int(count.split()[0])
    assert "managed_<demand>" not in shown.partition('id="data"')[0]


@browser
def test_dark_and_light_differ_in_a_browser(tmp_path: Path) -> None:
    page = write_page(published(tmp_path), tmp_path)
    shots = []
    for name, more in (("light", ()), ("dark", ("--force-dark-mode",))):
        shots.append(tmp_path / f"{name}.png")
        dom_args = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / name}", *more, f"--screenshot={shots[-1]}"]
        subprocess.run([*dom_args, page.as_uri()], capture_output=True, timeout=120, check=True)
    light, dark = (plt.imread(shot)[..., :3].mean() for shot in shots)
    assert light > 0.8 and dark < 0.3
