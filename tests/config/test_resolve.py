"""Every way to get a config wrong is a ValueError that says what was given, what is allowed and how to mend it."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf, open_dict

from tests.jobs import MECHANISMS, composed, job, resolved, run
from uvm_kv.config.command import compose_command
from uvm_kv.config.names import CONF_DIR, check_overrides, groups, parse_overrides
from uvm_kv.config.schema import UvmReplaySchema
from uvm_kv.config.settings import settings
from uvm_kv.job.build import repeats_of, workload_of
from uvm_kv.job.resolve import resolve
from uvm_kv.job.serving import free_host_bytes


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model=lama_7b", r"model 'lama_7b' is unknown; did you mean llama_7b"),
        ("hardware=rtx309", r"hardware 'rtx309' is unknown; did you mean rtx3090"),
        ("mechanism=pinned_balance", r"mechanism 'pinned_balance' is unknown; did you mean pinned_balanced"),
        ("mechanism=device_resident,pinned_swop", r"mechanism 'pinned_swop' is unknown; did you mean pinned_swap"),
        ("batchsize=3", r"key 'batchsize' is unknown; did you mean batch_size"),
        ("memory.device_kv_gib=3", r"key 'memory.device_kv_gib' is unknown; did you mean memory.device_kv_bytes"),
        ("hardware.link.h2d_gbps=3", r"did you mean hardware.link.h2d_gb_per_s"),
        ("batch_size=many", r"batch_size=many is not of the right type"),
        ("batch_size=8,many", r"batch_size=many is not of the right type"),
        ("seed=1.5", r"seed=1.5 is not of the right type"),
        ("memory.device_kv_bytes=8GB", r"memory.device_kv_bytes=8GB is not of the right type"),
        ("batch_size", r"'batch_size' cannot be read; write key=value"),
        ("memory=null", r"memory 'null' is unknown"),
        ("~memory", r"nothing can be taken out"),
        ("batch_size=interval(1,3)", r"cannot be swept; list the values"),
        ("mechanism=glob(*)", r"cannot be swept; list the values"),
        ("hardware.operators.attt.knee=2", r"'hardware.operators.attt.knee' is unknown"),
        ("hardware.operators.q_proj.overhead_us=fast", r"overhead_us=fast is not of the right type"),
    ],
)
def test_names_and_types_are_checked_before_composition(override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_overrides(parse_overrides([override]))


def test_good_overrides_pass_the_name_check() -> None:
    good = [
        "mechanism=device_resident,pinned_swap",
        "batch_size=1,2",
        "hardware.link.h2d_gb_per_s=0.1",
        "hardware.operators.q_proj.knee=2",
        "max_steps=null",
        "workload.path=/some/where.csv",
        "hydra.launcher.n_jobs=1",
    ]
    check_overrides(parse_overrides(good))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["batch_size=0"], "batch_size=0; it must be at least 1"),
        (["block_size=0"], "block_size=0"),
        (["num_repeats=0"], "num_repeats=0"),
        (["runner=gpu"], "runner 'gpu' is unknown.*sim"),
        (["dtype=float8"], "dtype 'float8' is unknown; did you mean float"),
        (["layout=layer"], "layout 'layer' is unknown"),
        (["workload.prompt_tokens=2000"], "make 2512 tokens, beyond the 2048 of model=llama_7b"),
        (["max_model_len=4096"], "max_model_len=4096 exceeds the context of llama_7b, 2048"),
        (["memory.device_kv_bytes=20000000000"], "does not fit rtx3090: weights 13.48 GB .* exceed 25.77 GB; at most"),
        (["model=llama2_13b"], "leaves no KV memory on rtx3090"),
        (["memory.gpu_memory_utilization=1.5"], "gpu_memory_utilization=1.5; it must be above 0 and at most 1"),
        (["memory.host_kv_bytes=1073741824"], "memory=device, which has no host tier; use memory=pinned"),
        (["memory=pinned", "memory.host_kv_bytes=-1"], "host_kv_bytes=-1; it must be at least 0 and at most"),
        (["placement=demand"], "placement=demand cannot be served by memory=device; it needs memory=managed"),
        (["memory=managed", "placement=bandwidth_balanced"], "needs memory=pinned or vmm"),
        (["mechanism=pinned_balanced", "memory=device"], "pinned_balanced means memory=pinned, but memory=device"),
        (["mechanism=device_recompute", "scheduler.preemption=none"], "means scheduler.preemption=recompute, but"),
        (["mechanism=managed_demand", "hints=by_tier"], "means hints.preferred_location=none, but"),
        (["driver.prefetcher=forest"], "driver.prefetcher 'forest' is unknown; allowed: block, none, tree"),
        (["driver.prefetch_threshold_percent=101"], "driver.prefetch_threshold_percent=101; it must be at least 1 and"),
        (
            ["mechanism=managed_demand", "driver.concurrent_managed_access=false"],
            r"driver.concurrent_managed_access=false \(Windows, WSL2\) with memory.host_kv_bytes=",
        ),
        (
            ["memory=managed", "placement=demand", "memory.host_kv_bytes=0", "hints=device",
             "driver.concurrent_managed_access=false"],
            "cudaMemAdvise and prefetch fail; use hints=none",
        ),
        (["memory=vmm", "placement=static_split", "memory.pageable=true"], "needs memory=pinned and placement"),
        (["mechanism=pinned_swap", "memory.pageable=true"], "mechanism=pinned_swap means memory.pageable=False"),
        (["hardware.operators.q_proj.compute_efficiency=50"], "q_proj.compute_efficiency=50.0; a share lies between"),
        (["hardware.managed.stream_fault_pages=1000"], "stream_fault_pages=1000; the driver fetches at most 256"),
        (["hardware.managed.fault_batch_us=-1"], "fault_batch_us=-1.0; it must be zero or a positive number"),
        (["hints=by_tier"], r"preferred_location=by_tier is ignored by memory=device \(it is used by memory=managed"),
        (["scheduler.admission=optimistic"], "needs scheduler.preemption=recompute or swap"),
        (["scheduler.admission=optimistic", "scheduler.preemption=swap"], "swap needs memory=pinned"),
        (["scheduler.max_num_batched_tokens=8"], "is below batch_size=16"),
        (["mechanism=pinned_zero_copy", "allocation=reserve_max"], "needs placement=resident"),
        (["mechanism=device_resident", "allocation=on_demand"], r"needs .*optimistic.*mechanism=device_recompute"),
        (["mechanism=device_recompute", "allocation=orca_pow2"], r"needs .*worst_case.*mechanism=device_resident"),
        (["mechanism=pinned_swap", "allocation=orca_oracle"], r"needs .*worst_case.*mechanism=device_resident"),
        (["mechanism=pinned_zero_copy", "allocation=orca_max"], "needs placement=resident"),
        (["mechanism=managed_demand", "allocation=orca_max"], "needs placement=resident"),
        (["allocation=orca"], "allocation 'orca' is unknown; .*allowed: .*orca_max.*"),
        (["workload.start=steady", "allocation=orca_max"], "needs allocation=paged, given is allocation=orca_max"),
        (["workload=trace"], "workload=trace needs a trace file: workload.path=FILE"),
        (["workload=trace", "workload.path=/no/such.csv"], "/no/such.csv: that is not a file"),
        (["workload.arrival=trace"], "arrival=trace needs workload=trace"),
        (["workload.arrival=poisson"], "request_rate=None; a rate"),
        (["workload.arrival=poisson", "workload.request_rate=0"], "request_rate=0.0; it must be at least"),
        (["workload=azure_conv", "workload.prompt_tokens=5"], "give exactly one"),
        (["workload.start=warm"], "workload.start 'warm' is unknown; allowed: cold, steady"),
        (["workload.start=steady", "workload.arrival=all_at_once"], "needs workload.arrival=closed_loop, given .*once"),
        (
            ["workload.start=steady", "workload.arrival=poisson", "workload.request_rate=1"],
            "needs workload.arrival=closed_loop",
        ),
        (["workload.start=steady", "allocation=reserve_max"], "needs allocation=paged, given is allocation=reserve"),
        (
            ["workload.start=steady", "mechanism=device_recompute", "allocation=on_demand"],
            "needs allocation=paged, given is allocation=on_demand",
        ),
        (["workload.start=steady", "scheduler=static"], "needs scheduler=continuous, given is scheduler=static"),
        (["max_seconds=0"], "max_seconds=0.0; it must be at least"),
        (["max_seconds=-1"], "max_seconds=-1.0; it must be at least"),
        (["max_steps=0"], "max_steps=0; it must be at least 1"),
        (["model.weights=none"], "model.weights 'none' is unknown; allowed: file, random"),
        (["runner=replay"], "runner=replay and replay.path=RUN_DIRECTORY go together"),
        (["runner=cuda"], "runner=cuda needs an NVIDIA GPU"),
        (["model=hf"], "model.path=DIR"),
        (["hardware.link.h2d_gb_per_s=0"], r"hardware.link.h2d_gb_per_s=0.0; it must be a positive number"),
        (["hardware.link.h2d_gb_per_s=nan"], "h2d_gb_per_s=nan; it must be a positive number"),
        (["hardware.link.h2d_gb_per_s=inf"], "h2d_gb_per_s=inf; it must be a positive number"),
        (["hardware.power.idle_w=nan"], "idle_w=nan; it must be a positive number"),
        (["hardware.operators.q_proj.knee=0"], "q_proj.knee=0.0; it must be a positive number"),
        (["seed=-1"], "seed=-1; it must be at least 0 and at most"),
        (["memory=pinned", "memory.host_kv_bytes=1000000000000000000"], "host_kv_bytes=.* it must be at least"),
        (["workload.num_requests=100000000000"], "num_requests=.* it must be at least"),
        (["memory=managed", "placement=static_split"], "needs hints=by_tier"),
        (["placement.num_layers_ahead=4"], "num_layers_ahead=4 is ignored by placement=resident"),
        (["mechanism=pinned_prefetch_ahead", "placement.reach=in_place"], "reach=in_place is ignored"),
        (["mechanism=pinned_prefetch_ahead", "placement.num_layers_ahead=99"], "takes 1 to 30"),
        (["hardware.gpu.hbm_efficiency=1.2"], "hbm_efficiency=1.2; a share lies between 0 and 1"),
    ],
)  # fmt: skip
def test_contradictions_and_impossible_values_are_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        job(tmp_path, *overrides)
    assert len(str(caught.value).splitlines()) <= 3


def test_runner_cpu_names_the_extra_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"runner=cpu needs torch and transformers.*\[torch\]"):
        resolved("runner=cpu")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["memory.device_kv_bytes=1000000"],
            "device_kv_bytes=1000000 holds no KV; one block of 16 tokens takes 8388608",
        ),
        (
            ["mechanism=pinned_swap", "memory.host_kv_bytes=1000"],
            "host_kv_bytes=1000 holds no KV; one block .* or 0 for",
        ),
        (
            ["memory.device_kv_bytes=1000000000", "allocation=orca_max", "max_model_len=1900"],
            "the largest chunk of the KV budget holds 64 blocks .* tokens needs 119 ",
        ),
        (["memory.device_kv_bytes=500000000"], "longest request of 1024 tokens needs 64"),
        (["workload=azure_conv", "workload.too_long=error"], "use workload.too_long=drop"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_before_the_run(
    tmp_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        job(tmp_path, *overrides)


def test_a_trace_row_beyond_the_context_names_its_line_or_is_dropped(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,100,10\n1,3000,10\n")
    shared = ("workload=trace", f"workload.path={trace}")
    with pytest.raises(ValueError, match="line 3: 3000 prompt"):
        job(tmp_path, *shared)
    assert job(tmp_path, *shared, "workload.too_long=drop")


@pytest.mark.parametrize("name", groups()["mechanism"])
def test_every_mechanism_resolves_and_keeps_its_label(name: str) -> None:
    assert resolved(f"mechanism={name}").config.mechanism == name


def test_the_mechanisms_of_the_main_job_exist() -> None:
    assert set(MECHANISMS) <= set(groups()["mechanism"])


@pytest.mark.parametrize("name", groups()["hardware"])
def test_every_card_resolves_and_every_number_has_a_source(name: str) -> None:
    profile = resolved(f"hardware={name}", "model=smollm2_135m").profile  # Fits the smallest card.
    assert profile.name == name


def test_a_number_without_a_source_is_refused() -> None:
    config = composed()
    with open_dict(config):
        del config.hardware.sources["link.h2d_gb_per_s"]
    with pytest.raises(ValueError, match=r"hardware\.link\.h2d_gb_per_s has no source"):
        resolve(config)


@pytest.mark.parametrize("name", [n for n in groups()["model"] if n != "hf"])
def test_every_model_resolves_on_a_large_card(name: str) -> None:
    assert resolved(f"model={name}", "hardware=a6000").model.name == name


def test_a_hugging_face_folder_gives_the_geometry(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, '
        '"num_hidden_layers": 3, "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 4096}'
    )
    model = resolved("model=hf", f"model.path={tmp_path}").model
    assert (model.num_layers, model.num_kv_heads, model.head_dim) == (3, 2, 16)
    broken = {
        "[]": "not a model's config",
        '{"model_type": "llama", "hidden_size": "abc"}': "hidden_size is 'abc'",
        '{"model_type": "llama", "vocab_size": null}': "has none of vocab_size",
        "{}": "model_type=null is none of the",
    }
    for text, said in broken.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            resolved("model=hf", f"model.path={tmp_path}")
    with pytest.raises(ValueError, match=r"no config\.json there"):
        resolved("model=hf", "model.path=/no/such/folder")


def test_layout_follows_the_preemption_unless_given() -> None:
    assert resolved("mechanism=pinned_swap").spec.layout == "block_major"
    assert resolved("mechanism=managed_demand").spec.layout == "layer_major"
    assert resolved("mechanism=managed_demand", "layout=block_major").spec.layout == "block_major"


def test_reach_defaults_to_both() -> None:
    assert resolved("mechanism=pinned_balanced").config.placement.reach == "both"


def test_choices_cover_what_the_groups_offer() -> None:
    names = groups()
    assert set(names["placement"]) == set(settings()["placement.name"].rule.allowed)
    assert set(names["memory"]) == set(settings()["memory.kind"].rule.allowed)
    schedulers = {str(OmegaConf.load(CONF_DIR / "scheduler" / f"{name}.yaml").name) for name in names["scheduler"]}
    assert schedulers == set(settings()["scheduler.name"].rule.allowed) <= set(names["scheduler"])
    assert set(names["tracking"]) == set(settings()["tracking.name"].rule.allowed)


def test_every_config_file_says_what_it_is() -> None:
    for file in CONF_DIR.rglob("*.yaml"):
        assert any(line.startswith("#") and len(line) > 8 for line in file.read_text().splitlines()[:3]), file


def test_what_the_command_line_changes_of_a_profile_is_said_to_be_from_there(tmp_path: Path) -> None:
    changed = compose_command("uvm_replay", UvmReplaySchema, ["hardware.link.h2d_gb_per_s=12", "hardware=a30"])
    assert changed.hardware.sources["link.h2d_gb_per_s"] == "given on the command line"
    assert "A30" in changed.hardware.sources["managed.evict_fixed_us"]


def test_pageable_memory_swaps_more_slowly(tmp_path: Path) -> None:
    sizes = ("batch_size=24", "workload.prompt_tokens=512", "workload.output_tokens=128", "max_steps=400")
    pinned, pageable = (
        run(tmp_path, f"mechanism={mechanism}", *sizes, "memory.device_kv_bytes=3000000000")
        for mechanism in ("pinned_swap", "pageable_swap")
    )
    assert pinned["preemptions"] > 0
    assert pageable["stall_s"] > pinned["stall_s"]


def test_without_concurrent_access_managed_memory_that_fits_never_faults(tmp_path: Path) -> None:
    axes = ("memory=managed", "placement=demand", "memory.host_kv_bytes=0", "max_steps=50")
    assert run(tmp_path, *axes)["gpu_fault_groups"] > 0
    assert run(tmp_path, *axes, "driver.concurrent_managed_access=false")["gpu_fault_groups"] == 0


def test_free_host_memory_counts_what_is_cached(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       65536 kB\nMemFree:         1024 kB\nMemAvailable:   32768 kB\n")
    assert free_host_bytes(meminfo) == 32 * 1024**2
    assert free_host_bytes(tmp_path / "none") > 0


@pytest.mark.parametrize(
    ("overrides", "tokens"),
    [
        (["workload.prompt_tokens=300", "workload.output_tokens=20"], 320),
        (["workload=azure_conv", "model=llama3_1_8b", "num_repeats=2"], 15050),
        (["workload=azure_conv", "max_model_len=1500", "num_repeats=2"], 1500),
    ],
)
def test_the_longest_request_is_that_of_any_repeat(overrides: list[str], tokens: int) -> None:
    """The workload's longest request sizes the buffers, not the model's context. It does not change with the seed."""
    found = resolved(*overrides)
    drawn = [sum(pair) for j in repeats_of(found, "test") for pair in workload_of(j).lengths]
    assert max(drawn) <= found.longest_request <= found.max_model_len
    assert resolved(*overrides, "seed=7").longest_request == found.longest_request
    assert found.longest_request == tokens
