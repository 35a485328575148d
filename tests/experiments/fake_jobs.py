"""Jobs that go wrong in the ways a GPU's do, for a worker of tests: its processes import this module by name."""

from __future__ import annotations

import os
import signal
import time
from typing import Any, NamedTuple

from uvm_kv.sweep.worker import OnStep


class Fake(NamedTuple):
    name: str
    mechanism: str = "a"
    does: str = "work"


class CudaError(RuntimeError):
    """As the extension's."""


class OutOfMemoryError(CudaError):
    """As the extension's."""


class FakeTask:
    """A task whose summary says which process ran it, and how many jobs that process had run."""

    def __init__(self) -> None:
        self.num_run = 0

    def __call__(self, job: Fake, argv: list[str], on_step: OnStep) -> dict[str, Any]:
        self.num_run += 1
        match job.does:
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(3)
            case "cuda":
                raise CudaError("cudaErrorIllegalAddress in attention.cu:12\nCompile with more checks.")
            case "wrapped":
                try:
                    raise CudaError("cudaErrorIllegalAddress in attention.cu:12")
                except CudaError as error:
                    raise ValueError(f"Llama cannot be served ({error})\nand more") from error
            case "torch":
                raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronous")
            case "full":
                raise OutOfMemoryError("cudaMalloc of 2147483648 bytes, 1073741824 are free")
            case "full_and_said":
                try:
                    raise OutOfMemoryError("cudaMalloc")
                except OutOfMemoryError as error:
                    raise ValueError("KV needs 2 GB, 1 GB is free; lower memory.device_kv_bytes") from error
            case "wrapped_full":
                try:
                    raise OutOfMemoryError("cudaMalloc")
                except OutOfMemoryError as error:
                    raise ValueError("Llama cannot be served (cudaMalloc)") from error
            case "cleaned_up" | "cleaned_up_full":
                try:
                    if job.does == "cleaned_up_full":
                        raise OutOfMemoryError("cudaMalloc")
                    raise CudaError("cudaErrorIllegalAddress in attention.cu:12")
                finally:
                    raise AssertionError("closing what is half built")
            case "host_full":
                raise MemoryError
            case "refused":
                raise ValueError("batch_size=0")
            case "bug":
                raise AssertionError("an invariant")
            case "hang":
                on_step(0, 0, 1)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(600)
            case "slow":
                for step in range(10):
                    time.sleep(0.1)
                    on_step(step, step, 10)
        return {"name": job.name, "argv": argv, "pid": os.getpid(), "nth": self.num_run}
