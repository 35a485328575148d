"""What managed memory costs in time: the counts of the driver times the constants of a profile. No other place says.

Faults are served one block after the other, and a service that evicts does so before it fetches (Nixie, OSDI'26: the
two never overlap), so their times add up. A prefetch has no faults: its copies run on both directions of the link,
with part of the shorter one hidden, while the calling CPU thread walks the blocks.
"""

from __future__ import annotations

from uvm_kv.hw.overlap import duplex
from uvm_kv.hw.profile import HardwareProfile
from uvm_kv.runner.sim.uvm.block import PAGE_BYTES, Counts

US = 1e-6


def fault_s(counts: Counts, profile: HardwareProfile, nap_us: float = 500.0) -> float:
    """Time in seconds that processors stand still for the faults in `counts`, evictions included."""
    driver, link = profile.managed, profile.link
    copied_out = (counts.d2h_fault_pages + counts.d2h_eviction_pages) * PAGE_BYTES
    return (
        counts.fault_batches * driver.fault_batch_us * US
        + (counts.fault_groups + counts.cpu_faults) * driver.fault_block_us * US
        + counts.cpu_mapped_pages * driver.cpu_mapped_page_us * US
        + counts.scattered_pages * driver.scattered_page_us * US
        + counts.evicted_chunks * driver.evict_fixed_us * US
        + counts.throttles * nap_us * US
        + counts.h2d_fault_pages * PAGE_BYTES / link.h2d_bytes_per_s
        + copied_out / link.d2h_bytes_per_s
        + counts.zeroed_pages * PAGE_BYTES / profile.gpu.hbm_bytes_per_s
    )


def prefetch_s(counts: Counts, num_calls: int, num_chunks: int, profile: HardwareProfile) -> float:
    """Time in seconds of `num_calls` calls of cudaMemPrefetchAsync that walked over `num_chunks` blocks in all."""
    driver, link = profile.managed, profile.link
    into = counts.h2d_prefetch_pages * PAGE_BYTES / (link.h2d_bytes_per_s * link.prefetch_share)
    out_pages = counts.d2h_prefetch_pages + counts.d2h_eviction_pages
    out = out_pages * PAGE_BYTES / (link.d2h_bytes_per_s * link.prefetch_share)
    on_link = max(into, out) + (1 - driver.prefetch_overlap) * min(into, out)
    on_cpu = (num_chunks * link.prefetch_chunk_us + counts.evicted_chunks * driver.evict_fixed_us) * US
    return num_calls * link.prefetch_call_us * US + max(on_link, on_cpu)


def remote_s(counts: Counts, profile: HardwareProfile) -> float:
    """Time in seconds that the link needs for what a kernel reads and writes in place."""
    read, written = counts.remote_read_pages * PAGE_BYTES, counts.remote_write_pages * PAGE_BYTES
    link = profile.link
    return max(
        duplex(
            read / link.zero_copy_bytes_per_s(read),
            written / link.d2h_bytes_per_s,
            link.duplex_h2d,
            link.duplex_d2h,
        )
    )
