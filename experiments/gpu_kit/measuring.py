"""The measured sweeps as commands: what is run on a card, and on the simulator to predict it; docs/gpu_check.md.

Managed memory takes at most 24 GB in all and half of what the card has free, host memory at most half of what is free.
Beyond that a part is not run; oversubscription is the user's own (`experiments.measure`).
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.gpu_kit.microbench.limits import MAX_MANAGED_BYTES
from experiments.gpu_kit.microbench.nominal import card_of
from uvm_kv.hw.host import available_host_bytes
from uvm_kv.store.provenance import gpu
from uvm_kv.types import BASELINES, GIB, OUR_ENGINE

OFFLOADED = ("pinned_balanced", "pinned_zero_copy", "pinned_prefetch_ahead", "pinned_swap", "vmm_balanced")
MANAGED = ("managed_by_tier", "managed_prefetch_ahead", "managed_demand_capped")
MODEL_OF_OPERATORS = "llama3_8b"


class NotPossibleError(Exception):
    """A part that cannot be run here, and why: no failure."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """conf/experiment/gpu_sweep_<name>.yaml, and what the file does not say."""

    name: str
    weights_bytes: int
    device_kv_bytes: int
    host_kv_bytes: int
    within: tuple[int, ...]
    """Batches within the budget: managed_demand is run at these alone."""
    beyond: tuple[int, ...]
    verdict_mechanisms: tuple[str, ...]
    verdict_batches: tuple[int, ...]
    """Where the verdict rests: five repeats."""

    @property
    def managed_bytes(self) -> int:
        return self.device_kv_bytes + self.host_kv_bytes


SWEEPS = (
    Sweep(
        *("llama_7b", 13_480_000_000, 8 * GIB, 10 * GIB, (8, 16), (20, 24, 32)),
        (*BASELINES, "pinned_balanced", "pinned_swap"),
        (16, 24),
    ),
    Sweep(
        *("llama3_8b", 16_060_000_000, GIB, 3 * GIB // 2, (16, 32), (40, 48, 64)),
        (*BASELINES, "pinned_balanced", "pinned_prefetch_ahead"),
        (32, 48),
    ),
)
REPEATS = 5


def sweep_named(name: str) -> Sweep:
    return next(sweep for sweep in SWEEPS if sweep.name == name)


# ---- the machine


def free_card_bytes() -> int | None:
    """What the card has free now; None where nvidia-smi does not say."""
    text = query_card("memory.free")
    return None if text is None or not text.split()[0].isdigit() else int(text.split()[0]) * 2**20


def query_card(field: str) -> str | None:
    """A field of nvidia-smi for the first card."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split("\n")
    return lines[0].strip() or None if done.returncode == 0 else None


