"""Compare the simulator with recorded runs, metric by metric: docs/validation.md.

    python -m experiments.validate recorded=RUN_DIR [hardware=rtx3090] [tolerance=0.05] [name=NAME] [out=results]
    python -m experiments.validate recorded=[RUN_DIR,RUN_DIR]            (repeats of one config give the noise)
    python -m experiments.validate recorded=vllm.csv model=llama3_8b batch_size=256 hardware=rtx3090

Writes <out>/validation/NAME/ (comparison.json, comparison.csv, what was served) and <out>/figures/validate_NAME.*; the
simulated runs go to <out>/runs/validate/. With --json it prints the comparison.json of each group of repeats as a list.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.text import Text

from uvm_kv.commands.ending import say_why
from uvm_kv.config.command import compose_config
from uvm_kv.config.grammar import take_json
from uvm_kv.config.names import check_overrides, folders_of, parse_overrides
from uvm_kv.config.option_file import check_files
from uvm_kv.config.schema import register
from uvm_kv.job.build import jobs_of
from uvm_kv.job.recording import check_simulable, serve_trace, simulation_of_run, work_key
from uvm_kv.job.resolve import resolve
from uvm_kv.peers.job import run_any_job
from uvm_kv.report.terminal import plain_console
from uvm_kv.store.checks import visible
from uvm_kv.store.directories import check_writable, read_json
from uvm_kv.store.whole import completed_runs
from uvm_kv.types import OUR_ENGINE
from uvm_kv.validate.comparison import TOLERANCE, Comparison, compare, write_comparison
from uvm_kv.validate.recorded import Recording, load_file, load_run
from uvm_kv.validate.terminal import print_comparison
from uvm_kv.workload.trace import write_trace

OWN_KEYS = ("recorded", "tolerance", "name", "out")
LIKE_VLLM = {"mechanism": "device_recompute", "scheduler.watermark": "0.0"}
"""What a file of requests is simulated with unless said otherwise: vLLM's defaults."""
NEEDED_FOR_FILE = ("model", "batch_size")


@dataclass(frozen=True)
class Source:
    """A recording and where it lies; runs with equal keys are repeats."""

    path: Path
    recording: Recording
    key: str

    @property
    def is_run(self) -> bool:
        return self.path.is_dir()


@dataclass(frozen=True)
class Request:
    sources: list[Source]
    overrides: list[str]
    tolerance: float
    name: str | None
    out: Path


def parse(arguments: list[str]) -> Request:
    """What the command line asks for; ValueError for what it cannot have."""
    own: dict[str, str] = {}
    overrides = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in OWN_KEYS and equals:
            own[key] = value
        else:
            overrides.append(argument)
    if not own.get("recorded"):
        raise ValueError("give what was recorded: recorded=RUN_DIR, or recorded=FILE.csv; --help shows the rest")
    paths = [Path(text.strip()) for text in own["recorded"].removeprefix("[").removesuffix("]").split(",")]
    sources = [source for path in paths for source in _sources(path)]
    parsed = parse_overrides(overrides)
    check_overrides(parsed)
    check_files(parsed, folders_of(parsed))
    for is_run in {source.is_run for source in sources}:
        check_simulable(parsed, of_run=is_run)
    given = {override.key_or_group for override in parsed}
    if not all(source.is_run for source in sources) and (absent := [k for k in NEEDED_FOR_FILE if k not in given]):
        raise ValueError(
            f"a file of requests does not say how it was served: give {' and '.join(f'{k}=...' for k in absent)} "
            f"(batch_size is vLLM's max_num_seqs), and what differs from the defaults"
        )
    tolerance, out = _tolerance(own.get("tolerance")), own.get("out", "results")
    if not out:
        raise ValueError("out= names no folder; give one, out=DIR, or out=. for this one")
    check_writable(Path(out), "out=")
    return Request(sources, overrides, tolerance, own.get("name"), Path(out))


def _sources(path: Path) -> list[Source]:
    if path.is_file():
        recording = load_file(path)
        lengths = (recording.requests["prompt_tokens"], recording.requests["output_tokens"])
        return [Source(path, recording, str(lengths))]
    if not path.exists():
        raise ValueError(f"recorded={path}: there is no such directory or file")
    runs = completed_runs(path) or [path]  # Of a folder all runs below it; one that has none is refused.
    ours = [run for run in runs if _engine_of(run) in (None, OUR_ENGINE)]
    if not ours:
        raise ValueError(f"recorded={path}: runs of {_engine_of(runs[0])}, which the simulator does not play")
    sources, left_out = [], []
    for run in ours:
        try:
            sources.append(Source(run, load_run(run), work_key(run)))
        except ValueError as error:
            left_out.append(error)
    if not sources:
        raise left_out[0]
    for why in left_out:
        print(f"left out: {visible(why)}", file=sys.stderr)
    return sources


def _engine_of(run: Path) -> str | None:
    """None: `load_run` says what is wrong."""
    try:
        engine: str | None = read_json(run / "summary.json").get("engine")
    except (OSError, ValueError):
        return None
    return engine


