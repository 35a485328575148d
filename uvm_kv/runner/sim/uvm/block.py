"""One VA block of managed memory: 512 pages of 4 KiB, exact in what NVIDIA's driver does with each of them.

A block is a value (`BlockState`, masks of 512 bits), and everything that can happen to it is a function from state to
state and counts (`Transition`). Which block loses its chunk when the card is full is not decided here but in
`uvm_kv.runner.sim.uvm.driver`; how long things take is in `uvm_kv.runner.sim.uvm.cost`.

The rules are those of NVIDIA/open-gpu-kernel-modules 595.45.04 on x86 with PCIe, where the GPU can map CPU memory and
the CPU cannot map GPU memory: residency from block_select_processor_residency (uvm_va_block.c), the tree prefetcher
from uvm_perf_prefetch.c, eviction from uvm_pmm_gpu.c, prefetch from uvm_migrate.c. Our reading where that leaves room:
a discard unmaps what it discards (the driver has to see the next write), and setting read-mostly makes mappings
read-only (so that it sees the next write there too); read-mostly goes before accessed-by; unsetting read-mostly keeps
the GPU's copy; taking back accessed-by, or a preference for the host, takes back the mappings over the link.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

PAGE_BYTES = 4096
BLOCK_PAGES = 512
FULL = (1 << BLOCK_PAGES) - 1
MAX_BATCHES_PER_RUN = 20
"""uvm_perf_fault_max_batches_per_service."""
BIG_PAGE = 16
"""Pages of 64 KiB, the smallest region that the prefetcher brings in."""


class Location(StrEnum):
    DEVICE = "device"
    HOST = "host"


class Prefetcher(StrEnum):
    TREE = "tree"
    """The driver's density tree."""
    NONE = "none"
    """Only what faulted (uvm_perf_prefetch_enable=0)."""
    BLOCK = "block"
    """Bring in the whole block."""


class Policy(NamedTuple):
    """cudaMemAdvise on the range that the block belongs to."""

    preferred: Location | None = None
    accessed_by: bool = False
    """The GPU maps the block wherever its pages lie."""
    read_mostly: bool = False

    @property
    def follows_remotely(self) -> bool:
        """The GPU gets a mapping over the link of what comes to the CPU."""
        return self.accessed_by and not self.read_mostly


NO_ADVICE = Policy()


class BlockState(NamedTuple):
    """Masks with one bit per page, bit 0 the lowest address."""

    gpu: int = 0
    """Resident on the GPU. A page resident on both is read-duplicated."""
    cpu: int = 0
    gpu_map: int = 0
    """The GPU has a mapping, to its own memory or, where the page is resident on the CPU only, over the link."""
    gpu_write: int = 0
    """Pages whose GPU mapping allows writes."""
    cpu_map: int = 0
    cpu_write: int = 0
    discarded: int = 0
    cpu_pages: int = 0
    """CPU pages that are allocated; they stay so after a migration, until the range is freed."""
    contiguous: bool = False
    """The CPU pages are one chunk of 2 MiB: they were allocated all at once."""
    chunk: bool = False
    """The block owns a root chunk of 2 MiB on the GPU; one page resident there is enough."""
    policy: Policy = NO_ADVICE


