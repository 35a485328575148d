"""Sequences beyond the card, made up: what is refused, what serves them, and how that is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.analysis.study.made import run, table
from uvm_kv.analysis.study.long_context import STUDY
from uvm_kv.analysis.style import save_figure

SHORT, LONG = 1024 - 64, 4096 - 64


def runs() -> list[dict[str, Any]]:
    """One and two sequences; the long ones are served from CPU memory only."""
    made = [run("device_resident", 1, 40.0, prompt_tokens=SHORT), run("device_resident", 2, 40.0, prompt_tokens=SHORT)]
    for batch in (1, 2):
        made += [
            run("pinned_prefetch_ahead", batch, 40.0 + 10 * (batch - 1), prompt_tokens=SHORT),
            run("pinned_prefetch_ahead", batch, 4.0, prompt_tokens=LONG, running_batch_mean=1.0, working_set_ratio=2.0),
            run("managed_demand", batch, 0.5, prompt_tokens=LONG, working_set_ratio=2.0),
        ]
    return made


def refusals(*, refused: bool = True) -> list[dict[str, Any]]:
    same = {"model": "llama2_7b", "workload": "fixed", "mechanism": "device_resident", "memory": "device"}
    lengths = {"prompt_tokens": LONG, "output_tokens": 64, "placement": "resident"}
    why = {"refused": refused, "error": "the KV budget holds 1\n"}
    return [same | lengths | why | {"offered_batch": b} for b in (1, 2)]


def said(made: list[dict[str, Any]], failures: list[dict[str, Any]]) -> str:
    return "\n".join(STUDY.draw(table(*made), failures).claims)


def test_what_the_card_alone_refuses_is_told_with_what_serves_it() -> None:
    text = said(runs(), refusals())
    assert "a sequence of 4096 tokens or more is refused; the longest that is served has 1024" in text
    one, two = "1 sequence that the card alone refuses: ", "2 sequences that the card alone refuses: "
    assert f"{one}4096 tokens (4 GiB of KV) at 4 tok/s with pinned_prefetch_ahead, 8 times managed_demand" in text
    assert f"{two}4096 tokens (4 GiB of KV) at 4 tok/s with pinned_prefetch_ahead (1 at a time), 8 times" in text
    assert "Of 2 points that the card alone serves too, CPU-backed KV is faster in 1; at most +25.0 %" in text


def test_nothing_is_called_refused_that_was_not() -> None:
    assert "The card alone refused none" in said(runs(), [])
    assert "The card alone refused none" in said(runs(), refusals(refused=False)), "it failed, and was not refused"


def test_without_a_device_only_job_nothing_is_said() -> None:
    text = said([row for row in runs() if row["mechanism"] != "device_resident"], [])
    assert text.startswith("No device-only job is among the results")


def test_refused_points_are_in_the_table_without_a_throughput() -> None:
    drawn = STUDY.draw(table(*runs()), refusals()).table
    refused = drawn[drawn["refused"]]
    assert len(refused) == 2 and refused["throughput"].isna().all()
    assert set(refused["why"]) == {"the KV budget holds 1"}


def test_runs_that_cannot_answer_are_refused() -> None:
    made = table(*runs())
    with pytest.raises(ValueError, match="takes workload=fixed"):
        STUDY.draw(made.assign(prompt_tokens=float("nan")), ())
    with pytest.raises(ValueError, match="several comparisons"):
        STUDY.draw(pd.concat([made, made.assign(model="llama3_8b")]), ())


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    files = [
        [p.read_bytes() for p in save_figure(STUDY.draw(table(*runs()), refusals()).figure, tmp_path / name)]
        for name in "ab"
    ]
    assert files[0] == files[1]
