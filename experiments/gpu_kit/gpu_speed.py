"""Speed on this card as ratios with their targets, from what the parts of gpu-measure left in a folder.

    python -m experiments.gpu_speed --folder OUT

Reads OUT/sweep/runs (sweeps and peers), OUT/decode_step (runs and profiles of decode steps, eager and compiled) and the
curves of the microbenchmark; prints and writes OUT/speed/speed.txt and .json. docs/gpu_check.md
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.gpu_kit.speed import balanced_lines, decode_lines, peer_lines, read_runs
from experiments.gpu_kit.step_profile import kernel_line, layer_kernels, step_profile
from uvm_kv.calibrate.curves import Curves, read_curves
from uvm_kv.store.provenance import git_state, gpu

PROFILES = {"the model as it is": "eager", "torch.compile": "compiled"}


def config_of(directory: Path) -> dict[str, Any]:
    tree = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def rates(curves: Curves) -> tuple[float, float]:
    """Bytes per second of the largest copies: over the link to the card, and within it, where a byte is read and
    written."""
    link = [p for p in curves.curves["link"] if (p.at["direction"], p.at["other_direction"]) == ("h2d", "idle")]
    within = curves.curves["hbm"]
    if not link or not within:
        raise ValueError(f"{curves.file} has no pinned copies to the card, or none within it; run the part microbench")
    a, b = (max(points, key=lambda p: p.at["bytes"]) for points in (link, within))
    return a.at["bytes"] / a.seconds, 2 * b.at["bytes"] / b.seconds


def traces(folder: Path) -> dict[str, Any]:
    files = {name: folder / sub / "trace.json" for name, sub in PROFILES.items()}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def attention_share(trace: dict[str, Any]) -> float | None:
    """Share of attention in the device time of a step; None for a trace without a device."""
    profile = step_profile(trace)
    of = {row.name: row.device_ms for row in profile.rows}
    total = sum(ms or 0.0 for ms in of.values())
    return (of.get("attention") or 0.0) / total if total else None


def report(folder: Path) -> tuple[list[str], dict[str, Any]]:
    candidates = [folder / part / "curves.json" for part in ("operators", "microbench")]
    file = next((c for c in candidates if c.is_file()), None)
    if file is None:
        raise ValueError(f"--folder {folder}: there are no curves; the parts microbench and operators take them")
    link, copy = rates(read_curves(file))
    found = traces(folder / "decode_step")
    swept = read_runs(folder / "sweep" / "runs", config_of)
    share = attention_share(found["the model as it is"]) if "the model as it is" in found else None
    lines = [
        *decode_lines(read_runs(folder / "decode_step" / "runs", config_of), copy),
        *peer_lines(swept),
        *balanced_lines(swept, attention_share=share, link_bytes_per_s=link, copy_bytes_per_s=copy),
    ]
    kernels = {name: layer_kernels(trace) for name, trace in found.items()}
    text = [f"link {link / 1e9:.1f} GB/s, copies within the card {copy / 1e9:.0f} GB/s ({file})"]
    text += [line.text() for line in lines]
    text += [f"{name}: {kernel_line(k)}" for name, k in kernels.items() if k is not None]
    content = {
        **git_state(),
        "gpu": gpu(),
        "link_bytes_per_s": link,
        "copy_bytes_per_s": copy,
        "attention_share": share,
        "lines": [dataclasses.asdict(line) | {"is_met": line.is_met} for line in lines],
        "kernels_per_layer": {name: None if k is None else k._asdict() for name, k in kernels.items()},
    }
    return text, content


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 2 for a mistake in `arguments` or a file that cannot be read; a target that is missed is none."""
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="the output folder of gpu-measure")
    options = parser.parse_args(arguments)
    try:
        text, content = report(options.folder)
        output: Path = options.folder / "speed"
        output.mkdir(parents=True, exist_ok=True)
        (output / "speed.txt").write_text("\n".join(text) + "\n")
        (output / "speed.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(text))
    return 0