class Counts(NamedTuple):
    """What happened. A page has 4 KiB."""

    fault_groups: int = 0
    """Services of a block within a batch of GPU faults."""
    fault_batches: int = 0
    migrations: int = 0
    """Services, and prefetch passes over a block, that copied something to the GPU."""
    h2d_fault_pages: int = 0
    h2d_prefetch_pages: int = 0
    d2h_fault_pages: int = 0
    """Pages moved to the CPU because it touched them, or because the GPU touched them where the CPU is preferred."""
    d2h_prefetch_pages: int = 0
    d2h_eviction_pages: int = 0
    evicted_chunks: int = 0
    dropped_pages: int = 0
    """Pages evicted without a copy: read-duplicated or discarded."""
    cpu_mapped_pages: int = 0
    """Pages copied to the GPU that the CPU had mapped until then, or may no longer write."""
    scattered_pages: int = 0
    """Pages copied to the GPU from a block of which the CPU holds no single chunk."""
    zeroed_pages: int = 0
    """Pages first populated on the GPU."""
    remote_maps: int = 0
    """Pages that a fault mapped over the link."""
    remote_read_pages: int = 0
    """Pages that the GPU read over the link, counted as they were asked for."""
    remote_write_pages: int = 0
    cpu_faults: int = 0
    throttles: int = 0
    """Services put off because the block is thrashing."""
    flushed_faults: int = 0
    """Faults dropped from the fault buffer with a replay, because a batch was full; they fault again."""

    @property
    def service_runs(self) -> int:
        """Runs of the driver's bottom half: each serves at most 20 batches. What a run costs is in the batches."""
        return -(-self.fault_batches // MAX_BATCHES_PER_RUN)


NOTHING = Counts()
NUM_COUNTS = len(NOTHING)


class Access(NamedTuple):
    """A kernel touches the pages of `mask` in ascending order, at most `window` faulting ones in flight at a time."""

    mask: int
    write: bool = False
    window: int = BLOCK_PAGES
    thrashing: int = 0
    """Pages that the prefetcher leaves alone."""
    pinned: bool = False
    """The pages stay on the CPU, because they thrash."""
    counts_remote: bool = True


class Prefetch(NamedTuple):
    """One pass of cudaMemPrefetchAsync over the block."""

    to: Location
    maps: bool = True
    """A range of several blocks is walked twice: first to move, then to map."""
    mask: int = FULL


class CpuAccess(NamedTuple):
    mask: int
    write: bool = False
    thrashing: int = 0


class Discard(NamedTuple):
    mask: int = FULL


class Evict(NamedTuple):
    pass


class Unmap(NamedTuple):
    """A pin has run out: the mapping over the link goes, so that the next touch faults."""

    mask: int


class Advise(NamedTuple):
    policy: Policy


Action = Access | Prefetch | CpuAccess | Discard | Evict | Advise | Unmap


class Transition(NamedTuple):
    state: BlockState
    counts: Counts
    touches: bool = False
    """Something was made resident on the GPU, or found so: the chunk goes to the tail of the eviction list."""


@dataclass(frozen=True)
class Rules:
    """Module parameters of the driver."""

    prefetcher: Prefetcher = Prefetcher.TREE
    prefetch_threshold_percent: int = 51

    def __post_init__(self) -> None:
        if self.prefetcher not in tuple(Prefetcher):
            raise ValueError(f"prefetcher={self.prefetcher}; allowed are {', '.join(Prefetcher)}")
        if not 1 <= self.prefetch_threshold_percent <= 100:
            raise ValueError(
                f"prefetch_threshold_percent={self.prefetch_threshold_percent}; it is a share of a region's pages, "
                f"from 1 to 100 (the driver's default is 51)"
            )


def run_of(first: int, num_pages: int) -> int:
    """The mask of pages [first, first + num_pages)."""
    return ((1 << num_pages) - 1) << first


def apply(state: BlockState, action: Action, rules: Rules) -> Transition:
    match action:
        case Access():
            return _access(state, action, rules)
        case Prefetch():
            return _prefetch(state, action)
        case CpuAccess():
            return _cpu_access(state, action, rules)
        case Evict():
            return _evict(state)
        case Discard():
            # The driver has to see the next write, so nothing stays mapped.
            resident, rest = action.mask & (state.gpu | state.cpu), ~action.mask
            state = state._replace(
                discarded=state.discarded | resident,
                gpu_map=state.gpu_map & rest,
                gpu_write=state.gpu_write & rest,
                cpu_map=state.cpu_map & rest,
                cpu_write=state.cpu_write & rest,
            )
            return Transition(state, NOTHING)
        case Advise():
            return _advise(state, action.policy)
        case Unmap():
            kept = ~(action.mask & ~state.gpu)
            state = state._replace(gpu_map=state.gpu_map & kept, gpu_write=state.gpu_write & kept)
            return Transition(state, NOTHING)


# ---- faults of the GPU


def _access(state: BlockState, access: Access, rules: Rules) -> Transition:
    counts = NOTHING
    touches = False
    while missing := access.mask & ~(state.gpu_write if access.write else state.gpu_map):
        state, served, touched = _service(state, lowest(missing, access.window), access, rules)
        counts = add(counts, served)
        touches |= touched
    remote = (access.mask & ~state.gpu).bit_count()
    if remote and access.counts_remote:
        read, written = (0, remote) if access.write else (remote, 0)
        counts = counts._replace(remote_read_pages=read, remote_write_pages=written)
    return Transition(state, counts, touches)


def _service(state: BlockState, faulted: int, access: Access, rules: Rules) -> Transition:
    """Serve one batch's faults of the GPU on this block."""
    to_host = faulted & (FULL if access.pinned else _stays_on_host(state))
    to_device = faulted & ~to_host
    ahead = 0
    if not (to_host and to_device):
        location = Location.HOST if to_host else Location.DEVICE
        ahead = _prefetched(state, faulted, location, rules, access.thrashing)
    counts = NOTHING._replace(fault_groups=1, fault_batches=1)
    if to_host:
        state, moved = _remote_map(state, to_host | (0 if to_device else ahead))
        counts = add(counts, moved)
    if to_device:
        state, moved = _make_resident(state, to_device, 0 if to_host else ahead, access.write)
        counts = add(counts, moved)
    return Transition(state, counts, bool(to_device))


def _stays_on_host(state: BlockState) -> int:
    """Pages that a touch by the GPU leaves on, or sends to, the CPU."""
    preferred, accessed_by, read_mostly = state.policy
    if read_mostly or preferred is Location.DEVICE:
        return 0
    if preferred is Location.HOST:
        return FULL & ~state.gpu
    return state.cpu & ~state.gpu if accessed_by else 0


def _prefetched(state: BlockState, faulted: int, to: Location, rules: Rules, thrashing: int) -> int:
    """Pages that the prefetcher adds to `faulted`, all of which go `to` one processor."""
    preferred = state.policy.preferred
    if rules.prefetcher is Prefetcher.NONE or (preferred is not None and preferred is not to):
        return 0
    if rules.prefetcher is Prefetcher.BLOCK or (preferred is to and not state.gpu | state.cpu):
        region = FULL
    else:
        bitmap = (state.gpu if to is Location.DEVICE else state.cpu) | faulted
        for first in range(0, BLOCK_PAGES, BIG_PAGE):
            big_page = run_of(first, BIG_PAGE)
            if faulted & big_page and not thrashing & big_page:
                bitmap |= big_page
        region = _dense(bitmap, faulted, 0, BLOCK_PAGES, rules.prefetch_threshold_percent)
    region &= ~faulted & ~thrashing
    return region & ~state.cpu_map if to is Location.HOST else region


def _dense(bitmap: int, faulted: int, first: int, size: int, threshold: int) -> int:
    """Union over the faulted pages of the largest region of the binary tree that is more than `threshold` % full."""
    here = run_of(first, size)
    if not faulted & here:
        return 0
    if (bitmap & here).bit_count() * 100 > size * threshold:
        return here
    if size == 1:
        return 0
    half = size // 2
    lower = _dense(bitmap, faulted, first, half, threshold)
    return lower | _dense(bitmap, faulted, first + half, half, threshold)


def _make_resident(state: BlockState, pages: int, ahead: int, write: bool) -> tuple[BlockState, Counts]:
    """Bring faulted `pages`, and `ahead` which the prefetcher added, to the GPU and map them."""
    both = pages | ahead
    duplicates = 0
    if state.policy.read_mostly:
        duplicates = ahead if write else both
    state, counts = _move_to_gpu(state, both, duplicates)
    mapped = state.gpu_map
    fresh = pages | (ahead & ~mapped)
    writable = fresh & ~(state.gpu & state.cpu)
    state = state._replace(gpu_map=mapped | both, gpu_write=(state.gpu_write & ~fresh) | writable)
    return state, counts


def _move_to_gpu(
    state: BlockState, pages: int, duplicates: int, *, by_prefetch: bool = False
) -> tuple[BlockState, Counts]:
    """Residency of `pages` on the GPU; those of `duplicates` that are on the CPU stay there too."""
    elsewhere = pages & ~state.gpu
    dead = elsewhere & state.discarded
    copied = elsewhere & state.cpu & ~dead
    kept = duplicates & state.cpu & ~dead
    gone = pages & ~kept
    num_copied = copied.bit_count()
    counts = NOTHING._replace(
        migrations=int(num_copied > 0),
        h2d_fault_pages=0 if by_prefetch else num_copied,
        h2d_prefetch_pages=num_copied if by_prefetch else 0,
        cpu_mapped_pages=(copied & state.cpu_map).bit_count(),
        scattered_pages=0 if state.contiguous else num_copied,
        zeroed_pages=(elsewhere & ~copied).bit_count(),
    )
    state = state._replace(
        gpu=state.gpu | pages,
        cpu=state.cpu & ~gone,
        cpu_map=state.cpu_map & ~gone,
        cpu_write=state.cpu_write & ~pages,
        gpu_map=state.gpu_map & ~elsewhere,  # A mapping over the link; the caller makes the new one.
        gpu_write=state.gpu_write & ~elsewhere,
        discarded=state.discarded & ~pages,
        chunk=True,
    )
    return state, counts


def _move_to_cpu(state: BlockState, pages: int, duplicates: int) -> tuple[BlockState, int]:
    """Residency of `pages` on the CPU, those of `duplicates` on the GPU, too; and how many were copied."""
    dead = pages & state.discarded & ~state.cpu
    copied = pages & state.gpu & ~state.cpu & ~dead
    leaving = pages & state.gpu & (~duplicates | dead)
    arriving = pages & ~state.cpu
    contiguous = state.contiguous or (arriving == FULL and not state.cpu_pages)
    state = state._replace(
        gpu=state.gpu & ~leaving,
        cpu=state.cpu | pages,
        gpu_map=state.gpu_map & ~leaving,
        gpu_write=state.gpu_write & ~(pages & state.gpu),
        discarded=state.discarded & ~pages,
        cpu_pages=state.cpu_pages | arriving,
        contiguous=contiguous,
    )
    return state, copied.bit_count()


def _map_over_link(state: BlockState, pages: int) -> BlockState:
    pages &= ~state.gpu
    return state._replace(gpu_map=state.gpu_map | pages, gpu_write=state.gpu_write | pages)


def _remote_map(state: BlockState, pages: int) -> tuple[BlockState, Counts]:
    """Map `pages` on the GPU over the link, wherever they were."""
    state, num_copied = _move_to_cpu(state, pages, 0)
    counts = NOTHING._replace(d2h_fault_pages=num_copied, remote_maps=(pages & ~state.gpu_map).bit_count())
    return _map_over_link(state, pages), counts


# ---- eviction, prefetch, advice


def _evict(state: BlockState) -> Transition:
    """The whole chunk goes: there is no dirty bit, so clean pages are copied back, too."""
    dropped = state.gpu & (state.cpu | state.discarded)
    copied = state.gpu & ~dropped
    lost = dropped & ~state.cpu
    counts = NOTHING._replace(
        # A chunk on which nothing is resident is taken back without an eviction.
        evicted_chunks=int(state.gpu > 0),
        d2h_eviction_pages=copied.bit_count(),
        dropped_pages=dropped.bit_count(),
    )
    gpu, discarded = state.gpu, state.discarded & ~lost
    evicted, _ = _move_to_cpu(state._replace(discarded=0), copied, 0)
    evicted = evicted._replace(
        gpu=0,
        gpu_map=evicted.gpu_map & ~gpu,
        gpu_write=evicted.gpu_write & ~gpu,
        discarded=discarded,
        chunk=False,
    )
    if state.policy.follows_remotely:
        evicted = _map_over_link(evicted, copied)
    return Transition(evicted, counts)


def _prefetch(state: BlockState, prefetch: Prefetch) -> Transition:
    mask = prefetch.mask
    if prefetch.to is Location.DEVICE:
        state, counts = _move_to_gpu(state, mask, mask if state.policy.read_mostly else 0, by_prefetch=True)
        if prefetch.maps:
            writable = mask & ~state.cpu
            state = state._replace(gpu_map=state.gpu_map | mask, gpu_write=(state.gpu_write & ~mask) | writable)
        return Transition(state, counts, True)
    state, num_copied = _move_to_cpu(state, mask, mask if state.policy.read_mostly else 0)
    if prefetch.maps:
        writable = mask & ~state.gpu
        state = state._replace(cpu_map=state.cpu_map | mask, cpu_write=(state.cpu_write & ~mask) | writable)
        if state.policy.follows_remotely:
            state = _map_over_link(state, mask)
    return Transition(state, NOTHING._replace(d2h_prefetch_pages=num_copied))


def _advise(state: BlockState, policy: Policy) -> Transition:
    old = state.policy
    touches = False
    remote = state.cpu & ~state.gpu
    if old.read_mostly and not policy.read_mostly:
        both = state.gpu & state.cpu
        touches = bool(both)
        state = state._replace(
            cpu=state.cpu & ~both,
            cpu_map=state.cpu_map & ~both,
            cpu_write=state.cpu_write & ~both,
            gpu_write=state.gpu_write | (both & state.gpu_map),
        )
    if policy.read_mostly and not old.read_mostly:
        touches = bool(state.gpu)
        state = state._replace(gpu_map=state.gpu_map & state.gpu, gpu_write=0, cpu_write=0)
    ends_accessed_by = old.accessed_by and not policy.accessed_by
    ends_host = old.preferred is Location.HOST and policy.preferred is not Location.HOST
    if ends_accessed_by or ends_host:
        state = state._replace(gpu_map=state.gpu_map & ~remote, gpu_write=state.gpu_write & ~remote)
    if policy.follows_remotely:
        state = _map_over_link(state, state.cpu & ~state.discarded)
    return Transition(state._replace(policy=policy), NOTHING, touches)


# ---- faults of the CPU


def _cpu_access(state: BlockState, access: CpuAccess, rules: Rules) -> Transition:
    """One fault per page: the CPU cannot map GPU memory, so every page comes to it."""
    counts = NOTHING
    while missing := access.mask & ~(state.cpu_write if access.write else state.cpu_map):
        state, served, _ = _serve_cpu(state, missing & -missing, access, rules)
        counts = add(counts, served)
    return Transition(state, counts)


def _serve_cpu(state: BlockState, faulted: int, access: CpuAccess, rules: Rules) -> Transition:
    ahead = _prefetched(state, faulted, Location.HOST, rules, access.thrashing)
    pages = faulted | ahead
    duplicates = 0
    if state.policy.read_mostly:
        duplicates = ahead if access.write else pages
    state, num_copied = _move_to_cpu(state, pages, duplicates)
    state = state._replace(cpu_map=state.cpu_map | pages, cpu_write=(state.cpu_write & ~pages) | (pages & ~state.gpu))
    if state.policy.follows_remotely:
        state = _map_over_link(state, pages)
    return Transition(state, NOTHING._replace(cpu_faults=1, d2h_fault_pages=num_copied))


# ---- helpers


def lowest(mask: int, count: int) -> int:
    """The `count` lowest set bits."""
    if count >= BLOCK_PAGES or mask.bit_count() <= count:
        return mask
    taken = 0
    for _ in range(count):
        bit = mask & -mask
        taken |= bit
        mask ^= bit
    return taken


def add(a: Counts, b: Counts) -> Counts:
    return Counts(*map(int.__add__, a, b))
