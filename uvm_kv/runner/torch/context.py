"""The CUDA context of this process: freeing its memory between two jobs, and whether it still answers."""

from __future__ import annotations

import gc

import torch


def release_memory() -> None:
    """Return the memory that torch caches to the device, because torch does not allocate the next job's KV memory."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def context_answers() -> bool:
    """False after an error that no later call survives. True where nothing has used CUDA yet."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
