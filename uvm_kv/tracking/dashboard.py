"""The saved views and the report of a wandb project, as code (docs/dashboards.md).

    python -m experiments.dashboard --project my-card             saves them; again writes over what it saved
    python -m experiments.dashboard --json                        prints what it would save; no network

A view or a section shows runs of one origin, so that simulated and measured ones never stand in one panel. Exit status:
0, with a line where there is no login or no server to be reached; 1 if the server refused; 2 without the package.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uvm_kv.config.grammar import parse
from uvm_kv.tracking.publish import PROJECT
from uvm_kv.tracking.wandb_sink import METRICS, PEER, REPORT, SERIES, TIME, server_problem

VIEWS = {"simulated": ("simulated",), "measured": ("measured", PEER), "replayed": ("replayed",)}
"""Job types that are shown together."""
SAVED = Path("results/wandb/dashboard.json")
"""What was saved where, so that it is written over and not added to."""
TITLE = "uvm-kv, CPU-backed KV cache"
QUESTION = (
    "Does KV cache in CPU memory raise the throughput of a GPU that serves a language model, when, by how much, and "
    "through which mechanism? Each point is one run; its run directory is its artifact. Figures and verdicts are made "
    "from the run directories, not from here."
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.dashboard", description=__doc__.splitlines()[0])
    parser.add_argument("--project", default=PROJECT, help=f"wandb's (default: {PROJECT})")
    parser.add_argument(
        "--entity", default=os.environ.get("WANDB_ENTITY"), help="team (default: WANDB_ENTITY, or yours)"
    )
    parser.add_argument("--json", action="store_true", help="print what would be saved")
    options = parse(parser, arguments)
    try:
        if options.json:
            print(json.dumps(described(options.entity or "entity", options.project), indent=1))
            return 0
        _import()
        if (problem := server_problem()) is not None:
            print(f"no dashboard was saved: {problem}; the layout is printed by --json")
            return 0
    except ImportError as error:
        print(f"error: {error}; pip install -e '.[dashboard]'", file=sys.stderr)
        return 2
    try:
        for name, url in save(options.entity, options.project).items():
            print(f"{name}: {url}")
    except Exception as error:  # Whatever the server, or the package, makes of its answer.
        print(f"error: it could not be saved: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


def _import() -> tuple[Any, Any, Any]:
    """(workspaces, reports, expr) of wandb-workspaces, which warns of its own use of pydantic."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from wandb_workspaces import expr, workspaces
        from wandb_workspaces.reports import v2 as reports
    return workspaces, reports, expr


def panels() -> dict[str, list[Any]]:
    """Panels by the title of their section, the answer first."""
    _, wr, _ = _import()

    def against(x: Any, name: str, **more: Any) -> Any:
        units = {metric.name: metric.unit for metric in METRICS}
        title = f"{name} ({units[name]}) against {x.name}"
        return wr.ScatterPlot(title=title, x=x, y=wr.SummaryMetric(name), **more)

    def over_time(*names: str, title: str) -> Any:
        y = [f"{SERIES}{name}" for name in names]
        axis = "simulated or measured time (s)"
        return wr.LinePlot(title=title, x=TIME, y=y, title_x=axis, max_runs_to_show=20, smoothing_type="none")

    batch, latency = wr.Config("offered_batch"), wr.SummaryMetric("tpot_s_p99")
    return {
        "Throughput": [
            against(batch, "output_tokens_per_s", log_x=True),
            against(latency, "output_tokens_per_s", log_x=True),
            against(wr.SummaryMetric("running_batch_mean"), "output_tokens_per_s"),
            wr.ParallelCoordinatesPlot(
                title="what goes with throughput",
                columns=[
                    wr.ParallelCoordinatesPlotColumn(metric=metric, display_name=shown)
                    for metric, shown in (
                        (wr.Config("mechanism"), "mechanism"),
                        (wr.Config("model_name"), "model"),
                        (batch, "offered batch"),
                        (wr.SummaryMetric("device_kv_bytes"), "KV on the card (bytes)"),
                        (latency, "p99 TPOT (s)"),
                        (wr.SummaryMetric("output_tokens_per_s"), "output tokens/s"),
                    )
                ],
            ),
        ],
        "Latency": [
            against(batch, "tpot_s_p99", log_x=True, log_y=True),
            against(batch, "ttft_s_p50", log_x=True, log_y=True),
            against(batch, "normalized_latency_s_mean", log_x=True, log_y=True),
        ],
        "Memory and link": [
            against(batch, name, log_x=True)
            for name in (
                *("kv_bytes_mean_used", "stall_s", "h2d_bytes", "d2h_bytes"),
                *("gpu_fault_groups", "evicted_chunks", "preemptions"),
            )
        ],
        "Energy": [against(batch, name, log_x=True) for name in ("energy_j_per_output_token", "power_w")],
        "Over time": [
            over_time("output_tokens_per_s", title="output tokens/s"),
            over_time("num_running", "num_waiting", "num_swapped", title="requests"),
            over_time("kv_used_bytes", "kv_reserved_bytes", title="KV memory (bytes)"),
            over_time("h2d_copy_bytes", "h2d_fault_bytes", "h2d_prefetch_bytes", "h2d_remote_read_bytes",
                      title="to the card, bytes a step, by cause"),
            over_time("stall_s", title="waiting for memory (s a step)"),
        ],
        "Figures": [wr.MediaBrowser(title="each run over time", media_keys=["figure"], num_columns=2)],
    }  # fmt: skip


