"""A slow, page-exact model of NVIDIA's Unified Memory driver: the second opinion that the fast model is compared with.

One managed range of 2 MiB blocks, one GPU behind PCIe (the GPU reads CPU memory, the CPU does not read GPU memory),
a record per 4 KiB page, no time, no thrashing detection. [SRC] marks what was read in the open driver's source.

Decisions where the written rules are silent or can be read in two ways:

 1. gpu_batch: an access completes at the first replay that finds its page mapped, and does not fault again when a later
    eviction takes the page; otherwise a batch wider than the GPU would never end.
 2. gpu_stream: the window is the batch; `fault_batch` does not cut it.
 3. A batch that reaches a block whose faulted pages have become accessible meanwhile does not service it.
 4. read_mostly takes precedence over accessed_by: no remote mapping is made while both are set [SRC].
 5. Setting read_mostly is our reading of the driver: mappings of GPU-resident pages become read-only, and so do CPU
    mappings; remote mappings are removed [SRC]. Unsetting it leaves pages that are not duplicated as they are mapped.
 6. advise touches the LRU where the driver calls make_resident: setting read_mostly on a block with GPU-resident pages
    [SRC], unsetting it on a block with duplicates.
 7. Unsetting either accessed_by or preferred host removes the remote mappings; if accessed_by is (still) set they are
    made again. advise with accessed_by maps every unmapped CPU-resident page also if it was set before, but never a
    discarded one (it has to fault).
 8. A page is mapped read-only exactly if it is resident on both sides: a read_mostly page with one copy gets a writable
    mapping. A mapping that was made read-only stays so after the other copy is gone, until a fault or prefetch of it.
 9. Residency rule 7 (go to the preferred location) only if the page is not resident on the GPU already [SRC].
10. GPU-resident pages of a tree prefetch to the CPU (a GPU fault with preferred host) are copied back: d2h_fault_pages.
11. Faulted pages with two destinations: no prefetch, the CPU is served first.
12. With accessed_by every page of a CPU fault service (also one populated there) gets a remote mapping [SRC].
    remote_maps counts the services of GPU faults only, and pages that had no remote mapping before.
13. A discarded page is forgotten when its last residency ends. If it moves, it is populated afresh at the destination:
    on the GPU it counts as zeroed. Discarding is per page, not per copy: with two copies, eviction drops the GPU copy
    and leaves the CPU copy discarded; a fault or prefetch on either side ends it.
14. Discarding a page that is resident nowhere does nothing. Discard counts for the LRU at once, without a touch.
15. A chunk that changes list (unused, discarded, used) goes to the tail of its new list.
16. cpu_mapped_pages counts a copied page that had any CPU mapping, also a read-only one.
17. A GPU fault can prefetch CPU-resident pages that are mapped remotely; they move like the others.
18. Eviction with accessed_by maps the evicted pages only. A prefetch to the host maps remotely in the mapping pass.
19. prefetcher "block" obeys the same exceptions as "tree" (preferred location, pages mapped on the CPU); "none" also
    switches off the whole-block population of a block that is resident nowhere [SRC].
"""

from __future__ import annotations

from dataclasses import dataclass, field

PAGES = 512
BIG_PAGE = 16
LEVELS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

NO, RO, RW = "no", "ro", "rw"
"""Kinds of mapping."""

UNUSED, DISCARDED, USED = "unused", "discarded", "used"
"""Lists of chunks, in the order in which they are searched for a victim."""

COUNTS = (
    "fault_groups",
    "fault_batches",
    "migrations",
    "h2d_pages",
    "d2h_fault_pages",
    "d2h_prefetch_pages",
    "d2h_eviction_pages",
    "evicted_chunks",
    "dropped_pages",
    "cpu_mapped_pages",
    "scattered_pages",
    "zeroed_pages",
    "remote_maps",
    "cpu_faults",
)

Snapshot = tuple[frozenset[int], frozenset[int], frozenset[int], frozenset[int], frozenset[int], bool]


