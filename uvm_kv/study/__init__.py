"""The study: one module a figure or table, each with its question, and how they are written to files."""

from __future__ import annotations

from uvm_kv.study import (
    allocation,
    attention_variants,
    batch_sweep,
    batching,
    does_it_help_my_box,
    energy,
    hints,
    long_context,
    oversubscription,
    phase_diagram,
    phase_diagram_link,
    preemption,
    roofline,
)
from uvm_kv.study.base import Drawn, Study

STUDIES: dict[str, Study] = {
    module.STUDY.name: module.STUDY
    for module in (
        batch_sweep,
        phase_diagram,
        phase_diagram_link,
        oversubscription,
        hints,
        allocation,
        batching,
        preemption,
        attention_variants,
        roofline,
        long_context,
        energy,
        does_it_help_my_box,
    )
}
"""In the order of the report."""

__all__ = ["STUDIES", "Drawn", "Study"]