def workspace(entity: str, project: str, view: str) -> Any:
    """The saved view of VIEWS[view]'s job types, best throughput first. Not grouped: panels would show group means."""
    ws, _, expr = _import()
    shown = [m.name for m in METRICS if m.goal is not None][:6]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"uvm-kv {view}",
        sections=[
            ws.Section(name=title, panels=there, is_open=i < 2) for i, (title, there) in enumerate(panels().items())
        ],
        settings=ws.WorkspaceSettings(x_axis=TIME, max_runs=20),
        runset_settings=ws.RunsetSettings(
            filters=[expr.Metric("JobType").isin(list(VIEWS[view]))],
            order=[expr.Ordering(expr.Summary(METRICS[0].name), ascending=METRICS[0].goal == "minimize")],
            pinned_columns=["run:displayName", *(f"summary:{name}" for name in shown)],
        ),
    )


def report(entity: str, project: str) -> Any:
    """One section of panels per origin, then the figures and reports that were published with the experiments."""
    _, wr, expr = _import()

    def runs(name: str, *job_types: str) -> Any:
        # Of the report's own project.
        return wr.Runset(name=name, filters=[expr.Metric("JobType").isin(list(job_types))])

    blocks: list[Any] = [wr.TableOfContents(), wr.P(text=QUESTION)]
    for view, job_types in VIEWS.items():
        blocks += [wr.H1(text=f"{view.capitalize()} runs")]
        for title, there in panels().items():
            blocks += [wr.H2(text=title), wr.PanelGrid(runsets=[runs(view, *job_types)], panels=there)]
    published = wr.MediaBrowser(title="report", media_keys=["report", "report_figure"], num_columns=1)
    blocks += [
        wr.H1(text="Figures and reports by experiment"),
        wr.PanelGrid(runsets=[runs("reports", REPORT)], panels=[published]),
        wr.H1(text="Metrics"),
        wr.UnorderedList(items=[f"{m.name} ({m.unit}{f', {m.goal}' if m.goal else ''}): {m.what}" for m in METRICS]),
    ]
    return wr.Report(entity=entity, project=project, title=TITLE, description=QUESTION, blocks=blocks, width="fluid")


def described(entity: str, project: str) -> dict[str, Any]:
    """What would be saved, as wandb stores it."""
    views = {view: workspace(entity, project, view) for view in VIEWS}
    specs = {f"view {view}": it._to_model().spec for view, it in views.items()}
    specs["report"] = report(entity, project)._to_model().spec
    return {name: json.loads(spec.model_dump_json(by_alias=True, exclude_none=True)) for name, spec in specs.items()}


def save(entity: str | None, project: str) -> dict[str, str]:
    """Save all, over what was saved before from here. URLs by name."""
    import wandb

    entity = entity or wandb.Api(timeout=20).default_entity
    if not entity:
        raise ValueError("the server names no entity for this login; give --entity")
    known: dict[str, Any] = json.loads(SAVED.read_text()) if SAVED.is_file() else {}
    saved = known.setdefault(f"{entity}/{project}", {})
    try:
        made = report(entity, project)
        made.id = saved.get("report", {}).get("id", "")
        made.save()  # It makes the project where there is none.
        saved["report"] = {"id": made.id, "url": made.url}
        for view in VIEWS:
            space = workspace(entity, project, view)
            before = saved.get(f"view {view}", {})
            space._internal_id, space._internal_name = before.get("id", ""), before.get("name", "")
            space.save()
            saved[f"view {view}"] = {"id": space._internal_id, "name": space._internal_name, "url": space.url}
    finally:
        SAVED.parent.mkdir(parents=True, exist_ok=True)
        SAVED.write_text(json.dumps(known, indent=1) + "\n")
    return {name: entry["url"] for name, entry in saved.items()}
