"""A peer among made-up points: a row and a line, marked as one, and never a side of the verdict."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tests.report.test_verdict import BASE, RECOMPUTE, table
from uvm_kv.report.figures import run_figure, sweep_figure
from uvm_kv.report.load import points
from uvm_kv.report.style import STYLES
from uvm_kv.report.verdict import verdicts, with_gains
from uvm_kv.telemetry.recorder import STEP_COLUMNS

OURS = [*BASE, *RECOMPUTE, ("pinned_balanced", 16, 115.0, 0.022)]


def with_peers(throughput: float) -> pd.DataFrame:
    """Our points beside a peer's at both batches, whose summary says nothing of our axes."""
    peer = table([("hf_generate", 8, throughput, 0.01), ("hf_generate", 16, throughput, 0.01)])
    nothing = {"memory": None, "placement": None, "admission": None, "h2d_bytes": None, "d2h_bytes": None}
    variant = [{"engine": "hf_generate", "peer.cache": "dynamic"}] * len(peer)
    peer = peer.assign(engine="hf_generate", variant=variant, kv_budget="not settable", **nothing)
    return pd.concat([table(OURS), peer], ignore_index=True)


@pytest.mark.parametrize("throughput", [1.0, 1e6])
def test_a_peer_changes_no_verdict(throughput: float) -> None:
    assert verdicts(points(with_peers(throughput))) == verdicts(points(table(OURS)))


def test_a_peer_is_a_row_of_the_same_comparison() -> None:
    rows = with_gains(points(with_peers(240.0)))
    peer = rows[rows["label"] == "hf_generate (peer)"]
    assert rows["title"].nunique() == 1
    assert list(peer["offered_batch"]) == [8, 16]
    assert peer["gain"].tolist() == pytest.approx([1.0, 1.0])
    assert peer["gain_same_admission"].isna().all()
    assert set(peer["label"]) <= set(STYLES)


def test_a_peer_is_a_line_of_the_same_figure(tmp_path: Path) -> None:
    rows = with_gains(points(with_peers(240.0))).assign(closed_form_ceiling=None)
    figure = sweep_figure(rows)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "hf_generate (peer)" in names
    assert "device_resident (baseline)" in names


def test_ways_of_a_peer_are_told_apart() -> None:
    runs = with_peers(240.0)
    static = runs[runs["mechanism"] == "hf_generate"].copy()
    static["variant"] = [{"engine": "hf_generate", "peer.cache": "static"}] * len(static)
    labels = set(points(pd.concat([runs, static], ignore_index=True))["label"])
    assert {f"hf_generate (peer), peer.cache={cache}" for cache in ("dynamic", "static")} <= labels


def test_a_run_without_steps_or_with_few_columns_has_a_figure() -> None:
    run_figure({name: [] for name in STEP_COLUMNS}, "hf_continuous")
    told = {"step": 0, "start_ns": 0, "end_ns": 9, "num_running": 2, "num_waiting": 0}
    figure = run_figure({name: [told.get(name)] for name in STEP_COLUMNS}, "hf_generate")
    assert [len(axis.lines) for axis in figure.axes] == [2, 0, 0, 0]
