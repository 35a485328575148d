"""From the config of `conf/roofline.yaml` to the analysis of one step. All errors are ValueErrors of a line."""

from __future__ import annotations

from uvm_kv.config.names import unknown
from uvm_kv.config.schema import RooflineSchema
from uvm_kv.hw.counting import Counting, Precision
from uvm_kv.hw.step import StepAnalysis, analyze_step
from uvm_kv.job.geometry import build_model, check_window
from uvm_kv.job.resolve import build_profile
from uvm_kv.types import Phase

MAX_TOKENS = 10**9


def analyze(config: RooflineSchema) -> StepAnalysis:
    for name, number in (("batch_size", config.batch_size), ("sequence_length", config.sequence_length)):
        if not 1 <= number <= MAX_TOKENS:
            raise ValueError(f"{name}={number}; it must lie between 1 and {MAX_TOKENS}")
    if config.stage not in tuple(Phase):
        raise unknown("stage", config.stage, Phase)
    if config.counting not in tuple(Counting):
        raise unknown("counting", config.counting, Counting)
    if config.weight_bits is not None:
        config.model.weight_bits = config.weight_bits
    model = build_model(config.model)
    check_window(model, config.sequence_length)
    stored = model.quantization
    weight_bits = stored.bits if stored is not None else config.model.weight_bits
    return analyze_step(
        build_profile(config.hardware),
        model,
        stage=Phase(config.stage),
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        precision=Precision(16 if weight_bits is None else weight_bits, config.activation_bits, config.kv_bits, stored),
        counting=Counting(config.counting),
    )
