"""What a job, or a whole command, would ignore is refused; what is meant for a part of a sweep is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.jobs import resolved
from uvm_kv.commands.run import preflight
from uvm_kv.config.names import check_overrides, length_workloads, parse_overrides, with_implied


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sampling.temperature=0.5"], "sampling.temperature=0.5 is ignored by runner=sim .*runner=cpu or cuda"),
        (["cuda_graphs=false"], r"cuda_graphs=false is ignored by runner=sim \(it is used by runner=cuda\); remove it"),
        (["runner=cpu", "cuda_graphs=false"], "cuda_graphs=false is ignored by runner=cpu"),
        (["memory=managed", "placement=demand", "memory.allow_oversubscription=true"],
         r"memory.allow_oversubscription=true is ignored by runner=sim \(it is used by runner=cuda"),
        (["runner=cpu", "memory=managed", "placement=demand", "driver.prefetcher=none"],
         r"driver.prefetcher=none is ignored by runner=cpu \(it is used by runner=sim"),
        (["scheduler.window_s=3"], "scheduler.window_s=3.0 is ignored by scheduler=continuous .*=dynamic"),
        (["scheduler=static", "scheduler.window_s=3"], "window_s=3.0 is ignored by scheduler=static"),
    ],
)  # fmt: skip
def test_a_setting_of_another_runner_or_scheduler_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        resolved(*overrides)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_heeded_and_what_is_as_it_is_by_default_is_taken() -> None:
    assert resolved("scheduler=dynamic", "scheduler.window_s=3").config.scheduler.window_s == 3
    assert resolved("memory=managed", "placement=demand", "driver.prefetcher=none").config.driver.prefetcher == "none"
    assert resolved("cuda_graphs=true", "scheduler.window_s=1", "driver.prefetcher=tree", "sampling.temperature=0")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["driver.prefetcher=none"], "driver.prefetcher=none is ignored by memory=device .*memory=managed, or a"),
        (["memory=pinned", "driver.prefetch_threshold_percent=20"], "percent=20 is ignored by memory=pinned"),
        (["-m", "mechanism=pinned_swap,device_resident", "driver.concurrent_managed_access=false"],
         "driver.concurrent_managed_access=false is ignored by memory=device and pinned"),
        (["experiment=energy", "-m", "driver.prefetcher=tree,block"], "driver.prefetcher=block is ignored by"),
        (["model.weights=random"], "model.weights=random is ignored by runner=sim .*runner=cpu or cuda"),
        (["watchdog_s=5"], r"watchdog_s=5 is ignored by runner=sim \(it is used by runner=cuda, or a sweep with"),
        (["-m", "batch_size=1,2", "watchdog_s=5"], "watchdog_s=5 is ignored by runner=sim"),
        (["watchdog_s=5", "hydra/launcher=basic"], "watchdog_s=5 is ignored by runner=sim"),
        (["results_dir="], "results_dir= names no folder; give one, results_dir=DIR, or results_dir=. for this one"),
    ],
)  # fmt: skip
def test_a_command_none_of_whose_jobs_heeds_a_setting_is_refused(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    where = [] if "results_dir=" in arguments else [f"results_dir={tmp_path}"]
    with pytest.raises(ValueError, match=said) as caught:
        preflight([*where, *arguments])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "mechanism=device_resident,managed_demand", "driver.prefetcher=none"],
        ["memory=managed", "placement=demand", "driver.prefetcher=none"],
        ["-m", "memory.kind=device,managed", "driver.prefetcher=none"],
        ["experiment=hints", "-m", "driver.prefetcher=none"],
        ["experiment=oversubscription", "-m", "driver.prefetcher=tree,none,block"],
        ["driver.prefetcher=tree", "watchdog_s=null", "model.weights=file"],
        ["runner=cpu", "model.weights=random"],
        ["prompts=FILE", "model.weights=random"],
        ["experiment=gpu_sweep_llama_7b", "runner=sim", "-m"],
        ["experiment=gpu_sweep_llama_7b", "-m", "watchdog_s=600", "memory.allow_oversubscription=true"],
        ["experiment=gpu_peers_llama_7b", "-m", "model.weights=random"],
        ["-m", "batch_size=1,2", "watchdog_s=5", "hydra/launcher=basic"],
        ["runner=replay", "replay.path=RUN", "driver.prefetcher=none", "model.weights=random"],
    ],
)
def test_what_some_job_of_a_command_heeds_is_taken(tmp_path: Path, arguments: list[str]) -> None:
    assert preflight(with_implied([f"results_dir={tmp_path}", *arguments])).results_dir == tmp_path


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("memory.device_kv_bytes=8GiB", "it must be a whole number of bytes, such as 8589934592, or null"),
        ("batch_size=abc", "it must be a whole number"),
        ("max_steps=few", "it must be a whole number, or null"),
        ("rerun=maybe", "it must be false, true or changed"),
        ("hardware.link.h2d_gb_per_s=fast", "it must be a number"),
        ("hardware.link.zero_copy_gib=4", "it must be a list, such as [1,2]"),
        ("results_dir=[a,b]", "it must be a text"),
    ],
)
def test_a_value_of_the_wrong_type_is_told_what_is_right(override: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{override} is not of the right type; {said}") + "$"):
        check_overrides(parse_overrides([override]))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["workload=azure_conv", "workload.prompt_tokens=9"],
         "workload=azure_conv has lengths of its own, and workload.prompt_tokens=9 is given; give exactly one: drop "
         "workload.prompt_tokens, or use workload=fixed"),
        (["workload.path=FILE"],
         "workload=fixed has lengths of its own, and workload.path=FILE is given; give exactly one: drop "
         "workload.path, or use workload=trace"),
        (["workload=trace", "workload.path=FILE", "workload.prompt_tokens=9", "workload.output_tokens=9"],
         "workload=trace has lengths of its own, and workload.prompt_tokens=9 and workload.output_tokens=9 is given; "
         "give exactly one: drop workload.prompt_tokens and workload.output_tokens, or use workload=fixed"),
        (["workload.prompt_tokens=null"],
         "workload.output_tokens=512 says half of the lengths; give workload.prompt_tokens too"),
        (["workload.prompt_tokens=null", "workload.output_tokens=null"],
         "workload=fixed says no lengths; use workload=fixed, trace, azure_code or azure_conv or sharegpt or "
         "sharegpt_vllm"),
    ],
)  # fmt: skip
def test_lengths_that_are_given_twice_are_told_what_to_drop(tmp_path: Path, overrides: list[str], said: str) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,8,8\n")
    with pytest.raises(ValueError, match=re.escape(said.replace("FILE", str(trace))) + "$"):
        resolved(*(text.replace("FILE", str(trace)) for text in overrides))


def test_the_workloads_with_a_distribution_are_found_and_named(tmp_path: Path) -> None:
    assert length_workloads() == ["azure_code", "azure_conv", "sharegpt", "sharegpt_vllm"]
    for workload in ([], ["workload=trace"]):
        with pytest.raises(ValueError, match=r"workload=azure_code or azure_conv or .*sharegpt_vllm; give one"):
            preflight([*workload, "workload.lengths.source=x", f"results_dir={tmp_path}"])
