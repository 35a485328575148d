// The kernels' shared code on the CPU, behind a C interface for tests/memory/test_kernels_host.py.
//
// Planning, index arithmetic, pieces, queues and merge are the headers' own; host_lanes.hpp stands in for the device.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "host_lanes.hpp"
#include "uvm_kv/append.cuh"
#include "uvm_kv/paged_attention.cuh"

namespace uvm_kv {
namespace {

template <class T, int kHeadDim>
int run_passes(const AttentionParams& params, const PlanCapacity& capacity, int num_ctas) {
  const int rows = narrow_rows(kHeadDim, params.group());
  constexpr bool kTuned = kHeadDim == 64 || kHeadDim == 128;
  int num_clashes = 0;
  if (capacity.items[0] > 0) {
    if (rows == 4) {
      num_clashes += run_pass<T, kHeadDim, 4, false>(params, num_ctas);
    } else if constexpr (kTuned) {
      num_clashes += rows == 1 ? run_pass<T, kHeadDim, 1, false>(params, num_ctas)
                               : run_pass<T, kHeadDim, 8, false>(params, num_ctas);
    }
  }
  if (capacity.items[1] > 0) {
    num_clashes += run_pass<T, kHeadDim, kWideWarpRows, true>(params, num_ctas);
  }
  run_merge<T>(params);
  return num_clashes;
}

template <class T>
int run_head_dim(const AttentionParams& params, const PlanCapacity& capacity, int num_ctas) {
  switch (params.kv.head_dim) {
    case 64:
      return run_passes<T, 64>(params, capacity, num_ctas);
    case 80:
      return run_passes<T, 80>(params, capacity, num_ctas);
    case 96:
      return run_passes<T, 96>(params, capacity, num_ctas);
    case 128:
      return run_passes<T, 128>(params, capacity, num_ctas);
    case 256:
      return run_passes<T, 256>(params, capacity, num_ctas);
    default:
      std::abort();
  }
}

int run_attention(DType dtype, const AttentionParams& params, const PlanCapacity& capacity, int num_ctas) {
  switch (dtype) {
    case DType::kFp16:
      return run_head_dim<Fp16>(params, capacity, num_ctas);
    case DType::kBf16:
      return run_head_dim<Bf16>(params, capacity, num_ctas);
    case DType::kFp32:
      return run_head_dim<float>(params, capacity, num_ctas);
    default:
      std::abort();
  }
}

}  // namespace
}  // namespace uvm_kv

// ---- C interface; the structs are repeated in the test

