"""What a card promises, and what that predicts: printed beside each measurement, made before it.

The figures are those of conf/hardware/*.yaml, where each has its source (a test holds the two together); here they are
plain Python because the machine with the GPU may read no YAML. An unknown card is predicted nothing.
"""

from __future__ import annotations

from typing import NamedTuple

COPY_SHARE = 0.9
"""Share of the nominal HBM bandwidth that a large copy reaches: 0.89 to 0.91 on RTX 3090, RTX 4090, A100, H100 and
H200 (published measurements, and copies of our own on an H100 and an H200)."""
PREFETCH_SHARE = 0.956
"""Share of a pinned copy's rate that a prefetch reaches: 10.9 of 11.4 GB/s (Sakharnykh 2017, PCIe 3.0)."""
FAULT_SERVICES_US = 600.0
"""Time to serve the faults of 2 MiB beside the copy, with the tree prefetcher: six services of about 100 us (from the
A30 study's 687 us)."""
PREFETCH_CALL_US, PREFETCH_CHUNK_US = 10.0, 20.0
"""Assumed: published nowhere."""

LINK = {3: (11.5, 12.0), 4: (25.0, 26.0), 5: (56.0, 57.0)}
"""Pinned copies over PCIe x16 by generation, GB/s to the device and to the host (sources: conf/hardware)."""
ZERO_COPY = {3: None, 4: 25.1, 5: 35.0}
"""Reads in place, GB/s: an A100 up to 1 GiB, an H100; none published for PCIe 3.0."""


class Card(NamedTuple):
    profile: str
    """Its file in conf/hardware."""
    names: tuple[str, ...]
    """Parts of the name that the driver gives; the first card of the table that has one is meant."""
    memory_gib: int
    hbm_gb_per_s: float
    tensor_tflop_per_s: float
    tensor_int8_top_per_s: float
    float32_tflop_per_s: float
    pcie_generation: int


CARDS = (
    Card("h200", ("H200",), 141, 4800.0, 989.4, 1979.0, 67.0, 5),
    Card("h100", ("H100 80GB HBM3", "H100 SXM"), 80, 3350.0, 989.4, 1979.0, 67.0, 5),
    Card("a100_80g", ("A100-SXM4-80GB", "A100-SXM-80GB"), 80, 2039.0, 312.0, 624.0, 19.5, 4),
    Card("a100_40g", ("A100-SXM4-40GB", "A100-PCIE-40GB"), 40, 1555.0, 312.0, 624.0, 19.5, 4),
    Card("a30", ("A30",), 24, 933.0, 165.0, 330.0, 10.3, 4),
    Card("a6000", ("RTX A6000",), 48, 768.0, 154.84, 309.7, 38.7, 4),
    Card("rtx4090", ("RTX 4090",), 24, 1008.0, 165.2, 660.6, 82.6, 4),
    Card("rtx3090", ("RTX 3090",), 24, 936.0, 71.0, 284.0, 35.6, 4),
    Card("rtx2080ti", ("RTX 2080 Ti",), 11, 616.0, 56.9, 227.7, 14.2, 3),
)
VARIANTS = ("RTX 3090 Ti", "RTX 4090 D", "RTX 4090 Laptop", "RTX 3090 Laptop", "A30X")
"""Other cards whose names contain one of the names above."""


def card_of(name: str) -> Card | None:
    if any(variant in name for variant in VARIANTS):
        return None
    return next((card for card in CARDS if any(part in name for part in card.names)), None)


class Prediction(NamedTuple):
    """GB/s and microseconds; None where nothing is known."""

    hbm: float | None
    h2d: float | None
    d2h: float | None
    zero_copy: float | None
    prefetch: float | None
    fault_chunk_us: float | None

    @property
    def both_tiers(self) -> float | None:
        return None if self.hbm is None or self.zero_copy is None else self.hbm + self.zero_copy

    def link(self, direction: str) -> float | None:
        return self.h2d if direction == "h2d" else self.d2h

    @staticmethod
    def prefetch_call_us(num_chunks: int, h2d: float | None) -> float | None:
        """Time of a call and its synchronisation; `h2d` None for chunks that are there already."""
        copy = 0.0 if h2d is None else num_chunks * (2 << 20) / (h2d * PREFETCH_SHARE * 1e3)
        return PREFETCH_CALL_US + max(num_chunks * PREFETCH_CHUNK_US, copy)


NOTHING = Prediction(None, None, None, None, None, None)


def predict(card: Card | None, pcie_generation: int | None) -> Prediction:
    """`pcie_generation`: of the link as the system shows it; None takes the card's own."""
    if card is None:
        return NOTHING
    generation = card.pcie_generation if pcie_generation is None else min(pcie_generation, card.pcie_generation)
    if generation not in LINK:
        return NOTHING._replace(hbm=COPY_SHARE * card.hbm_gb_per_s)
    h2d, d2h = LINK[generation]
    chunk_us = FAULT_SERVICES_US + (2 << 20) / (h2d * 1e3)
    return Prediction(COPY_SHARE * card.hbm_gb_per_s, h2d, d2h, ZERO_COPY[generation], PREFETCH_SHARE * h2d, chunk_us)
