#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>

#include "arrays.hpp"
#include "bindings.hpp"
#include "uvm_kv/append.cuh"
#include "uvm_kv/capabilities.hpp"
#include "uvm_kv/cuda_check.hpp"
#include "uvm_kv/device.hpp"
#include "uvm_kv/kv_view.hpp"
#include "uvm_kv/memory_resource.hpp"
#include "uvm_kv/paged_attention.cuh"
#include "uvm_kv/stream.hpp"

namespace uvm_kv::bindings {
namespace {

using namespace nb::literals;
using HostInts = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using HostTable = nb::ndarray<const std::int32_t, nb::c_contig, nb::device::cpu>;
using HostFlags = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using HostBytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void throw_if_failed(const Status& status) {
  if (status.ok()) return;
  if (status.code == Status::Code::kCudaError) throw CudaError(status.text, 0);
  throw std::invalid_argument(status.text);
}

const char* dtype_name(DType dtype) {
  return dtype == DType::kFp16 ? "float16" : dtype == DType::kBf16 ? "bfloat16" : "float32";
}

void make_view(KVView* self, const SlabLayout& near, std::uintptr_t near_slab, const SlabLayout* far,
               std::uintptr_t far_slab, const SlabLayout* staged, std::uintptr_t staged_slab, int num_kv_heads,
               int head_dim, int block_size, const std::string& dtype, int device) {
  const KVView view = make_kv_view({near_slab, &near}, {far_slab, far}, {staged_slab, staged}, num_kv_heads, head_dim,
                                   block_size, to_kv_dtype(dtype), device);
  throw_if_failed(check_paged_kv(view.kv));
  new (self) KVView(view);
}

std::uintptr_t slot_address(const KVView& view, int layer, int block, bool value, int head, int slot) {
  const PagedKV kv = view.kv.at_layer(layer);
  return reinterpret_cast<std::uintptr_t>(kv.block(block) + kv.slot_offset(value ? 1 : 0, head, slot));
}

std::span<const std::int32_t> span_of(const HostInts& array) { return {array.data(), array.size()}; }

/// [seqs, width], or with indptr [entries].
BlockTable host_table(const HostTable& blocks, const std::optional<HostInts>& indptr, std::size_t num_seqs) {
  if (!indptr) {
    require(blocks.ndim() == 2 && blocks.shape(0) == num_seqs,
            "a block table of " + std::to_string(num_seqs) + " sequences must be int32 [sequences, blocks]");
    return {blocks.data(), nullptr, static_cast<std::int64_t>(blocks.shape(1))};
  }
  require(blocks.ndim() == 1 && indptr->size() == num_seqs + 1,
          "with indptr, block_table is int32 [entries] and indptr int32 [" + std::to_string(num_seqs + 1) + "]");
  const std::int32_t* at = indptr->data();
  for (std::size_t s = 0; s < num_seqs; ++s)
    require(at[s] >= 0 && at[s] <= at[s + 1], "indptr must begin at 0 or above and never fall");
  require(static_cast<std::size_t>(at[num_seqs]) <= blocks.size(), "indptr ends behind the block table");
  return {blocks.data(), at, 0};
}

PlanInput plan_input(const KVView& view, int num_q_heads, int split_tokens, const HostInts& query_lens,
                     const HostInts& context_lens) {
  PlanInput input;
  input.num_q_heads = num_q_heads;
  input.num_kv_heads = view.kv.num_kv_heads;
  input.head_dim = view.kv.head_dim;
  input.element_bytes = view.kv.element_bytes;
  input.block_size = view.kv.block_size;
  input.split_tokens = split_tokens;
  input.query_lens = span_of(query_lens);
  input.context_lens = span_of(context_lens);
  input.first_host_block = view.kv.split_block;
  input.first_staged_block = view.kv.staged_block;
  return input;
}

PlanCapacity count(const KVView& view, int num_q_heads, int split_tokens, const HostInts& query_lens,
                   const HostInts& context_lens) {
  PlanCapacity capacity;
  throw_if_failed(count_plan(plan_input(view, num_q_heads, split_tokens, query_lens, context_lens), &capacity));
  return capacity;
}

void fill(const KVView& view, int num_q_heads, int split_tokens, const HostInts& query_lens,
          const HostInts& context_lens, const HostTable& block_table, const std::optional<HostInts>& indptr,
          const std::optional<HostFlags>& block_on_host, const PlanCapacity& capacity, const HostBytes& out) {
  PlanInput input = plan_input(view, num_q_heads, split_tokens, query_lens, context_lens);
  PlanCapacity counted;
  throw_if_failed(count_plan(input, &counted));  // The lengths are sound before the table is walked.
  input.table = host_table(block_table, indptr, context_lens.size());
  require_known_blocks(view, input.table, input.query_lens, input.context_lens, [&](std::size_t s) {
    return input.table.indptr == nullptr ? input.table.row_stride
                                         : std::int64_t{input.table.indptr[s + 1]} - input.table.indptr[s];
  });
  if (block_on_host) {
    require(block_on_host->size() == view.num_blocks, "block_on_host has " + std::to_string(block_on_host->size()) +
                                                          " flags for " + std::to_string(view.num_blocks) + " blocks");
    input.block_on_host = {block_on_host->data(), block_on_host->size()};
  }
  throw_if_failed(fill_plan(input, capacity, {reinterpret_cast<std::byte*>(out.data()), out.size()}));
}

DeviceArray checked(nb::handle object, const char* name, const KVView& view, const std::string& dtype,
                    const std::vector<std::int64_t>& shape) {
  DeviceArray array = device_array(object, name);
  require_rows(array, name, dtype, shape);
  require(!array.pageable || pageable_memory_access(view.device),
          std::string(name) + " lies in host memory, which device " + std::to_string(view.device) +
              " does not reach; move it to the device");
  require(array.device < 0 || array.device == view.device, std::string(name) + " is on device " +
                                                               std::to_string(array.device) + ", the cache on device " +
                                                               std::to_string(view.device));
  return array;
}

BlockTable device_table(nb::handle blocks, nb::handle indptr, const KVView& view) {
  if (indptr.is_none()) {
    const DeviceArray array = checked(blocks, "block_table", view, "int32", {-1, -1});
    return {reinterpret_cast<const std::int32_t*>(array.data), nullptr, row_stride(array) / 4};
  }
  const DeviceArray array = checked(blocks, "block_table", view, "int32", {-1});
  const DeviceArray starts = checked(indptr, "indptr", view, "int32", {-1});
  return {reinterpret_cast<const std::int32_t*>(array.data), reinterpret_cast<const std::int32_t*>(starts.data), 0};
}

PagedKV at_layer(const KVView& view, int layer) {
  require(layer >= 0 && layer < view.num_layers,
          "layer " + std::to_string(layer) + " of " + std::to_string(view.num_layers));
  return view.kv.at_layer(layer);
}

void append(const KVView& view, int layer, nb::handle key, nb::handle value, nb::handle seqs, nb::handle positions,
            nb::handle block_table, nb::handle indptr, std::uintptr_t stream) {
  const cudaStream_t on = to_stream(stream);
  const std::vector<std::int64_t> rows = {-1, view.kv.num_kv_heads, view.kv.head_dim};
  const DeviceArray k = checked(key, "key", view, dtype_name(view.dtype), rows);
  const DeviceArray v = checked(value, "value", view, dtype_name(view.dtype), {k.shape[0], rows[1], rows[2]});
  const DeviceArray of = checked(seqs, "seqs", view, "int32", {k.shape[0]});
  const DeviceArray at = checked(positions, "positions", view, "int32", {k.shape[0]});
  AppendParams params;
  params.kv = at_layer(view, layer);
  params.table = device_table(block_table, indptr, view);
  params.num_tokens = static_cast<std::int32_t>(k.shape[0]);
  params.seqs = reinterpret_cast<const std::int32_t*>(of.data);
  params.positions = reinterpret_cast<const std::int32_t*>(at.data);
  params.key = k.data;
  params.value = v.data;
  params.key_stride_bytes = row_stride(k);
  params.value_stride_bytes = row_stride(v);
  const DeviceScope scope(view.device);
  throw_if_failed(append_kv(params, on));
}

void send_plan(const Slab& staging, const Slab& plan, std::size_t num_bytes, std::uintptr_t stream) {
  const cudaStream_t on = to_stream(stream);
  require_not_capturing(on, "a plan");
  const ByteRange range{0, num_bytes};
  UVM_KV_CUDA_BYTES(cudaMemcpyAsync(plan.part(range), staging.host_part(range), num_bytes, cudaMemcpyHostToDevice, on),
                    num_bytes);
}

void init_workspace(const KVView& view, const Slab& workspace, std::uintptr_t stream) {
  const DeviceScope scope(view.device);
  throw_if_failed(init_attention_workspace(workspace.data(), to_stream(stream)));
}

void attend(const KVView& view, int layer, nb::handle query, nb::handle out, nb::handle block_table, nb::handle indptr,
            const Slab& plan, const PlanCapacity& capacity, std::int64_t num_rows, const Slab& workspace,
            int num_q_heads, float scale, int num_host_workers, std::uintptr_t stream) {
  const cudaStream_t on = to_stream(stream);
  const std::vector<std::int64_t> rows = {-1, num_q_heads, view.kv.head_dim};
  const DeviceArray q = checked(query, "query", view, dtype_name(view.dtype), rows);
  const DeviceArray o = checked(out, "out", view, dtype_name(view.dtype), {q.shape[0], rows[1], rows[2]});
  require(q.shape[0] >= num_rows, "query has " + std::to_string(q.shape[0]) + " rows, the plan is for " +
                                      std::to_string(num_rows));
  require(static_cast<std::int64_t>(plan.bytes()) >= capacity.bytes(),
          "a plan of " + std::to_string(capacity.bytes()) + " B in a slab of " + text(plan.bytes()));
  AttentionArgs args;
  args.dtype = view.dtype;
  args.kv = at_layer(view, layer);
  args.table = device_table(block_table, indptr, view);
  args.num_q_heads = num_q_heads;
  args.scale = scale;
  args.query = q.data;
  args.out = o.data;
  args.query_stride_bytes = row_stride(q);
  args.out_stride_bytes = row_stride(o);
  args.plan = plan.data();
  args.capacity = capacity;
  args.workspace = workspace.data();
  args.workspace_bytes = static_cast<std::int64_t>(workspace.bytes());
  args.num_host_workers = num_host_workers;
  const DeviceScope scope(view.device);
  throw_if_failed(paged_attention(args, on));
}

void bind_plan(nb::module_& m) {
  nb::class_<PlanCapacity>(m, "PlanCapacity", "Room for a plan; fixed for the life of a captured graph.")
      .def(
          "__init__",
          [](PlanCapacity* self, std::int64_t narrow_items, std::int64_t wide_items, std::int64_t merges,
             std::int64_t partial_rows) {
            require(std::min({narrow_items, wide_items, merges, partial_rows}) >= 0, "a capacity below 0");
            new (self) PlanCapacity{{narrow_items, wide_items}, merges, partial_rows};
          },
          nb::kw_only(), "narrow_items"_a, "wide_items"_a, "merges"_a, "partial_rows"_a)
      .def_prop_ro("narrow_items", [](const PlanCapacity& c) { return c.items[0]; })
      .def_prop_ro("wide_items", [](const PlanCapacity& c) { return c.items[1]; })
      .def_ro("merges", &PlanCapacity::merges)
      .def_ro("partial_rows", &PlanCapacity::partial_rows)
      .def_prop_ro("plan_bytes", &PlanCapacity::bytes)
      .def("workspace_bytes", &attention_workspace_bytes, "head_dim"_a);
  m.def("count_plan", &count, "view"_a, nb::kw_only(), "num_q_heads"_a, "split_tokens"_a, "query_lens"_a,
        "context_lens"_a, "What the plan of a batch takes. Lengths are int32 [sequences] on the host.");
  m.def("fill_plan", &fill, "view"_a, nb::kw_only(), "num_q_heads"_a, "split_tokens"_a, "query_lens"_a,
        "context_lens"_a, "block_table"_a, "indptr"_a.none(), "block_on_host"_a.none(), "capacity"_a, "out"_a,
        "Writes a plan into host bytes. block_table: int32 [sequences, blocks], or [entries] with indptr.");
  m.def("send_plan", &send_plan, "staging"_a, "plan"_a, nb::kw_only(), "num_bytes"_a, "stream"_a,
        "From pinned memory to the device. Not capturable: a replay would send what is there then.");
}

}  // namespace

void bind_attention(nb::module_& m) {
  nb::class_<KVView>(m, "KVView", "K and V of all layers as the kernels see them: one tier, or two.")
      .def("__init__", &make_view, nb::kw_only(), "near"_a, "near_slab"_a, "far"_a.none(), "far_slab"_a,
           "staged"_a.none(), "staged_slab"_a, "num_kv_heads"_a, "head_dim"_a, "block_size"_a, "dtype"_a, "device"_a,
           "near, far, staged: layouts, and the addresses of their slabs. Blocks of far follow those of near, staged "
           "copies those of far.")
      .def_ro("num_layers", &KVView::num_layers)
      .def_ro("num_blocks", &KVView::num_blocks)
      .def_prop_rw("staged_first", [](const KVView& view) { return view.kv.staged_first; }, &KVView::set_staged_first,
                   "Place of layer 0 in the ring of staged copies. Launches from here on find them there.")
      .def("slot_address", &slot_address, "layer"_a, "block"_a, nb::kw_only(), "value"_a, "head"_a, "slot"_a,
           "Where the kernels find a row of K or V. Asks nobody.");
  bind_plan(m);
  m.def("append_kv", &append, "view"_a, "layer"_a, "key"_a, "value"_a, nb::kw_only(), "seqs"_a, "positions"_a,
        "block_table"_a, "indptr"_a.none(), "stream"_a,
        "Rows of K and V [tokens, num_kv_heads, head_dim] into their slots. Capturable. ValueError: dtype, shape, "
        "strides, alignment, layer.");
  m.def("init_workspace", &init_workspace, "view"_a, "workspace"_a, nb::kw_only(), "stream"_a,
        "Once, before the first attention with this workspace.");
  m.def("paged_attention", &attend, "view"_a, "layer"_a, "query"_a, "out"_a, nb::kw_only(), "block_table"_a,
        "indptr"_a.none(), "plan"_a, "capacity"_a, "num_rows"_a, "workspace"_a, "num_q_heads"_a, "scale"_a,
        "num_host_workers"_a, "stream"_a,
        "query, out: [tokens, num_q_heads, head_dim], at least the num_rows of the plan. Capturable. ValueError: dtype, "
        "shape, strides, alignment, layer, head size, block size, a workspace or plan that is too small.");
}

}  // namespace uvm_kv::bindings