extern "C" {

struct HkCache {
  std::int32_t dtype, layout, num_layers, num_kv_heads, head_dim, block_size, split_block;
  std::int64_t chunk_bytes;
  std::byte* device;
  std::int64_t num_device_blocks;
  std::byte* host;
  std::int64_t num_host_blocks;
};

struct HkBatch {
  std::int32_t num_seqs, num_q_heads, split_tokens, first_host_block;
  const std::int32_t* query_lens;
  const std::int32_t* context_lens;
  const std::int32_t* blocks;
  const std::int32_t* indptr;
  std::int64_t row_stride;
  const std::uint8_t* block_on_host;
  std::int64_t num_flags;
};

static uvm_kv::KVGeometry geometry_of(const HkCache& c) {
  const int bytes = uvm_kv::element_bytes(static_cast<uvm_kv::DType>(c.dtype));
  return {c.num_layers, c.num_kv_heads, c.head_dim, bytes, c.block_size};
}

static uvm_kv::PagedKV view_of(const HkCache& c) {
  const auto layout = static_cast<uvm_kv::Layout>(c.layout);
  const auto geometry = geometry_of(c);
  const auto device = uvm_kv::make_slab_view(c.device, layout, geometry, c.num_device_blocks, c.chunk_bytes);
  const auto host = uvm_kv::make_slab_view(c.host, layout, geometry, c.num_host_blocks, c.chunk_bytes);
  return uvm_kv::make_paged_kv(device, host, c.split_block, geometry);
}

static uvm_kv::PlanInput plan_input(const HkCache& c, const HkBatch& b) {
  uvm_kv::PlanInput input;
  const auto geometry = geometry_of(c);
  input.num_q_heads = b.num_q_heads;
  input.num_kv_heads = c.num_kv_heads;
  input.head_dim = c.head_dim;
  input.element_bytes = geometry.element_bytes;
  input.block_size = c.block_size;
  input.split_tokens = b.split_tokens;
  input.query_lens = {b.query_lens, static_cast<std::size_t>(b.num_seqs)};
  input.context_lens = {b.context_lens, static_cast<std::size_t>(b.num_seqs)};
  input.table = {b.blocks, b.indptr, b.row_stride};
  input.first_host_block = b.first_host_block;
  input.block_on_host = {b.block_on_host, static_cast<std::size_t>(b.num_flags)};
  return input;
}

static int answer(const uvm_kv::Status& status, char* text) {
  std::memcpy(text, status.text, sizeof(status.text));
  return static_cast<int>(status.code);
}

int hk_check(const HkCache* cache, char* text) { return answer(uvm_kv::check_paged_kv(view_of(*cache)), text); }

// Byte offset of a slot; *on_host says in which slab.
std::int64_t hk_slot(const HkCache* cache, int layer, int block, int which, int head, int slot, int* on_host) {
  const uvm_kv::PagedKV kv = view_of(*cache).at_layer(layer);
  *on_host = block >= kv.split_block ? 1 : 0;
  return kv.block(block) + kv.slot_offset(which, head, slot) - (*on_host != 0 ? cache->host : cache->device);
}

void hk_to_float(int dtype, const std::uint16_t* in, float* out, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    out[i] = dtype == 0 ? uvm_kv::to_float(uvm_kv::Fp16{in[i]}) : uvm_kv::to_float(uvm_kv::Bf16{in[i]});
  }
}

void hk_from_float(int dtype, const float* in, std::uint16_t* out, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    out[i] = dtype == 0 ? uvm_kv::from_float<uvm_kv::Fp16>(in[i]).bits : uvm_kv::from_float<uvm_kv::Bf16>(in[i]).bits;
  }
}

// counts: narrow items, wide items, merges, rows of partials; bytes of the plan.
int hk_count_plan(const HkCache* cache, const HkBatch* batch, std::int64_t* counts, char* text) {
  uvm_kv::PlanCapacity capacity;
  const uvm_kv::Status status = uvm_kv::count_plan(plan_input(*cache, *batch), &capacity);
  counts[0] = capacity.items[0];
  counts[1] = capacity.items[1];
  counts[2] = capacity.merges;
  counts[3] = capacity.partial_rows;
  counts[4] = capacity.bytes();
  return answer(status, text);
}

int hk_fill_plan(const HkCache* cache, const HkBatch* batch, const std::int64_t* counts, std::byte* plan,
                 std::int64_t bytes, char* text) {
  uvm_kv::PlanCapacity capacity{{counts[0], counts[1]}, counts[2], counts[3]};
  const std::span<std::byte> buffer{plan, static_cast<std::size_t>(bytes)};
  return answer(uvm_kv::fill_plan(plan_input(*cache, *batch), capacity, buffer), text);
}

