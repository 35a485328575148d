"""Replay a published study of Unified Memory on the driver model: simulated milliseconds a pass, beside published ones.

    python -m experiments.uvm_replay
    python -m experiments.uvm_replay working_set_ratio=1.25 prefetcher=block passes=[A,B,A,B] json=true

Every key, its default and what it takes: conf/uvm_replay.yaml.
With json=true, or --json, one object with `passes` is printed: name, milliseconds, fault_groups, migrations,
evicted_chunks, h2d_bytes, d2h_bytes each; what the GPU reads and writes over the link without migrating it is counted
apart.
"""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from uvm_kv.calibrate.profile_file import load_profile
from uvm_kv.commands.ending import say_why
from uvm_kv.config.command import compose_command
from uvm_kv.config.grammar import with_json_key
from uvm_kv.config.schema import UvmReplaySchema
from uvm_kv.job.resolve import build_profile
from uvm_kv.runner.sim.uvm.block import Prefetcher, Rules
from uvm_kv.runner.sim.uvm.replay import PassResult, ReplayStudy, run_study

PUBLISHED_CAPACITY_BYTES = 8589344768
PUBLISHED_MS = {"tree": (1335.8, 1332.9), "none": (17435.0, 17330.0), "block": (468.4, 465.7)}
"""First touches of A and B in the A30 study, mean of 3 runs, working set 0.95 of the capacity. The constants of
conf/hardware/a30.yaml are fitted to these six numbers."""


def published_ms(config: UvmReplaySchema) -> list[float | None]:
    """What the study measured, for the passes of which we have it."""
    as_published = (
        config.hardware.name == "a30"
        and _is_studied_card(config)
        and config.capacity_bytes == PUBLISHED_CAPACITY_BYTES
        and config.working_set_ratio == 0.95
        and config.prefetch_threshold_percent == 51
        and not config.prefetch
        and config.concurrent_managed_access
        and (config.access, config.operation, config.advice, config.initial_location)
        == ("stream", "update", "none", "host")
        and config.passes[:2] == ["A", "B"]
    )
    first = list(PUBLISHED_MS[config.prefetcher]) if as_published else []
    return [*first, *[None] * len(config.passes)][: len(config.passes)]


def _is_studied_card(config: UvmReplaySchema) -> bool:
    """Whether no number of the card was changed, its link's included."""
    given, studied = build_profile(config.hardware), load_profile("a30")
    return (given.gpu, given.link, given.managed) == (studied.gpu, studied.link, studied.managed)


def run(config: UvmReplaySchema) -> list[PassResult]:
    if config.prefetcher not in tuple(Prefetcher):
        raise ValueError(f"prefetcher={config.prefetcher} is unknown; allowed: {', '.join(Prefetcher)}")
    study = ReplayStudy(
        config.capacity_bytes,
        config.working_set_ratio,
        tuple(config.passes),
        config.access,
        config.operation,
        config.advice,
        config.prefetch,
        config.initial_location,
        config.seed,
    )
    rules = Rules(Prefetcher(config.prefetcher), config.prefetch_threshold_percent)
    return run_study(
        study,
        build_profile(config.hardware),
        rules,
        concurrent_managed_access=config.concurrent_managed_access,
    )


def main(arguments: list[str] | None = None) -> int:
    """Exit status 2 for a mistake in `arguments`, said in a line."""
    arguments = with_json_key(arguments)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        config = compose_command("uvm_replay", UvmReplaySchema, arguments)
        results = run(config)
    except ValueError as error:
        return say_why(error)
    published = published_ms(config)
    passes = [
        result.to_json() | {"published_milliseconds": known} for result, known in zip(results, published, strict=True)
    ]
    if config.json:
        print(json.dumps({"simulated": True, "hardware": config.hardware.name, "passes": passes}))
        return 0
    table = Table(
        title=f"Simulated passes on {config.hardware.name}, working set {config.working_set_ratio:g} x device"
    )
    table.add_column("pass")
    columns = ("ms", "study", "faults", "moves", "evicted", "MB in", "MB out", "MB remote")
    for column in columns:
        table.add_column(column, justify="right")
    for one in passes:
        known = one["published_milliseconds"]
        table.add_row(
            one["name"],
            f"{one['milliseconds']:.1f}",
            "" if known is None else f"{known:.1f}",
            *(f"{one[key]}" for key in ("fault_groups", "migrations", "evicted_chunks")),
            *(f"{one[key] / 1e6:.1f}" for key in ("h2d_bytes", "d2h_bytes")),
            f"{(one['remote_read_bytes'] + one['remote_write_bytes']) / 1e6:.1f}",
        )
    table.caption = "study: published ms; faults: groups; moves: migrations; evicted: chunks of 2 MiB"
    Console().print(table)
    return 0
