"""runner=cuda from the config to the summary: sizes, checks and labels of measured runs."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from experiments.gpu_kit import profile
from tests import jobs
from tests.runner.torch_cpu.models import load_model, save_model, torch
from uvm_kv.config.names import parse_overrides
from uvm_kv.config.schema import register
from uvm_kv.job import cuda, models
from uvm_kv.job.build import build_runner, jobs_of, run_job
from uvm_kv.job.models import load_served as load_for_good
from uvm_kv.job.resolve import resolve
from uvm_kv.memory import Slab, capabilities, decode_workspace_bytes, new_workspace
from uvm_kv.runner.torch.cuda_kv import CudaKV
from uvm_kv.sweep import listing
from uvm_kv.sweep.worker import Scope, explain, scope_of
from uvm_kv.types import CHUNK_BYTES, MIB

HEADS = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
SMALL = ("workload.prompt_tokens=16", "workload.output_tokens=8", "workload.num_requests=4", "batch_size=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama") / "model", initializer_range=0.12, **HEADS)


@pytest.fixture(autouse=True)
def _here(c: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is asked in this process, which is the one that has it; without a GPU torch computes on the CPU."""
    if not torch.cuda.is_available():
        if not c.pageable_memory_access(0):
            pytest.skip("torch sees no GPU, and this one does not read torch's tensors on the CPU")
        monkeypatch.setattr(models, "load_served", lambda job: load_model(job.serving.folder, job.config.dtype))
    monkeypatch.setattr(cuda, "this_card", capabilities)
    monkeypatch.setattr("uvm_kv.job.build.this_card", capabilities)


def compose(folder: Path, results: Path, *overrides: str) -> Any:
    model = ("runner=cuda", "model=hf", f"model.path={folder}", f"results_dir={results}", "max_model_len=64")
    # 200 MiB, so that the chunks of every layer fit; a small emulated card all the same.
    sizes = [f"memory.device_kv_bytes={64 * MIB}"]
    if not any(o.startswith("engine=") for o in overrides):  # A peer has a scheduler of its own.
        sizes.append("scheduler.max_num_batched_tokens=64")
    return jobs.composed(*model, *sizes, *SMALL, *overrides)


@pytest.mark.parametrize(
    "mechanism",
    [
        "device_resident",
        "device_recompute",
        "pinned_swap",
        "pinned_zero_copy",
        "pinned_prefetch_ahead",
        "managed_demand",
    ],
)
def test_a_job_runs_and_says_what_it_ran_on(mechanism: str, folder: Path, tmp_path: Path) -> None:
    more = () if mechanism.startswith("device") else (f"memory.host_kv_bytes={64 * MIB}",)
    ahead = ("placement.num_layers_ahead=1",) if mechanism == "pinned_prefetch_ahead" else ()
    (job,) = jobs_of(resolve(compose(folder, tmp_path, f"mechanism={mechanism}", *more, *ahead)), "test")
    summary = run_job(job, argv=["test"], load=models.load_served)
    assert (summary["origin"], summary["runner"], summary["memory_emulated"]) == ("measured", "cuda", False)
    assert summary["hardware"] == capabilities().name
    assert summary["mechanism"] == mechanism
    assert summary["dtype"] == "float16"
    assert summary["num_requests"] == 4
    assert summary["device_kv_bytes"] <= 64 * MIB
    assert summary["device_kv_bytes"] % job.resolved.spec.block_bytes == 0
    assert summary["eviction"] is None
    assert summary["output_tokens_per_s_whole_run"] > 0
    assert json.loads((job.directory / "summary.json").read_text())["hardware"] == summary["hardware"]


