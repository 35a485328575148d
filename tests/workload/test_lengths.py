"""Quantiles and draws, and the published distributions against the traces they are taken from."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from tests.helpers import CONF, DATA
from uvm_kv.workload.lengths import Lengths, Quantiles, draw_lengths, mean_lengths
from uvm_kv.workload.trace import read_trace

HALVES = Quantiles((0.0, 0.5, 1.0), (1.0, 11.0, 31.0))


def test_quantiles_are_linear_in_between() -> None:
    assert [HALVES.at(u) for u in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1, 6, 11, 21, 31]
    assert HALVES.mean == pytest.approx(0.5 * 6 + 0.5 * 21)


@pytest.mark.parametrize(
    ("probabilities", "values", "message"),
    [
        ((0.0, 1.0), (1.0,), "probabilities"),
        ((0.0,), (1.0,), "probabilities"),
        ((0.1, 1.0), (1.0, 2.0), "rise from 0 to 1"),
        ((0.0, 0.9), (1.0, 2.0), "rise from 0 to 1"),
        ((0.0, 0.5, 0.5, 1.0), (1.0, 2.0, 3.0, 4.0), "rise from 0 to 1"),
        ((0.0, 1.0), (5.0, 4.0), "do not fall"),
        ((0.0, 1.0), (0.0, 4.0), "token counts"),
    ],
)
def test_quantiles_that_are_none_are_refused(
    probabilities: tuple[float, ...], values: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Quantiles(probabilities, values)


def test_draws_follow_the_distribution_and_the_seed() -> None:
    def draw(seed: int) -> list[Lengths]:
        return draw_lengths(HALVES, HALVES, 4_000, 100, np.random.default_rng(seed))[0]

    assert draw(1) == draw(1) != draw(2)
    prompt, output = mean_lengths(draw(1))
    assert prompt == pytest.approx(HALVES.mean, rel=0.05)
    assert output == pytest.approx(HALVES.mean, rel=0.05)
    pairs = np.array(draw(1))
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.05


def test_what_exceeds_the_context_is_drawn_again_and_counted() -> None:
    lengths, redrawn = draw_lengths(HALVES, HALVES, 500, 30, np.random.default_rng(3))
    assert len(lengths) == 500
    assert max(map(sum, lengths)) <= 30
    assert redrawn > 0
    assert draw_lengths(HALVES, HALVES, 500, 62, np.random.default_rng(3))[1] == 0


def test_a_context_that_hardly_any_draw_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match="context of 1 tokens"):
        draw_lengths(HALVES, HALVES, 1, 1, np.random.default_rng(0))


@pytest.mark.parametrize(("name", "rows"), [("conv", 19_366), ("code", 8_819)])
def test_azure_quantiles_are_those_of_the_trace(name: str, rows: int) -> None:
    path = DATA / f"AzureLLMInferenceTrace_{name}.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not there: traces are not part of the project")
    raw = yaml.safe_load((CONF / "workload" / f"azure_{name}.yaml").read_text())["lengths"]
    trace = read_trace(str(path)).rows
    assert len(trace) == rows
    for part in ("prompt", "output"):
        tokens = np.array([getattr(row, f"{part}_tokens") for row in trace])
        quantiles = Quantiles(tuple(raw[part]["probabilities"]), tuple(raw[part]["values"]))
        assert quantiles.values == tuple(np.round(np.quantile(tokens, quantiles.probabilities)))
        assert quantiles.mean == pytest.approx(tokens.mean(), rel=0.03)
