"""The model that a job serves, and a cache of the last one for a process that runs many jobs."""

from __future__ import annotations

from typing import Any

from uvm_kv.job.cuda import check_room_for_weights
from uvm_kv.job.resolve import Resolved


def load_served(resolved: Resolved) -> Any:
    """The real model of a job, on the device of its runner. ValueError if it cannot be loaded."""
    config, serving = resolved.config, resolved.serving
    assert serving is not None
    from uvm_kv.runner.torch import compile_layers, load_model, random_model

    if config.runner == "cuda":
        check_room_for_weights(resolved)
    if serving.folder is None:
        # Repeats serve the same weights.
        model = random_model(resolved.model, config.dtype, config.seed, **_device(resolved))
    else:
        model = load_model(serving.folder, config.dtype, **_device(resolved))
    if config.compile:
        compile_layers(model, resolved.model.num_layers)
    return model


def _device(resolved: Resolved) -> dict[str, str]:
    return {"device": "cuda"} if resolved.config.runner == "cuda" else {}  # Else the loaders' own, the CPU.


class ModelCache:
    """`load_served`, but the last model is kept: a job that serves the same weights in the same way gets it again."""

    def __init__(self) -> None:
        self.num_loads = 0
        self._key: Any = None
        self._model: Any = None

    def __call__(self, resolved: Resolved) -> Any:
        key = _identity(resolved)
        if key != self._key:
            self._key = self._model = None  # Two of them may not fit.
            self._model = load_served(resolved)
            self._key = key
            self.num_loads += 1
        return self._model


def _identity(resolved: Resolved) -> Any:
    """What two jobs must share to serve the same model."""
    from uvm_kv.runner.torch import content_digest

    config, serving = resolved.config, resolved.serving
    assert serving is not None
    weights: Any = config.seed
    if serving.folder is not None:
        files = sorted(f for f in serving.folder.iterdir() if f.is_file())
        weights = [str(serving.folder.resolve()), *((f.name, content_digest(f)) for f in files)]
    return weights, resolved.model, config.dtype, config.compile, _device(resolved)