class _Nvml:
    """A card that takes 100 W, whatever it does; asked by bus id."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.num_open = self.num_readings = 0

    def nvmlInit(self) -> None:
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> str:
        self.asked.append(bus_id)
        return bus_id

    def nvmlDeviceGetTotalEnergyConsumption(self, _: str) -> int:
        self.num_readings += 1
        return round(time.perf_counter() * 100 * 1000)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> _Nvml:
    played = _Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", played)  # type: ignore[arg-type]
    # What fills KV takes longer here than a busy machine holds a process up between the readings of two clocks.
    for name, value in (("REST_S", 0.05), ("MIN_WINDOW_NS", 0), ("READ_EVERY_NS", 0), ("STOOD_STILL_NS", 60_000_000)):
        monkeypatch.setattr(f"uvm_kv.telemetry.energy.{name}", value)
    fill = CudaKV.fill

    def slowly(*arguments: Any) -> None:
        time.sleep(0.1)
        fill(*arguments)

    monkeypatch.setattr(CudaKV, "fill", slowly)
    return played


@pytest.mark.parametrize("start", ["cold", "steady"])
def test_energy_is_the_cards_own_over_the_steady_window(
    start: str, folder: Path, tmp_path: Path, c: Any, nvml: _Nvml
) -> None:
    """A steady start fills KV while the run's clock stands still; this energy is not the run's."""
    work = ("workload.num_requests=12", "workload.output_tokens=32", f"workload.start={start}")
    config = compose(folder, tmp_path, "mechanism=device_resident", *work)
    (job,) = jobs_of(resolve(config), "test")
    summary = run_job(job, argv=["test"], load=models.load_served)
    begin, end = summary["steady_window_s"]
    assert summary["energy_j"] == pytest.approx(100 * (end - begin), rel=0.1, abs=0.02)
    tokens = summary["output_tokens_per_s"] * (end - begin)
    assert summary["energy_j_per_output_token"] == pytest.approx(summary["energy_j"] / tokens)
    assert summary["idle_power_w"] == pytest.approx(100, rel=0.1)
    assert set(nvml.asked) == {c.pci_bus_id(0)}
    assert nvml.num_readings <= summary["num_steps"] + 5, "between steps, and at both ends"
    assert nvml.num_open == 0


@pytest.mark.parametrize("engine", ["hf_generate", "hf_continuous"])
@pytest.mark.parametrize("arrival", ["closed_loop", "all_at_once"])
def test_a_peers_energy_is_taken_as_ours(
    engine: str, arrival: str, folder: Path, tmp_path: Path, c: Any, nvml: _Nvml
) -> None:
    """Energy is that of the steady window, and of the whole run where a single batch has no window."""
    more = ("workload.num_requests=12",) if arrival == "closed_loop" else ("workload.num_requests=3",)
    config = compose(folder, tmp_path, f"engine={engine}", f"workload.arrival={arrival}", *more)
    (job,) = jobs_of(resolve(config), "test")
    summary = run_job(job, argv=["test"], load=models.load_served)
    window = summary["steady_window_s"] or (0, summary["duration_s"])
    assert (summary["steady_window_s"] is None) == (arrival == "all_at_once")
    assert summary["energy_j"] == pytest.approx(100 * (window[1] - window[0]), rel=0.1, abs=0.02)
    assert summary["energy_j_per_output_token"] > 0
    assert summary["idle_power_w"] == pytest.approx(100, rel=0.1)
    assert set(nvml.asked) == {c.pci_bus_id(0)}
    assert nvml.num_open == 0


def test_without_a_counter_there_is_no_energy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    (job,) = jobs_of(resolve(compose(folder, tmp_path, "mechanism=device_resident")), "test")
    summary = run_job(job, argv=["test"], load=models.load_served)
    assert summary["energy_j"] is summary["energy_j_per_output_token"] is summary["idle_power_w"] is None
    (peer,) = jobs_of(resolve(compose(folder, tmp_path, "engine=hf_generate")), "test")
    summary = run_job(peer, argv=["test"], load=models.load_served)
    assert summary["energy_j"] is summary["energy_j_per_output_token"] is summary["idle_power_w"] is None


def test_a_profile_of_it_has_every_range(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile, "build_runner", lambda *given: build_runner(*given, models.load_served))
    overrides = ["runner=cuda", "model=hf", f"model.path={folder}", f"results_dir={tmp_path}", "max_model_len=64"]
    overrides += [*SMALL, "scheduler.max_num_batched_tokens=64", "mechanism=pinned_prefetch_ahead"]
    overrides += [f"memory.device_kv_bytes={8 * MIB}", f"memory.host_kv_bytes={64 * MIB}"]
    overrides += ["placement.num_layers_ahead=1", "block_size=8"]
    assert profile.main(["--steps", "4", "--warmup", "2", "--output", str(tmp_path / "out"), *overrides]) == 0
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    names = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    assert names.count("execute") == names.count("layer 3") == 4
    assert names.count("append") == names.count("attention") == 4 * 4
    out, _ = capsys.readouterr()
    assert "runner=cuda: 4 steps after 2" in out
    assert ("device ms/step" in out) == torch.cuda.is_available()
    assert "\nThe rest:\n" in out


@pytest.mark.parametrize("graphs", ["true", "false"])
def test_the_workspace_of_the_longest_requests_is_in_the_account(
    graphs: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest requests are the workload's, not the model's context. The allocation agrees, graphs or not."""
    counted: list[dict[str, Any]] = []
    made: list[int] = []

    def count(spec: Any, **shape: Any) -> int:
        counted.append(shape)
        return decode_workspace_bytes(spec, **shape) + 4 * MIB

    def make(kv: Any, num_bytes: int, **options: Any) -> Any:
        made.append(num_bytes)
        return new_workspace(kv, num_bytes, **options)

    monkeypatch.setattr(cuda, "decode_workspace_bytes", count)
    monkeypatch.setattr("uvm_kv.runner.torch.cuda_kv.decode_workspace_bytes", count)
    monkeypatch.setattr("uvm_kv.runner.torch.cuda_kv.new_workspace", make)
    monkeypatch.setattr("uvm_kv.memory.attention.new_workspace", make)
    axes = ("mechanism=device_resident", f"cuda_graphs={graphs}", "max_model_len=512")
    (job,) = jobs_of(resolve(compose(folder, tmp_path, *axes)), "test")
    run_job(job, argv=["test"], load=models.load_served)
    assert dict(job.resolved.memory_account)["attention workspace"] == -6 * MIB
    assert made == [6 * MIB]
    assert {(s["num_seqs"], s["max_tokens"], s["num_q_heads"]) for s in counted} == {(3, 24, 4)}
    card = capabilities().total_bytes
    with pytest.raises(ValueError, match=r"weights .* \+ activation peak .* \+ attention workspace .* \+ KV .* exceed"):
        resolve(compose(folder, tmp_path, *axes, f"memory.device_kv_bytes={card}"))


