"""The visible GPU, asked by a process of its own: asking makes a CUDA context, which takes hundreds of MB of it."""

from __future__ import annotations

import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from uvm_kv.memory import Capabilities, capabilities
from uvm_kv.store.family import end_children_with_me


def ask_card() -> Capabilities:
    """What the card can do and has free now. RuntimeError or ImportError where there is none, or no extension."""
    end_children_with_me()
    leave_interrupts = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(1, get_context("spawn"), signal.signal, leave_interrupts) as pool:
        return pool.submit(capabilities).result()