@dataclass
class Page:
    """One 4 KiB page. A GPU mapping of a page that is not GPU-resident is a remote one."""

    on_gpu: bool = False
    on_cpu: bool = False
    gpu_map: str = NO
    cpu_map: str = NO
    cpu_allocated: bool = False
    discarded: bool = False

    @property
    def on_both(self) -> bool:
        return self.on_gpu and self.on_cpu

    @property
    def nowhere(self) -> bool:
        return not self.on_gpu and not self.on_cpu

    @property
    def proper_map(self) -> str:
        """What a service maps: decision 8."""
        return RO if self.on_both else RW

    def leave_gpu(self) -> None:
        self.on_gpu = False
        self.gpu_map = NO

    def leave_cpu(self) -> None:
        self.on_cpu = False
        self.cpu_map = NO

    def gpu_can(self, write: bool) -> bool:
        return self.gpu_map == RW if write else self.gpu_map != NO

    def cpu_can(self, write: bool) -> bool:
        return self.cpu_map == RW if write else self.cpu_map != NO


@dataclass
class Block:
    """One VA block: its pages, its policy, and whether it holds a root chunk of the GPU."""

    pages: list[Page] = field(default_factory=lambda: [Page() for _ in range(PAGES)])
    preferred: str | None = None
    accessed_by_gpu: bool = False
    read_mostly: bool = False
    has_chunk: bool = False
    contiguous: bool = False
    """The CPU holds the block in one chunk of 2 MiB."""

    @property
    def follows_remotely(self) -> bool:
        """Pages that come to the CPU get a remote GPU mapping: decision 4."""
        return self.accessed_by_gpu and not self.read_mostly

    def numbers(self, condition: str) -> set[int]:
        """The page numbers for which a flag of `Page` holds."""
        return {number for number, page in enumerate(self.pages) if getattr(page, condition)}

    def chunk_list(self) -> str:
        """The list in which the block's chunk belongs."""
        resident = [page for page in self.pages if page.on_gpu]
        if not resident:
            return UNUSED
        return DISCARDED if all(page.discarded for page in resident) else USED