def _tolerance(text: str | None) -> float:
    try:
        value = TOLERANCE if text is None else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise ValueError(f"tolerance={text}; it is a relative error, above 0 and below 1, such as 0.05")
    return value


def simulate(source: Source, request: Request, trace: Path) -> Recording:
    """Serve what was recorded on the simulator; the run is written like any other. A closed loop is served from its
    config, since its arrivals are the system's; all else as a trace of what arrived."""
    parsed, recorded = parse_overrides(request.overrides), source.recording
    config: DictConfig
    if source.is_run:
        config = simulation_of_run(source.path, _compose(request.overrides), parsed)
    else:
        given = {override.key_or_group for override in parsed}
        defaults = [f"{key}={value}" for key, value in LIKE_VLLM.items() if key not in given]
        config = _compose([*defaults, *request.overrides])
    if not source.is_run or config.workload.arrival != "closed_loop":
        columns = ("arrival_ns", "prompt_tokens", "output_tokens")
        rows: Any = list(zip(*(recorded.requests[name] for name in columns), strict=True))
        longest, limit = max(p + o for _, p, o in rows), config.max_model_len or config.model.max_position_embeddings
        if limit is not None and longest > limit:
            raise ValueError(
                f"recorded={source.path}: a request of {longest} tokens exceeds the {limit} of {config.model.name}; "
                f"give the model and max_model_len that it was recorded with"
            )
        trace.parent.mkdir(parents=True, exist_ok=True)
        write_trace(trace, rows)
        serve_trace(config, trace)
    config.results_dir, config.rerun = str(request.out / "runs"), "true"  # The simulator may have changed since.
    (job,) = jobs_of(resolve(config, folders_of(parsed)), "validate")
    run_any_job(job, argv=_argv())
    simulated = load_run(job.directory)
    changed = [o.removeprefix("hardware.") for o in request.overrides if o.startswith("hardware.")]
    return dataclasses.replace(simulated, where=", ".join([simulated.where, *changed]))


def _argv() -> list[str]:
    return ["python", "-m", "experiments.validate", *sys.argv[1:]]


def _compose(overrides: list[str]) -> DictConfig:
    return compose_config(overrides)


def validate(request: Request, console: Console) -> list[Path]:
    """Simulate, compare, print and write every group of repeats; the comparison.json of each."""
    groups: dict[str, list[Source]] = {}
    written = []
    for source in request.sources:
        groups.setdefault(source.key, []).append(source)
    for sources in groups.values():
        first = sources[0].recording.name
        name = first if request.name is None else request.name if len(groups) == 1 else f"{request.name}-{first}"
        folder = request.out / "validation" / name
        folder.mkdir(parents=True, exist_ok=True)
        with console.status(Text(f"simulating {name}")):
            pairs = [(s.recording, simulate(s, request, folder / f"served-{s.recording.name}.csv")) for s in sources]
        rows = compare(pairs, request.tolerance)
        written.append(_show(name, folder, rows, pairs, request, console))
    return written


def _show(
    name: str,
    folder: Path,
    rows: list[Comparison],
    pairs: list[tuple[Recording, Recording]],
    request: Request,
    console: Console,
) -> Path:
    from uvm_kv.report.style import save_figure
    from uvm_kv.validate.figure import validation_figure

    recorded, simulated = pairs[0]
    runs = "1 run" if len(pairs) == 1 else f"{len(pairs)} runs"
    title = f"{name}: recorded ({recorded.label}, {runs}) against simulated ({simulated.where})"
    print_comparison(title, rows, request.tolerance, console)
    if recorded.origin != "measured":
        text = {"external": "the file does not say how its times were measured"}.get(
            recorded.origin, f"the recording is {recorded.origin} too: this compares two settings of the simulator"
        )
        console.print(f"note: {text}", soft_wrap=True)
    counts = {word: sum(row.verdict == word for row in rows) for word in dict.fromkeys(row.verdict for row in rows)}
    line = ", ".join(f"{count} {word}" for word, count in counts.items())
    console.print(f"Validation: {line}", highlight=False, soft_wrap=True)
    figures = request.out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    paths = save_figure(validation_figure(pairs, rows, request.tolerance), figures / f"validate_{name}")
    tables = write_comparison(folder, rows, pairs, tolerance=request.tolerance, argv=_argv())
    for what, files in (("figure", paths), ("table", tables)):
        console.print(f"{what}: {'  '.join(map(str, files))}", markup=False, highlight=False, soft_wrap=True)
    return tables[0]


def main() -> int:
    arguments, as_json = take_json(sys.argv[1:])
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    register()
    try:
        if flags := [a for a in arguments if a.startswith("-")]:
            raise ValueError(f"{flags[0]} is not an option; --help shows what there is")
        console = plain_console()
        console.quiet = as_json
        written = validate(parse(arguments), console)
        if as_json:
            print(json.dumps([read_json(file) for file in written], indent=1))
    except (ValueError, OmegaConfBaseException, OSError) as error:
        return say_why(error)
    return 0
