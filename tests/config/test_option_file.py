"""Options of the user's own and numbers from the command line: every quantity of every card can be given, and what was
given is never said to be what a data sheet says."""

from __future__ import annotations

import dataclasses
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.helpers import REPOSITORY
from tests.jobs import composed
from uvm_kv.advise.advisor import Advice, Question
from uvm_kv.calibrate.profile_file import load_profile
from uvm_kv.cli.advise import lines
from uvm_kv.commands import uvm_replay
from uvm_kv.commands.roofline import main as roofline
from uvm_kv.commands.run import preflight
from uvm_kv.config.command import compose_command, compose_config
from uvm_kv.config.names import groups
from uvm_kv.config.option_file import NUMBERS, axes_of, mark_sources, without_source
from uvm_kv.config.schema import RooflineSchema, UvmReplaySchema
from uvm_kv.hw.profile import HardwareProfile
from uvm_kv.job.resolve import build_profile, resolve
from uvm_kv.job.roofline import analyze

SHEET = "a data sheet that nobody wrote"


def quantities(profile: HardwareProfile) -> dict[str, Any]:
    """Dotted path of every number, or list of numbers, to its value."""
    groups_of = {name: dataclasses.asdict(getattr(profile, name)) for name in NUMBERS if name != "operators"}
    flat = {f"{group}.{name}": value for group, node in groups_of.items() for name, value in node.items()}
    for name, cost in profile.operators.items():
        flat |= {f"operators.{name}.{field}": value for field, value in dataclasses.asdict(cost).items()}
    return flat


def changed(path: str, value: Any) -> Any:
    """Another value that is allowed: shares stay below 1, and lists keep their order."""
    if isinstance(value, tuple):
        return [v * 0.5 for v in value]
    return value + 1 if isinstance(value, int) else value * 0.5 + 0.001


def overrides(profile: HardwareProfile) -> tuple[dict[str, Any], list[str]]:
    values = {path: changed(path, value) for path, value in quantities(profile).items()}
    return values, [f"hardware.{path}={value}" for path, value in values.items()]


def check_given(profile: HardwareProfile, values: dict[str, Any]) -> None:
    found = quantities(profile)
    assert len(values) == len(found) > 70
    for path, value in values.items():
        assert found[path] == (tuple(value) if isinstance(value, list) else value), path
        assert profile.sources[path] == "given on the command line"


@pytest.mark.parametrize("name", groups()["hardware"])
def test_every_quantity_of_every_card_can_be_given(name: str) -> None:
    plain = composed(f"hardware={name}").hardware
    hardware: Any = OmegaConf.to_object(plain)
    values, given = overrides(build_profile(hardware))
    before = dict(plain.sources)
    choices = {"hardware": name, "link": "own"}
    mark_sources(plain, [], choices=choices)
    assert plain.sources == before  # Of our own files, each says where all its numbers are from.
    config: Any = OmegaConf.to_object(compose_config([f"hardware={name}", *given]).hardware)
    check_given(build_profile(config), values)


def test_every_command_takes_every_quantity() -> None:
    """Quantities are checked by name and type before anything is composed, and are then used."""
    values, given = overrides(load_profile("a6000"))
    given = ["hardware=a6000", *given]
    assert preflight([*given, "results_dir=/tmp"]).num_jobs == 1
    replay: UvmReplaySchema = compose_command("uvm_replay", UvmReplaySchema, given)
    step: RooflineSchema = compose_command("roofline", RooflineSchema, given)
    assert analyze(step).total_s > 0
    assert uvm_replay.published_ms(replay) == [None] * 4
    advised = Question(tuple(given)).resolved("device_resident", 2).profile
    for profile in (advised, build_profile(replay.hardware), build_profile(step.hardware)):
        check_given(profile, values)


def test_a_group_of_numbers_can_be_given_at_once() -> None:
    given = ["hardware.operators.q_proj={knee:2,overhead_us:1}", "hardware.link={h2d_gb_per_s:12}"]
    preflight([*given, "results_dir=/tmp"])
    sources = resolve(compose_config(given)).profile.sources
    assert sources["link.h2d_gb_per_s"] == sources["operators.q_proj.knee"] == "given on the command line"
    assert "on the command line" not in sources["link.d2h_gb_per_s"]


