"""The microbenchmark where there is no GPU: what it plans, keeps to, concludes, writes and refuses."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from experiments.gpu_kit.microbench import copies, curves, faults, in_place, prefetch
from experiments.gpu_kit.microbench.batch import Shape, attend, relative_error, scattered_table, split_kv, split_table
from experiments.gpu_kit.microbench.bench import scattered
from experiments.gpu_kit.microbench.cli import PARTS, main, see_only
from experiments.gpu_kit.microbench.limits import Ledger, LimitError, Limits, limits_for, scaled
from experiments.gpu_kit.microbench.managed import tile, tiles_sum, write
from experiments.gpu_kit.microbench.manifest import uvm_parameters
from experiments.gpu_kit.microbench.nominal import CARDS, NOTHING, card_of, predict
from experiments.gpu_kit.microbench.record import PartRecord, is_kept, part_lines, read_part
from experiments.gpu_kit.microbench.stats import AMBIGUOUS, MET, NOT_MET, REPORTED, Summary, ratios, summary, verdict
from tests.helpers import CONF, REPOSITORY
from uvm_kv.calibrate.curves import FIELDS, FORMAT, MIN_POINTS, PLAN, SCHEMA_VERSION, read_curves
from uvm_kv.calibrate.profile_file import load_profile
from uvm_kv.runner.sim.uvm.replay import ReplayStudy
from uvm_kv.types import CHUNK_BYTES, GIB, MIB

GPU = {"name": "NVIDIA H200", "driver": "580.0", "memory_bytes": 150 * GIB}


# Statistics


def test_a_spread_is_robust_and_relative() -> None:
    assert summary([2.0, 2.0, 2.1, 1.9, 50.0]) == Summary(2.0, pytest.approx(1.4826 * 0.1 / 2))
    assert summary([3.0]) == Summary(3.0, None)
    with pytest.raises(ValueError, match="no values"):
        summary([])


def test_ratios_are_taken_repeat_by_repeat() -> None:
    assert ratios([2.0, 4.0], [1.0, 2.0]) == [2.0, 2.0]
    with pytest.raises(ValueError, match="not from one run"):
        ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("median", "spread", "target", "expected"),
    [
        (0.90, 0.01, 0.85, MET),
        (0.84, 0.001, 0.85, NOT_MET),
        (0.86, 0.05, 0.85, AMBIGUOUS),
        (0.84, 0.05, 0.85, AMBIGUOUS),
        (0.99, None, 0.85, AMBIGUOUS),
        (0.85, 0.0, 0.85, MET),
        (0.10, 0.0, None, REPORTED),
    ],
)
def test_a_verdict_needs_the_whole_spread(median: float, spread: float | None, target: float, expected: str) -> None:
    assert verdict(Summary(median, spread), target) == expected


# Limits


def test_limits_of_a_large_and_of_a_small_card() -> None:
    large = limits_for(140 * 10**9, 120 * GIB)
    assert large == Limits(device=20 * 10**9, pinned=16 * GIB, managed=24 * 10**9, card=126 * 10**9)
    small = limits_for(24 * 10**9, 30 * GIB)
    assert small.managed == min(12 * 10**9, 10 * GIB)
    assert small.pinned == 10 * GIB
    assert small.device < 24 * 10**9
    assert limits_for(24 * 10**9, 0).managed == 0


def test_the_ledger_keeps_device_and_managed_memory_below_what_is_free() -> None:
    ledger = Ledger(Limits(device=10, pinned=4, managed=10, card=12))
    ledger.take("device", 8)
    assert ledger.room("managed") == 4
    with pytest.raises(LimitError, match="5 bytes of managed memory, and 4 are left"):
        ledger.take("managed", 5)
    ledger.take("managed", 4)
    ledger.take("pinned", 4)
    assert ledger.room("pinned") == ledger.room("device") == 0
    ledger.give_back("managed", 4)
    assert ledger.held["managed"] == 0
    assert ledger.peak["managed"] == 4


def test_sizes_are_scaled_down_by_halves() -> None:
    assert scaled(32, 100 * MIB, MIB) == 32
    assert scaled(32, 10 * MIB, MIB) == 8
    with pytest.raises(LimitError, match="the least this takes"):
        scaled(32, 10 * MIB, MIB, least=16)


def test_nothing_here_lifts_the_guard() -> None:
    files = list((REPOSITORY / "experiments" / "gpu_kit" / "microbench").glob("*.py"))
    assert files
    for file in files:
        assert "allow_oversubscription" not in file.read_text(), file


# Nominal figures


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.profile)
def test_the_cards_are_those_of_the_hardware_profiles(card: Any) -> None:
    gpu = load_profile(card.profile).gpu
    assert card.hbm_gb_per_s == gpu.hbm_gb_per_s
    assert card.tensor_tflop_per_s == gpu.tensor_tflop_per_s
    assert card.tensor_int8_top_per_s == gpu.tensor_int8_top_per_s
    assert card.float32_tflop_per_s == gpu.float32_tflop_per_s
    assert card.memory_gib * GIB == gpu.memory_bytes
    raw = yaml.safe_load((CONF / "hardware" / f"{card.profile}.yaml").read_text())
    assert "gpu.hbm_gb_per_s" in raw["sources"]


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 2080 Ti", "rtx2080ti"),
        ("NVIDIA A100-SXM4-40GB", "a100_40g"),
        ("NVIDIA B200", None),
    ],
)
def test_a_card_is_known_by_its_name_or_not_at_all(name: str, profile: str | None) -> None:
    found = card_of(name)
    assert (found and found.profile) == profile


def test_a_prediction_follows_card_and_link() -> None:
    h200 = card_of("NVIDIA H200")
    assert predict(h200, None).h2d == 56.0
    assert predict(h200, 4).h2d == 25.0
    assert predict(h200, 5).hbm == pytest.approx(4320)
    assert predict(h200, 2) == NOTHING._replace(hbm=pytest.approx(4320))
    assert predict(None, 5) == NOTHING
    assert predict(h200, 5).both_tiers == pytest.approx(4355)


# Shapes and references


def test_the_shapes_of_the_targets() -> None:
    assert in_place.MHA.kv_bytes == 2 * GIB
    assert in_place.GQA.kv_bytes == GIB // 2
    assert in_place.MHA.name == "MHA float16, 32 x 4096"
    assert in_place.GQA.name == "GQA 32/8 float16, 32 x 4096"


def test_the_reference_attends_as_written_out() -> None:
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(4, 8)), rng.normal(size=(5, 2, 8)), rng.normal(size=(5, 2, 8))
    expected = np.empty((4, 8))
    for head in range(4):
        weights = [np.exp(sum(query[head] * key[t, head // 2]) / np.sqrt(8)) for t in range(5)]
        expected[head] = sum(w * value[t, head // 2] for t, w in enumerate(weights)) / sum(weights)
    assert relative_error(attend(query, key, value), expected) < 1e-12


def test_blocks_are_taken_apart_as_they_lie() -> None:
    shape = Shape(2, block_size=4, head_dim=8, num_q_heads=2)
    raw = np.arange(3 * 2 * 2 * 4 * 8, dtype=np.float64).reshape(3, -1)
    key, value = split_kv(raw, shape)
    assert key.shape == value.shape == (12, 2, 8)
    lying = raw.reshape(3, 2, 2, 4, 8)
    for token in (0, 5, 11):
        assert (key[token, 1] == lying[token // 4, 0, 1, token % 4]).all()
        assert (value[token, 0] == lying[token // 4, 1, 0, token % 4]).all()


def test_tables_name_every_block_once() -> None:
    shape = replace(Shape(8), num_seqs=4, context=128)
    table = scattered_table(shape, range(10, 10 + shape.num_blocks), seed=1)
    assert sorted(table.reshape(-1)) == list(range(10, 10 + shape.num_blocks))
    mixed = split_table(shape, range(shape.num_blocks), range(100, 108), seed=1)
    assert mixed.shape == (4, 8)
    assert sorted(mixed[:, -2:].reshape(-1)) == list(range(100, 108))
    assert (mixed[:, :-2] < shape.num_blocks).all()
    assert len(set(mixed.reshape(-1))) == shape.num_blocks


@pytest.mark.parametrize(
    ("hbm", "link", "blocks"), [(4320e9, 50e9, 3), (840e9, 25e9, 7), (1e9, 1e9, 128), (1e15, 1, 1)]
)
def test_the_balanced_share_takes_both_equally_long(hbm: float, link: float, blocks: int) -> None:
    assert in_place.balanced_blocks(Shape(32), hbm, link) == blocks


# Copies


@pytest.mark.parametrize("num", [4, 8, 16, 100, 512, 2048])
def test_scattered_blocks_do_not_join(num: int) -> None:
    pairs = scattered(num)
    assert sorted(target for _, target in pairs) == list(range(num))
    assert all(b[1] != a[1] + 1 for a, b in itertools.pairwise(pairs))


def test_run_lengths_stay_small_and_few() -> None:
    for size in copies.RUN_SIZES:
        num = copies.num_runs(size, copies.NUM_BLOCKS * copies.BLOCK_BYTES)
        assert 4 <= num <= copies.MAX_RUNS
        assert num * size <= copies.MAX_RUN_TOTAL


def test_the_run_length_from_which_the_engine_wins_for_good() -> None:
    kernel = {4096: 1.0, 8192: 2.0, 16384: 4.0, 32768: 8.0}
    batch = {4096: 2.0, 8192: 1.9, 16384: 5.0, 32768: 6.0}
    assert "from runs of 32 KiB on" in copies.advice("h2d", {"kernel": kernel, "batch": batch})
    assert "never beats" in copies.advice("h2d", {"kernel": kernel, "batch": dict.fromkeys(kernel, 9.0)})
    assert "stays an estimate" in copies.advice("h2d", {"kernel": kernel})


# Managed memory


def test_the_sum_of_tiles_is_what_the_words_sum_to() -> None:
    pattern = tile()
    memory = np.zeros(3 * CHUNK_BYTES, np.uint8)
    write(memory, pattern)
    words = memory.view(np.uint32)
    assert int(words.sum(dtype=np.uint64)) == tiles_sum(pattern, memory.size)
    words += 1
    assert int(words.sum(dtype=np.uint64)) == tiles_sum(pattern, memory.size, added=1)


def test_a_fault_point_gives_its_halves_back() -> None:
    for capacity in (140_000_000_001, 25_000_000_000):
        for chunks in (1, 16, 128):
            point = faults.fault_point("stream", chunks * CHUNK_BYTES, capacity, ["A", "B"])
            study = ReplayStudy(point["capacity_bytes"], point["working_set_ratio"], ("A", "B"), "stream")
            assert -(-study.half_bytes // CHUNK_BYTES) == chunks


# Curves


def test_the_points_are_those_of_a_calibration() -> None:
    assert (curves.FILE_FORMAT, curves.FILE_VERSION) == (FORMAT, SCHEMA_VERSION)
    assert {name: MIN_POINTS[name] for name in curves.MIN_POINTS} == curves.MIN_POINTS
    assert set(curves.MIN_POINTS) == set(FIELDS) - {"operators"}
    assert {p["bytes"] for p in PLAN["copy"]} == set(curves.COPY_SIZES)
    assert {p["bytes"] for p in PLAN["link"]} == {mib * MIB for mib in curves.LINK_MIB}
    assert {p["bytes"] for p in PLAN["hbm"]} == {mib * MIB for mib in curves.HBM_MIB}
    assert {p["num_chunks"] for p in PLAN["prefetch"]} == set(prefetch.CALL_CHUNKS)


def test_a_curves_file_needs_points_and_a_known_card(tmp_path: Path) -> None:
    point = {"direction": "h2d", "seconds": [1e-5, 1.1e-5]}
    parts = [
        {"curves": {"copy": [{**point, "bytes": 4096}], "hbm": [{"bytes": 4096, "seconds": [1e-6]}]}},
        {"curves": {"copy": [{**point, "bytes": 8192}]}},
    ]
    made = curves.curves_file(parts, card_of("NVIDIA H200"), GPU, "2026-11-21", None)
    assert made is not None
    assert set(made["curves"]) == {"copy"}  # One point of hbm tells nothing.
    file = tmp_path / "curves.json"
    file.write_text(json.dumps(made))
    assert len(read_curves(file).curves["copy"]) == 2
    assert curves.curves_file(parts, None, GPU, "2026-11-21", None) is None
    assert curves.curves_file([{"curves": {}}], card_of("NVIDIA H200"), GPU, "2026-11-21", None) is None


# Records


def test_a_record_is_on_disk_after_every_case(tmp_path: Path) -> None:
    path = tmp_path / "copies.json"
    record = PartRecord(path, "copies", {"quick": False}, "now")
    record.case("one", num_bytes=10**9, seconds=[0.1, 0.1, 0.11], predicted_gb_per_s=20.0)
    record.without("two", "not run", "no\nsuch   thing")
    record.ratio("one / other", [0.97, 0.96, 0.97], 0.95)
    found = read_part(path)
    assert found is not None
    assert found["status"] == "stopped"
    assert found["cases"][0]["gb_per_s"] == 10.0
    assert found["cases"][1]["why"] == "no such thing"
    assert found["ratios"][0]["verdict"] == "met"
    text = "\n".join(part_lines(found))
    assert "not run: two: no such thing" in text
    assert "0.50" in text  # Of what was predicted.


def test_only_a_whole_part_of_the_same_settings_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "copies.json"
    record = PartRecord(path, "copies", {"quick": False}, "now")
    assert not is_kept(read_part(path), {"quick": False})
    record.finish(1.0)
    assert is_kept(read_part(path), {"quick": False})
    assert not is_kept(read_part(path), {"quick": True})
    record.without("a library", "not run", "is not installed")
    assert is_kept(read_part(path), {"quick": False})
    record.without("a case", "failed", "wrong")
    assert not is_kept(read_part(path), {"quick": False})
    assert not is_kept(None, {})
    path.write_text("{")
    assert read_part(path) is None


def test_parameters_of_the_driver_where_they_may_be_read(tmp_path: Path) -> None:
    (tmp_path / "uvm_perf_prefetch_enable").write_text("1\n")
    assert uvm_parameters(tmp_path) == {"uvm_perf_prefetch_enable": "1"}


# The command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "copys"], "part 'copys' is unknown; allowed: attention"),
        (["--device", "-1"], "--device -1"),
        (["--minutes", "0"], "--minutes 0.0"),
        (["--minutes", "nan"], "--minutes nan"),
        (["--output", str(Path(__file__))], "is a file"),
        (["--wrong"], "unrecognized arguments"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert said in err


def test_without_a_gpu_it_says_so_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.gpu_kit.microbench.cli.num_devices", lambda: 0)
    assert main(["--output", str(tmp_path / "new")]) == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no NVIDIA GPU" in err
    assert not (tmp_path / "new").exists()


def test_the_list_needs_no_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.gpu_kit.microbench.cli.num_devices", lambda: pytest.fail("asked"))
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in PARTS)


def test_another_device_becomes_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, device, expected in ((None, 0, "0"), (None, 2, "2"), ("4,7", 1, "7"), ("4,7", 2, ""), ("", 0, "")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given or "")
        if given is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        see_only(device)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_it_needs_numpy_and_nothing_else() -> None:
    code = (
        "import sys\n"
        "class No:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in sys.argv[1:]:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, No())\n"
        "from experiments.gpu_kit.microbench.cli import main\n"
        "sys.exit(main(['--list']))\n"
    )
    absent = ["hydra", "omegaconf", "pandas", "pyarrow", "rich", "yaml", "numba", "scipy", "wandb", "matplotlib"]
    absent += ["torch", "transformers", "cupy", "cuda"]
    subprocess.run([sys.executable, "-c", code, *absent], check=True, cwd=REPOSITORY, timeout=120, capture_output=True)
