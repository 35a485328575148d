"""Search the best batch size of each mechanism around those of a sweep (`uvm_kv.sweep.search`), where refine=true.

    1. the device-only baselines, each from the batches of the sweep
    2. the CPU-backed mechanisms, from theirs and from the baselines' best: beyond it requests are preempted
    3. where lengths or arrivals are drawn: the points that a verdict compares, with NUM_DRAWS draws each

What is finished is not run again. The new runs lie among those of the sweep and are reported like them. They run on the
cores of this machine, also after a sweep on a cluster. Only simulated points are searched.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from uvm_kv.config.command import compose_config
from uvm_kv.config.names import folders_of, parse_overrides
from uvm_kv.config.schema import register
from uvm_kv.job.build import Job, check_fits, identity, is_done, repeats_of
from uvm_kv.job.resolve import resolve
from uvm_kv.peers.job import run_any_job
from uvm_kv.report.load import setting_of
from uvm_kv.report.verdict import LIMIT
from uvm_kv.store.code import is_of_other_code
from uvm_kv.store.failures import clear_failure, write_failure
from uvm_kv.store.provenance import git_state
from uvm_kv.store.whole import read_run, set_aside
from uvm_kv.sweep.progress import Event, read_command, report_event
from uvm_kv.sweep.search import Tried, search_best
from uvm_kv.sweep.worker import end_with_parent, explain
from uvm_kv.telemetry.summary import is_limited_by_memory
from uvm_kv.types import BASELINES

NUM_DRAWS = 5


@dataclass(frozen=True)
class Line:
    """One mechanism with its variant in one comparison: its points differ in the batch size only."""

    comparison: str
    mechanism: str
    overrides: tuple[str, ...]
    """Those of one of its jobs, without what says the batch size."""
    experiment: str
    tracking: dict[str, str] | None
    summaries: tuple[dict[str, Any], ...]
    """Summaries of the finished runs of one seed and repeat."""
    finished: frozenset[str]
    """Run directories that this sweep or its search has run already: rerun=true does not run them again, and they are
    reported once."""
    hints: tuple[int, ...] = ()
    """Batches to begin with beside its own."""
    search_path: tuple[str, ...] = ()
    """The override that adds folders of the user's own."""

    @property
    def is_backed(self) -> bool:
        return self.mechanism not in BASELINES

    def best(self, *, tpot_s: float | None = None, batch: int | None = None) -> dict[str, Any] | None:
        """The fastest run that a verdict may take, at most as slow per token, or at one batch."""
        fit = [s for s in self.summaries if _tried(s, is_backed=self.is_backed).counts]
        if tpot_s is not None:
            fit = [s for s in fit if s["tpot_s"]["p99"] is not None and s["tpot_s"]["p99"] <= tpot_s]
        if batch is not None:
            fit = [s for s in fit if s["offered_batch"] == batch]
        return max(fit, key=_rate, default=None)


def _rate(summary: dict[str, Any]) -> float:
    rate = summary["output_tokens_per_s"]
    return float(summary["output_tokens_per_s_whole_run"] or 0.0 if rate is None else rate)


def _tried(summary: dict[str, Any], *, is_backed: bool) -> Tried:
    batch, running, preemptions = summary["offered_batch"], summary["running_batch_mean"] or 0.0, summary["preemptions"]
    waiting = summary["waiting_batch_mean"] or 0.0
    return Tried(
        batch,
        _rate(summary),
        running,
        is_limited_by_memory(batch, running=running, waiting=waiting, preemptions=preemptions),
        preemptions > 0,
        not is_backed or bool(summary["h2d_bytes"] or summary["d2h_bytes"]),
    )


def refine(events: Sequence[Event], experiment: str, search_path: tuple[str, ...], num_workers: int) -> None:
    """Run what the search asks for; each run is reported as an event of the sweep. `search_path`: the override that
    adds folders of the user's own; `num_workers`: processes at once."""
    lines = [replace(line, search_path=search_path) for line in _lines(events, experiment)]
    if not lines:
        return
    with ProcessPoolExecutor(num_workers, get_context("spawn"), _begin_worker) as pool:
        try:
            alone = list(pool.map(_search, [line for line in lines if not line.is_backed]))
            found = [*alone, *pool.map(_search, [_with_hints(line, alone) for line in lines if line.is_backed])]
            for future in [pool.submit(_draw, *point) for point in _to_draw(found)]:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin_worker() -> None:
    end_with_parent()
    GlobalHydra.instance().clear()
    register()


def _lines(events: Iterable[Event], experiment: str) -> list[Line]:
    finished = [e for e in events if e.status in ("done", "skipped") and e.directory is not None and e.overrides]
    done = frozenset(str(e.directory) for e in finished)
    found: dict[tuple[str, str], list[tuple[Event, dict[str, Any]]]] = {}
    for event in finished:
        try:
            summary, manifest, _ = read_run(Path(str(event.directory)))
        except ValueError:  # Damaged since; the report leaves it out and says so.
            continue
        if summary["origin"] != "simulated" or summary["mechanism"] == "custom":
            continue
        if is_of_other_code(manifest, summary["runner"]):  # Its numbers say nothing about those of the present code.
            continue
        comparison = json.dumps([setting_of(summary), summary["hardware"], summary["model"], summary["workload"]])
        key = comparison, json.dumps([summary["mechanism"], summary["variant"]])
        found.setdefault(key, []).append((event, summary))
    lines = []
    for (comparison, _), runs in found.items():
        first = min((s["seed"], s["repeat"]) for _, s in runs)
        runs = [(e, s) for e, s in runs if (s["seed"], s["repeat"]) == first]
        event, summary = runs[0]
        sized = ("batch_size=", "working_set_ratio=", "num_repeats=")
        overrides = tuple(o for o in event.overrides or () if not o.startswith(sized))
        summaries = tuple(s for _, s in runs)
        lines.append(Line(comparison, summary["mechanism"], overrides, experiment, event.tracking, summaries, done))
    return lines


