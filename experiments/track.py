"""Mirror finished runs to wandb, after they have run."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import Progress

from experiments.progress import Event
from uvm_kv.telemetry.store import read_json, read_table
from uvm_kv.telemetry.wandb_sink import is_mirrored, mirror


def mirror_all(events: list[Event]) -> None:
    """Every finished run that asked for it and is not mirrored yet; problems are warnings."""
    pending = [
        (Path(e.directory), e.tracking)
        for e in events
        if e.status != "failed" and e.directory is not None and e.tracking is not None
    ]
    pending = [(d, t) for d, t in pending if not is_mirrored(d)]
    if not pending:
        return
    from uvm_kv.analysis.figures import run_figure
    from uvm_kv.analysis.style import save_figure

    console = Console(stderr=True)
    with (
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        tempfile.TemporaryDirectory() as folder,
    ):
        for directory, tracking in progress.track(pending, description="wandb"):
            summary = read_json(directory / "summary.json")
            title = f"{summary['mechanism']}, batch {summary['offered_batch']}, {summary['model']}, {summary['origin']}"
            picture, _ = save_figure(run_figure(read_table(directory, "steps"), title), Path(folder) / directory.name)
            config = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))
            assert isinstance(config, dict)
            problem = mirror(directory, config={str(k): v for k, v in config.items()}, figure=picture, **tracking)
            if problem is not None:
                print(f"warning: {problem}", file=sys.stderr)
