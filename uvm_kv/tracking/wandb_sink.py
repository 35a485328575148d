"""Finished runs to Weights & Biases, in one layout (docs/dashboards.md). The record stays the run directory.

Everything is first written as an offline mirror, under a temporary name and renamed, so that a mirror that has its name
is whole; `online` then sends that file with `wandb sync`, which leaves a mark beside it. So a run is sent once, whoever
was interrupted when, and offline neither a network nor an account is needed.

    <experiment>/wandb/offline-run-<time>-<run id>/run-<run id>.wandb  [.wandb.synced]  content.json
    <experiment>/wandb/replaced/...                       mirrors of what was since run again; never sent
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uvm_kv.store.records import Record
from uvm_kv.telemetry.recorder import Table
from uvm_kv.types import OUR_ENGINE

LAYOUT_VERSION = 1
"""In every run's config, raised when names or meanings of the layout change."""
MAX_POINTS = 500
"""Points of a step series: longer ones are averaged over equal spans of steps."""
SERIES = "steps/"
TIME = f"{SERIES}time_s"
MAX_TAG = 64
"""Characters that a tag may have there."""
REPORT = "report"
"""Job type of the run that holds figures and report of an experiment; the others are an origin, or PEER."""
PEER = "peer"
OFFLINE, ONLINE = "offline", "online"
CONTENT = "content.json"
WRITING = ".writing-"
PROBE_S = 5.0
SYNC_S = 600.0


class Metric(NamedTuple):
    """A number of summary.json as it is named there: the dots of nested fields are underscores."""

    name: str
    unit: str
    goal: str | None
    """maximize, minimize, or None where neither is better by itself."""
    what: str


METRICS = (
    Metric("output_tokens_per_s", "tokens/s", "maximize", "throughput over the steady window"),
    Metric("output_tokens_per_s_whole_run", "tokens/s", "maximize", "throughput with start and end"),
    Metric("running_batch_mean", "requests", "maximize", "requests served at once, mean over time"),
    Metric("tpot_s_p99", "s", "minimize", "time per output token, 99th percentile; also _mean, _p50, _p90"),
    Metric("ttft_s_p50", "s", "minimize", "time to first token, median; also _mean, _p90, _p99"),
    Metric("normalized_latency_s_mean", "s/token", "minimize", "arrival to last token over the output's length"),
    Metric("energy_j_per_output_token", "J/token", "minimize", "energy of an output token; also _above_idle"),
    Metric("power_w", "W", None, "mean power of the time that energy is of"),
    Metric("stall_s", "s", "minimize", "time in which computing waited for memory"),
    Metric("h2d_bytes", "bytes", "minimize", "over the link to the card; by cause: link_bytes_by_cause_h2d_*"),
    Metric("d2h_bytes", "bytes", "minimize", "over the link to the host; by cause: link_bytes_by_cause_d2h_*"),
    Metric("gpu_fault_groups", "count", "minimize", "fault groups of managed memory"),
    Metric("evicted_chunks", "count of 2 MiB", "minimize", "chunks that left the card"),
    Metric("preemptions", "count", "minimize", "requests put back; also preemptions_by_kind_*"),
    Metric("kv_bytes_mean_used", "bytes", None, "KV memory that holds tokens, mean over time; also _claimed, _lost_*"),
    Metric("device_kv_bytes", "bytes", None, "KV memory on the card"),
    Metric("host_kv_bytes", "bytes", None, "KV memory on the host"),
    Metric("num_output_tokens", "tokens", None, "tokens of the whole run"),
    Metric("duration_s", "s", None, "simulated or measured time of the whole run"),
)
"""What dashboards show first, the one to look at first being the first."""

