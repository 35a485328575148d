"""The calibrate command: what it writes loads as a card, what it prints, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.config.curves import curves_of
from tests.helpers import CONF
from uvm_kv.calibrate.calibration import quantities_of
from uvm_kv.calibrate.curves import PLAN
from uvm_kv.calibrate.profile_file import load_profile
from uvm_kv.commands.calibrate import main
from uvm_kv.commands.uvm_replay import run as replay
from uvm_kv.config import names
from uvm_kv.config.command import compose_command
from uvm_kv.config.schema import UvmReplaySchema
from uvm_kv.job.resolve import build_profile

pytest.importorskip("scipy")


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/, so that a test may add a card."""
    folder = tmp_path / "conf"
    shutil.copytree(CONF, folder)
    monkeypatch.setattr(names, "CONF_DIR", folder)
    return folder


@pytest.fixture
def curves(tmp_path: Path) -> str:
    """curves=FILE of an A30 whose repeats spread by 1 %."""
    file = tmp_path / "a30.json"
    file.write_text(json.dumps(curves_of(load_profile("a30"), ("link", "copy", "prefetch", "zero_copy"), noise=0.01)))
    return f"curves={file}"


def error(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    """The one line that bad input is answered with."""
    assert main(list(arguments)) == status
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    return err


def test_what_is_written_loads_as_a_card(conf: Path, curves: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([curves, "name=my_3090"]) == 0
    file = conf / "hardware" / "my_3090.yaml"
    assert f"written: {file}" in capsys.readouterr().out
    config: Any = compose_command("uvm_replay", UvmReplaySchema, ["hardware=my_3090", "working_set_ratio=0.01"])
    profile = build_profile(config.hardware)
    assert profile == load_profile("my_3090")
    assert profile.name == "my_3090"
    assert replay(config)[0].seconds > 0
    raw = yaml.safe_load(file.read_text())
    for path, value in quantities_of(profile).items():
        group, name = path.split(".")
        written = raw[group][name]
        assert (tuple(written) if isinstance(written, list) else written) == value or written == vars(value), path
        assert raw["sources"][path] == profile.sources[path]
    assert profile.link.h2d_gb_per_s == pytest.approx(25, rel=0.01)
    assert profile.operators == load_profile("rtx3090").operators
    text = file.read_text()
    assert text.startswith("# a30: generated curves, not measured, 2026-01-31, with tests.config.curves at commit")
    assert str(conf.parent) not in text
    assert [f.name for f in file.parent.iterdir() if f.name.startswith(".")] == []


def test_the_table_shows_what_was_fitted_and_how_well(
    curves: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mine.yaml"
    assert main([curves, "name=mine", "base=h100", f"output={output}"]) == 0
    out = capsys.readouterr().out
    assert "mine from a30.json (generated, not measured)" in out
    cells = {row[0]: row[1:] for line in out.splitlines() if len(row := [c.strip() for c in line.split("│")[1:-1]]) > 2}
    fitted, base, spread, std_error = cells["link.h2d_gb_per_s"]
    assert float(fitted) == pytest.approx(25, rel=0.01)
    assert base == "56"
    assert spread.endswith("%") and std_error.endswith("%")
    assert cells["managed.fault_batch_us"] == ["", "65", "", ""]
    assert cells["copy"][:2] == [str(len(PLAN["copy"])), "5"]
    assert float(cells["copy"][3].rstrip("%")) < 2
    assert "hardware=mine finds it in conf/hardware; put it there to use it" in out
    assert max(map(len, out.splitlines()[:30])) <= 80


def test_an_existing_profile_is_replaced_only_by_force(
    conf: Path, curves: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = conf / "hardware" / "a30.yaml"
    before = file.read_text()
    said = error(capsys, curves, "name=a30")
    assert "a30.yaml exists already; give another name or output, or force=true to replace it" in said
    assert file.read_text() == before
    assert main([curves, "name=a30", "base=a30", "force=true"]) == 0
    assert file.read_text() != before
    assert load_profile("a30").sources["power.active_w"].startswith("not measured; that of a30: board power")


def test_nothing_is_written_when_it_fails(conf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = curves_of(load_profile("a30"), ("link", "zero_copy"))
    for point in raw["curves"]["zero_copy"]:
        point["seconds"] = [s / 3 for s in point["seconds"]]
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(raw))
    assert "share is at most 1" in error(capsys, f"curves={file}", "name=bad")
    assert not (conf / "hardware" / "bad.yaml").exists()


def test_without_curves_it_says_what_it_would_measure_and_refuses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for card, why in (
        (None, "no NVIDIA GPU here; nothing was measured: give curves=FILE.json and name=NAME"),
        (
            {"name": "NVIDIA A30", "uuid": "x", "driver": "580"},
            "python -m experiments.microbench measures this NVIDIA A30",
        ),
    ):
        monkeypatch.setattr("uvm_kv.commands.calibrate.gpu", lambda card=card: card)
        assert main(["name=mine"]) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"error: {why}")
        assert err.count("\n") == 1
        for curve, points in PLAN.items():
            assert f"  {curve} ({len(points)} points): " in out
        assert "bytes 4 KiB, 16 KiB, 64 KiB, 256 KiB, 1 MiB, 4 MiB, 16 MiB, 64 MiB, 256 MiB" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["curves=/no/such/file.json", "name=mine"], "curves=/no/such/file.json cannot be read (No such file"),
        (["curves=/", "name=mine"], "curves=/ cannot be read (Is a directory)"),
        (["CURVES"], "the new profile needs a name: name=my_3090"),
        (["CURVES", "name=a/b"], "name=a/b cannot name a profile"),
        (["CURVES", "name=../b"], "name=../b cannot name a profile"),
        (["CURVES", "name=3090"], "name=3090 cannot name a profile"),
        (["CURVES", "name=mine", "base=rtx3091"], "base 'rtx3091' is unknown; did you mean rtx3090"),
        (["CURVES", "name=mine", "base=../rtx3090"], "base '../rtx3090' is unknown"),
        (["CURVES", "name=mine", "output=/no/such/folder/mine.yaml"], "there is no folder /no/such/folder"),
        (["CURVES", "name=mine", "output=/tmp"], "output=/tmp must be the path of a file that ends in .yaml"),
        (["CURVES", "name=mine", "output=mine.json"], "output=mine.json must be the path of a file"),
        (["CURVES", "name=mine", "output=/proc/mine.yaml"], "output=/proc/mine.yaml cannot be written ("),
        (["CURVES", "name=mine", "force=perhaps"], "force=perhaps is not of the right type"),
        (["CURVES", "name=a,b"], "name=a,b has several values; this command takes one at a time"),
        (["CURVES", "nam=mine"], "key 'nam' is unknown; did you mean name"),
        (["--verbose"], "--verbose is not an option"),
        (["curves"], "cannot be read; write key=value"),
    ],
)
def test_bad_input_is_answered_in_a_line(
    capsys: pytest.CaptureFixture[str], conf: Path, curves: str, arguments: list[str], said: str
) -> None:
    assert said in error(capsys, *[curves if a == "CURVES" else a for a in arguments])
    assert sorted(f.name for f in (conf / "hardware").iterdir()) == sorted(
        f.name for f in (CONF / "hardware").iterdir()
    )


def test_it_says_that_scipy_is_missing(
    capsys: pytest.CaptureFixture[str], conf: Path, curves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uvm_kv.calibrate.calibration.find_spec", lambda _: None)
    assert "a calibration needs scipy, in the extra 'dev': pip install -e '.[dev]'" in error(
        capsys, curves, "name=mine"
    )


def test_help_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "python -m experiments.calibrate" in capsys.readouterr().out
