"""Mirror finished run directories to Weights & Biases. The directory stays the record, a dashboard is no source.

One wandb run a run directory, under the same id, grouped by experiment: resolved config, step series, summary, figure,
and the directory as an artifact. It happens after the runs, so it slows none of them; offline it needs neither network
nor account.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from uvm_kv.telemetry.recorder import Table
from uvm_kv.telemetry.store import read_json, read_table

MAX_POINTS = 500
"""Points of a step series: longer ones are averaged over equal spans of steps."""


def is_mirrored(directory: Path) -> bool:
    """Whether an offline mirror of the run lies beside it, and is not of an earlier run of the same id."""
    finished = (directory / "summary.json").stat().st_mtime
    mirrors = (directory.parent / "wandb").glob(f"*run-*-{directory.name}")
    return any(mirror.stat().st_mtime >= finished for mirror in mirrors)


def mirror(
    directory: Path, *, project: str, mode: str, config: dict[str, Any], figure: Path | None = None
) -> str | None:
    """Send a run; None, or why it could not be done. Never raises: tracking must not fail what is already finished."""
    try:
        import wandb

        run = wandb.init(
            project=project,
            mode=mode,  # type: ignore[arg-type]
            id=directory.name,
            name=directory.name,
            group=directory.parent.name,
            config=config,
            dir=str(directory.parent),
            reinit="finish_previous",
            settings=wandb.Settings(silent=True),
        )
        for row in step_series(read_table(directory, "steps")):
            run.log(row)
        if figure is not None:
            run.log({"figure": wandb.Image(str(figure))})
        run.summary.update(read_json(directory / "summary.json"))
        artifact = wandb.Artifact(f"run-{directory.name}", type="run-directory")
        artifact.add_dir(str(directory))
        run.log_artifact(artifact)
        run.finish()
    except Exception as error:  # Whatever a tracker may raise.
        return f"tracking=wandb failed for {directory.name}: {error}"
    return None


def step_series(steps: Table) -> list[dict[str, float]]:
    """At most MAX_POINTS rows of step means, with the time of their last step; unobserved columns are left out."""
    observed = {name: np.array(v, float) for name, v in steps.items() if v and None not in v}
    if not observed:
        return []
    spans = np.array_split(np.arange(len(observed["step"])), min(MAX_POINTS, len(observed["step"])))
    rows = []
    for span in spans:
        row = {name: float(values[span].mean()) for name, values in observed.items() if not name.endswith("_ns")}
        row["time_s"] = float(observed["end_ns"][span[-1]]) * 1e-9
        row["step"] = float(span[-1])
        rows.append(row)
    return rows