FACETS = (
    *("origin", "runner", "engine", "hardware", "model", "weights", "mechanism", "memory", "placement", "reach"),
    *("scheduler", "admission", "preemption", "workload", "arrival", "start", "prompt_tokens", "output_tokens"),
    *("layout", "block_size", "allocation", "dtype", "offered_batch", "seed", "repeat"),
)
"""Fields of a summary that say what the run is of: they go to the config, where runs are filtered and grouped by."""
NOT_METRICS = {"schema_version", "setting", "variant", "hints", *FACETS}
GROUPED = ("hardware", "model", "memory", "placement", "scheduler", "workload")
"""Facets that are also groups of the config, and are `<facet>_name` there."""
PROVENANCE = ("git_sha", "git_dirty", "started", "duration_s", "versions", "gpu", "argv")


@dataclass(frozen=True)
class Address:
    """Where a wandb run belongs, and what it must hold for it to be sent already."""

    id: str
    home: Path
    """Folder of the experiment; the mirrors are in `home`/wandb."""
    sha256: str
    """SHA-256 of the content that the wandb run is made of."""
    project: str


@dataclass(frozen=True)
class Content:
    """The content of a wandb run."""

    name: str
    """Name that legends show; the address has the id."""
    group: str
    job_type: str
    tags: list[str]
    config: dict[str, Any]
    summary: dict[str, Any]
    series: list[dict[str, float]] = field(default_factory=list)
    pictures: Mapping[str, Path] = field(default_factory=dict)
    """PNG or HTML content by key."""
    artifact: tuple[str, str, Sequence[Path]] | None = None
    """Name, type, and files or directories, whose content lies at its root."""


def address_of(record: Record, project: str) -> Address:
    return Address(record.id, record.place.parent, record.sha256, project)


def content_of(record: Record, steps: Table | None, picture: Path | None) -> Content:
    """`steps`, `picture`: None for a run of a packed set, which has no step rows."""
    return Content(
        name=title_of(record.summary),
        group=record.experiment,
        job_type=job_type(record.summary),
        tags=tags(record.summary),
        config=config_of(record),
        summary=metrics(record.summary),
        series=[] if steps is None else step_series(steps),
        pictures={} if picture is None else {"figure": picture},
        artifact=(f"run-{record.id}", "run-directory", [record.place]) if record.place.is_dir() else None,
    )


def title_of(summary: Mapping[str, Any]) -> str:
    """`pinned_balanced, batch 24, llama_7b, simulated`; a peer by its engine."""
    kind = job_type(summary)
    what = summary["engine"] if kind == PEER else summary["mechanism"]
    return f"{what}, batch {summary['offered_batch']}, {summary['model']}, {kind}"


def job_type(summary: Mapping[str, Any]) -> str:
    """simulated, measured, replayed, or peer: a measured run of another engine."""
    return PEER if summary.get("engine", OUR_ENGINE) != OUR_ENGINE else str(summary["origin"])


def tags(summary: Mapping[str, Any]) -> list[str]:
    """`mechanism:pinned_balanced` and so on; a peer's is its engine."""
    peer = job_type(summary) == PEER
    facets = ("engine" if peer else "mechanism", "model", "hardware", "memory")
    named = [f"{facet}:{value}"[:MAX_TAG] for facet in facets if (value := summary.get(facet)) is not None]
    return [*named, "memory:emulated"] if summary.get("memory_emulated") else named


def config_of(record: Record) -> dict[str, Any]:
    """The setting and variant as groups, the facets flat, and where the run came from."""
    summary, manifest = record.summary, record.manifest
    config = _nested({**summary.get("setting", {}), **summary.get("variant", {})})
    for facet in FACETS:
        if facet in summary:
            config[f"{facet}_name" if facet in GROUPED else facet] = summary[facet]
    return config | {
        "experiment": record.experiment,
        "provenance": {key: manifest[key] for key in PROVENANCE if key in manifest},
        "summary_sha256": record.sha256,
        "schema_version": summary["schema_version"],
        "layout_version": LAYOUT_VERSION,
    }