def _with_hints(line: Line, alone: Iterable[Line]) -> Line:
    """Where it preempts: the best batches of the baselines in its comparison, and the next ones."""
    if line.summaries[0]["preemption"] == "none":
        return line
    best = [it.best() for it in alone if it.comparison == line.comparison]
    return replace(line, hints=tuple(s["offered_batch"] + more for s in best if s is not None for more in (0, 1)))


def _compose(line: Line) -> DictConfig:
    composed = compose_config([*line.search_path, *line.overrides])
    with open_dict(composed):
        composed.working_set_ratio = None
    return composed


def _jobs(line: Line, composed: DictConfig, batch_size: int, num_repeats: int = 1) -> list[Job]:
    config = composed.copy()
    OmegaConf.update(config, "batch_size", batch_size)
    OmegaConf.update(config, "num_repeats", num_repeats)
    folders = folders_of(parse_overrides(list(line.search_path)))
    return repeats_of(resolve(config, folders), line.experiment)


def _search(line: Line) -> Line:
    """With the summaries of what the search ran. In a worker process."""
    composed = _compose(line)
    known = {s["offered_batch"]: s for s in line.summaries}
    ran: set[str] = set()

    def evaluate(batch_size: int) -> Tried | None:
        if batch_size not in known:
            try:
                job = _jobs(line, composed, batch_size)[0]
            except ValueError:  # The activations of so large a batch leave too little of the card.
                return None
            summary = _run(line, job)
            if summary is None:
                return None
            known[batch_size] = summary
            ran.add(str(job.directory))
        return _tried(known[batch_size], is_backed=line.is_backed)

    one_length = not line.summaries[0]["drawn"]
    # No step takes more sequences than tokens, and the LIMIT of a sweep is a point of its own, not a rung.
    start = [b for b in known if b != LIMIT] or list(known)
    search_best(evaluate, [*start, *line.hints], one_length=one_length, most=composed.scheduler.max_num_batched_tokens)
    return replace(line, summaries=tuple(known.values()), finished=line.finished | ran)


def _to_draw(lines: Sequence[Line]) -> list[tuple[Line, int]]:
    """(line, batch size) of the points whose gain is paired over draws: the best ones of each side and of each
    baseline, the best backed one at most as slow per token as the baseline, and the best at LIMIT."""
    found: dict[tuple[str, str, int], tuple[Line, int]] = {}
    for comparison in dict.fromkeys(line.comparison for line in lines):
        here = [line for line in lines if line.comparison == comparison and line.summaries[0]["drawn"]]
        alone = [line for line in here if not line.is_backed]
        base = _fastest(alone)
        wanted = [(line, line.best()) for line in alone]
        backed = [line for line in here if line.is_backed]
        tpot_s = None if base is None else base[1]["tpot_s"]["p99"]
        wanted += [it for it in (_fastest(backed), _fastest(backed, tpot_s=tpot_s)) if it is not None]
        wanted += [it for it in (_fastest(alone, batch=LIMIT), _fastest(backed, batch=LIMIT)) if it is not None]
        for line, summary in wanted:
            if summary is not None:
                batch = summary["offered_batch"]
                found[comparison, json.dumps(line.overrides), batch] = (line, batch)
    return list(found.values())


def _fastest(lines: Sequence[Line], **which: Any) -> tuple[Line, dict[str, Any]] | None:
    found = [(line, best) for line in lines if (best := line.best(**which)) is not None]
    return max(found, key=lambda it: _rate(it[1]), default=None)


def _draw(line: Line, batch_size: int) -> None:
    for job in _jobs(line, _compose(line), batch_size, NUM_DRAWS):
        _run(line, job)


def _run(line: Line, job: Job) -> dict[str, Any] | None:
    """The summary of a job, run where it is not finished; None where it is refused or fails, or where what is there is
    of other code, which rerun=changed runs again."""
    directory, overrides = str(job.directory), [*line.overrides, f"batch_size={job.resolved.config.batch_size}"]
    label = f"{job.resolved.model.name} {job.resolved.config.workload.name} {line.mechanism}"
    label += f" batch {job.resolved.config.batch_size} (searched)"
    if directory in line.finished or is_done(job):
        if directory not in line.finished:
            report_event(Event("skipped", label, directory, tracking=line.tracking, overrides=overrides))
        try:
            summary, manifest, _ = read_run(job.directory)
        except ValueError:  # As above.
            return None
        return None if is_of_other_code(manifest, summary["runner"]) else summary
    try:
        check_fits(job)
    except ValueError:  # No finding: the batches of the sweep are those that were asked for.
        return None
    argv = read_command().argv
    told = identity(job)
    try:
        note = set_aside(job.directory)
        report_event(Event("started", label, directory, overrides=overrides, identity=told, note=note))
        summary = run_any_job(job, argv=argv)
    except Exception as error:
        why = explain(error)
        write_failure(job.directory, identity=told, error=why, tried=True, argv=argv, git_sha=git_state()["git_sha"])
        report_event(Event("failed", label, directory, why))
        return None
    clear_failure(job.directory)
    report_event(Event("done", label, directory, tracking=line.tracking, overrides=overrides))
    return summary
