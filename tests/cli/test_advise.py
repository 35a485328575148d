"""uvm-kv advise: does CPU-backed KV help this card, model and workload?"""

from __future__ import annotations

import dataclasses
import json
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import run
from uvm_kv.advise.advisor import QUANTITIES, Advice, Question, advise, moved_profile, search, uncertainty_of, verdict
from uvm_kv.calibrate.profile_file import load_profile
from uvm_kv.cli import main
from uvm_kv.cli.advise import lines
from uvm_kv.hw.profile import HardwareProfile
from uvm_kv.types import GIB

LLAMA3 = (
    *("hardware=rtx3090", "model=llama3_8b", "memory.device_kv_bytes=1073741824", "mechanism=pinned_balanced"),
    *("workload.prompt_tokens=128", "workload.output_tokens=128", "batch_size=64"),
    "workload.num_requests=192",
)
PCIE3 = ("hardware.link.h2d_gb_per_s=12", "hardware.link.d2h_gb_per_s=13")
LONG = (
    *("model=llama3_8b", "memory.device_kv_bytes=536870912", "workload.prompt_tokens=6000", "workload.num_requests=4"),
    *("workload.output_tokens=50", "batch_size=2", "mechanism=pinned_zero_copy,pinned_balanced"),
)


@cache
def asked(*overrides: str) -> Advice:
    return advise(list(overrides), num_workers=1, progress=lambda _: None)


def reproduced(command: str, folder: Path) -> dict[str, Any]:
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "experiments.run"]
    return run(folder, *words[3:])


def test_llama_7b_on_a_3090_gains_little_or_nothing() -> None:
    advice = asked(
        "hardware=rtx3090", "model=llama_7b", "mechanism=pinned_swap", "batch_size=24", "workload.num_requests=96"
    )
    assert advice.answer != "yes" or (advice.gain is not None and advice.gain < 0.05)
    assert advice.baseline is not None and advice.baseline.batch_size == 22, "where optimistic admission is just full"
    assert advice.num_device_seqs == 16
    assert {p.mechanism for p in advice.tried} == {"device_resident", "device_recompute", "pinned_swap"}
    assert lines(advice)[0].startswith(advice.answer) and "[simulated]" in lines(advice)[0]


def test_little_device_kv_is_a_clear_yes() -> None:
    advice = asked(*LLAMA3)
    assert advice.answer == "yes" and advice.gain is not None and advice.gain_range is not None
    assert 0 < advice.gain_range[0] < advice.gain < advice.gain_range[1]
    assert advice.best is not None and advice.best.host_kv_bytes == GIB and advice.best.peak_host_bytes <= GIB
    assert [effect.quantity for effect in advice.uncertainty] == list(QUANTITIES), "fixed lengths have no spread"
    link = advice.uncertainty[0]
    assert link.uncertainty == 0.1 and link.gains[0] < 0 < link.gains[1], "a slower link costs gain, a faster one adds"
    first = lines(advice)[0]
    assert first.startswith("yes: pinned_balanced with 1 GiB of CPU memory, +") and "(range +" in first


def test_each_side_is_reproduced_by_its_command(tmp_path: Path) -> None:
    advice = asked(*LLAMA3)
    for point, command in ((advice.best, advice.best_command), (advice.baseline, advice.baseline_command)):
        assert point is not None and command is not None
        summary = reproduced(command, tmp_path)
        assert summary["mechanism"] == point.mechanism
        assert summary["output_tokens_per_s"] == point.tokens_per_s
        assert summary["tpot_s"]["p99"] == point.tpot_p99_s


def test_a_slower_link_gains_less() -> None:
    fast, slow = asked(*LLAMA3), asked(*LLAMA3, *PCIE3)
    assert fast.gain is not None and slow.gain is not None
    assert slow.gain < fast.gain


def test_a_sequence_longer_than_the_device_kv_is_refused_without_the_cpu(tmp_path: Path) -> None:
    advice = asked(*LONG)
    assert advice.answer == "yes" and advice.baseline is None and advice.gain is None and advice.num_device_seqs == 0
    assert advice.refused is not None and "the longest request of 6050 tokens" in advice.refused
    assert advice.best is not None and advice.best_command is not None and advice.best.moved_kv
    assert reproduced(advice.best_command, tmp_path)["output_tokens_per_s"] == advice.best.tokens_per_s
    text = "\n".join(lines(advice))
    assert text.startswith("yes: device only refuses this workload; pinned_")
    assert "without: refused" in text


def test_random_lengths_add_their_spread() -> None:
    advice = asked(
        *("model=llama3_8b", "memory.device_kv_bytes=1073741824", "workload=azure_conv", "max_model_len=2048"),
        *("workload.num_requests=48", "batch_size=16", "mechanism=pinned_balanced"),
    )
    spread = advice.uncertainty[-1]
    assert spread.quantity == "lengths" and spread.why == "95 % interval over 5 seeds" and spread.uncertainty > 0
    assert advice.best_command is not None and advice.best_command.endswith("num_repeats=5")


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", *LONG[:-1], "--json", LONG[-1], "driver.concurrent_managed_access=true"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {field.name for field in dataclasses.fields(Advice)}
    assert told["origin"] == "simulated" and told["answer"] == "yes" and told["baseline"] is None
    assert told["best"]["mechanism"].startswith("pinned_") and told["best"]["tokens_per_s"] > 0
    assert set(told["left_out"]) == {"device_resident", "device_recompute"}


