"""Sequences beyond the card, made up: what is refused, what serves them, and how that is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.study.made import run, table
from uvm_kv.report.style import save_figure
from uvm_kv.study.long_context import STUDY

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
    one, two = (f"{n} that the card alone refuses, decode alone: " for n in ("1 sequence", "2 sequences"))
    assert f"{one}4096 tokens (4 GiB of KV) at 4 tok/s with pinned_prefetch_ahead, 8 times managed_demand" in text
    assert f"{two}4096 tokens (4 GiB of KV) at 4 tok/s with pinned_prefetch_ahead (1 at a time), 8 times" in text
    both = "Of 2 points that the card alone serves too, decode alone, CPU-backed KV is faster in 1; at most +25.0 %"
    assert both in text


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
        STUDY.draw(
            table(*runs(), *[row | {"setting": row["setting"] | {"memory.device_kv_bytes": 2**30}} for row in runs()]),
            (),
        )
    for name, other in (("model", "llama3_8b"), ("hardware", "h100")):
        with pytest.raises(ValueError, match=f"several {name}s"):
            STUDY.draw(pd.concat([made, made.assign(**{name: other})]), ())
    with pytest.raises(ValueError, match="cold ones are not of decode"):
        STUDY.draw(made.assign(start="cold"), ())


def cold(ttft_s: float, **more: Any) -> dict[str, Any]:
    """One long sequence, whose rate over the whole run is not one of decode."""
    more = {"prompt_tokens": LONG, "start": "cold", "ttft_s.p50": ttft_s, "output_tokens_per_s": None} | more
    return run("pinned_prefetch_ahead", 1, 0.1, **more)


def test_the_headline_says_decode_alone_and_what_comes_before() -> None:
    """Repeats of a cold start count by their median; its rate is in no line."""
    starts = [cold(ttft_s, seed=seed) for seed, ttft_s in enumerate((60.0, 99.0, 58.0))]
    drawn = STUDY.draw(table(*runs(), *starts), refusals())
    said = "With it one of 4096 is served, at 4 tok/s in decode alone (pinned_prefetch_ahead), after 60 s to its first"
    assert said in (drawn.headline or "")
    text = "\n".join(drawn.claims)
    assert "Rates are of decode alone, over 16 steps" in text
    assert "the first token of 1 sequence comes after 60 s at 4096 tokens (pinned_prefetch_ahead)" in text
    told = drawn.table[drawn.table["cold_ttft_s"].notna()]
    assert told[["label", "offered_batch", "context_tokens", "cold_ttft_s", "throughput"]].values.tolist() == [
        ["pinned_prefetch_ahead", 1, 4096, 60.0, 4.0]
    ]
    assert [axis.get_ylabel() for axis in drawn.figure.axes][-1] == "time to first token (s)"


def test_without_cold_runs_no_first_token_is_told() -> None:
    drawn = STUDY.draw(table(*runs()), refusals())
    assert "at 4 tok/s in decode alone (pinned_prefetch_ahead)." in (drawn.headline or "")
    assert drawn.table["cold_ttft_s"].isna().all() and len(drawn.figure.axes) == 2
    assert "decode alone" in drawn.figure.axes[0].get_ylabel()


def test_cold_starts_of_two_settings_are_not_mixed() -> None:
    with pytest.raises(ValueError, match=r"from a cold start.*differ in setting"):
        STUDY.draw(table(*runs(), cold(60.0), cold(70.0, setting={"block_size": 16})), refusals())


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    files = [
        [p.read_bytes() for p in save_figure(STUDY.draw(table(*runs()), refusals()).figure, tmp_path / name)]
        for name in "ab"
    ]
    assert files[0] == files[1]