class ReferenceDriver:
    """The driver: calls change the state and `counts`; `snapshot` and `lru` show the state."""

    def __init__(
        self,
        num_blocks: int,
        capacity_chunks: int,
        *,
        prefetcher: str = "tree",
        threshold_percent: int = 51,
        fault_batch: int = 256,
    ) -> None:
        if prefetcher not in ("none", "tree", "block") or capacity_chunks < 1 or fault_batch < 1:
            raise ValueError((prefetcher, capacity_chunks, fault_batch))
        self.blocks = [Block() for _ in range(num_blocks)]
        self.capacity_chunks = capacity_chunks
        self.prefetcher = prefetcher
        self.threshold_percent = threshold_percent
        self.fault_batch = fault_batch
        self.lists: dict[str, list[int]] = {UNUSED: [], DISCARDED: [], USED: []}
        self.counts: dict[str, int] = dict.fromkeys(COUNTS, 0)

    # What one can see

    def snapshot(self) -> list[Snapshot]:
        """Per block: GPU-resident, CPU-resident, GPU-mapped, GPU-writable, CPU-mapped pages, and has a chunk."""
        return [
            (
                frozenset(block.numbers("on_gpu")),
                frozenset(block.numbers("on_cpu")),
                frozenset(number for number, page in enumerate(block.pages) if page.gpu_map != NO),
                frozenset(number for number, page in enumerate(block.pages) if page.gpu_map == RW),
                frozenset(number for number, page in enumerate(block.pages) if page.cpu_map != NO),
                block.has_chunk,
            )
            for block in self.blocks
        ]

    def lru(self) -> list[int]:
        """Blocks with a chunk, first victim first."""
        return self.lists[UNUSED] + self.lists[DISCARDED] + self.lists[USED]

    # API calls

    def advise(
        self, first_block: int, last_block: int, *, preferred: str | None, accessed_by_gpu: bool, read_mostly: bool
    ) -> None:
        """Sets the whole policy of a range of blocks."""
        for index in range(first_block, last_block + 1):
            block = self.blocks[index]
            if block.read_mostly and not read_mostly:
                self._collapse_duplicates(index)
            if read_mostly and not block.read_mostly:
                self._protect(index)
            ends_accessed_by = block.accessed_by_gpu and not accessed_by_gpu
            ends_preferred_host = block.preferred == "host" and preferred != "host"
            block.preferred, block.accessed_by_gpu, block.read_mostly = preferred, accessed_by_gpu, read_mostly
            for page in block.pages:
                if (ends_accessed_by or ends_preferred_host) and not page.on_gpu:
                    page.gpu_map = NO
                if block.follows_remotely and page.on_cpu and not page.on_gpu and not page.discarded:
                    page.gpu_map = RW

    def prefetch(self, first_block: int, last_block: int, to: str) -> None:
        """cudaMemPrefetchAsync: one pass over a single block, else a pass that moves and a pass that maps."""
        if to not in ("device", "host"):
            raise ValueError(to)
        passes = (True,) if first_block == last_block else (False, True)
        for with_mapping in passes:
            for index in range(first_block, last_block + 1):
                if to == "device":
                    self._prefetch_to_device(index, with_mapping)
                else:
                    self._prefetch_to_host(index, with_mapping)

    def discard(self, first_block: int, last_block: int) -> None:
        """cudaMemDiscardBatchAsync: the contents are dead; residency stays, mappings go."""
        for index in range(first_block, last_block + 1):
            for page in self.blocks[index].pages:
                page.discarded = not page.nowhere
                page.gpu_map = NO
                page.cpu_map = NO
            self._settle(index)

    # Accesses

    def gpu_stream(self, block: int, pages: list[int], write: bool, window: int) -> None:
        """A kernel walks through pages of one block in ascending order, `window` faults in flight."""
        walk = sorted(set(pages))
        while True:
            faulted = [page for page in walk if not self.blocks[block].pages[page].gpu_can(write)][:window]
            if not faulted:
                return
            self.counts["fault_batches"] += 1
            self._service_gpu(block, set(faulted), write)

    def gpu_batch(self, accesses: list[tuple[int, int]], write: bool) -> None:
        """All (block, page) accesses are outstanding at once."""
        pending = list(dict.fromkeys(accesses))
        while True:
            # The replay: what is accessible now completes (decision 1), the rest faults again.
            pending = [(block, page) for block, page in pending if not self.blocks[block].pages[page].gpu_can(write)]
            if not pending:
                return
            batch = pending[: self.fault_batch]
            self.counts["fault_batches"] += 1
            for index in sorted({block for block, _ in batch}):
                mine = {page for block, page in batch if block == index}
                missing = {page for page in mine if not self.blocks[index].pages[page].gpu_can(write)}
                if missing:
                    self._service_gpu(index, missing, write)

    def cpu_touch(self, block: int, pages: list[int], write: bool) -> None:
        """The CPU touches pages one after the other: one service per page that it cannot access."""
        for page in sorted(set(pages)):
            if not self.blocks[block].pages[page].cpu_can(write):
                self._service_cpu(block, page, write)

    # Fault services

    def _service_gpu(self, index: int, faulted: set[int], write: bool) -> None:
        """One service of the faulted pages of one block."""
        self.counts["fault_groups"] += 1
        block = self.blocks[index]
        wanted: dict[str, set[int]] = {"host": set(), "device": set()}
        for number in faulted:
            wanted[self._destination_of_gpu_fault(block, block.pages[number])].add(number)
        destinations = [destination for destination, pages in wanted.items() if pages]
        prefetched: set[int] = set()
        if len(destinations) == 1:
            prefetched = self._prefetch_set(block, faulted, destinations[0])
        for destination in destinations:  # the CPU first: decision 11
            if destination == "host":
                self._map_remotely(index, wanted["host"] | prefetched)
            else:
                self._migrate_to_gpu(index, wanted["device"], prefetched, write)

    def _destination_of_gpu_fault(self, block: Block, page: Page) -> str:
        """Location for a page that the GPU faulted on: the rules in their order, without thrashing."""
        if block.read_mostly:  # rules 1 and 2: a copy for a read, the page itself for a write
            return "device"
        if block.preferred == "device":  # rule 3
            return "device"
        if page.nowhere:  # rule 5; the GPU can access both locations
            return "host" if block.preferred == "host" else "device"
        if block.accessed_by_gpu:  # rule 6; the GPU's own copy is the closest
            return "device" if page.on_gpu else "host"
        if block.preferred == "host" and not page.on_gpu:  # rule 7: decision 9
            return "host"
        return "device"  # rule 8

    def _migrate_to_gpu(self, index: int, faulted: set[int], prefetched: set[int], write: bool) -> None:
        """The part of a GPU service that has the GPU as its destination."""
        block = self.blocks[index]
        duplicated = set()
        if block.read_mostly:  # the access type of prefetched pages is never a write
            duplicated = prefetched if write else faulted | prefetched
        self._make_resident_on_gpu(index, faulted | prefetched, duplicated)
        for number in faulted | prefetched:
            page = block.pages[number]
            if number in faulted or page.gpu_map == NO:
                page.gpu_map = page.proper_map

    def _map_remotely(self, index: int, pages: set[int]) -> None:
        """The part of a GPU service that has the CPU as its destination."""
        block = self.blocks[index]
        self._make_resident_on_cpu(index, pages, set(), "d2h_fault_pages")
        for number in pages:
            if block.pages[number].gpu_map == NO:
                self.counts["remote_maps"] += 1
                block.pages[number].gpu_map = RW

    def _service_cpu(self, index: int, faulted: int, write: bool) -> None:
        """One CPU fault: the page comes to the CPU, whatever its policy, since the CPU cannot read GPU memory."""
        self.counts["cpu_faults"] += 1
        block = self.blocks[index]
        prefetched = self._prefetch_set(block, {faulted}, "host")
        duplicated = set()
        if block.read_mostly:
            duplicated = prefetched if write else prefetched | {faulted}
        self._make_resident_on_cpu(index, prefetched | {faulted}, duplicated, "d2h_fault_pages")
        for number in prefetched | {faulted}:
            page = block.pages[number]
            page.cpu_map = page.proper_map
            if block.follows_remotely and not page.on_gpu:
                page.gpu_map = RW

    def _prefetch_set(self, block: Block, faulted: set[int], destination: str) -> set[int]:
        """Pages that the driver takes along with faulted pages that all go to one destination."""
        if self.prefetcher == "none" or block.preferred not in (None, destination):
            return set()
        populates = destination == block.preferred and all(page.nowhere for page in block.pages)
        if populates or self.prefetcher == "block":
            region = set(range(PAGES))
        else:
            region = self._tree_region(block.numbers("on_gpu" if destination == "device" else "on_cpu"), faulted)
        region -= faulted
        if destination == "host":
            region -= {number for number in region if block.pages[number].cpu_map != NO}
        return region

    def _tree_region(self, resident: set[int], faulted: set[int]) -> set[int]:
        """The tree: for each fault the largest aligned region that is full enough; their union."""
        filled = resident | faulted
        for number in faulted:
            big_page = number - number % BIG_PAGE
            filled |= set(range(big_page, big_page + BIG_PAGE))
        full_enough: dict[tuple[int, int], bool] = {}
        region: set[int] = set()
        for number in sorted(faulted):
            largest = range(0)
            for size in LEVELS:
                start = number - number % size
                if (start, size) not in full_enough:
                    count = sum(page in filled for page in range(start, start + size))
                    full_enough[start, size] = count * 100 > size * self.threshold_percent
                if full_enough[start, size]:
                    largest = range(start, start + size)
            region |= set(largest)
        return region

    # Prefetch passes

    def _prefetch_to_device(self, index: int, with_mapping: bool) -> None:
        block = self.blocks[index]
        everything = set(range(PAGES))
        self._make_resident_on_gpu(index, everything, everything if block.read_mostly else set())
        if with_mapping:
            for page in block.pages:
                page.gpu_map = page.proper_map

    def _prefetch_to_host(self, index: int, with_mapping: bool) -> None:
        block = self.blocks[index]
        everything = set(range(PAGES))
        duplicated = everything if block.read_mostly else set()
        self._make_resident_on_cpu(index, everything, duplicated, "d2h_prefetch_pages")
        if with_mapping:
            for page in block.pages:
                page.cpu_map = page.proper_map
                if block.follows_remotely and not page.on_gpu:
                    page.gpu_map = RW

    # Residency

    def _make_resident_on_gpu(self, index: int, pages: set[int], duplicated: set[int]) -> None:
        """Brings pages to the GPU, without mapping them; those in `duplicated` keep their CPU copy."""
        block = self.blocks[index]
        if not block.has_chunk:
            self._allocate_chunk(index)
        copied = 0
        for number in pages:
            page = block.pages[number]
            if page.discarded and not page.on_gpu:
                page.leave_cpu()
                page.gpu_map = NO
            page.discarded = False
            if page.nowhere:
                self.counts["zeroed_pages"] += 1
            elif not page.on_gpu:
                copied += 1
                self.counts["cpu_mapped_pages"] += page.cpu_map != NO
                self.counts["scattered_pages"] += not block.contiguous
                page.gpu_map = NO  # a remote mapping
            page.on_gpu = True
            if number not in duplicated:
                page.leave_cpu()
            elif page.cpu_map == RW:
                page.cpu_map = RO
        self.counts["h2d_pages"] += copied
        self.counts["migrations"] += copied > 0
        self._touch(index)

    def _make_resident_on_cpu(self, index: int, pages: set[int], duplicated: set[int], counter: str) -> None:
        """Brings pages to the CPU, without mapping them; those in `duplicated` keep their GPU copy."""
        block = self.blocks[index]
        arriving = set()
        for number in pages:
            page = block.pages[number]
            if page.discarded and not page.on_cpu:
                page.leave_gpu()
            page.discarded = False
            if not page.on_cpu:
                arriving.add(number)
                self.counts[counter] += page.on_gpu
            page.on_cpu = True
            if page.on_gpu and number not in duplicated:
                page.leave_gpu()
            elif page.on_gpu and page.gpu_map == RW:
                page.gpu_map = RO
        self._allocate_on_cpu(block, arriving)
        self._settle(index)

    def _allocate_on_cpu(self, block: Block, pages: set[int]) -> None:
        """CPU pages stay allocated for good; one chunk of 2 MiB only if all come first and at once."""
        if len(pages) == PAGES and not block.numbers("cpu_allocated"):
            block.contiguous = True
        for number in pages:
            block.pages[number].cpu_allocated = True

    def _collapse_duplicates(self, index: int) -> None:
        """read_mostly ends: of two copies the GPU's stays."""
        duplicates = [page for page in self.blocks[index].pages if page.on_both]
        for page in duplicates:
            page.leave_cpu()
            if page.gpu_map == RO:
                page.gpu_map = RW
        if duplicates:
            self._touch(index)

    def _protect(self, index: int) -> None:
        """read_mostly begins: decision 5."""
        block = self.blocks[index]
        for page in block.pages:
            if not page.on_gpu:
                page.gpu_map = NO
            elif page.gpu_map == RW:
                page.gpu_map = RO
            if page.cpu_map == RW:
                page.cpu_map = RO
        if block.numbers("on_gpu"):
            self._touch(index)

    # Chunks

    def _allocate_chunk(self, index: int) -> None:
        if len(self.lru()) == self.capacity_chunks:
            self._evict(self.lru()[0])
        self.blocks[index].has_chunk = True
        self.lists[USED].append(index)

    def _evict(self, index: int) -> None:
        """Takes the whole chunk of a block."""
        block = self.blocks[index]
        self.counts["evicted_chunks"] += any(page.on_gpu for page in block.pages)  # an unused chunk is just taken
        arriving = set()
        for number in block.numbers("on_gpu"):
            page = block.pages[number]
            page.leave_gpu()
            if page.on_cpu:
                self.counts["dropped_pages"] += 1
            elif page.discarded:
                self.counts["dropped_pages"] += 1
                page.discarded = False
            else:
                self.counts["d2h_eviction_pages"] += 1
                page.on_cpu = True
                arriving.add(number)
                if block.follows_remotely:
                    page.gpu_map = RW
        self._allocate_on_cpu(block, arriving)
        block.has_chunk = False
        for chunks in self.lists.values():
            if index in chunks:
                chunks.remove(index)

    def _touch(self, index: int) -> None:
        """Moves the block's chunk to the tail of its list, which after any service is that of the used ones."""
        for chunks in self.lists.values():
            if index in chunks:
                chunks.remove(index)
        self.lists[self.blocks[index].chunk_list()].append(index)

    def _settle(self, index: int) -> None:
        """Moves the block's chunk only if it is no longer in the list where it belongs."""
        block = self.blocks[index]
        if block.has_chunk and index not in self.lists[block.chunk_list()]:
            self._touch(index)
