"""What random numbers are drawn from."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from uvm_kv.workload.draws import Purpose, entropy


def first(numbers: list[int]) -> int:
    return int(np.random.default_rng(numbers).integers(2**63))


def test_every_seed_repeat_and_purpose_draws_other_numbers() -> None:
    drawn = {first(entropy(*it)) for it in product(range(5), range(5), Purpose)}
    assert len(drawn) == 5 * 5 * len(Purpose)


@pytest.mark.parametrize("more", [(), (7,)])
def test_the_first_repeat_is_what_the_seed_alone_draws(more: tuple[int, ...]) -> None:
    """Its numbers are those of versions that had no repeat here."""
    for purpose in Purpose:
        assert first(entropy(3, 0, purpose, *more)) == first([3, purpose.value, *more])
