"""The parts of gpu-check, gpu-measure and measure in one list, and the commands of each; docs/gpu_check.md, measure.md.

Managed memory takes at most 24 GB in all and half of what the card has free, host memory at most half of what is free.
Beyond that a part is not run, except the oversubscribed ones, which the owner of a card consents to.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from experiments.gpu_kit.microbench.limits import MAX_MANAGED_BYTES
from experiments.gpu_kit.microbench.nominal import card_of
from uvm_kv.hw.host import available_host_bytes
from uvm_kv.store.provenance import gpu
from uvm_kv.types import BASELINES, GIB, OUR_ENGINE

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / "wheels"
CHECK, MEASURE, OWN = "gpu-check", "gpu-measure", "measure"
"""The three commands; `measure` is for the owner of a card."""
PATIENCE = 4
"""Times a part's limit in `measure`: the card is slower than a data centre's, and there is all the time."""
CONSENT, YES = "CONSENT", ("yes", "y")
WATCHDOG_S = 180
"""Wall clock of one job: loading its model, filling its KV, at most 10 s of steps. A thrashing job needs more."""
HOST_RESERVE_BYTES = 4 * GIB
DEMAND_BATCHES, DEMAND_HOST_BYTES = (16, 20, 24, 32, 40), 12 * GIB
OVERSUBSCRIBED_BYTES = 22 * GIB
"""LLaMA-7B's KV at batch 40 and a little more: what may end up on the host."""
OFFLOADED = ("pinned_balanced", "pinned_zero_copy", "pinned_prefetch_ahead", "pinned_swap", "vmm_balanced")
MANAGED = ("managed_by_tier", "managed_prefetch_ahead", "managed_demand_capped")
REPEATS = 5

Commands = list[list[str]]


class NotPossibleError(Exception):
    """A part that cannot be run here, and why: no failure."""


@dataclass(frozen=True)
class Part:
    """One part: `commands` makes what it runs, in order, from the output folder of all parts. It stops at the first
    command that fails. `limit_s` holds for all of them together."""

    name: str
    about: str
    limit_s: int
    commands: Callable[[Path], Commands]
    of: tuple[str, ...] = (MEASURE, OWN)
    needs: str | None = None
    """A program that must be on the PATH."""
    refused: str | None = None
    """A tool that says this does not take the device; the part is then not run, which is no failure."""
    goes_on: bool = False
    """A command that fails does not keep the next from being run. Finished runs are kept, so the part resumes."""
    always: bool = False
    """Taken anew each time: it is short, and what it reads may have grown. Any other part that ended well is kept."""


@dataclass(frozen=True)
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