def managed_fits(sweep: Sweep, free_bytes: int | None) -> bool:
    """Whether the sweep's managed memory is within the rule, beside the weights."""
    if free_bytes is None:
        return False
    return sweep.managed_bytes <= min(MAX_MANAGED_BYTES, (free_bytes - sweep.weights_bytes) // 2)


def check_host(sweep: Sweep) -> None:
    available = available_host_bytes() or 0  # Where the system does not say, nothing is allowed.
    if 2 * sweep.host_kv_bytes > available:
        raise NotPossibleError(
            f"the host tier takes {sweep.host_kv_bytes / GIB:g} GiB, at most half of free host memory, and "
            f"{available / GIB:.1f} GiB are free"
        )


# ---- the profile that was calibrated here


def profile_name() -> str:
    """Of this card; NotPossibleError for one whose nominal figures are not known."""
    card = gpu()
    known = None if card is None else card_of(card["name"])
    if known is None:
        raise NotPossibleError(
            f"experiments/gpu_kit/microbench/nominal.py does not know {card['name'] if card else 'a card'}"
        )
    return f"measured_{known.profile}"


def profile_file(output: Path) -> Path:
    return output / "calibrate" / "conf" / "hardware" / f"{profile_name()}.yaml"


def profile_overrides(output: Path) -> list[str]:
    """What makes a command use it; NotPossibleError where there is none."""
    file = profile_file(output)
    if not file.is_file():
        raise NotPossibleError("there is no calibrated profile; the part calibrate makes it")
    return [f"hydra.searchpath=['file://{file.parent.parent.resolve()}']", f"hardware={file.stem}"]


def profile_if_any(output: Path) -> list[str]:
    """For measured runs, to which it is what balanced policies plan with; the others go without."""
    try:
        return profile_overrides(output)
    except NotPossibleError:
        return []


# ---- commands


def _python(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def _joined(values: Sequence[object]) -> str:
    return ",".join(map(str, values))


def run_command(experiment: str, results: Path, *overrides: str) -> list[str]:
    return _python("experiments.run", "-m", f"experiment={experiment}", f"results_dir={results}", *overrides)


def sweep_commands(sweep: Sweep, results: Path, overrides: Sequence[str], *, managed: bool) -> list[list[str]]:
    """Every mechanism; managed memory where it may be had. Verdict first: what is cut off is the least of it."""
    mechanisms = (*BASELINES, *OFFLOADED, *(MANAGED if managed else ()))
    experiment = f"gpu_sweep_{sweep.name}"
    commands = [run_command(experiment, results, f"mechanism={_joined(mechanisms)}", *overrides)]
    if managed:
        within = (f"mechanism={'managed_demand'}", f"batch_size={_joined(sweep.within)}")
        commands.append(run_command(experiment, results, *within, *overrides))
    return commands


def repeat_command(sweep: Sweep, results: Path, overrides: Sequence[str]) -> list[str]:
    """The first repeat is the sweep's own, and is kept."""
    where = (f"mechanism={_joined(sweep.verdict_mechanisms)}", f"batch_size={_joined(sweep.verdict_batches)}")
    return run_command(f"gpu_sweep_{sweep.name}", results, *where, f"num_repeats={REPEATS}", *overrides)


def peer_commands(sweep: Sweep, results: Path) -> list[list[str]]:
    ours = (f"engine={OUR_ENGINE}", f"mechanism={_joined(BASELINES)}")
    experiment = f"gpu_peers_{sweep.name}"
    return [run_command(experiment, results), run_command(experiment, results, *ours)]


def operator_commands(output: Path) -> list[list[str]]:
    """Curves of the link and of managed memory too, where the microbenchmark has not been run."""
    profile_name()
    curves = output / "microbench" / "curves.json"
    quick = _python("experiments.microbench", "--quick", "--output", str(curves.parent))
    target = str(output / "operators" / "curves.json")
    more = ["--curves", str(curves), "--output", target, "--model", MODEL_OF_OPERATORS]
    return [*([] if curves.is_file() else [quick]), _python("experiments.measure_operators", *more)]


def calibrate_commands(output: Path) -> list[list[str]]:
    file = profile_file(output)
    folders = (output / "operators", output / "microbench")
    curves = next((f / "curves.json" for f in folders if (f / "curves.json").is_file()), None)
    if curves is None:
        raise NotPossibleError("there are no curves; the parts microbench and operators take them")
    file.parent.mkdir(parents=True, exist_ok=True)
    base = file.stem.removeprefix("measured_")
    more = (f"name={file.stem}", f"base={base}", f"output={file}", "force=true")
    return [_python("experiments.calibrate", f"curves={curves}", *more)]


def predict_commands(output: Path, *, published: bool = False) -> list[list[str]]:
    """Every point that the sweeps may measure, by the simulator alone; `published`: with the profile that conf/hardware
    has of this card, not the calibrated one."""
    name = profile_name().removeprefix("measured_") if published else profile_name()
    overrides = ["runner=sim", *([f"hardware={name}"] if published else profile_overrides(output))]
    folder = output / _predictions(published)
    runs = folder / "runs"
    commands = [c for sweep in SWEEPS for c in sweep_commands(sweep, runs, overrides, managed=True)]
    commands += [repeat_command(sweep, runs, overrides) for sweep in SWEEPS]
    write = ("--runs", str(runs), "--output", str(folder / "predictions.json"))
    return [*commands, _python("experiments.validate_sweep", "predict", *write, "--hardware", name)]


def _predictions(published: bool) -> str:
    return "predict_published" if published else "predict"


def measure_commands(sweep: Sweep, output: Path) -> list[list[str]]:
    check_host(sweep)
    managed = managed_fits(sweep, free_card_bytes())
    return sweep_commands(sweep, output / "sweep" / "runs", profile_if_any(output), managed=managed)


def repeat_commands(output: Path) -> list[list[str]]:
    for sweep in SWEEPS:
        check_host(sweep)
    return [repeat_command(sweep, output / "sweep" / "runs", profile_if_any(output)) for sweep in SWEEPS]


def all_peer_commands(output: Path) -> list[list[str]]:
    return [command for sweep in SWEEPS for command in peer_commands(sweep, output / "sweep" / "runs")]


def decode_step_commands(output: Path) -> list[list[str]]:
    """The point of the sweep that fills the device, with the model as it is and compiled; then their kernels, without
    graphs, whose launches no layer makes."""
    folder, sweep = output / "decode_step", sweep_named("llama3_8b")
    where = ("mechanism=device_resident", f"batch_size={max(sweep.within)}")
    experiment = f"gpu_sweep_{sweep.name}"
    commands = [run_command(experiment, folder / "runs", *where, "compile=false,true")]
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        options = ("--steps", "4", "--output", str(folder / name))
        job = (f"experiment={experiment}", *where, f"compile={compiled}", "cuda_graphs=false")
        commands.append(_python("experiments.profile", *options, *job))
    return commands


def speed_commands(output: Path) -> list[list[str]]:
    if not (output / "decode_step").is_dir() and not (output / "sweep" / "runs").is_dir():
        raise NotPossibleError("there are no runs; the parts sweep_*, peers and decode_step make them")
    return [_python("experiments.gpu_speed", "--folder", str(output))]


def validate_commands(output: Path, *, published: bool = False) -> list[list[str]]:
    predictions, runs = output / _predictions(published) / "predictions.json", output / "sweep" / "runs"
    for path, part in ((predictions, _predictions(published)), (runs, "sweep")):
        if not path.exists():
            raise NotPossibleError(f"there is no {path.name}; the part {part} makes it")
    where = ("--runs", str(runs), "--predictions", str(predictions), "--output", str(output / _validation(published)))
    return [_python("experiments.validate_sweep", "compare", *where)]


def _validation(published: bool) -> str:
    return "validate_published" if published else "validate"