def metrics(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What summary.json says of the outcome, flat; what was not observed is absent."""
    return _flat({key: value for key, value in summary.items() if key not in NOT_METRICS})


def step_series(steps: Table) -> list[dict[str, float]]:
    """At most MAX_POINTS rows of step means under `steps/`, with the time of their last step; columns that were not
    observed are left out. Durations are in seconds; throughput is tokens over the time of the steps."""
    observed = {name: np.array(v, float) for name, v in steps.items() if v and None not in v}
    if not observed:
        return []
    start, end = observed.pop("start_ns"), observed.pop("end_ns")
    number = observed.pop("step")
    for name in [n for n in observed if n.endswith("_ns")]:
        observed[name.removesuffix("_ns") + "_s"] = observed.pop(name) * 1e-9
    observed["duration_s"] = (end - start) * 1e-9
    rows = []
    for span in np.array_split(np.arange(len(number)), min(MAX_POINTS, len(number))):
        row = {name: float(values[span].mean()) for name, values in observed.items()}
        if row["duration_s"] > 0:
            row["output_tokens_per_s"] = row["num_output_tokens"] / row["duration_s"]
        row |= {"time_s": float(end[span[-1]]) * 1e-9, "step": float(number[span[-1]])}
        rows.append({f"{SERIES}{name}": value for name, value in row.items()})
    return rows


def is_sent(address: Address, mode: str) -> bool:
    """Whether a whole mirror of this very content lies there; online, whether it has been sent."""
    found = _mirror(address)
    return found is not None and (mode == OFFLINE or _is_synced(found))


def send(address: Address, content: Content, mode: str) -> str | None:
    """Write the mirror if there is none, and online send it. None, or why it could not be done: never raises for what
    a tracker may do, which must not fail what is already finished."""
    try:
        with _alone(address.home / "wandb"):
            mirror = _mirror(address) or _write(address, content)
            if mode == ONLINE and not _is_synced(mirror):
                _sync(mirror)
    except Exception as error:
        return f"tracking=wandb failed for {address.id}: {one_line(error)}"
    return None


def check_settings() -> None:
    """ValueError where wandb does not take what its environment variables and files say."""
    try:
        _quiet_wandb()
    except ImportError:
        raise
    except Exception as error:  # Of pydantic, of wandb, or of what they call.
        raise ValueError(
            f"wandb refuses its settings ({_told_by_pydantic(error) or one_line(error)}); mend them, and python -m "
            f"experiments.publish sends the runs"
        ) from None


def _told_by_pydantic(error: Exception) -> str | None:
    """`WANDB_BASE_URL: Invalid URL`, of the several lines of a ValidationError."""
    errors = getattr(error, "errors", None)
    if not callable(errors):
        return None
    return "; ".join(f"WANDB_{'.'.join(map(str, it['loc'])).upper()}: {it['msg']}" for it in errors())


def server_problem() -> str | None:
    """Why nothing can be sent from here: no login, or no answer in PROBE_S; None if it can. Never asks for a key."""
    wandb = _quiet_wandb()
    url = str(wandb.setup().settings.base_url)
    try:
        if not wandb.login(prompt=False, verify=False):
            return "no login to a wandb server (wandb login, or WANDB_API_KEY)"
    except Exception as error:
        return f"no login to a wandb server ({one_line(error)})"
    failure: list[str] = [f"no answer in {PROBE_S:.0f} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=PROBE_S).close()
            failure.clear()
        except urllib.error.HTTPError:  # It answers.
            failure.clear()
        except Exception as error:
            failure[:] = [one_line(error)]

    # In a thread: looking up a name has no timeout of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_S)
    return f"the wandb server cannot be reached from here ({failure[0]})" if failure else None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time writes mirrors into a folder; the system ends the claim of one that is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob(f"{WRITING}*"):  # By a process that was killed: the lock is ours.
            shutil.rmtree(left, ignore_errors=True)
        yield


def _mirrors(address: Address) -> list[Path]:
    found = (address.home / "wandb").glob(f"offline-run-*-{address.id}")
    return sorted(path for path in found if path.name.split("-", 3)[3] == address.id)


def _mirror(address: Address) -> Path | None:
    expected = _made_of(address)
    for path in _mirrors(address):
        with contextlib.suppress(OSError, ValueError):
            if json.loads((path / CONTENT).read_text()) == expected:
                return path
    return None


def _made_of(address: Address) -> dict[str, Any]:
    return {"sha256": address.sha256, "project": address.project, "layout_version": LAYOUT_VERSION}


def _is_synced(mirror: Path) -> bool:
    return any(mirror.glob("*.wandb.synced"))


def _write(address: Address, content: Content) -> Path:
    folder = address.home / "wandb"
    temporary = Path(tempfile.mkdtemp(prefix=WRITING, dir=folder))
    try:
        _log(address, content, temporary)
        (written,) = (temporary / "wandb").glob(f"offline-run-*-{address.id}")
        (written / CONTENT).write_text(json.dumps(_made_of(address)), encoding="utf-8")
        for old in _mirrors(address):
            if _project(old) in (None, address.project):
                old.rename(_unused(folder / "replaced", old.name))
        return written.rename(_unused(folder, written.name))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unused(folder: Path, name: str) -> Path:
    """wandb's names go by the second."""
    folder.mkdir(exist_ok=True)
    time, rest = name.removeprefix("offline-run-").split("-", 1)
    names = (f"offline-run-{time}{f'.{n}' if n else ''}-{rest}" for n in itertools.count())
    return next(path for path in (folder / name for name in names) if not path.exists())


def _project(mirror: Path) -> str | None:
    try:
        return str(json.loads((mirror / CONTENT).read_text())["project"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _quiet_wandb() -> Any:
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    return wandb


def _log(address: Address, content: Content, folder: Path) -> None:
    wandb = _quiet_wandb()
    run = wandb.init(
        project=address.project,
        mode=OFFLINE,
        id=address.id,
        name=content.name,
        group=content.group,
        job_type=content.job_type,
        tags=content.tags,
        config=content.config,
        dir=str(folder),
        reinit="create_new",
        # The machine and the checkout that send are not those that ran; theirs are in the config.
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        ),
    )
    failed = True
    try:
        run.define_metric(TIME, summary="none", hidden=True)
        run.define_metric(f"{SERIES}*", step_metric=TIME, summary="none")
        for row in content.series:
            run.log(row)
        if content.pictures:
            run.log({key: _media(path) for key, path in content.pictures.items()})
        run.summary.update(content.summary)
        if content.artifact is not None:
            name, kind, paths = content.artifact
            artifact = wandb.Artifact(name, type=kind)
            for path in paths:
                # Finished runs do not change, so they are not copied; `wandb sync` reads them where they are.
                if path.is_dir():
                    artifact.add_dir(str(path), policy="immutable")
                else:
                    artifact.add_file(str(path))
            run.log_artifact(artifact)
        failed = False
    finally:
        run.finish(exit_code=int(failed))


def _media(path: Path) -> Any:
    import wandb

    return wandb.Html(str(path)) if path.suffix == ".html" else wandb.Image(str(path))


def _sync(mirror: Path) -> None:
    """Raises RuntimeError if wandb does not say that it was sent."""
    command = [sys.executable, "-m", "wandb", "sync", str(mirror)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SYNC_S, stdin=subprocess.DEVNULL)
        said = (done.stdout + done.stderr).strip().splitlines()
    except subprocess.TimeoutExpired:
        said = [f"wandb sync had not ended after {SYNC_S:.0f} s"]
    if not _is_synced(mirror):
        raise RuntimeError(said[-1] if said else "wandb sync did not send it")


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}_")
        elif value is not None:
            flat[prefix + key] = value
    return flat


def one_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
