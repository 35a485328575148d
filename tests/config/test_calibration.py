"""From curves to a profile: a known profile is recovered, what cannot be known stays the base's, and both are said."""

from __future__ import annotations

import copy
import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.config.curves import MODEL, curves_of
from uvm_kv.calibrate.calibration import Calibration, calibrate, fit, prefetch_counts, quantities_of
from uvm_kv.calibrate.curves import FIELDS, PLAN, Curves, read_curves
from uvm_kv.calibrate.profile_file import load_profile
from uvm_kv.hw.counting import Precision
from uvm_kv.hw.fit import all_work
from uvm_kv.hw.profile import HardwareProfile
from uvm_kv.hw.roofline import Roofline

pytest.importorskip("scipy")
MEMORY = tuple(curve for curve in PLAN if curve != "operators")
A30_FIRST_TOUCHES = {"tree": (1.3358, 1.3329), "none": (17.435, 17.330), "block": (0.4684, 0.4657)}
"""Seconds of A and B, working set 0.95 of 8589344768 bytes: the A30 study."""


def changed() -> HardwareProfile:
    """A card unlike any: every constant that can be identified differs from the RTX 3090's, some by a lot."""
    base = load_profile("rtx3090")
    link = dataclasses.replace(
        base.link,
        h2d_gb_per_s=52.0,
        d2h_gb_per_s=11.0,
        duplex_h2d=0.45,
        duplex_d2h=1.0,
        zero_copy_gib=(1.0, 8.0),
        zero_copy_share=(0.8, 0.3),
        prefetch_share=0.7,
        copy_call_us=14.0,
        prefetch_call_us=55.0,
        prefetch_chunk_us=4.0,
    )
    managed = dataclasses.replace(
        base.managed,
        stream_fault_pages=9,
        fault_batch_us=21.0,
        fault_block_us=48.0,
        cpu_mapped_page_us=0.31,
        scattered_page_us=0.11,
        evict_fixed_us=17.0,
        prefetch_overlap=0.8,
    )
    gpu = dataclasses.replace(base.gpu, hbm_efficiency=0.7, hbm_gb_per_s=1500.0)
    return dataclasses.replace(base, name="changed", gpu=gpu, link=link, managed=managed)


@cache
def generated(name: str, noise: float, curves: tuple[str, ...] = MEMORY, seed: int = 0) -> str:
    profile = changed() if name == "changed" else load_profile(name)
    return json.dumps(curves_of(profile, curves, noise=noise, seed=seed))


def read(folder: Path, raw: Any) -> Curves:
    file = folder / "curves.json"
    file.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return read_curves(file)


def recover(
    folder: Path, raw: Any, base: str | HardwareProfile = "rtx3090"
) -> tuple[HardwareProfile, Calibration, dict[str, Any]]:
    """The new profile, the calibration, and its quantities by path."""
    found = calibrate(read(folder, raw), load_profile(base) if isinstance(base, str) else base, "mine")
    return found.profile, found, {row.path: row for row in found.quantities}


IDENTIFIED = [
    *(f"gpu.{name}" for name in ("memory_bytes", "hbm_gb_per_s", "hbm_efficiency", "tensor_tflop_per_s")),
    *(f"link.{name}" for name in ("h2d_gb_per_s", "d2h_gb_per_s", "duplex_h2d", "duplex_d2h", "prefetch_share")),
    *(f"link.{name}" for name in ("copy_call_us", "prefetch_call_us", "prefetch_chunk_us")),
    *(f"managed.{name}" for name in ("fault_batch_us", "fault_block_us", "cpu_mapped_page_us", "scattered_page_us")),
    *(f"managed.{name}" for name in ("evict_fixed_us", "prefetch_overlap", "stream_fault_pages")),
]


@pytest.mark.parametrize("name", ["a30", "h100", "changed"])
def test_a_known_profile_is_recovered_from_curves_without_noise(name: str, tmp_path: Path) -> None:
    profile, _, rows = recover(tmp_path, generated(name, 0.0))
    true = changed() if name == "changed" else load_profile(name)
    expected = quantities_of(true)
    for path in IDENTIFIED:
        if (name, path) == ("h100", "managed.prefetch_overlap"):
            # Over PCIe 5.0 the calling CPU is slower than both copies one after the other: it cannot be seen.
            assert rows[path].fitted is None
            continue
        assert rows[path].fitted == pytest.approx(expected[path], rel=0.01), path
    for gib in (0.5, 1, 3, 10, 17, 40):
        mine, theirs = (p.link.zero_copy_bytes_per_s(gib * 2**30) for p in (profile, true))
        assert mine == pytest.approx(theirs, rel=0.01), gib


