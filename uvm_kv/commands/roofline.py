"""One step, operator by operator: operations, bytes, intensity, bound, attainable rate and time, and a roofline figure.

    python -m experiments.roofline model=llama2_7b hardware=a6000 stage=decode batch_size=1 sequence_length=2048
    python -m experiments.roofline model=llama3_8b hardware=h100 weight_bits=4 kv_bits=8 json=true
    python -m experiments.roofline model=hf model.path=DIR model.num_kv_heads=1 counting=llm_viewer

Every key, its default and what it takes: conf/roofline.yaml. json=true, or --json, prints one object:

    model hardware stage batch_size sequence_length weight_bits activation_bits kv_bits counting num_heads num_kv_heads
    operators       a list; of one execution: name, ops, bytes, intensity (ops per byte), bound (compute or memory by
                    the card's nominal peak and bandwidth), attainable_ops_per_s, time_ms, roof_share (time at the roof
                    over time_ms); count: how often a step executes it, the number of layers or 1
    total_ms total_ops total_bytes                         sums over count executions of each operator
    weight_bytes kv_bytes activation_bytes                 weight_bytes as counted
    required_bytes card_bytes fits                         all weights, KV and activations beside the card's memory
    warnings        a list of lines: what does not fit, or is beyond the model's context
    figure          the paths of the figure; empty with figure=false
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hydra.errors import HydraException

from uvm_kv.commands.ending import say_why
from uvm_kv.config.command import compose_command
from uvm_kv.config.grammar import with_json_key
from uvm_kv.config.schema import RooflineSchema
from uvm_kv.hw.step import StepAnalysis
from uvm_kv.job.roofline import analyze


def main(arguments: list[str] | None = None) -> int:
    """Exit status 2 for a mistake in `arguments` (default: the command line's), said in a line."""
    arguments = with_json_key(arguments)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        config: RooflineSchema = compose_command("roofline", RooflineSchema, arguments)
        analysis = analyze(config)
        figure = _draw(analysis, Path(config.figure_dir)) if config.figure else []
    except (ValueError, HydraException) as error:
        return say_why(error)
    except OverflowError:
        print("error: the time of the step overflows; a rate given under hardware is far too small", file=sys.stderr)
        return 2
    if config.json:
        print(json.dumps(analysis.to_json() | {"figure": [str(path) for path in figure]}, indent=1))
        return 0
    from uvm_kv.report.terminal import plain_console, print_roofline

    print_roofline(analysis, plain_console())
    if figure:
        print(f"figure: {'  '.join(map(str, figure))}")
    return 0


def _draw(analysis: StepAnalysis, folder: Path) -> list[Path]:
    from uvm_kv.study.roofline_figure import write_roofline

    try:
        return write_roofline(analysis, folder)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"figure_dir={folder} cannot be written ({reason}); give another, or figure=false") from None
