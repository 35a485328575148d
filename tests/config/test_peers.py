"""engine=...: what a peer takes from a job, and what is refused in a line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.jobs import resolved, run
from uvm_kv.config.schema import PEERS
from uvm_kv.config.settings import settings
from uvm_kv.job import peers

ON_GPU = ("runner=cuda",)
TAKEN = "which decides for itself; remove it|whose cache grows"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("engine=hf_generat",), "engine 'hf_generat' is unknown; did you mean hf_generate"),
        (("engine=vllm",), "engine=vllm is not served yet: it needs a class beside"),
        (("engine=vllm", *ON_GPU), "engine=vllm is not served yet"),
        (("engine=hf_generate",), "engine=hf_generate with runner=sim: a peer serves a real model; use runner=cpu"),
        (("engine=hf_generate", "runner=replay"), "runner=replay, which re-executes plans of ours"),
        (("engine=hf_offloaded", "runner=cpu"), "engine=hf_offloaded moves KV between a GPU and the host"),
        (("peer.cache=static",), "peer.cache=static is ignored by engine=uvm_kv (it is used by engine=hf_gen"),
        (("engine=hf_generate", "runner=cpu", "peer.cache=paged"), "peer.cache 'paged' is unknown"),
        (("engine=hf_generate", "runner=cpu", "peer.page_size=16"), "it is used by engine=hf_continuous"),
        (("engine=hf_generate", "runner=cpu", "peer.use_cuda_graph=true"), "it is used by engine=hf_continuous"),
        (
            ("engine=hf_continuous", "runner=cpu", "peer.cache=static"),
            "it is used by engine=hf_generate or hf_offloaded",
        ),
        (("engine=hf_continuous", "peer.page_size=2", *ON_GPU), "peer.page_size=2; it must be at least 4"),
        (("engine=hf_continuous", "peer.max_batch_tokens=8", *ON_GPU), "is below batch_size=16"),
        (("engine=hf_generate", "memory.host_kv_bytes=9", *ON_GPU), "memory.host_kv_bytes=9 is ignored by"),
        (("engine=hf_continuous", "memory.host_kv_bytes=9", "runner=cpu"), "pinned memory beside a GPU"),
        (("engine=hf_generate", "workload.arrival=poisson", *ON_GPU), "served in a closed_loop or all_at_once"),
    ],
)
def test_refusals_are_one_line(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        resolved(*overrides)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("engine", PEERS)
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("mechanism=device_resident", "mechanism=device_resident"),
        ("mechanism=pinned_swap", "mechanism=pinned_swap"),
        ("memory=pinned", "memory=pinned"),
        ("placement=demand", "placement=demand"),
        ("placement.num_layers_ahead=4", "placement.num_layers_ahead=4"),
        ("hints.read_mostly=true", "hints.read_mostly=True"),
        ("scheduler=static", "scheduler=static"),
        ("scheduler.max_num_batched_tokens=4096", "scheduler.max_num_batched_tokens=4096"),
        ("scheduler.admission=optimistic", "scheduler.admission=optimistic"),
        ("driver.prefetcher=none", "driver.prefetcher=none"),
        ("layout=block_major", "layout=block_major"),
        ("block_size=32", "block_size=32"),
        ("allocation=reserve_max", "allocation=reserve_max"),
        ("sampling.temperature=0.5", "sampling.temperature=0.5"),
        ("max_steps=3", "max_steps=3"),
        ("record_plans=true", "record_plans=True"),
        ("workload.start=steady", "workload.start=steady"),
    ],
)
def test_what_means_nothing_to_a_peer_is_refused(engine: str, override: str, named: str) -> None:
    with pytest.raises(ValueError, match=TAKEN) as refused:
        resolved(f"engine={engine}", override, *ON_GPU)
    assert str(refused.value).startswith(f"{named} is ignored by engine={engine}")


@pytest.mark.parametrize("engine", PEERS)
def test_an_absent_package_is_named_with_its_extra(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "accelerate" else name)
    with pytest.raises(ValueError, match=rf"engine={engine} needs accelerate, the extra 'torch': pip install"):
        resolved(f"engine={engine}", *ON_GPU)


def test_the_engines_are_a_choice() -> None:
    assert settings()["engine"].rule.allowed == ("uvm_kv", "hf_generate", "hf_offloaded", "hf_continuous")


def test_runs_of_ours_are_what_they_were_before_there_were_peers(tmp_path: Path) -> None:
    """Neither their id nor their comparison knows of engines."""
    of = resolved("batch_size=2")
    assert not [path for path in of.determining() if path.startswith(("engine", "peer"))]
    setting, variant = of.comparison()
    assert not [key for key in {**setting, **variant} if key.startswith(("engine", "peer"))]
    assert run(tmp_path, "batch_size=2", "max_steps=2")["engine"] == "uvm_kv"