LLAMA_7B = Sweep(
    *("llama_7b", 13_480_000_000, 8 * GIB, 10 * GIB, (8, 16), (20, 24, 32)),
    (*BASELINES, "pinned_balanced", "pinned_swap"),
    (16, 24),
)
LLAMA3_8B = Sweep(
    *("llama3_8b", 16_060_000_000, GIB, 3 * GIB // 2, (16, 32), (40, 48, 64)),
    (*BASELINES, "pinned_balanced", "pinned_prefetch_ahead"),
    (32, 48),
)
SWEEPS = (LLAMA_7B, LLAMA3_8B)


# ---- the machine, and the profile that was calibrated on it


def query_card(field: str) -> str | None:
    """A field of nvidia-smi for the first card."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def free_card_bytes() -> int | None:
    """What the card has free now; None where nvidia-smi does not say."""
    text = query_card("memory.free")
    return None if text is None or not text.split()[0].isdigit() else int(text.split()[0]) * 2**20


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


def check_room(sweep: Sweep) -> None:
    """Pages that leave the card go to the host, which without room swaps or kills. NotPossibleError without room."""
    if managed_fits(sweep, free_card_bytes()):
        raise NotPossibleError("its managed memory fits this card, so that there is nothing to oversubscribe")
    needed, available = OVERSUBSCRIBED_BYTES + HOST_RESERVE_BYTES, available_host_bytes() or 0
    if available < needed:
        raise NotPossibleError(
            f"oversubscription may put {OVERSUBSCRIBED_BYTES / GIB:.0f} GiB on the host, and {needed / GIB:.0f} GiB "
            f"must be free; {available / GIB:.1f} GiB are"
        )


def profile_file(output: Path) -> Path:
    """Where this card's profile goes; NotPossibleError for a card whose nominal figures are not known."""
    card = gpu()
    known = None if card is None else card_of(card["name"])
    if known is None:
        name = card["name"] if card else "a card"
        raise NotPossibleError(f"experiments/gpu_kit/microbench/nominal.py does not know {name}")
    return output / "calibrate" / "conf" / "hardware" / f"measured_{known.profile}.yaml"


def profile_overrides(output: Path) -> list[str]:
    """What makes a command use it; NotPossibleError where there is none."""
    file = profile_file(output)
    if not file.is_file():
        raise NotPossibleError("there is no calibrated profile; the part calibrate makes it")
    return [f"hydra.searchpath=['file://{file.parent.parent.resolve()}']", f"hardware={file.stem}"]


def profile_if_any(output: Path) -> list[str]:
    """For measured runs, where balanced policies plan with it; the others go without."""
    try:
        return profile_overrides(output)
    except NotPossibleError:
        return []


# ---- commands of gpu-check


def _python(*words: object) -> list[str]:
    return [sys.executable, "-m", *map(str, words)]


def build(_: Path) -> Commands:
    pip = _python("pip", "install", "--disable-pip-version-check", "--no-deps")
    missing = [str(wheel) for wheel in sorted(WHEELS.glob("*.whl")) if not _installed(wheel)]
    isolated = ["--no-build-isolation"] if WHEELS.is_dir() else []  # With a network pip fetches what a build needs.
    return [
        *([[*pip, "--no-index", *missing]] if missing else []),
        [*pip, *isolated, "--verbose", "-e", str(ROOT)],
    ]


def _installed(wheel: Path) -> bool:
    try:
        metadata.version(wheel.name.split("-")[0])
    except metadata.PackageNotFoundError:
        return False
    return True


def _pytest(output: Path, name: str, *words: str) -> list[str]:
    # Warnings of torch and CuPy on a machine that is not ours must not fail a test.
    options = ("-p", "no:cacheprovider", "-W", "default", "--durations=15", "-rs")
    return _python("pytest", *options, f"--junitxml={output / name / 'junit.xml'}", *words)


def sanitizer(output: Path) -> Commands:
    """One shape of attention over each kind of memory, append, and the copies' kernel."""
    some = "float16-128-8q2kv-16 or float32-64-8q2kv or test_append or any_alignment"
    files = ("tests/cuda/test_attention.py", "tests/cuda/test_copies.py")
    tool = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "86"]
    return [[*tool, *_pytest(output, "sanitizer", "-k", some, *files)]]


def ladder(output: Path) -> Commands:
    program, source = str(output / "ladder" / "attention_ladder"), ROOT / "cuda_ext"
    sources = [str(source / "dev" / "attention_ladder.cu"), str(source / "src" / "paged_attention.cu")]
    compiled = ["nvcc", "-std=c++20", "-O3", "-arch=native", "-t", "0", f"-I{source / 'include'}", "-o", program]
    gqa = [program, "--q-heads", "32", "--kv-heads", "8", "--repeats", "10"]
    return [[*compiled, *sources], gqa, [*gqa, "--host-percent", "10"]]


# ---- commands of the measured sweeps


def _run(experiment: str, results: Path, **overrides: object) -> list[str]:
    """A sweep; a sequence is several values of its key."""
    words = (
        f"{key}={value if isinstance(value, str | int) else ','.join(map(str, value))}"  # type: ignore[call-overload]
        for key, value in overrides.items()
    )
    return _python("experiments.run", "-m", f"experiment={experiment}", f"results_dir={results}", *words)


def _runs(output: Path) -> Path:
    return output / "sweep" / "runs"


def operators(output: Path) -> Commands:
    """Curves of the link and of managed memory too, where the microbenchmark has not been run."""
    profile_file(output)
    curves, target = output / "microbench" / "curves.json", output / "operators" / "curves.json"
    measured = _python("experiments.measure_operators", "--curves", curves, "--output", target, "--model", "llama3_8b")
    quick = _python("experiments.microbench", "--quick", "--output", curves.parent)
    return [measured] if curves.is_file() else [quick, measured]


def calibrate(output: Path) -> Commands:
    file = profile_file(output)
    found = [c for part in ("operators", "microbench") if (c := output / part / "curves.json").is_file()]
    if not found:
        raise NotPossibleError("there are no curves; the parts microbench and operators take them")
    file.parent.mkdir(parents=True, exist_ok=True)
    names = (f"name={file.stem}", f"base={file.stem.removeprefix('measured_')}")
    return [_python("experiments.calibrate", f"curves={found[0]}", *names, f"output={file}", "force=true")]


