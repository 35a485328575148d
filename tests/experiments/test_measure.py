"""make measure, where there is no card: consent, warnings, what may be oversubscribed, parts and archive."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from experiments.gpu_kit import consent, gpu_check, parts
from experiments.gpu_kit.consent import has_consent, slug, warnings
from experiments.gpu_kit.gpu_check import main
from experiments.gpu_kit.parts import CONSENT, OWN, SWEEPS, NotPossibleError, Part, parts_of
from tests import jobs
from uvm_kv.store.failures import write_failure
from uvm_kv.types import GIB

CARD = {"name": "NVIDIA GeForce RTX 3090", "uuid": "GPU-0", "driver": "580.0"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A desktop with a 3090 and 64 GiB; what nvidia-smi says of it can be changed."""
    says = {"display_active": "Disabled", "memory.used": "300 MiB", "memory.free": "24000 MiB"}
    for module in (parts, gpu_check):
        monkeypatch.setattr(module, "gpu", lambda: CARD)
    for module in (parts, consent):
        monkeypatch.setattr(module, "query_card", lambda field: says.get(field))
    monkeypatch.setattr(parts, "available_host_bytes", lambda: 60 * GIB)
    monkeypatch.setenv(CONSENT, "")
    return says


def test_consent_is_a_yes_and_nothing_else() -> None:
    asked: list[str] = []

    def answer(text: str) -> Any:
        return lambda question: asked.append(question) or text

    assert has_consent("a card", {}, answer("yes"))
    assert "Oversubscribe this a card?" in asked[0] and "stopped after 180 s" in asked[0]
    for text in ("", "no", "maybe", "yess"):
        assert not has_consent("a card", {}, answer(text))
    assert not has_consent("a card", {}, None)  # Nobody is there to ask.
    asked.clear()
    assert has_consent("a card", {"CONSENT": "YES"}, answer("no"))
    assert not has_consent("a card", {"CONSENT": "no"}, answer("yes"))
    assert asked == []
    with pytest.raises(ValueError, match="CONSENT=1; it is yes or no"):
        has_consent("a card", {"CONSENT": "1"}, None)

    def gone(_: str) -> str:
        raise EOFError

    assert not has_consent("a card", {}, gone)


def test_a_display_and_a_card_in_use_are_warned_of(machine: dict[str, str]) -> None:
    assert warnings() == []
    machine |= {"display_active": "Enabled", "memory.used": "2100 MiB"}
    first, second = warnings()
    assert "drives a display" in first and "2100 MiB of the card are in use" in second


def test_without_consent_nothing_is_oversubscribed(machine: dict[str, str], tmp_path: Path) -> None:
    without = {part.name: part for part in parts_of(OWN)}
    outcome = gpu_check.run_part(without["oversubscribed_llama_7b"], tmp_path, 10, "x")
    assert (outcome.status, outcome.reason) == (
        "not run",
        "no consent to oversubscribe the card (CONSENT=yes gives it)",
    )
    for part in without.values():
        if part.name.startswith("sweep_"):
            words = [word for command in part.commands(tmp_path) for word in command]
            assert not [w for w in words if "allow_oversubscription" in w or w.startswith("watchdog_s")]


def test_with_consent_every_job_has_its_watchdog(
    machine: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CONSENT, "yes")
    seven, eight = parts_of(OWN, ["oversubscribed_llama_7b", "oversubscribed_llama3_8b"])
    commands = seven.commands(tmp_path)
    assert [next(w for w in c if w.startswith("mechanism=")) for c in commands] == [
        f"mechanism={name}" for name in (*parts.MANAGED, "managed_demand")
    ]
    for command in commands:
        assert {"memory.allow_oversubscription=true", "watchdog_s=180"} <= set(command)
    with pytest.raises(NotPossibleError, match="fits this card, so that there is nothing to oversubscribe"):
        eight.commands(tmp_path)


def test_what_is_oversubscribed_needs_host_memory(machine: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "available_host_bytes", lambda: 20 * GIB)
    with pytest.raises(NotPossibleError, match=r"26 GiB must be free; 20\.0 GiB are"):
        parts.check_room(SWEEPS[0])


def test_the_largest_oversubscribed_batch_is_what_the_host_is_asked_for() -> None:
    found = jobs.resolved(
        *("experiment=gpu_sweep_llama_7b", "runner=sim", "mechanism=managed_demand", "memory.device_kv_bytes=null"),
        *("memory.gpu_memory_utilization=1.0", f"memory.host_kv_bytes={parts.DEMAND_HOST_BYTES}", "batch_size=40"),
    )
    needed = max(parts.DEMAND_BATCHES) * found.spec.num_blocks(1024)
    assert needed <= sum(found.capacity)
    assert needed * found.spec.block_bytes < parts.OVERSUBSCRIBED_BYTES


def test_the_folder_is_named_after_the_card() -> None:
    assert slug("NVIDIA GeForce RTX 3090") == "rtx_3090"
    assert slug("NVIDIA H100 80GB HBM3") == "h100_80gb_hbm3"


def test_it_goes_on_and_ends_with_one_archive(
    machine: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Small programs stand in for the parts; the missing point of a watchdog is told at the end."""
    output = tmp_path / "rtx_3090"

    def count(output: Path) -> list[list[str]]:
        code = f"open({str(output / 'doctor' / 'n')!r}, 'a').write('x'); print('done')"
        return [[sys.executable, "-c", code]]

    monkeypatch.setattr(gpu_check, "parts_of", lambda *_: [Part("doctor", "a test", 30, count)])
    identity = {"model": "llama_7b", "mechanism": "managed_demand", "offered_batch": 32}
    run = output / "sweep" / "runs" / "gpu_sweep_llama_7b" / "abc-r0"
    error = "watchdog: stopped after 3 steps or more, at its limit of 180 s (watchdog_s); it may have been thrashing"
    write_failure(run, identity=identity, error=error, tried=True, argv=[], git_sha=None)
    for _ in range(2):
        assert main(["--output", str(output)], own=True) == 0
    assert (output / "doctor" / "n").read_text() == "x"
    said = capsys.readouterr().out
    assert "doctor: kept" in said
    assert "missing: llama_7b, managed_demand, batch 32: watchdog: stopped after 3 steps" in said
    with tarfile.open(output / "measured-rtx_3090.tar.gz") as archive:
        names = archive.getnames()
    assert {"summary.json", "doctor/log.txt", "sweep/runs/gpu_sweep_llama_7b/abc-r0.failed.json"} <= set(names)
    assert json.loads((output / "summary.json").read_text())["gpu"] == CARD


def test_mistakes_are_a_line(machine: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    assert main(["--output", str(tmp_path / "x"), "--parts", "swep"], own=True) == 2
    assert "--parts swep: no such part; there are microbench, doctor" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gpu_check, "gpu", lambda: None)
    assert main([], own=True) == 3
    assert "nothing to measure" in capsys.readouterr().out