@pytest.mark.parametrize(("name", "seed"), [("a30", 0), ("a30", 1), ("changed", 0)])
def test_it_is_recovered_through_noise(name: str, seed: int, tmp_path: Path) -> None:
    """Repeats that spread by 2 %: rates and shares within 2 %, what is small beside the rest within 25 %."""
    _, found, rows = recover(tmp_path, generated(name, 0.02, seed=seed))
    expected = quantities_of(changed() if name == "changed" else load_profile(name))
    loose = {"managed.scattered_page_us": 0.25, "managed.evict_fixed_us": 0.25, "link.prefetch_call_us": 0.1}
    loose |= {"managed.cpu_mapped_page_us": 0.05, "managed.fault_batch_us": 0.05, "managed.fault_block_us": 0.05}
    loose |= {"managed.prefetch_overlap": 0.1}
    for path in IDENTIFIED:
        assert rows[path].fitted == pytest.approx(expected[path], rel=loose.get(path, 0.02)), path
        if rows[path].error is not None:
            assert abs(rows[path].fitted / expected[path] - 1) < 5 * rows[path].error + 0.005, path
    assert rows["managed.stream_fault_pages"].fitted == expected["managed.stream_fault_pages"]
    for report in found.reports:
        assert report.spread is not None
        assert 0.01 < report.spread < 0.04
        assert report.residual is None or report.residual < 0.03


def test_operators_are_recovered(tmp_path: Path) -> None:
    """The times are recovered; an efficiency only where it binds, as for a long projection that waits for the tensor
    cores."""
    profile, _, rows = recover(tmp_path, generated("a30", 0.0, ("operators",)), "h100")
    true = load_profile("a30")
    mine, theirs = (Roofline(p, MODEL, 2, Precision()) for p in (profile, true))
    for name in true.operators:
        for tokens in (1, 48, 1500):
            work = all_work(MODEL, tokens, 2)[name]
            assert mine.operator_s(name, *work) == pytest.approx(theirs.operator_s(name, *work), rel=0.01), name
    fitted = rows["operators.down_proj"].fitted
    assert fitted.compute_efficiency == pytest.approx(true.operators["down_proj"].compute_efficiency, rel=0.01)
    assert rows["link.h2d_gb_per_s"].fitted is None


def test_every_number_says_where_it_is_from(tmp_path: Path) -> None:
    raw = json.loads(generated("a30", 0.02, ("link", "copy", "operators")))
    raw |= {"origin": "measured", "commit": "0123abc"}
    raw["card"] |= {"name": "NVIDIA A30", "driver": "580.65.06"}
    profile, _, _ = recover(tmp_path, raw)
    assert set(profile.sources) == set(quantities_of(profile))
    for path in ("link.h2d_gb_per_s", "link.duplex_d2h", "operators.q_proj"):
        source = profile.sources[path]
        assert source.startswith("measured on NVIDIA A30, 2026-01-31, driver 580.65.06, curve ")
        assert "relative spread" in source
        assert "over 5 repeats" in source
        assert "residual of the fit" in source
        assert "curves file sha256 " in source
    assert profile.sources["gpu.memory_bytes"].startswith("nominal, as given for NVIDIA A30 beside measured curves")
    base = load_profile("rtx3090")
    for path in ("link.prefetch_share", "managed.fault_block_us", "power.idle_w", "gpu.hbm_efficiency"):
        key = path if path in base.sources else path.split(".")[0]
        assert profile.sources[path] == f"not measured; that of rtx3090: {base.sources[key]}"
        assert quantities_of(profile)[path] == quantities_of(base)[path]


def test_a_float32_rate_that_the_curves_do_not_tell_is_not_another_cards(tmp_path: Path) -> None:
    raw = json.loads(generated("a30", 0.0, ("copy",)))
    assert recover(tmp_path, raw)[0].gpu.float32_tflop_per_s == 10.3
    del raw["card"]["float32_tflop_per_s"]
    profile, _, rows = recover(tmp_path, raw)
    assert profile.gpu.float32_tflop_per_s is None
    assert "gpu.float32_tflop_per_s" not in rows and "gpu.float32_tflop_per_s" not in profile.sources


def test_generated_curves_are_never_called_measured(tmp_path: Path) -> None:
    profile, _, _ = recover(tmp_path, generated("a30", 0.0))
    for path, source in profile.sources.items():
        assert source.startswith(("generated, not measured, as if on a30", "nominal, as given", "not measured")), path
        assert "beside measured" not in source