def _measured(noise: str) -> HardwareProfile:
    profile = load_profile("rtx3090")
    sources = {**profile.sources, "link.h2d_gb_per_s": f"measured on a card, 2026-01-31, driver 1, curve link: {noise}"}
    return dataclasses.replace(profile, sources=sources)


def test_uncertainty_is_what_the_calibration_recorded() -> None:
    noise = "relative spread 0.7 % over 5 repeats, standard error 0.2 %, residual of the fit 3.1 % (file)"
    half = _measured(noise)
    assert uncertainty_of(half, "link")[0] == 0.1, "the other direction is not measured"
    both = dataclasses.replace(
        half, sources={**half.sources, "link.d2h_gb_per_s": half.sources["link.h2d_gb_per_s"].replace("3.1", "2")}
    )
    assert uncertainty_of(both, "link") == (0.031, "the noise that its calibration recorded")
    assert uncertainty_of(both, "operators") == (0.1, "assumed: not measured on this card")


@pytest.mark.parametrize(
    ("gain", "lowest", "highest", "answer"),
    [
        (0.05, 0.01, 0.09, "yes"),
        (0.05, -0.01, 0.11, "cannot tell"),
        (-0.02, -0.05, 0.02, "cannot tell"),
        (-0.05, -0.08, -0.02, "no"),
        (0.0, 0.0, 0.0, "no"),
        (0.009, 0.008, 0.011, "no"),
    ],
)
def test_the_range_decides(gain: float, lowest: float, highest: float, answer: str) -> None:
    assert verdict(gain, lowest, highest) == answer


def test_a_moved_profile_moves_that_quantity_alone() -> None:
    profile = load_profile("rtx3090")
    assert moved_profile(profile, "", 1.0) is profile
    faster = moved_profile(profile, "operators", 1.1)
    assert faster.gpu.hbm_bytes_per_s == pytest.approx(profile.gpu.hbm_bytes_per_s)
    assert faster.link == profile.link
    assert faster.gpu.float32_tflop_per_s == pytest.approx(1.1 * 35.6)
    assert moved_profile(profile, "HBM", 2.0).gpu.hbm_efficiency == 1.0
    assert moved_profile(profile, "link", 0.9).link.h2d_gb_per_s == pytest.approx(0.9 * profile.link.h2d_gb_per_s)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("hardware=rtx390", "hardware 'rtx390' is unknown; did you mean rtx3090"),
        ("model=llama7b", "model 'llama7b' is unknown; did you mean llama_7b"),
        ("workload=trace", "workload=trace needs a trace file"),
        ("workload=trace workload.path=/no/such.csv", "workload.path=/no/such.csv: that is not a file"),
        ("model=llama2_13b", "llama2_13b leaves no KV memory on rtx3090"),
        (
            "mechanism=device_resident",
            "mechanism=device_resident is not one of CPU-backed KV; allowed: managed_by_tier",
        ),
        ("mechanism=pined_swap", "mechanism 'pined_swap' is unknown; did you mean pinned_swap"),
        ("hardware=rtx3090,a6000", "hardware=rtx3090,a6000 has several values"),
        ("runner=cuda", "runner=cuda: advise simulates"),
        ("memory=pinned", "memory=pinned: advise simulates"),
        ("batch_size=many", "batch_size=many is not of the right type"),
        ("batch_size=0", "batch_size=0; it must be at least 1"),
        ("memory.host_kv_bytes=-1", "memory.host_kv_bytes=-1; a block of KV takes 8388608: give more, or leave it out"),
        ("memory.device_kv_bytes=1000", "memory.device_kv_bytes=1000 holds no KV"),
        ("llama_7b", "'llama_7b' cannot be read; write key=value"),
        ("workload.prompt_tokens=3000", "beyond the 2048 of model=llama_7b"),
    ],
)
def test_a_mistake_is_answered_in_a_line(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", *given.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and said in err


def test_where_nothing_can_serve_the_reason_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", *LONG, "memory.host_kv_bytes=4194304"]) == 2
    assert "the longest request of 6050 tokens" in capsys.readouterr().err


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["advise", "--jsn"])


def test_a_larger_batch_that_is_refused_leaves_what_was_found_below_it() -> None:
    """Its logits need more memory than the weights and the given KV memory leave."""
    given = ("model=qwen2_5_7b", "memory.device_kv_bytes=9814574336", "workload.prompt_tokens=32")
    question = Question((*given, "workload.output_tokens=4", "workload.num_requests=256"))
    for mechanism in ("device_resident", "pinned_balanced"):
        points = search(question, mechanism, [128, 256, 900], 2048)
        assert isinstance(points, list) and {p.batch_size for p in points} >= {128, 256}
        assert max(p.batch_size for p in points) < 900
    refusal = search(question, "device_resident", [900], 2048)
    assert isinstance(refusal, str) and "activation peak" in refusal


def test_a_workload_that_never_fills_the_card_is_told_so() -> None:
    advice = asked("model=llama_7b", "mechanism=pinned_swap", "batch_size=4", "workload.num_requests=16")
    assert advice.answer == "no" and advice.best is not None and not advice.best.moved_kv
    assert advice.baseline is not None and not advice.baseline.limited
    why = next(line for line in lines(advice) if line.startswith("  why:"))
    assert why.endswith("the workload never fills the card's KV memory, which holds 16 requests")
