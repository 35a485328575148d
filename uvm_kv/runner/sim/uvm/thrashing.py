"""When the CPU and the GPU fight over a page: napping, then pinning it where both can reach it.

A page is watched on its own only after two migrations of its block within a lapse, by *different* processors; evictions
are no such event. That is why a GPU that evicts and faults back in, however fast, never counts as thrashing: there is
one processor only (uvm_perf_thrashing.c, open-gpu-kernel-modules 595.45.04; parameters are its module defaults).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from uvm_kv.runner.sim.uvm.block import FULL, Location


class Processor(Enum):
    CPU = "cpu"
    GPU = "gpu"


@dataclass(frozen=True)
class ThrashingRules:
    enabled: bool = True
    threshold: int = 3
    """Events within a lapse each until a page thrashes."""
    pin_threshold: int = 10
    """Naps until it is pinned."""
    lapse_us: float = 500.0
    nap_us: float = 500.0
    pin_us: float = 150_000.0
    epoch_us: float = 1_000_000.0
    """A page that was quiet for so long starts anew."""


@dataclass
class _Page:
    num_events: int = 0
    last_us: float = float("-inf")
    owner: Processor | None = None
    """The processor that got the page last and need not nap."""
    num_throttles: int = 0
    pinned_until_us: float = float("-inf")


@dataclass
class _Block:
    last_us: float = float("-inf")
    last_processor: Processor | None = None
    is_tracked: bool = False
    pages: dict[int, _Page] = field(default_factory=dict)


class ThrashingDetector:
    def __init__(self, rules: ThrashingRules | None = None) -> None:
        self.rules = rules or ThrashingRules()
        self._blocks: dict[int, _Block] = {}

    def record(self, block: int, pages: int, processor: Processor, now_us: float) -> None:
        """A fault of `processor` has moved the pages of a mask, or taken them from the other one."""
        if not self.rules.enabled:
            return
        known = self._blocks.setdefault(block, _Block())
        if not known.is_tracked:
            recent = now_us - known.last_us <= self.rules.lapse_us
            known.is_tracked = recent and known.last_processor not in (None, processor)
        known.last_us, known.last_processor = now_us, processor
        if not known.is_tracked:
            return
        for index in _bits(pages):
            page = known.pages.setdefault(index, _Page())
            if now_us - page.last_us > self.rules.epoch_us:
                page.num_throttles = 0
            page.num_events = page.num_events + 1 if now_us - page.last_us <= self.rules.lapse_us else 1
            page.last_us, page.owner = now_us, processor

    def throttle_us(self, block: int, faulted: int, processor: Processor, now_us: float) -> float:
        """How long `processor` naps before its faults are served; counts as a throttle of the thrashing pages."""
        thrashing = [
            self._blocks[block].pages[i]
            for i in _bits(faulted & self.pages(block, now_us) & ~self._pinned_pages(block, now_us))
        ]
        others = [page for page in thrashing if page.owner is not processor]
        for page in others:
            page.num_throttles += 1
            if page.num_throttles >= self.rules.pin_threshold:
                page.pinned_until_us = now_us + self.rules.pin_us
        return self.rules.nap_us if others else 0.0

    def pages(self, block: int, now_us: float) -> int:
        """The mask of the pages that thrash."""
        known = self._blocks.get(block)
        if known is None:
            return 0
        # A nap is as long as a lapse, so being put off does not end the thrashing.
        recent = self.rules.lapse_us + self.rules.nap_us
        found = (
            1 << i
            for i, page in known.pages.items()
            if now_us < page.pinned_until_us
            or (page.num_events >= self.rules.threshold and now_us - page.last_us <= recent)
        )
        return sum(found)

    def pinned(self, block: int, faulted: int, preferred: Location | None, now_us: float) -> int:
        """The pages of `faulted` that stay on the CPU now. There are none where the device is preferred, because the
        CPU cannot reach it and such a page keeps moving."""
        return 0 if preferred is Location.DEVICE else faulted & self._pinned_pages(block, now_us)

    def unpinned(self, block: int, now_us: float) -> int:
        """Pages whose pin has run out since this was asked last."""
        known = self._blocks.get(block)
        ended = 0
        for index, page in known.pages.items() if known else ():
            if float("-inf") < page.pinned_until_us <= now_us:
                known.pages[index] = _Page()  # type: ignore[union-attr]
                ended |= 1 << index
        return ended

    def reset(self, block: int) -> None:
        """A prefetch by the program, or read-mostly advice."""
        self._blocks.pop(block, None)

    def _pinned_pages(self, block: int, now_us: float) -> int:
        known = self._blocks.get(block)
        return sum(1 << i for i, page in known.pages.items() if now_us < page.pinned_until_us) if known else 0


def _bits(mask: int) -> list[int]:
    return [i for i in range(FULL.bit_length()) if mask >> i & 1]
