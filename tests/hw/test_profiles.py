"""The hardware profiles: every card loads, and every number of every file has a source that is its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from tests.helpers import CONF
from tests.jobs import composed, resolved
from uvm_kv.calibrate.profile_file import profile_yaml
from uvm_kv.config.names import groups
from uvm_kv.hw.profile import HardwareProfile
from uvm_kv.hw.roofline import peak_ops_per_s
from uvm_kv.job.resolve import build_profile

CARDS = ("rtx3090", "rtx2080ti", "rtx4090", "a6000", "a30", "a100_40g", "a100_80g", "h100", "h200")
FILES = sorted((CONF / "hardware").glob("*.yaml"))


def load(name: str) -> HardwareProfile:
    hardware: Any = OmegaConf.to_object(composed(f"hardware={name}").hardware)
    return build_profile(hardware)


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path of every number, or list of numbers, to its value."""
    if not isinstance(node, dict):
        return {prefix.rstrip("."): node}
    found: dict[str, Any] = {}
    for key, value in node.items():
        if key not in ("defaults", "name", "sources"):
            found |= leaves(value, f"{prefix}{key}.")
    return found


def covering(path: str, sources: Any) -> list[str]:
    """Keys of `sources` that speak of `path`, the most specific last."""
    return sorted((key for key in sources if path == key or path.startswith(key + ".")), key=len)


def test_the_cards_are_there() -> None:
    # A calibrated profile of one's own machine may lie beside them.
    assert set(CARDS) <= set(groups()["hardware"])


@pytest.mark.parametrize("name", CARDS)
def test_a_card_loads_and_says_where_its_numbers_are_from(name: str) -> None:
    profile = load(name)
    assert profile.name == name
    paths = leaves(dataclasses.asdict(profile))
    assert len(paths) > 70
    for path in paths:
        source = profile.sources[covering(path, profile.sources)[-1]]
        assert len(source) > 10, path


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_no_number_stands_under_the_source_of_another(file: Any) -> None:
    """What a file sets has its most specific source in that file; what it inherits is declared there as borrowed."""
    raw = yaml.safe_load(file.read_text())
    merged = load(file.stem)
    for path in leaves(raw):
        assert covering(path, merged.sources)[-1] in raw["sources"], f"{file.name}: {path} has another card's source"
    for path in leaves(dataclasses.asdict(merged)):
        assert covering(path, raw["sources"]), f"{file.name} does not say where {path} is from"


def test_a_number_without_a_source_is_refused() -> None:
    profile = load("h100")
    for path in leaves(dataclasses.asdict(profile)):
        rest = {key: text for key, text in profile.sources.items() if key not in covering(path, profile.sources)}
        with pytest.raises(ValueError, match=r"hardware\.\S+ has no source; add it under hardware\.sources"):
            dataclasses.replace(profile, sources=rest)


@pytest.mark.parametrize("name", [n for n in CARDS if n != "rtx3090"])
def test_operators_are_the_measured_cards_and_the_profile_says_so(name: str) -> None:
    """The rule: overheads and efficiencies of the RTX 3090, at the card's own peak and bandwidth."""
    profile, measured = load(name), load("rtx3090")
    assert profile.operators == measured.operators
    assert "no operator table of this card" in profile.sources["operators"]
    assert "RTX 3090" in profile.sources["operators"]


@pytest.mark.parametrize("name", CARDS)
def test_driver_constants_are_the_a30s(name: str) -> None:
    assert load(name).managed == load("a30").managed
    assert name == "a30" or "a30.yaml" in load(name).sources["managed"]


def test_memory_and_rates_rise_where_they_should() -> None:
    cards = {name: load(name) for name in CARDS}
    by_bandwidth = sorted(CARDS, key=lambda name: cards[name].gpu.hbm_gb_per_s)
    assert by_bandwidth == ["rtx2080ti", "a6000", "a30", "rtx3090", "rtx4090", "a100_40g", "a100_80g", "h100", "h200"]
    for name, profile in cards.items():
        gpu, link = profile.gpu, profile.link
        assert 1.9 < gpu.tensor_int8_top_per_s / gpu.tensor_tflop_per_s < 4.1, name
        assert gpu.float32_tflop_per_s is not None, name
        assert 0.05 < gpu.float32_tflop_per_s / gpu.tensor_tflop_per_s < 0.51, name
        assert link.zero_copy_bytes_per_s(0) <= link.h2d_bytes_per_s < gpu.hbm_bytes_per_s / 10, name
        assert profile.power.idle_w < profile.power.waiting_w < profile.power.active_w, name
    assert cards["h100"].link.zero_copy_bytes_per_s(2**40) == pytest.approx(35e9)
    assert cards["rtx2080ti"].link.h2d_gb_per_s < cards["a30"].link.h2d_gb_per_s < cards["h100"].link.h2d_gb_per_s


def test_float32_runs_at_the_rate_of_the_plain_cores() -> None:
    """The plain cores reach a sixteenth of the tensor cores' rate on an A100, and a half on a GeForce of 2020."""
    rates = {name: peak_ops_per_s(load(name), 32) / 1e12 for name in CARDS}
    assert (rates["a100_80g"], rates["a30"], rates["h100"]) == (19.5, 10.3, 67.0)
    assert rates["rtx3090"] == pytest.approx(peak_ops_per_s(load("rtx3090"), 16) / 2e12, rel=0.01)


def without_float32(name: str) -> HardwareProfile:
    profile = load(name)
    return dataclasses.replace(profile, gpu=dataclasses.replace(profile.gpu, float32_tflop_per_s=None))


def test_float32_is_refused_where_its_rate_is_not_known() -> None:
    unknown = without_float32("a30")
    assert peak_ops_per_s(unknown, 16) == 165e12
    with pytest.raises(ValueError, match=r"^hardware=a30 has no float32 rate; add hardware\.gpu\.float32_tflop_per_s"):
        peak_ops_per_s(unknown, 32)
    with pytest.raises(ValueError, match=r"add hardware\.gpu\.float32_tflop_per_s"):
        resolved("hardware=a30", "hardware.gpu.float32_tflop_per_s=null", "dtype=float32", "model=smollm2_135m")
    assert "  float32_tflop_per_s" not in profile_yaml(unknown, [])


def test_the_float32_rate_is_part_of_a_float32_run_only() -> None:
    """Runs in half precision are what they were before profiles had it."""

    def settings(*more: str) -> list[object]:
        rates = ("35.6", "30.0", "null") if "dtype=float32" not in more else ("35.6", "30.0")
        given = (f"hardware.gpu.float32_tflop_per_s={rate}" for rate in rates)
        return [resolved("model=smollm2_135m", one, *more).determining() for one in given]

    first, *others = settings()
    assert all(other == first for other in others)
    one, other = settings("dtype=float32")
    assert one != other