// Planning, pieces on num_ctas CTAs, merge. The workspace starts as NaN, but for the queues, and the plan as all ones.
// counts: as of hk_count_plan, or more, as in a captured graph.
int hk_attention(const HkCache* cache, const HkBatch* batch, const std::int64_t* counts, int layer, float scale,
                 const std::byte* query, std::byte* out, std::int64_t query_stride_bytes, int num_ctas,
                 int num_host_workers, char* text) {
  const uvm_kv::PlanCapacity capacity{{counts[0], counts[1]}, counts[2], counts[3]};
  const uvm_kv::PlanInput input = plan_input(*cache, *batch);
  std::vector<uvm_kv::Chunk16> plan(static_cast<std::size_t>(capacity.bytes()) / 16);
  std::vector<uvm_kv::Chunk16> workspace(
      static_cast<std::size_t>(uvm_kv::attention_workspace_bytes(capacity, cache->head_dim) + 15) / 16);
  auto* plan_bytes = reinterpret_cast<std::byte*>(plan.data());
  auto* workspace_bytes = reinterpret_cast<std::byte*>(workspace.data());
  std::memset(plan_bytes, 0xff, plan.size() * 16);
  const uvm_kv::Status status = uvm_kv::fill_plan(input, capacity, {plan_bytes, plan.size() * 16});
  if (!status.ok()) {
    return answer(status, text);
  }
  std::memset(workspace_bytes, 0xff, workspace.size() * 16);
  std::memset(workspace_bytes, 0, uvm_kv::WorkspaceLayout::kQueueBytes);

  uvm_kv::AttentionParams params;
  params.kv = view_of(*cache).at_layer(layer);
  params.table = input.table;
  params.num_q_heads = batch->num_q_heads;
  params.query = query;
  params.out = out;
  params.query_stride_bytes = query_stride_bytes;
  params.out_stride_bytes = batch->num_q_heads * params.kv.row_bytes();
  params.scale_log2 = scale * uvm_kv::kLog2E;
  params.num_host_workers = num_host_workers;
  uvm_kv::set_plan(&params, capacity, plan_bytes, workspace_bytes);
  if (const int clashes = uvm_kv::run_attention(static_cast<uvm_kv::DType>(cache->dtype), params, capacity, num_ctas)) {
    return answer(uvm_kv::make_status(uvm_kv::Status::Code::kCudaError,
                                      "%d copies went to a target that had one in flight", clashes), text);
  }
  for (const std::byte* b = workspace_bytes; b < workspace_bytes + uvm_kv::WorkspaceLayout::kQueueBytes; ++b) {
    if (*b != std::byte{0}) {
      return answer(uvm_kv::make_status(uvm_kv::Status::Code::kCudaError, "the queues were not left at zero"), text);
    }
  }
  return answer(status, text);
}

void hk_append(const HkCache* cache, const HkBatch* batch, int layer, std::int32_t num_tokens, const std::int32_t* seqs,
               const std::int32_t* positions, const std::byte* key, const std::byte* value,
               std::int64_t key_stride_bytes, std::int64_t value_stride_bytes) {
  uvm_kv::AppendParams params;
  params.kv = view_of(*cache).at_layer(layer);
  params.table = {batch->blocks, batch->indptr, batch->row_stride};
  params.num_tokens = num_tokens;
  params.seqs = seqs;
  params.positions = positions;
  params.key = key;
  params.value = value;
  params.key_stride_bytes = key_stride_bytes;
  params.value_stride_bytes = value_stride_bytes;
  const std::int64_t units = std::int64_t{num_tokens} * uvm_kv::append_units_per_token(params.kv);
  for (std::int64_t unit = 0; unit < units; ++unit) {
    uvm_kv::append_unit(params, static_cast<int>(unit));
  }
}

// Merges `count` states (m, l, acc [dim]) one after the other, as teams do, and all at once, as splits are.
void hk_merge(const float* stats, const float* acc, int count, int dim, float* folded, float* merged) {
  float m = stats[0];
  float l = stats[1];
  std::copy(acc, acc + dim, folded);
  for (int i = 1; i < count; ++i) {
    const uvm_kv::MergeWeights weights = uvm_kv::merge_weights(m, stats[2 * i]);
    m = weights.m;
    l = uvm_kv::merge_sum(weights, l, stats[2 * i + 1]);
    for (int d = 0; d < dim; ++d) {
      folded[d] = uvm_kv::merge_sum(weights, folded[d], acc[i * dim + d]);
    }
  }
  for (int d = 0; d < dim; ++d) {
    folded[d] /= l;
  }
  const uvm_kv::MergeRow row{stats, acc, 1, count};
  for (int d = 0; d < dim; d += 4) {
    uvm_kv::MergeSum sum = uvm_kv::merge_part(row, dim, 0, d);
    for (int part = 1; part < uvm_kv::kMergeParts; ++part) {
      uvm_kv::merge_add(sum, uvm_kv::merge_part(row, dim, part, d));
    }
    for (int e = 0; e < 4; ++e) {
      merged[d + e] = sum.acc[e] / sum.l;
    }
  }
}

}  // extern "C"
