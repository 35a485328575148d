"""Energy of made-up runs: what the sentences say follows the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.study.made import run, table
from uvm_kv.report.style import save_figure
from uvm_kv.study.energy import STUDY


def point(mechanism: str, batch: int, throughput: float, joules: float) -> dict[str, Any]:
    energy = {"energy_j_per_output_token": joules, "energy_j_per_output_token_above_idle": joules - 0.1}
    return run(mechanism, batch, throughput, **energy, power_w=joules * throughput, idle_power_w=30.0)


def runs(backed: float, *, backed_speed: float = 110.0) -> pd.DataFrame:
    """Runs that take 4 J at batch 1 and 1 J at batch 16 on the card alone, and `backed` J at batch 16 and 20 J at 32
    with CPU memory."""
    return table(
        point("device_resident", 1, 50.0, 4.0),
        point("device_resident", 16, 100.0, 1.0),
        point("device_resident", 32, 100.0, 1.0),
        point("pinned_balanced", 16, backed_speed, backed),
        point("managed_demand", 32, 5.0, 20.0),
    )


def said(made: pd.DataFrame) -> str:
    return "\n".join(STUDY.draw(made, ()).claims)


@pytest.mark.parametrize(
    ("backed", "words"),
    [(0.8, "less than the card alone: 0.8 J"), (1.3, "more than the card alone: 1.3"), (1.0, "as much as the card")],
)
def test_the_least_energy_is_compared(backed: float, words: str) -> None:
    text = said(runs(backed))
    assert f"at its best CPU-backed KV takes {words}" in text
    assert f"{100 * (backed - 1):+.1f} %" in text
    assert "J per output token above idle" in text


def test_batching_waste_and_the_fastest_are_said() -> None:
    text = said(runs(0.8))
    assert "from 4 J per output token at batch 1 to 1 at batch 16, a factor of 4" in text
    assert "most is wasted by managed_demand at batch 32: 20 J per output token, 20 times the card alone" in text
    assert "the point of least energy, pinned_balanced at batch 16, is also the fastest." in text
    text = said(runs(0.8, backed_speed=90.0))
    assert "is not the fastest, which is device_resident at batch 16" in text


def test_without_one_side_nothing_is_compared() -> None:
    made = runs(0.8)
    assert "no CPU-backed run" in said(made[made["memory"] == "device"])
    assert "no device-only run" in said(made[made["memory"] != "device"])


def test_runs_without_energy_are_refused() -> None:
    with pytest.raises(ValueError, match="no run has energy_j_per_output_token"):
        said(runs(0.8).assign(energy_j_per_output_token=None))
    with pytest.raises(ValueError, match="no run has energy_j_per_output_token_above_idle"):
        said(runs(0.8).drop(columns="energy_j_per_output_token_above_idle"))


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    files = [
        [path.read_bytes() for path in save_figure(STUDY.draw(runs(0.8), ()).figure, tmp_path / name)] for name in "ab"
    ]
    assert files[0] == files[1]


def test_measured_energies_count_where_their_repeats_decide() -> None:
    def measured(*factors: float) -> str:
        made = runs(0.8).assign(origin="measured")
        names = ["energy_j_per_output_token", "energy_j_per_output_token_above_idle"]
        return said(pd.concat([made.assign(**{name: made[name] * x for name in names}) for x in factors]))

    assert measured(0.999, 1.0, 1.001).count("takes less than the card alone: ") == 2
    assert "is AMBIGUOUS, which needs 3 repeats on both sides to be told from noise: 0.8 J" in measured(1.0)
    assert measured(0.5, 1.0, 1.5).count("takes less than the card alone is AMBIGUOUS (95 % interval") == 2


def test_cards_and_origins_are_told_apart() -> None:
    drawn = STUDY.draw(pd.concat([runs(0.8), runs(0.8).assign(hardware="h100", idle_power_w=70.0)]), ())
    assert drawn.figure.legends[0].get_title().get_text() == "h100, at rest 70 W; rtx3090, at rest 30 W"
    titles = {axis.get_title(loc="left").partition("\n")[2] for axis in drawn.figure.axes} - {""}
    assert titles == {"on a simulated h100", "on a simulated rtx3090"} and set(drawn.table["hardware"]) == {
        "h100",
        "rtx3090",
    }
