"""SimRunner: a simulated GPU in virtual time. Never imports torch."""

from uvm_kv.runner.sim.runner import SimRunner

__all__ = ["SimRunner"]