def test_a_source_on_the_command_line_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^hardware\.sources\.link\.h2d_gb_per_s cannot be given .*docs/hardware\.md"):
        preflight(["hardware.sources.link.h2d_gb_per_s=me"])


def test_the_link_of_a_replayed_study_can_be_another(capsys: pytest.CaptureFixture[str]) -> None:
    config: UvmReplaySchema = compose_command("uvm_replay", UvmReplaySchema, ["link=pcie3"])
    assert config.hardware.link.h2d_gb_per_s == 11.5
    assert config.hardware.sources["link.h2d_gb_per_s"].startswith("pinned copies over PCIe 3.0")
    assert uvm_replay.published_ms(config) == [None] * 4  # The study's card was on PCIe 4.0.
    assert uvm_replay.published_ms(compose_command("uvm_replay", UvmReplaySchema, []))[0] == 1335.8
    assert roofline(["link=pcie3"]) == 2  # One step on the card moves nothing over it.
    assert "key 'link' is unknown" in capsys.readouterr().err


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    return folder


def write(folder: Path, option: str, text: str) -> None:
    file = folder / f"{option}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


def refusal(own: Path, *given: str) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        preflight([f"hydra.searchpath=[{own}]", "results_dir=/tmp", *given])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_inherited_source_never_covers_a_changed_number(own: Path) -> None:
    write(
        own,
        "hardware/base",
        "name: base\ndefaults: [h100, _self_]\ngpu: {memory_bytes: 17179869184, hbm_gb_per_s: 1000.0}\n"
        f"link: {{h2d_gb_per_s: 20.0, d2h_gb_per_s: 21.0}}\nsources:\n  link: {SHEET}\n",
    )
    write(
        own,
        "hardware/card",
        f"name: card\ndefaults: [base, _self_]\ngpu: {{hbm_gb_per_s: 1100.0}}\nlink: {{d2h_gb_per_s: 22.0}}\n"
        f"power: {{idle_w: 10.0}}\nsources:\n  gpu.hbm_gb_per_s: {SHEET}\n  power.idle_w:\n",
    )
    write(own, "link/x8", "# @package hardware\nlink: {pageable_share: 0.7}\n")
    given = [f"hydra.searchpath=[{own}]", "hardware=card", "link=x8"]
    preflight([*given, "results_dir=/tmp"])
    sources = resolve(compose_config(given)).profile.sources
    assert sources["link.pageable_share"] == "given by x8, no source"
    assert sources["gpu.memory_bytes"] == "given by base, no source"
    assert sources["gpu.hbm_gb_per_s"] == SHEET
    assert sources["link.h2d_gb_per_s"] == SHEET  # Its own, though the card below has a more special one.
    assert sources["link.d2h_gb_per_s"] == "given by card, no source"
    assert sources["power.idle_w"] == "given by card, no source"  # A blank source is none.
    assert sources["link.copy_call_us"] == load_profile("h100").sources["link.copy_call_us"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: card\ngpu: {memory_bytes: 5", "line 2: not YAML"),
        ("name: card\nname: card\n", "line 2: not YAML: found duplicate key name"),
        ("\tname: card\n", "line 1: not YAML"),
        ("- a list\n", "it must hold keys and values"),
        ("", "it has no name"),
        ("name: rtx3090\ndefaults: [rtx3090, _self_]\n", "it says name: rtx3090, so that results would bear another's"),
        ("name: card\ndefaults: [rtx309, _self_]\n", "defaults: hardware 'rtx309' is unknown; did you mean"),
        ("name: card\ndefaults: [card, _self_]\n", "its defaults lead back to card itself"),
        ("name: card\ndefaults: rtx3090\n", "defaults must be a list"),
        ("name: card\ndefaults: [rtx3090]\n", r"would win over the file itself; .*`defaults: \[rtx3090, _self_\]`"),
        ("name: card\ndefaults: [_self_, rtx3090]\n", "would win over the file itself"),
        ("name: card\ngpu: {memory_bytes: 5}\n", "gpu.context_bytes, gpu.hbm_efficiency, gpu.hbm_gb_per_s and 38 more"),
        ("name: card\ndefaults: [rtx3090, _self_]\ngpu: {memory_bites: 5}\n", "did you mean hardware.gpu.memory_bytes"),
        ("name: card\ndefaults: [rtx3090, _self_]\noperators: {q_prj: {knee: 2}}\n", "did you mean hardware.op"),
        ("name: card\ndefaults: [rtx3090, _self_]\ngpu: {memory_bytes: many}\n", "must be a whole number of bytes"),
        ("name: card\ndefaults: [rtx3090, _self_]\nlink: {zero_copy_gib: 3}\n", "it must be a list"),
        ("name: card\ndefaults: [rtx3090, _self_]\ngpu:\n", "hardware.gpu=None is not of the right type"),
        ("name: card\ndefaults: [rtx3090, _self_]\nsources: {gpu.memory_bites: x}\n", "did you mean gpu.memory_bytes"),
        ("name: card\ndefaults: [rtx3090, _self_]\nsources: {gpu: {memory_bytes: x}}\n", "sources.gpu is not a text"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_profile_is_one_line_that_names_the_file(own: Path, text: str, said: str) -> None:
    write(own, "hardware/card", text)
    message = refusal(own, "hardware=card")
    assert message.startswith(f"{own / 'hardware' / 'card.yaml'}")
    with pytest.raises(ValueError, match=said):
        raise ValueError(message)
    for name, schema in (("roofline", RooflineSchema), ("uvm_replay", UvmReplaySchema)):
        with pytest.raises(ValueError, match=said):
            compose_command(name, schema, [f"hydra.searchpath=[{own}]", "hardware=card"])


def test_a_long_value_is_not_repeated_in_full(own: Path) -> None:
    write(own, "hardware/card", f"name: card\ndefaults: [rtx3090, _self_]\ngpu: {{memory_bytes: {'x' * 5000}}}\n")
    assert len(refusal(own, "hardware=card")) < 400


def test_an_option_with_the_name_of_ours_is_refused(own: Path) -> None:
    write(own, "hardware/rtx3090", "name: rtx3090\n")
    assert "hardware=rtx3090 is one of ours and would be taken instead; rename yours" in refusal(own)


def test_a_folder_that_does_not_exist_is_refused(own: Path) -> None:
    with pytest.raises(ValueError, match=r"/absent\]: there is no such folder"):
        preflight([f"hydra.searchpath=[{own}/absent]"])


def test_an_unknown_card_names_the_page_that_tells_how_to_add_one() -> None:
    for names_it in (preflight, lambda a: compose_command("uvm_replay", UvmReplaySchema, a)):
        with pytest.raises(ValueError, match=r"'rtx5090' is unknown; .*docs/hardware\.md tells how to add a card"):
            names_it(["hardware=rtx5090"])


MECHANISM = (
    "# @package _global_\ndefaults:\n  - override /memory: pinned\n  - override /placement: resident\n"
    "  - override /hints: none\nmechanism: {name}\nscheduler:\n  admission: optimistic\n  preemption: swap\n"
)


def test_mechanisms_workloads_and_experiments_of_ones_own(own: Path, tmp_path: Path) -> None:
    write(own, "mechanism/my_swap", MECHANISM.format(name="my_swap"))
    write(own, "workload/short", "name: short\nprompt_tokens: 16\noutput_tokens: 4\narrival: closed_loop\n")
    write(
        own,
        "experiment/mine",
        "# @package _global_\ndefaults:\n  - override /workload: short\n  - override /mechanism: my_swap\n"
        "hardware: {link: {h2d_gb_per_s: 5.0}}\nhydra: {sweeper: {params: {batch_size: '2,4'}}}\n",
    )
    given = [f"hydra.searchpath=[{own}]", "experiment=mine", f"results_dir={tmp_path}"]
    assert preflight(["-m", *given]).num_jobs == 2
    config = compose_config(given)
    assert config.hardware.sources["link.h2d_gb_per_s"] == "given by mine, no source"
    with pytest.raises(ValueError, match="mechanism 'my_swap' is unknown"):
        resolve(config)
    found = resolve(config, [own])
    assert (found.config.mechanism, found.config.workload.prompt_tokens) == ("my_swap", 16)
    with pytest.raises(ValueError, match="mechanism=my_swap means memory=pinned, but memory=device is given"):
        resolve(OmegaConf.merge(config, {"memory": {"kind": "device"}}), [own])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        ("mechanism/m", MECHANISM.format(name="pinned_swap"), "it says mechanism: pinned_swap"),
        ("mechanism/m", MECHANISM.format(name="m") + "  watermarc: 1\n", "did you mean scheduler.watermark"),
        ("mechanism/m", MECHANISM.format(name="m").replace("pinned", "pined"), "memory 'pined' is unknown"),
        ("mechanism/m", "mechanism: m\n", "write `# @package _global_` as its first line"),
        ("experiment/m", "batch_size: 4\n", "write `# @package _global_` as its first line"),
        ("link/m", "link: {h2d_gb_per_s: 4.0}\n", "write `# @package hardware` as its first line"),
        ("link/m", "# @package hardware\nlink: {h2d_gbps: 4.0}\n", "did you mean hardware.link.h2d_gb_per_s"),
        ("experiment/m", "# @package _global_\nbatch_sise: 4\n", "did you mean batch_size"),
        ("experiment/m", "# @package _global_\nbatch_size: [4\n", "not YAML"),
        ("experiment/m", "# @package _global_\ndefaults:\n  - override /hardwear: rtx3090\n", "hardwear"),
        ("experiment/m", "# @package _global_\nhydra: {sweeper: {params: {batch_sise: '2,4'}}}\n", "mean batch_s"),
        ("workload/m", "name: m\nprompt_tokens: few\n", "workload.prompt_tokens=few is not of the right type"),
        ("workload/m", "name: m\nlengths: {sourse: x}\n", "did you mean workload.lengths.source"),
        ("workload/m", "prompt_tokens: 5\noutput_tokens: 5\n", "workload.name has no value"),
        ("model/m", "name: m\nnum_layers: 2.5\n", "model.num_layers=2.5 is not of the right type"),
    ],
)  # fmt: skip
def test_a_mistake_in_any_option_is_one_line(own: Path, option: str, text: str, said: str) -> None:
    write(own, option, text)
    assert said in refusal(own, f"{option.partition('/')[0]}=m")


def test_a_mechanism_that_leaves_an_axis_open_is_refused(own: Path) -> None:
    write(own, "mechanism/m", "# @package _global_\nmechanism: m\n")
    with pytest.raises(ValueError, match=r"must say its memory and placement and scheduler\.admission and"):
        axes_of("m", [own])


def test_the_page_on_adding_a_card_works_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (REPOSITORY / "docs" / "hardware.md").read_text()
    found = re.search(r"<!-- file: (\S+) -->\s*```yaml\n(.*?)```", page, re.DOTALL)
    assert found is not None
    file = tmp_path / found[1]
    file.parent.mkdir(parents=True)
    file.write_text(textwrap.dedent(found[2]))
    monkeypatch.chdir(tmp_path)
    block = re.search(r"<!-- commands -->\s*```sh\n(.*?)```", page, re.DOTALL)
    assert block is not None
    commands = [shlex.split(line) for line in block[1].splitlines() if line.strip()]
    assert [command[2] for command in commands] == ["experiments.roofline", "experiments.run", "experiments.uvm_replay"]
    for _, _, module, *arguments in commands:
        if module == "experiments.run":
            assert preflight(arguments).num_jobs == 1
            found_profile = resolve(compose_config(arguments)).profile
            assert (found_profile.name, found_profile.link.h2d_gb_per_s) == (file.stem, 56.0)
            assert not without_source(found_profile.sources)
        else:
            assert (roofline if module.endswith("roofline") else uvm_replay.main)(arguments) == 0
            assert file.stem in capsys.readouterr().out


def test_advise_says_which_numbers_have_no_source() -> None:
    given = {"gpu.memory_bytes": "given by mine, no source", "power": SHEET, "link": "given by it, no source"}
    found = without_source(given)
    assert found == {"gpu.memory_bytes": "mine", "link": "it"}
    advice = Advice("no", "mine", None, "m", "w", 0, 0, None, None, None, None, None, [], {}, found)
    assert lines(advice)[-1].startswith(
        "  no source: gpu.memory_bytes (given by mine), link (given by it); the range leaves out how far off"
    )