def a30_study(*prefetchers: str) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(generated("a30", 0.0, ("link",)))
    at = {"access": "stream", "capacity_bytes": 8589344768, "working_set_ratio": 0.95}
    raw["curves"] = {
        "fault": [
            {"prefetcher": name, **at, "passes": list("AB"[:length]), "seconds": [A30_FIRST_TOUCHES[name][length - 1]]}
            for name in prefetchers
            for length in (1, 2)
        ]
    }
    return raw


def test_the_first_touches_of_the_a30_study_give_the_constants_of_its_profile(tmp_path: Path) -> None:
    """Only their sum is told of batch and block, and of the pages in flight only what suits the tree."""
    profile, found, rows = recover(tmp_path, a30_study("tree", "none", "block"), "a30")
    driver = profile.managed
    assert driver.stream_fault_pages == 5
    assert rows["managed.stream_fault_pages"].fitted is None
    assert driver.fault_batch_us + driver.fault_block_us == pytest.approx(85, abs=1)
    assert rows["managed.fault_block_us"].fitted is None
    assert rows["managed.fault_batch_us"].note == "given fault_block_us=20, evict_fixed_us=56 of the base"
    assert driver.cpu_mapped_page_us == pytest.approx(0.129, rel=0.05)
    assert driver.scattered_page_us == pytest.approx(0.040, rel=0.1)
    assert found.reports[0].residual is not None
    assert found.reports[0].residual < 0.005
    assert found.reports[0].spread is None
    assert "spread unknown, 1 repeat," in profile.sources["managed.fault_batch_us"]
    assert "not identified by the curve" in profile.sources["managed.evict_fixed_us"]


def test_pages_that_are_mapped_and_scattered_are_one_without_the_block_prefetcher(tmp_path: Path) -> None:
    profile, _, rows = recover(tmp_path, a30_study("tree", "none"), "a30")
    assert rows["managed.scattered_page_us"].fitted is None
    assert profile.managed.cpu_mapped_page_us + profile.managed.scattered_page_us == pytest.approx(0.17, rel=0.1)


def test_what_each_curve_leaves_open_is_the_bases(tmp_path: Path) -> None:
    """The curves are those of `changed`, the base is an RTX 3090. Without its points a constant is the base's, and says
    so."""
    raw = json.loads(generated("changed", 0.0))
    raw["curves"]["fault"] = [p for p in raw["curves"]["fault"] if p["access"] == "stream"]
    raw["curves"]["prefetch"] = [p for p in raw["curves"]["prefetch"] if p["case"] == "from_host"]
    raw["curves"]["link"] = [p for p in raw["curves"]["link"] if p["other_direction"] == "idle"]
    del raw["curves"]["copy"]
    profile, _, rows = recover(tmp_path, raw)
    base = quantities_of(load_profile("rtx3090"))
    for path in ("managed.fault_block_us", "link.prefetch_chunk_us", "managed.prefetch_overlap", "link.duplex_h2d"):
        assert rows[path].fitted is None, path
        assert quantities_of(profile)[path] == base[path], path
        assert "not identified by the curve" in profile.sources[path]
        assert profile.sources[path].startswith("not measured (curve ")
    assert profile.managed.fault_batch_us + profile.managed.fault_block_us == pytest.approx(69, rel=0.01)
    assert profile.managed.evict_fixed_us == pytest.approx(17, rel=0.01)
    assert profile.link.h2d_gb_per_s == pytest.approx(52, rel=0.01)


def test_a_base_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """The sum of batch and block is 69 us; a base whose block alone takes 500 cannot lend it."""
    raw = json.loads(generated("changed", 0.0, ("link", "fault")))
    raw["curves"]["fault"] = [p for p in raw["curves"]["fault"] if p["access"] == "stream"]
    base = load_profile("rtx3090")
    base = dataclasses.replace(base, managed=dataclasses.replace(base.managed, fault_block_us=500.0))
    with pytest.raises(ValueError, match=r"with fault_block_us=500.* of the base .* take another base, or measure"):
        recover(tmp_path, raw, base)


