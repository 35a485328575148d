"""What records some steps of a job: torch's profiler, or a tool that the process runs under."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class TorchTrace:
    """A Chrome trace of what is between `start` and `stop`, by torch's profiler: the CPU, and the GPU where one is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profiler = profile(activities=[ProfilerActivity.CPU, *on_gpu])

    def start(self) -> None:
        self._profiler.start()

    def stop(self) -> None:
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(self._path))


class ToolRange:
    """What is between `start` and `stop` is what nsys (--capture-range=cudaProfilerApi) or ncu (--profile-from-start
    off) records."""

    def start(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()

    def stop(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
