"""Points of the study that are computed and not run: each function makes packed records (`uvm_kv.store.records`).

Their origin is `analytic`: sums over operators, with no engine and no scheduler behind them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from uvm_kv.config.command import compose_command
from uvm_kv.config.schema import RooflineSchema
from uvm_kv.hw.counting import Counting
from uvm_kv.hw.step import StepAnalysis
from uvm_kv.job.roofline import analyze
from uvm_kv.store.directories import encode_json, run_id
from uvm_kv.store.provenance import git_state, versions
from uvm_kv.store.records import PACKED, Record, pack
from uvm_kv.study.roofline_figure import kind_of
from uvm_kv.telemetry.summary import SCHEMA_VERSION
from uvm_kv.types import Phase

ORIGIN = "analytic"
# The grid of the roofline study. Llama-2-7B and the A6000 are those of "LLM Inference Unveiled" (LLM-Viewer); sequences
# beyond the model's 4096 tokens are of its shapes, as there.
ROOFLINE_MODEL = "llama2_7b"
ROOFLINE_CARDS = ("a6000", "rtx3090")
ROOFLINE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
ROOFLINE_SEQUENCES = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 50000)
# Bits of weights, activations and KV that the same work prints a decode time for, at batch 1 and 2048 tokens.
PUBLISHED_BITS = ((16, 16, 8), (16, 16, 4), (8, 16, 16), (4, 16, 16), (8, 8, 8), (4, 16, 4))
PARTS = {
    "projections and MLP": "projections",
    "attention": "attention",
    "norms, activation, RoPE": "elementwise",
    "embedding and head": "head",
}


def roofline_records(
    cards: Sequence[str] = ROOFLINE_CARDS,
    batches: Sequence[int] = ROOFLINE_BATCHES,
    sequences: Sequence[int] = ROOFLINE_SEQUENCES,
) -> list[Record]:
    """Prefill and decode of Llama-2-7B on each card, in both countings, over the grid; and decode at the published bits
    in LLM-Viewer's counting on the A6000, if that is among the cards. In order of ids."""
    records = []
    for card in cards:
        base: RooflineSchema = compose_command(
            "roofline", RooflineSchema, [f"hardware={card}", f"model={ROOFLINE_MODEL}"]
        )
        for config in _grid(base, batches, sequences):
            records.append(_record(config, analyze(config)))
    return sorted(records, key=lambda record: record.id)


def write_roofline(folder: Path) -> None:
    """The packed set of them into `folder`."""
    pack(roofline_records(), {}, folder)


def _grid(base: RooflineSchema, batches: Sequence[int], sequences: Sequence[int]) -> Iterator[RooflineSchema]:
    for counting in Counting:
        for stage in Phase:
            for batch_size in batches:
                for sequence_length in sequences:
                    yield replace(
                        base,
                        counting=counting.value,
                        stage=stage.value,
                        batch_size=batch_size,
                        sequence_length=sequence_length,
                    )
    if base.hardware.name == "a6000":
        published = replace(
            base, counting=Counting.LLM_VIEWER.value, stage=Phase.DECODE.value, batch_size=1, sequence_length=2048
        )
        for weight_bits, activation_bits, kv_bits in PUBLISHED_BITS:
            yield replace(published, weight_bits=weight_bits, activation_bits=activation_bits, kv_bits=kv_bits)


def _record(config: RooflineSchema, step: StepAnalysis) -> Record:
    summary = _summary(step)
    sha256 = hashlib.sha256(encode_json(summary)).hexdigest()
    inputs = asdict(config)
    del inputs["hardware"]["sources"], inputs["json"], inputs["figure"], inputs["figure_dir"]
    manifest = {
        "summary_sha256": sha256,
        **git_state(),
        "versions": versions(),
        "argv": ["uvm_kv.study.points", "roofline"],
        "started": None,
    }
    return Record(run_id(inputs, 0), Path(PACKED), summary, manifest, sha256)


def _summary(step: StepAnalysis) -> dict[str, Any]:
    """The step's totals, and those of its kinds of operators; times in ms, sizes in bytes, rates those of the card."""
    told = step.to_json()
    parts = {name: {"ops": 0.0, "bytes": 0.0, "ms": 0.0} for name in PARTS.values()}
    for op in step.operators:
        part = parts[PARTS[kind_of(op.name)]]
        part["ops"] += op.count * op.ops
        part["bytes"] += op.count * op.num_bytes
        part["ms"] += op.count * op.time_s * 1e3
    kept = (
        *("hardware", "model", "stage", "batch_size", "sequence_length", "counting", "total_ms", "total_ops"),
        *("total_bytes", "weight_bytes", "kv_bytes", "activation_bytes", "required_bytes", "card_bytes", "fits"),
    )
    bits = step.precision
    return {
        "schema_version": SCHEMA_VERSION,
        "origin": ORIGIN,
        **{name: told[name] for name in kept},
        "bits": f"w{bits.weight_bits}a{bits.activation_bits}kv{bits.kv_bits}",
        "max_position_embeddings": step.model.max_position_embeddings,
        "peak_ops_per_s": max(op.peak_ops_per_s for op in step.operators),
        "hbm_bytes_per_s": step.profile.gpu.hbm_gb_per_s * 1e9,
        "parts": parts,
    }
