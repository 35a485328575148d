"""The microbenchmark with sizes that a CPU goes through in seconds, and stand-ins for the other libraries, for
tests.host_runtime:

    python -m tests.host_runtime tests.experiments.small_microbench --parts attention --output DIR --child 300

The stand-ins have the calls that CuPy's and cuda.core's own sources and documentation show; torch is the real one, on
the CPU. They show that our code holds together and nothing about those libraries.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from experiments.gpu_kit.microbench import (
    attention,
    batch,
    cli,
    copies,
    curves,
    faults,
    in_place,
    nominal,
    peers,
    prefetch,
)
from experiments.gpu_kit.microbench.bench import Settings
from uvm_kv.memory import Slab
from uvm_kv.types import KIB, MIB


def shrink() -> None:
    """Every size that a part takes from its module."""
    small = {"num_seqs": 2, "context": 256, "num_q_heads": 8, "head_dim": 64}
    mha, gqa, bf16 = batch.Shape(8, **small), batch.Shape(2, **small), batch.Shape(2, "bfloat16", **small)
    attention.SHAPES = (mha, gqa, bf16)
    attention.COPY_BYTES, attention.MIN_LAYER_BYTES = 64 * MIB, MIB
    attention.TORCH_SPARE_BYTES = MIB
    in_place.MHA, in_place.GQA = mha, gqa
    in_place.FOOTPRINTS_MIB, in_place.QUICK_FOOTPRINT_MIB = (2, 4), 4
    in_place.LINK_BYTES, in_place.COPY_TARGET_BYTES, in_place.HBM_COPY_BYTES = 2 * MIB, 2 * MIB, MIB
    copies.NUM_BLOCKS, copies.RUN_SIZES, copies.MAX_RUNS = 16, (4 * KIB, 64 * KIB, 512 * KIB), 8
    prefetch.NUM_CHUNKS, prefetch.LEAST_CHUNKS, prefetch.CALL_CHUNKS = 8, 4, (1, 2, 4)
    faults.STREAM_CHUNKS = faults.RANDOM_CHUNKS = faults.TOUCH_CHUNKS = 2
    peers.MANAGED_CHUNKS = peers.COPY_CHUNKS = 4
    curves.NUM_BLOCKS, curves.LINK_MIB, curves.HBM_MIB = 16, (4, 16), (1, 2, 4)
    curves.COPY_SIZES = (4 * KIB, 64 * KIB, 1 * MIB)
    Settings.of = classmethod(lambda cls, *, quick: cls(quick, 3, 2))


class FakeTorch(ModuleType):
    """torch on the CPU under the names of its CUDA half."""

    def __init__(self, torch: Any) -> None:
        super().__init__("torch")
        self._torch = torch
        self.cuda = SimpleNamespace(
            ExternalStream=lambda _: SimpleNamespace(synchronize=lambda: None),
            stream=lambda _: nullcontext(),
            empty_cache=lambda: None,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def from_dlpack(self, view: Any) -> Any:
        bits = np.ctypeslib.as_array((ctypes.c_int16 * int(np.prod(view.shape))).from_address(view._address))
        return self._torch.from_numpy(bits).view(getattr(self._torch, view.dtype)).reshape(view.shape)

    def empty(self, size: int, *, dtype: Any, **_: Any) -> Any:
        return self._torch.empty(size, dtype=dtype)


def fake_cupy() -> ModuleType:
    def malloc_managed(num_bytes: int) -> Any:
        slab = Slab.managed(num_bytes)
        return SimpleNamespace(ptr=slab.address, mem=SimpleNamespace(prefetch=lambda stream: stream.ptr), slab=slab)

    made = ModuleType("cupy")
    made.cuda = SimpleNamespace(ExternalStream=lambda ptr: SimpleNamespace(ptr=ptr), malloc_managed=malloc_managed)
    return made


def fake_cuda_core() -> ModuleType:
    """A stand-in for a version whose buffers have no prefetch."""

    class Resource:
        def allocate(self, size: int, *, stream: Any) -> Any:
            slab = Slab.managed(size)
            return SimpleNamespace(handle=slab.address, close=lambda _: slab.close())

    stream = SimpleNamespace(sync=lambda: None)
    made = ModuleType("cuda.core")
    device = SimpleNamespace(set_current=lambda: None, create_stream=lambda: stream)
    made.Device, made.ManagedMemoryResource = lambda _: device, Resource
    return made


def stand_in() -> None:
    import torch
    import torch.nn.attention

    sys.modules["torch"] = FakeTorch(torch)
    sys.modules["cupy"], sys.modules["cuda.core"] = fake_cupy(), fake_cuda_core()
    sys.modules.setdefault("cuda", ModuleType("cuda"))


def stay_here() -> None:
    """Parts run in this process, since another one would look for a GPU; the card is taken for an RTX 3090."""
    run = subprocess.run

    def run_here(command: list[str], **options: Any) -> Any:
        if command[1:3] != ["-m", "experiments.microbench"]:
            return run(command, **options)
        return SimpleNamespace(returncode=cli.main(command[3:]))

    subprocess.run = run_here
    cli.card_of = lambda _: next(card for card in nominal.CARDS if card.profile == "rtx3090")


if __name__ == "__main__":
    shrink()
    stand_in()
    stay_here()
    sys.exit(cli.main())
