"""The dashboard as code: its panels show what runs have, origins apart, and it is saved where a server is."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.experiments.test_publish import environment
from tests.jobs import job
from tests.wandb_server import ENTITY, KEY, wandb_server
from uvm_kv.job.build import run_job
from uvm_kv.store.directories import read_table
from uvm_kv.store.records import read_records
from uvm_kv.tracking import dashboard
from uvm_kv.tracking.wandb_sink import METRICS, content_of

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb-workspaces of its own use of pydantic


@pytest.fixture(scope="module")
def layout() -> dict[str, Any]:
    return dashboard.described("entity", "project")


def named(node: Any, key: str) -> list[Any]:
    """Every value under `key`, at any depth."""
    if isinstance(node, list):
        return [value for child in node for value in named(child, key)]
    if not isinstance(node, dict):
        return []
    return [value for k, child in node.items() for value in ([child] if k == key else named(child, key))]


def test_panels_show_what_runs_have(layout: dict[str, Any], tmp_path: Path) -> None:
    one = job(tmp_path, "batch_size=4", "workload.prompt_tokens=64", "workload.output_tokens=64")
    run_job(one, argv=["test"])
    ((record,), _) = read_records(tmp_path)
    content = content_of(record, read_table(record.place, "steps"), None)
    for spec in layout.values():
        text = json.dumps(spec)
        summaries, configs = set(re.findall(r'"summary:(\w+)"', text)), set(re.findall(r'"config:(\w+)\.value"', text))
        assert summaries <= set(content.summary)
        assert configs <= set(content.config)
        assert {"output_tokens_per_s", "tpot_s_p99", "h2d_bytes", "energy_j_per_output_token"} <= summaries
        series = set(re.findall(r'"(steps/\w+)"', text))
        assert {"steps/time_s", "steps/output_tokens_per_s", "steps/kv_used_bytes"} <= series
        assert series <= set(content.series[-1])


def test_a_view_has_the_runs_of_one_origin_best_first(layout: dict[str, Any]) -> None:
    for view, job_types in dashboard.VIEWS.items():
        (runs,) = layout[f"view {view}"]["section"]["runSets"]
        (shown,) = (f["value"] for f in named(runs["filters"], "filters")[0] if f["key"]["name"] == "jobType")
        assert shown == list(job_types)
        (key,) = runs["sort"]["keys"]
        assert (key["key"]["name"], key["ascending"]) == (METRICS[0].name, False)
        assert not runs["grouping"], "panels would show means over groups"
    wanted = [f["value"] for runs in named(layout["report"], "runSets") for f in named(runs, "filters")[0]["filters"]]
    origins = {"simulated", "measured", "replayed"}
    assert all(len(origins & set(values)) <= 1 for values in wanted)
    assert {value for values in wanted for value in values} == {*origins, "peer", "report"}


def test_the_report_says_the_unit_of_every_metric(layout: dict[str, Any]) -> None:
    text = json.dumps(layout["report"])
    for metric in METRICS:
        assert f"{metric.name} ({metric.unit}" in text


def command(tmp_path: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = {**environment(tmp_path, **more), "PYTHONPATH": f"{REPOSITORY}:{environment(tmp_path).get('PYTHONPATH', '')}"}
    code = [sys.executable, "-m", "experiments.dashboard", *arguments]
    return subprocess.run(code, cwd=tmp_path, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("more", "said"),
    [({}, "no login"), ({"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}, "cannot be reached")],
)
def test_without_a_server_it_says_so_in_a_line_and_ends_well(tmp_path: Path, more: dict[str, str], said: str) -> None:
    done = command(tmp_path, **more)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert line.startswith("no dashboard was saved: ")
    assert said in line
    assert not (tmp_path / "results").exists()


def test_a_server_that_never_answers_is_not_waited_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = command(tmp_path, WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
    assert done.returncode == 0
    (line,) = done.stdout.splitlines()
    assert "cannot be reached" in line


def test_it_is_saved_and_written_over(tmp_path: Path) -> None:
    with wandb_server() as server:
        for _ in range(2):
            done = command(tmp_path, "--project", "study", WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
            assert done.returncode == 0, done.stderr
            assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
                "report", *(f"view {view}" for view in dashboard.VIEWS)
            ]  # fmt: skip
    assert len(server.views) == 2 * (1 + len(dashboard.VIEWS))
    first, again = server.views[: len(server.views) // 2], server.views[len(server.views) // 2 :]
    assert all(view.get("id") is None and view["entityName"] == ENTITY for view in first)
    assert [view["id"] for view in again] == [f"view{i}" for i in range(1, 2 + len(dashboard.VIEWS))]
    assert [view["displayName"] for view in first] == [view["displayName"] for view in again]


def test_a_server_that_refuses_is_one_line(tmp_path: Path) -> None:
    with wandb_server() as server:
        server.refuse = {dashboard.TITLE}
        done = command(tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    assert done.returncode == 1
    assert "no room for it" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_without_its_package_it_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    for arguments in ([], ["--json"]):
        assert dashboard.main(arguments) == 2
        assert ".[dashboard]" in capsys.readouterr().err