def sweep_commands(sweep: Sweep, results: Path, *overrides: str, managed: bool) -> Commands:
    """Every mechanism; managed memory where it may be had. Verdict first: what is cut off is the least of it."""
    run = partial(_run, f"gpu_sweep_{sweep.name}", results)
    commands = [run(mechanism=(*BASELINES, *OFFLOADED, *(MANAGED if managed else ())))]
    if managed:
        commands.append(run(mechanism="managed_demand", batch_size=sweep.within))
    return [[*command, *overrides] for command in commands]


def repeat_command(sweep: Sweep, results: Path, *overrides: str) -> list[str]:
    """The first repeat is the sweep's own, and is kept."""
    where = {"mechanism": sweep.verdict_mechanisms, "batch_size": sweep.verdict_batches, "num_repeats": REPEATS}
    return [*_run(f"gpu_sweep_{sweep.name}", results, **where), *overrides]


def predict(output: Path, *, published: bool = False) -> Commands:
    """Every point that the sweeps may measure, by the simulator alone; `published`: with the profile that conf/hardware
    has of this card, not the calibrated one."""
    name = profile_file(output).stem.removeprefix("measured_" if published else "")
    overrides = ["runner=sim", *([f"hardware={name}"] if published else profile_overrides(output))]
    folder = output / ("predict_published" if published else "predict")
    runs = folder / "runs"
    where = ("--runs", runs, "--output", folder / "predictions.json", "--hardware", name)
    return [
        *(c for sweep in SWEEPS for c in sweep_commands(sweep, runs, *overrides, managed=True)),
        *(repeat_command(sweep, runs, *overrides) for sweep in SWEEPS),
        _python("experiments.validate_sweep", "predict", *where),
    ]


def measure(output: Path, sweep: Sweep) -> Commands:
    check_host(sweep)
    managed = managed_fits(sweep, free_card_bytes())
    return sweep_commands(sweep, _runs(output), *profile_if_any(output), managed=managed)


def repeats(output: Path) -> Commands:
    for sweep in SWEEPS:
        check_host(sweep)
    return [repeat_command(sweep, _runs(output), *profile_if_any(output)) for sweep in SWEEPS]


def oversubscribed(output: Path, sweep: Sweep) -> Commands:
    """Managed mechanisms at every batch, each in a sweep of its own so that one which thrashes ends alone.

    A managed slab is not bound by a cap in software, so managed_demand plans with all that the card has."""
    if os.environ.get(CONSENT, "").strip().lower() not in YES:
        raise NotPossibleError(f"no consent to oversubscribe the card ({CONSENT}=yes gives it)")
    check_room(sweep)
    run = partial(_run, f"gpu_sweep_{sweep.name}", _runs(output))
    sizes = {"memory.device_kv_bytes": "null", "memory.gpu_memory_utilization": "1.0"}
    sizes["memory.host_kv_bytes"] = str(DEMAND_HOST_BYTES)
    shared = ["memory.allow_oversubscription=true", f"watchdog_s={WATCHDOG_S}", *profile_if_any(output)]
    commands = [run(mechanism=name) for name in MANAGED]
    commands.append(run(mechanism="managed_demand", batch_size=DEMAND_BATCHES, **sizes))
    return [[*command, *shared] for command in commands]


def peers(output: Path) -> Commands:
    runs = [partial(_run, f"gpu_peers_{sweep.name}", _runs(output)) for sweep in SWEEPS]
    return [command for run in runs for command in (run(), run(engine=OUR_ENGINE, mechanism=BASELINES))]


def decode_step(output: Path) -> Commands:
    """The point of the sweep that fills the device, with the model as it is and compiled; then their kernels, without
    graphs, whose launches no layer makes."""
    folder, experiment = output / "decode_step", f"gpu_sweep_{LLAMA3_8B.name}"
    where = {"mechanism": "device_resident", "batch_size": max(LLAMA3_8B.within)}
    words = [f"{key}={value}" for key, value in where.items()]
    commands = [_run(experiment, folder / "runs", **where, compile="false,true")]
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        job = (f"experiment={experiment}", *words, f"compile={compiled}", "cuda_graphs=false")
        commands.append(_python("experiments.profile", "--steps", "4", "--output", folder / name, *job))
    return commands