@pytest.mark.parametrize(
    ("curve", "factor", "said"),
    [
        ("zero_copy", 0.5, "zero_copy makes link.zero_copy_share 2, but a share is at most 1: .* rate of pinned"),
        ("hbm", 0.5, "hbm makes gpu.hbm_efficiency 1.7.*, but a share is at most 1: .* card.hbm_gb_per_s"),
    ],
)
def test_curves_that_contradict_each_other_are_refused(curve: str, factor: float, said: str, tmp_path: Path) -> None:
    raw = json.loads(generated("a30", 0.0))
    for point in raw["curves"][curve]:
        point["seconds"] = [factor * s for s in point["seconds"]]
    with pytest.raises(ValueError, match=said):
        recover(tmp_path, raw)


def test_one_bad_repeat_of_each_point_and_one_bad_point_hardly_matter(tmp_path: Path) -> None:
    raw = json.loads(generated("a30", 0.0, ("link", "copy")))
    for point in raw["curves"]["copy"]:
        point["seconds"][0] *= 10
    raw["curves"]["copy"][4]["seconds"] = [3 * s for s in raw["curves"]["copy"][4]["seconds"]]
    profile, _, _ = recover(tmp_path, raw)
    assert profile.link.h2d_gb_per_s == pytest.approx(25, rel=0.02)
    assert profile.link.copy_call_us == pytest.approx(6, rel=0.03)


def test_two_points_are_enough_for_what_they_can_tell(tmp_path: Path) -> None:
    raw = json.loads(generated("changed", 0.0, ("copy",)))
    raw["curves"]["copy"] = [raw["curves"]["copy"][i] for i in (0, 8)]
    profile, _, rows = recover(tmp_path, raw)
    assert profile.link.copy_call_us == pytest.approx(14, rel=0.01)
    assert profile.link.h2d_gb_per_s == pytest.approx(52, rel=0.01)
    assert rows["link.d2h_gb_per_s"].fitted is None


def test_a_prefetch_moves_once_and_evicts_only_from_a_full_card() -> None:
    from_host, resident, evicting = (prefetch_counts(case, 3) for case in FIELDS["prefetch"]["case"])
    assert (from_host.h2d_prefetch_pages, from_host.evicted_chunks) == (3 * 512, 0)
    assert not any(resident)
    assert (evicting.h2d_prefetch_pages, evicting.evicted_chunks, evicting.d2h_eviction_pages) == (1536, 3, 1536)


def test_a_fit_holds_the_last_of_what_only_a_sum_tells() -> None:
    size = np.array([1.0, 2.0, 4.0])
    found = fit(lambda x: size * (x["a"] + x["b"]), {"a": 5.0, "b": 1.0}, 10 * size)
    assert (found.held, found.given_held) == (("b",), ("a",))
    assert found.values == {"a": pytest.approx(9.0), "b": 1.0}
    assert found.residual < 1e-6


def test_the_plan_can_be_read_as_a_file(tmp_path: Path) -> None:
    got = read(tmp_path, generated("a30", 0.0))
    assert {curve: [point.at for point in points] for curve, points in got.curves.items()} == {
        curve: PLAN[curve] for curve in MEMORY
    }
    assert got.curves["copy"][0].repeats == (got.curves["copy"][0].seconds,) * 5


def put(path: str, value: Any) -> Any:
    """A change of a valid file: `value` at a dotted path, or gone where it is `put`."""

    def change(raw: dict[str, Any]) -> Any:
        node: Any = raw
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in parents:
            node = node[part]
        if value is put:
            del node[last]
        else:
            node[last] = value
        return raw

    return change


def float32_unknown(raw: Any) -> Any:
    del raw["card"]["float32_tflop_per_s"]
    raw["model"]["dtype"] = "float32"
    return raw


