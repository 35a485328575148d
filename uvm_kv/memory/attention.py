"""The kernels on the KV of a KVMemory: append new rows, and paged attention split over the context.

    attention = PagedAttention(PagedKV.of(memory, spec, dtype="float16"), num_q_heads=32)
    attention.plan(query_lens=..., context_lens=..., block_table=host_table, stream=stream)      once a step
    for layer in range(num_layers):
        append_kv(attention.kv, layer, key, value, seqs=..., positions=..., block_table=table, stream=stream)
        attention.run(layer, query, out, block_table=table, stream=stream)

Device arrays are anything with DLPack or `__cuda_array_interface__`; host arrays are NumPy's. What split a token falls
into depends on positions alone, so the same plan gives bit-identical output wherever its blocks lie.

`append_kv` and `run` can be captured into a CUDA graph, `plan` cannot: it is called before each replay, on the same
stream, with a `capacity` fixed beforehand, so that buffers stay where they are.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.memory.copies import Placed
from uvm_kv.memory.extension import extension
from uvm_kv.memory.kv_memory import KVMemory
from uvm_kv.memory.layout import slab_layout
from uvm_kv.memory.slab import Slab
from uvm_kv.memory.streams import new_event, stream_handle
from uvm_kv.types import CHUNK_BYTES, DTYPE_BYTES, ceil_div

HostInts = npt.NDArray[np.int32]


class PagedKV:
    """K and V of all layers as the kernels see them. Block ids are those of the KVMemory: device blocks come first."""

    def __init__(self, raw: Any, spec: KVCacheSpec, dtype: str, device: int) -> None:
        self.raw, self.spec, self.dtype, self.device = raw, spec, dtype, device

    @classmethod
    def of(cls, memory: KVMemory, spec: KVCacheSpec, *, dtype: str, staging: Placed | None = None) -> PagedKV:
        """`dtype`: float16, bfloat16 or float32, of `spec.dtype_bytes`. ValueError: a shape that no kernel serves.

        `staging`: device memory for copies of host blocks, a ring over layers: layer l has place (staged_first + l) %
        its layers. Their ids follow those of both tiers.
        """
        if DTYPE_BYTES.get(dtype) != spec.dtype_bytes:
            raise ValueError(f"dtype={dtype}, and the cache has elements of {spec.dtype_bytes} bytes")
        near, far = memory.device, memory.host
        raw = extension().KVView(
            near=near.layout,
            near_slab=near.slab.address,
            far=None if far is None else far.layout,
            far_slab=0 if far is None else far.slab.address,
            staged=None if staging is None else staging.layout,
            staged_slab=0 if staging is None else staging.slab.address,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            block_size=spec.block_size,
            dtype=dtype,
            device=int(near.slab.raw.device),
        )
        return cls(raw, spec, dtype, int(near.slab.raw.device))

    def set_staged_first(self, place: int) -> None:
        """Where layer 0 has its place in the ring of staged copies, for launches from here on. ValueError: no place."""
        self.raw.staged_first = place


def append_kv(
    kv: PagedKV,
    layer: int,
    key: Any,
    value: Any,
    *,
    seqs: Any,
    positions: Any,
    block_table: Any,
    indptr: Any = None,
    stream: object,
) -> None:
    """Copies new rows, RoPE already applied, into their slots.

    Args:
        key, value: [tokens, num_kv_heads, head_dim] of the cache's dtype; tokens may lie further apart.
        seqs: int32 [tokens], row of the block table; a negative one skips the token.
        positions: int32 [tokens], position in the sequence. Its block must be in the table: nobody checks on the GPU.
        block_table: int32 [sequences, blocks], or int32 [entries] with `indptr` int32 [sequences + 1].

    Raises ValueError for dtype, shape, strides, alignment, layer; TypeError for what is no device array.
    """
    table = {"block_table": block_table, "indptr": indptr}
    where = {"seqs": seqs, "positions": positions, **table}
    extension().append_kv(kv.raw, layer, key, value, **where, stream=stream_handle(stream))


def plan_capacity(
    kv: PagedKV, *, num_q_heads: int, query_lens: HostInts, context_lens: HostInts, split_tokens: int = 0
) -> Any:
    """What the plan of a batch takes: narrow_items, wide_items, merges, partial_rows, plan_bytes, workspace_bytes()."""
    lengths = {"query_lens": _ints(query_lens), "context_lens": _ints(context_lens)}
    return extension().count_plan(kv.raw, num_q_heads=num_q_heads, split_tokens=split_tokens, **lengths)


def decode_workspace_bytes(spec: KVCacheSpec, *, dtype: str, num_q_heads: int, num_seqs: int, max_tokens: int) -> int:
    """Bytes of attention's workspace in decode steps of `num_seqs` sequences of up to `max_tokens` tokens, in whole
    chunks. The call allocates nothing."""
    shape = {"num_kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim, "block_size": spec.block_size}
    none = {"far": None, "far_slab": 0, "staged": None, "staged_slab": 0, "dtype": dtype, "device": 0}
    # At an address that nobody touches: lengths are counted, and nothing else.
    raw = extension().KVView(near=slab_layout(spec, num_blocks=1), near_slab=CHUNK_BYTES, **shape, **none)
    kv, one, most = PagedKV(raw, spec, dtype, 0), np.ones(num_seqs, np.int32), np.full(num_seqs, max_tokens, np.int32)
    capacity = plan_capacity(kv, num_q_heads=num_q_heads, query_lens=one, context_lens=most)
    return ceil_div(capacity.workspace_bytes(spec.head_dim), CHUNK_BYTES) * CHUNK_BYTES


def new_workspace(kv: PagedKV, num_bytes: int, *, stream: object) -> Slab:
    """Partial results of attention, and the queues of its work, which every call leaves as it found them: one will do
    for all calls on one stream. `num_bytes`: whole chunks."""
    workspace = Slab.device(num_bytes, device=kv.device)
    extension().init_workspace(kv.raw, workspace.raw, stream=stream_handle(stream))
    return workspace


class PagedAttention:
    """Plan buffers and workspace for one stream of attention calls.

    Args:
        capacity: of `plan_capacity`, for the largest batch to come; buffers then never move, as a captured graph needs.
            None: buffers grow as plans do.
        workspace: of `new_workspace`, shared with other attention on the same stream; a plan that needs more gets one
            of its own. None: this one's own.
        split_tokens: length of a split, a multiple of 128; 0 for the default of the head size.
        num_host_workers: warps that start with the pieces read over the link; 0 for the default.
    """

    def __init__(
        self,
        kv: PagedKV,
        *,
        num_q_heads: int,
        capacity: Any = None,
        workspace: Slab | None = None,
        split_tokens: int = 0,
        num_host_workers: int = 0,
    ) -> None:
        self.kv, self.num_q_heads, self.split_tokens = kv, num_q_heads, split_tokens
        self._num_host_workers = num_host_workers
        self._fixed, self._shared = capacity, workspace
        self._staging: list[_Staging] = []
        self._plan: Slab | None = None
        self._workspace: Slab | None = None
        self._planned: _Planned | None = None

    def plan(
        self,
        *,
        query_lens: HostInts,
        context_lens: HostInts,
        block_table: HostInts,
        indptr: HostInts | None = None,
        block_on_host: npt.NDArray[np.uint8] | None = None,
        stream: object,
    ) -> None:
        """Divides the step's attention into pieces and sends the plan to the device.

        Args:
            query_lens: int32 [sequences], new tokens; 0: the sequence has no part in this step.
            context_lens: int32 [sequences], tokens of each sequence with the new ones.
            block_table: int32 [sequences, blocks] in host memory, or int32 [entries] with `indptr`.
            block_on_host: uint8 [num_blocks], for managed memory: blocks that the caller believes to be read over the
                link. The others' place is known. It sets the order of work and never the result.

        A graph that has captured `run` reads as many query rows as its latest plan says: no more than were captured.

        Raises ValueError for lengths or blocks that do not fit, or a batch above the fixed capacity.
        """
        shape = {"num_q_heads": self.num_q_heads, "split_tokens": self.split_tokens}
        lengths = {"query_lens": _ints(query_lens), "context_lens": _ints(context_lens)}
        table = {"block_table": _ints(block_table), "indptr": None if indptr is None else _ints(indptr)}
        flags = None if block_on_host is None else np.ascontiguousarray(block_on_host, np.uint8)
        capacity = self._fixed or extension().count_plan(self.kv.raw, **shape, **lengths)
        plan, staging = self._room_for_plan(capacity)
        workspace = self._room_for_work(capacity, stream)
        rest = {"block_on_host": flags, "capacity": capacity, "out": staging.free_bytes(capacity.plan_bytes)}
        extension().fill_plan(self.kv.raw, **shape, **lengths, **table, **rest)
        staging.send(plan, capacity.plan_bytes, stream)
        self._planned = _Planned(capacity, int(lengths["query_lens"].sum(dtype=np.int64)), plan, workspace)

    def run(
        self,
        layer: int,
        query: Any,
        out: Any,
        *,
        block_table: Any,
        indptr: Any = None,
        scale: float | None = None,
        stream: object,
    ) -> None:
        """Attention of the planned batch in one layer; causal over each sequence's own tokens.

        Args:
            query, out: [tokens, num_q_heads, head_dim] of the cache's dtype, sequences one after the other; at least
                the planned tokens, and rows behind them are left alone.
            block_table: the planned table in device memory.
            scale: of the scores; None: 1 / sqrt(head_dim).

        Raises ValueError for dtype, shape, strides, alignment, layer, head size; TypeError for what is no device array.
        """
        if self._planned is None:
            raise ValueError("run() before plan(): the batch is not known")
        scale = 1 / math.sqrt(self.kv.spec.head_dim) if scale is None else scale
        capacity, num_rows, plan, workspace = self._planned
        buffers = {"plan": plan.raw, "capacity": capacity, "num_rows": num_rows, "workspace": workspace.raw}
        table = {"block_table": block_table, "indptr": indptr}
        options = {"num_q_heads": self.num_q_heads, "scale": scale, "num_host_workers": self._num_host_workers}
        extension().paged_attention(
            self.kv.raw, layer, query, out, **table, **buffers, **options, stream=stream_handle(stream)
        )

    def close(self) -> None:
        self._close_plan()
        self._close_workspace()

    def _close_plan(self) -> None:
        plan, staging = self._plan, self._staging
        self._plan, self._staging, self._planned = None, [], None
        for slab in (plan, *(s.slab for s in staging)):
            if slab is not None:
                slab.close()

    def _close_workspace(self) -> None:
        workspace, self._workspace, self._planned = self._workspace, None, None
        if workspace is not None:
            workspace.close()

    def _room_for_plan(self, capacity: Any) -> tuple[Slab, _Staging]:
        """What is too small is forgotten before there is anew: memory may run out in between."""
        if self._plan is None or self._plan.num_bytes < capacity.plan_bytes:
            self._close_plan()
            size, device = self._room(capacity.plan_bytes), self.kv.device
            plan, pinned = Slab.device(size, device=device), [Slab.pinned(size, device=device) for _ in range(2)]
            self._plan, self._staging = plan, [_Staging(slab) for slab in pinned]
        self._staging.reverse()  # They take turns.
        return self._plan, self._staging[0]

    def _room_for_work(self, capacity: Any, stream: object) -> Slab:
        needed = capacity.workspace_bytes(self.kv.spec.head_dim)
        if self._shared is not None and self._shared.num_bytes >= needed:
            return self._shared
        if self._workspace is None or self._workspace.num_bytes < needed:
            self._close_workspace()
            self._workspace = new_workspace(self.kv, self._room(needed), stream=stream)
        return self._workspace

    def _room(self, num_bytes: int) -> int:
        """Whole chunks; a power of two of them for what may grow: freeing device memory waits for the whole device."""
        chunks = ceil_div(num_bytes, CHUNK_BYTES)
        return (chunks if self._fixed is not None else 1 << (chunks - 1).bit_length()) * CHUNK_BYTES


class _Planned(NamedTuple):
    """What `run` needs of the latest plan."""

    capacity: Any
    num_rows: int
    plan: Slab
    workspace: Slab


class _Staging:
    """Pinned memory for a plan on its way; written again only when the last copy out of it has ended."""

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        self._sent = new_event(device=slab.device_ordinal)

    def free_bytes(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        self._sent.synchronize()
        return self.slab.host_view(offset=0, num_bytes=num_bytes)

    def send(self, target: Slab, num_bytes: int, stream: object) -> None:
        handle = stream_handle(stream)
        extension().send_plan(self.slab.raw, target.raw, num_bytes=num_bytes, stream=handle)
        self._sent.record(stream=handle)


def _ints(values: npt.ArrayLike) -> HostInts:
    """TypeError for what are no integers, ValueError for those beyond int32."""
    given = np.asarray(values)
    narrow = given.astype(np.int32, casting="same_kind", copy=False)
    if narrow is not given and not np.array_equal(narrow, given):
        raise ValueError(f"lengths and blocks are int32; given are {given.min()} to {given.max()}")
    return np.ascontiguousarray(narrow)