def validate(output: Path, *, published: bool = False) -> Commands:
    suffix, runs = "_published" if published else "", _runs(output)
    predictions = output / f"predict{suffix}" / "predictions.json"
    for path, part in ((predictions, f"predict{suffix}"), (runs, "sweep")):
        if not path.exists():
            raise NotPossibleError(f"there is no {path.name}; the part {part} makes it")
    where = ("--runs", runs, "--predictions", predictions, "--output", output / f"validate{suffix}")
    return [_python("experiments.validate_sweep", "compare", *where)]


def speed(output: Path) -> Commands:
    if not (output / "decode_step").is_dir() and not _runs(output).is_dir():
        raise NotPossibleError("there are no runs; the parts sweep_*, peers and decode_step make them")
    return [_python("experiments.gpu_speed", "--folder", output)]


def report(output: Path) -> Commands:
    from uvm_kv.store.whole import completed_runs

    if not completed_runs(_runs(output)):
        raise NotPossibleError("there are no runs to report; the parts sweep_* make them")
    return [_python("uvm_kv.cli", "report", _runs(output))]


PARTS = (
    Part("build", "what the machine lacks from wheels/, and the extension", 180, build, of=(CHECK, MEASURE)),
    Part(
        *("tests", "tests/cuda: every resource, copy, hint, kernel and graph", 150),
        lambda output: [_pytest(output, "tests", "tests/cuda")],
        of=(CHECK,),
    ),
    Part(
        *("microbench", "speeds as ratios of one run", 240),
        lambda output: [_python("experiments.microbench", "--output", output / "microbench")],
        of=(CHECK, OWN),
    ),
    Part(
        *("sanitizer", "compute-sanitizer over a few of the tests", 90, sanitizer),
        of=(CHECK,),
        needs="compute-sanitizer",
        refused="Device not supported",
    ),
    Part("ladder", "versions of the attention kernel", 90, ladder, of=(CHECK,), needs="nvcc"),
    Part("doctor", "what this machine has", 30, lambda _: [_python("uvm_kv.cli", "doctor")], of=(CHECK, OWN)),
    Part("operators", "times of a model's operators, for the calibration", 150, operators),
    Part("calibrate", "the profile of this card", 60, calibrate),
    Part("predict", "what the simulator says of every point", 130, predict),
    Part("predict_published", "the same by conf/hardware", 130, partial(predict, published=True), of=(OWN,)),
    Part("sweep_llama_7b", "8 GiB of device KV, 0.5x to 2x", 320, partial(measure, sweep=LLAMA_7B), goes_on=True),
    Part("sweep_llama3_8b", "1 GiB of device KV, 0.5x to 2x", 260, partial(measure, sweep=LLAMA3_8B), goes_on=True),
    Part("repeats", "five of each point that the verdict rests on", 200, repeats, goes_on=True),
    *(
        Part(
            *(f"oversubscribed_{sweep.name}", "managed memory beyond the card", 450),
            partial(oversubscribed, sweep=sweep),
            of=(OWN,),
            goes_on=True,
        )
        for sweep in SWEEPS
    ),
    Part("peers", "other engines at the same batches", 150, peers, goes_on=True),
    Part("decode_step", "a decode step, eager and compiled, and its kernels", 180, decode_step, goes_on=True),
    Part("validate", "the simulator against every point", 30, validate, always=True),
    Part(
        *("validate_published", "the same by conf/hardware", 30, partial(validate, published=True)),
        of=(OWN,),
        always=True,
    ),
    Part("speed", "ratios with their targets", 20, speed, always=True),
    Part("report", "tables and figure of all runs", 75, report, of=(OWN,), always=True),
)
"""Most valuable first, within each command."""


def parts_of(command: str, names: Sequence[str] | None = None) -> list[Part]:
    """The parts of a command, or these of them; ValueError for a name that is none. gpu-check and gpu-measure take each
    other's by name."""
    own = [part for part in PARTS if command in part.of]
    known = own if command == OWN else [part for part in PARTS if part.of != (OWN,)]
    for name in names or ():
        if name not in {part.name for part in known}:
            raise ValueError(f"--parts {name}: no such part; there are {', '.join(part.name for part in known)}")
    return [part for part in known if part.name in names] if names else own
