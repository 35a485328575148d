"""The CUDA context of this process: what is left in it between two jobs, and whether it still answers."""

from __future__ import annotations

import gc

import torch


def release_memory() -> None:
    """Give back what torch keeps of freed tensors: the next job's KV memory is not allocated by torch."""
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