def test_planned_evictions_are_never_shown_as_the_drivers(folder: Path, tmp_path: Path) -> None:
    config = compose(folder, tmp_path, "mechanism=managed_demand_capped", f"memory.host_kv_bytes={64 * MIB}")
    (job,) = jobs_of(resolve(config), "test")
    summary = run_job(job, argv=["test"], load=models.load_served)
    assert summary["eviction"] == "planned"
    assert json.loads((job.directory / "manifest.json").read_text())["eviction"] == "planned"


def test_a_dry_run_counts_one_job_after_another(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process owns the GPU, however many cores there are; a limit in seconds limits the estimate too."""
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    words = ["runner=cuda", "model=hf", f"model.path={folder}", f"results_dir={tmp_path}", "max_model_len=64", *SMALL]
    words += [f"memory.device_kv_bytes={64 * MIB}", "mechanism=device_resident,device_recompute", "max_seconds=1"]
    register()
    assert listing.list_jobs(parse_overrides(words), "adhoc") == 0
    said = " ".join(capsys.readouterr().out.split())
    found = re.search(r"2 jobs, 0 runs complete, 0 jobs refused; about (\d+) s left one after another", said)
    assert found is not None, said
    assert 2 * listing.GPU_JOB_S <= int(found[1]) <= 2 * (listing.GPU_JOB_S + 1)
    assert not list(tmp_path.glob("adhoc/*"))


def test_capacity_is_what_whole_chunks_hold(folder: Path, tmp_path: Path) -> None:
    resolved = resolve(compose(folder, tmp_path, "mechanism=device_resident"))
    chunks = resolved.spec.num_chunks(resolved.capacity.num_device_blocks)
    assert chunks * CHUNK_BYTES <= 64 * MIB


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("block_size=4",), "block_size=4 with runner=cuda; its kernels take 8, 16, 32, 64, 128"),
        (("mechanism=pageable_swap",), "memory.pageable=true is simulated only"),
        (("memory.device_kv_bytes=1000000000000",), "does not fit"),
        (("mechanism=pinned_zero_copy", "memory.host_kv_bytes=50000000000000"), "more than the .* bytes that the host"),
        (("mechanism=pinned_balanced",), "needs a profile that was calibrated on this .*calibrated on no machine"),
        (("mechanism=pinned_zero_copy", "memory.allow_oversubscription=true"), "is ignored by memory=pinned"),
    ],
)
def test_what_it_does_not_serve_is_a_line(folder: Path, tmp_path: Path, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        resolve(compose(folder, tmp_path, *overrides))
    assert "\n" not in str(error.value)


def test_a_head_size_without_a_kernel_is_a_line(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", **(HEADS | {"hidden_size": 192}))
    with pytest.raises(ValueError, match="has heads of 48, and the kernels of runner=cuda take 64, 80, 96, 128, 256"):
        resolve(compose(folder, tmp_path))


def test_demand_paging_under_a_cap_that_does_not_bind_it_is_refused(folder: Path, tmp_path: Path) -> None:
    """KV beyond memory.device_kv_bytes would lie on this larger card, and nothing would page."""
    sizes = ("memory.device_kv_bytes=65536", f"memory.host_kv_bytes={64 * MIB}", "mechanism=managed_demand")
    config = compose(folder, tmp_path, *sizes)
    with pytest.raises(ValueError, match=r"nothing would page; use mechanism=managed_demand_capped") as error:
        resolve(config)
    assert "\n" not in str(error.value)


def test_nan_in_logits_is_a_line_and_the_next_job_is_served(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = jobs_of(resolve(compose(folder, tmp_path, "mechanism=device_resident")), "test")
    model = models.load_served(job.resolved)
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(
        ValueError, match=r"its logits are NaN.*exceeds the range of float16: try dtype=bfloat16"
    ) as error:
        run_job(job, argv=["test"], load=lambda _: model)
    assert (explain(error.value), scope_of(error.value)) == (str(error.value), Scope.JOB)
    assert "\n" not in str(error.value)
    assert not job.directory.exists()
    assert run_job(job, argv=["test"], load=models.load_served)["num_requests"] == 4


def test_a_card_without_room_for_the_weights_says_so(folder: Path, tmp_path: Path, c: Any) -> None:
    """The card is left as another process that fills it would leave it."""
    resolved = resolve(compose(folder, tmp_path, "mechanism=device_resident"))
    part = (c.free_bytes(0) // CHUNK_BYTES - 1) * CHUNK_BYTES
    said = r"no room for the weights of model in float16: they take \d+ bytes and \d+ of the card are free \(nvidia-smi"
    with Slab.device(part), pytest.raises(ValueError, match=said) as error:
        load_for_good(resolved)
    assert "\n" not in str(error.value)


def test_host_memory_that_cannot_be_pinned_says_what_to_lower(
    folder: Path, tmp_path: Path, c: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of the system below its free memory: the driver alone knows it, once it is asked."""

    def refuse(*_: Any, **__: Any) -> None:
        raise c.OutOfMemoryError("cudaHostAlloc of 67108864 bytes: cudaErrorMemoryAllocation, out of memory")

    monkeypatch.setattr("uvm_kv.runner.torch.cuda_kv.KVMemory", refuse)
    sizes = ("mechanism=pinned_zero_copy", f"memory.host_kv_bytes={64 * MIB}")
    (job,) = jobs_of(resolve(compose(folder, tmp_path, *sizes)), "test")
    with pytest.raises(ValueError, match=r"no room for .*memory.host_kv_bytes=67108864: cudaHostAlloc.*lower") as error:
        run_job(job, argv=["test"], load=models.load_served)
    assert (explain(error.value), scope_of(error.value)) == (str(error.value), Scope.WORKER)
    assert "\n" not in str(error.value)


def test_a_card_that_is_full_says_what_to_lower(folder: Path, tmp_path: Path, c: Any) -> None:
    resolved = resolve(compose(folder, tmp_path, "mechanism=device_resident"))
    (job,) = jobs_of(resolved, "test")
    part = (c.free_bytes(0) // CHUNK_BYTES - 8) * CHUNK_BYTES
    with (
        Slab.device(part),
        pytest.raises(ValueError, match=r"no room for memory.device_kv_bytes=.*lower one of the two"),
    ):
        run_job(job, argv=["test"], load=models.load_served)
    assert run_job(job, argv=["test"], load=models.load_served)["num_requests"] == 4
