"""Time the operators of a model's shapes on this GPU and put them into a file of curves: docs/gpu_check.md.

    python -m experiments.measure_operators --curves microbench/curves.json --output calibrate/curves.json

The other curves of the file are kept as they are. Needs torch and transformers, and runs on the CPU only to be tested.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from uvm_kv.calibrate.profile_file import load_geometry
from uvm_kv.hw.model import ModelGeometry
from uvm_kv.types import DTYPE_BYTES

TOKENS = tuple(1 << i for i in range(12))
REPEATS = 5


def add_operators(
    curves: Path, output: Path, model: ModelGeometry, dtype: str, tokens: Sequence[int], device: str
) -> int:
    """Write `output`: `curves` with the curve `operators`; how many points it has."""
    from uvm_kv.runner.torch.operators import operator_points

    content = json.loads(curves.read_text())
    content["curves"]["operators"] = operator_points(model, dtype, tokens, repeats=REPEATS, device=device)
    shape = {name: value for name, value in dataclasses.asdict(model).items() if value is not None}
    content["model"] = shape | {"dtype": dtype}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=1) + "\n")
    return len(content["curves"]["operators"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.measure_operators", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--curves", type=Path, required=True, help="what experiments.microbench wrote")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--model", default="llama3_8b", help="whose shapes (default llama3_8b)")
    parser.add_argument("--dtype", default="float16", choices=sorted(DTYPE_BYTES))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args(arguments)
    try:
        model = load_geometry(options.model)
        num = add_operators(options.curves, options.output, model, options.dtype, options.tokens, options.device)
    except (ValueError, OSError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {num} points of {model.name}'s operators")
    return 0
