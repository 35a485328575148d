"""Where the report of a sweep goes: each sweep has a name and a report of its own, and runs may be shared by several.

<results_dir>/<experiment>/<run id>/            runs, of whichever sweep made them first
<results_dir>/<experiment>/report/              of a published experiment as it is
<results_dir>/<experiment>/reports/<name>/      of any other sweep; reports/latest is the newest of them
    figure.png  figure.pdf  points.csv  report.html  runs.json  sweep.json
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from uvm_kv.store.directories import REPORT_RUNS, temporary_path, written_whole

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
LATEST = "latest"
MAX_DEFAULT = 60
"""Characters in what a name that is not given says of the overrides."""
NOT_OF_THE_SWEEP = ("experiment", "results_dir", "rerun", "tracking")
"""Overrides with which a published experiment is still as it is published."""


@dataclass(frozen=True)
class SweepReport:
    """The place of a sweep's report."""

    folder: Path
    """Folder of the report's files."""
    end: Path
    """Path of sweep.json."""

    @property
    def is_named(self) -> bool:
        return self.folder == self.end

    def discard_empty(self) -> None:
        """Remove the folder of a sweep that came to nothing."""
        if self.is_named:
            with suppress(OSError):
                self.folder.rmdir()

    def write_runs(self, argv: Sequence[str], runs: Iterable[str], failed: Iterable[str]) -> None:
        """Write which runs the report is of, by which `uvm-kv report` makes it again, and make it the latest."""
        content = {"argv": list(argv), "runs": sorted(runs), "failed": sorted(failed)}
        with written_whole(self.folder) as staging:
            (staging / REPORT_RUNS).write_text(json.dumps(content, indent=1) + "\n")
        if self.is_named:
            link = self.folder.parent / LATEST
            temporary = temporary_path(link)
            with suppress(OSError):  # A file system without links: names begin with the time, and sort by it.
                temporary.unlink(missing_ok=True)
                temporary.symlink_to(self.folder.name, target_is_directory=True)
                temporary.replace(link)


def take_name(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The name that is given by `name=...`, and the other arguments. ValueError where it is no name."""
    given = [argument.removeprefix("name=") for argument in arguments if argument.startswith("name=")]
    rest = [argument for argument in arguments if not argument.startswith("name=")]
    for name in given:
        if not NAME.fullmatch(name) or name == LATEST:
            raise ValueError(
                f"name={name} cannot name a sweep; give letters, digits, _, - and ., at most 100, and not {LATEST}"
            )
    return (given[-1] if given else None), rest


def place_of(experiment: Path, name: str | None, overrides: Sequence[Any], *, published: bool) -> SweepReport:
    """Where the report of the sweep of these overrides goes, below its experiment's folder. `published`: the experiment
    has a file of its own."""
    changed = [o for o in overrides if o.key_or_group.split(".")[0].split("/")[0] not in (*NOT_OF_THE_SWEEP, "hydra")]
    if name is None and published and not changed:
        return SweepReport(experiment / "report", experiment)
    reports = experiment / "reports"
    if name is None:
        name = _unused(reports, _default_name(changed))
    return SweepReport(reports / name, reports / name)


def _default_name(overrides: Sequence[Any]) -> str:
    """The time, then what is swept, or else what is given."""
    told = [o for o in overrides if o.is_sweep_override()] or overrides
    words = re.sub(r"[^A-Za-z0-9_.]+", "-", "-".join(o.key_or_group for o in told))[:MAX_DEFAULT].strip("-.")
    return "-".join(word for word in (datetime.now().strftime("%Y%m%d-%H%M%S"), words) if word)


def _unused(reports: Path, name: str) -> str:
    """Make its folder: another sweep may begin in the same second."""
    reports.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(2):
        try:
            (reports / name).mkdir()
        except FileExistsError:
            name = f"{re.sub(r'_[0-9]+$', '', name)}_{number}"
        else:
            return name
    raise AssertionError