POINT = {"direction": "h2d", "bytes": 4096, "seconds": [1e-5]}
BAD = [
    (lambda _: "{", "not JSON"),
    (lambda _: "[" * 100_000, "not JSON"),
    (lambda _: [1], "format is None; this version reads 'uvm-kv curves'"),
    (put("format", "curves"), "format is 'curves'"),
    (put("schema_version", 2), "schema_version is 2; this version reads 1"),
    (put("schema_version", True), "schema_version is True"),
    (put("origin", put), "the file has no origin; it must have format,"),
    (put("origin", "guessed"), "origin 'guessed' is unknown; did you mean measured or generated?"),
    (put("date", "yesterday"), "date is 'yesterday'; it must be a day such as 2026-01-31"),
    (put("date", 5), "date is 5"),
    (put("tool", ""), "tool is ''; it must be a line of text"),
    (put("card.name", "A30\nname: x"), "card.name is 'A30\\nname: x'"),
    (put("card.name", "${oc.env:HOME}"), "card.name is '${oc.env:HOME}'"),
    (put("card.hbm_gb_per_s", put), "card has no hbm_gb_per_s"),
    (put("card.memory_bytes", 1.5), "card.memory_bytes is 1.5; it must be a whole number"),
    (put("card", []), "card is not a JSON object"),
    (put("card.float32_tflop_per_s", "fast"), "card.float32_tflop_per_s is 'fast'; it must be a positive number"),
    (put("colour", "red"), "the field of the file 'colour' is unknown"),
    (put("curves", {}), "curves holds no curve; allowed: link, copy"),
    (put("curves", []), "curves holds no curve"),
    (put("curves.copies", []), "curve 'copies' is unknown; did you mean copy"),
    (put("curves.copy", {}), "curves.copy is not a list of points"),
    (put("curves.copy", []), "curves.copy has 0 points; it needs at least 2"),
    (put("curves.copy", [POINT]), "curves.copy has 1 points; it needs at least 2"),
    (put("curves.copy", [POINT, POINT]), "curves.copy[1] is taken where curves.copy[0] is; put repeats into"),
    (put("curves.copy.0", 7), "curves.copy[0] is not a JSON object"),
    (put("curves.copy.0.bytes", put), "curves.copy[0] has no bytes; it must have direction, bytes, seconds"),
    (put("curves.copy.0.byte", 1), "the field of curves.copy[0] 'byte' is unknown; did you mean bytes"),
    (put("curves.copy.0.bytes", -1), "curves.copy[0].bytes is -1; it must be a positive number"),
    (put("curves.copy.0.bytes", 10**400), "it must be a positive number"),
    (put("curves.copy.0.bytes", "4 KiB"), "curves.copy[0].bytes is '4 KiB'"),
    (put("curves.copy.0.direction", "up"), "curves.copy[0].direction 'up' is unknown; allowed: d2h, h2d"),
    (put("curves.copy.0.seconds", []), "curves.copy[0].seconds is []; it is a list of the time of every repeat"),
    (put("curves.copy.0.seconds", 1.0), "curves.copy[0].seconds is 1.0"),
    (put("curves.copy.0.seconds", [1.0, -1.0]), "curves.copy[0].seconds[1] is -1.0; it must be a positive number"),
    (put("curves.copy.0.seconds", [0]), "curves.copy[0].seconds[0] is 0"),
    (put("curves.copy.0.seconds", [float("nan")]), "curves.copy[0].seconds[0] is nan"),
    (put("curves.copy.0.seconds", [True]), "curves.copy[0].seconds[0] is True"),
    (put("curves.fault.0.passes", ["C"]), "curves.fault[0].passes is ['C']; it is a list of A and B"),
    (put("curves.fault.0.prefetcher", "all"), "curves.fault[0].prefetcher 'all' is unknown"),
    (put("curves.fault.6.working_set_ratio", 9), "walks 9.66e+09 bytes at random; the driver model takes at most"),
    (put("curves.prefetch.0.num_chunks", 2**30), "curves.prefetch[0].num_chunks is 1073741824; it must be at most"),
    (put("curves.operators", []), "curves.operators has 0 points"),
    (put("model", put), "curves.operators needs a model"),
    (put("model.num_heads", 7), "model.num_heads=7 is not a multiple"),
    (put("model.rope", 1), "model.rope is 1; it is true or false"),
    (put("model.dtype", "int4"), "model.dtype 'int4' is unknown"),
    (float32_unknown, "model.dtype is float32, so that card must have float32_tflop_per_s"),
    (put("curves.operators.0.layer_name", "qkv"), "curves.operators has 1 points of qkv; it needs at least 3"),
]


@pytest.mark.parametrize(("change", "said"), BAD, ids=[said[:40] for _, said in BAD])
def test_a_bad_file_is_answered_in_a_line(change: Any, said: str, tmp_path: Path) -> None:
    raw = change(copy.deepcopy(json.loads(generated("a30", 0.0, (*MEMORY, "operators")))))
    with pytest.raises(ValueError, match="curves=") as error:
        read(tmp_path, raw)
    text = str(error.value)
    assert said in text
    assert "\n" not in text
    assert len(text) < 1000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("curves.fault.0.capacity_bytes", 4096), r"curves.fault\[0\]: capacity_bytes=4096; the card must hold"),
        (put("curves.fault.0.working_set_ratio", 1e9), r"curves.fault\[0\]: working_set_ratio=1000000000.0 of"),
    ],
)
def test_an_impossible_study_is_named(change: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        recover(tmp_path, change(json.loads(generated("a30", 0.0))))
