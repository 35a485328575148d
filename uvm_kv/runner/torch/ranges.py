"""Named ranges of the host's time, for profilers: NVTX where a runner has a GPU, torch's own profiler where it is asked
for, nothing otherwise.

    execute                                                   | schedule | execute ...
      move | layer 0                        | layer 1 | sample|   idle
           |  prefetch  evict  append  attention ...

A layer's range begins with its attention, before which its memory ops are issued, and ends where the next one's begins:
the rest of its block and the next one's projections are in it. `schedule` is all that lies between two steps, the
engine's part; `idle` in it is waiting for an arrival. Ranges nest, as profilers ask; a graph's replay has none inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch


class Sink(NamedTuple):
    """The sink of the ranges. There is one per process, as there is one profiler per process."""

    push: Callable[[str], object]
    pop: Callable[[], object]


OFF = Sink(lambda _: None, lambda: None)
_sink = OFF
_NOTHING = nullcontext()


def push(name: str) -> None:
    _sink.push(name)


def pop() -> None:
    _sink.pop()


class _Range:
    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        _sink.push(self._name)

    def __exit__(self, *_: object) -> None:
        _sink.pop()


def mark(name: str) -> AbstractContextManager[object]:
    return _NOTHING if _sink is OFF else _Range(name)


def to_nvtx() -> None:
    """From now on, unless something records them already. Without a profiler a range costs about a microsecond."""
    global _sink
    if _sink is OFF:
        _sink = Sink(torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop)


@contextmanager
def recorded() -> Iterator[None]:
    """Ranges are events of torch's profiler, whichever runner makes them."""
    global _sink
    before, opened = _sink, list[Any]()

    def push(name: str) -> None:
        opened.append(torch.profiler.record_function(name))
        opened[-1].__enter__()

    _sink = Sink(push, lambda: opened.pop().__exit__(None, None, None))
    try:
        yield
    finally:
        _sink = before
