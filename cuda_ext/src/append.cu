// Launcher of the append kernel.
#include "uvm_kv/append.cuh"

#include <cuda_runtime.h>

#include <algorithm>

namespace uvm_kv {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMostUnits = std::int64_t{1} << 30;  // 32-bit counting, and a step past the end

__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ AppendParams params) {
  const int units = params.num_tokens * append_units_per_token(params.kv);
  const int step = static_cast<int>(gridDim.x) * kThreads;
  for (int unit = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x); unit < units; unit += step) {
    append_unit(params, unit);
  }
}

Status check_rows(const std::byte* rows, std::int64_t stride_bytes, const PagedKV& kv, const char* name) {
  const std::int64_t token_bytes = kv.num_kv_heads * kv.row_bytes();
  if (rows == nullptr || !is_aligned(rows, 16) || stride_bytes % 16 != 0 || stride_bytes < token_bytes) {
    return make_status(Status::Code::kInvalidArgument,
                       "%s at %p, rows %lld bytes apart: they must be multiples of 16 bytes, the pointer not null and "
                       "the rows at least %lld bytes apart",
                       name, static_cast<const void*>(rows), static_cast<long long>(stride_bytes),
                       static_cast<long long>(token_bytes));
  }
  return {};
}

Status check(const AppendParams& params) {
  Status status = check_paged_kv(params.kv);
  if (status.ok()) {
    status = check_rows(params.key, params.key_stride_bytes, params.kv, "key");
  }
  if (status.ok()) {
    status = check_rows(params.value, params.value_stride_bytes, params.kv, "value");
  }
  if (status.ok() && params.num_tokens < 0) {
    return make_status(Status::Code::kInvalidArgument, "num_tokens=%d; it may not be negative", params.num_tokens);
  }
  if (status.ok() && (params.seqs == nullptr || params.positions == nullptr || params.table.blocks == nullptr)) {
    return make_status(Status::Code::kInvalidArgument, "append needs seqs, positions and a block table");
  }
  return status;
}

}  // namespace

Status append_kv(const AppendParams& params, CUstream_st* stream) {
  if (params.num_tokens == 0) {
    return {};
  }
  const Status status = check(params);
  if (!status.ok()) {
    return status;
  }
  const std::int64_t units = std::int64_t{params.num_tokens} * append_units_per_token(params.kv);
  if (units > kMostUnits) {
    return make_status(Status::Code::kNotSupported, "num_tokens=%d; %lld rows of this size in one launch are the most",
                       params.num_tokens, static_cast<long long>(kMostUnits / append_units_per_token(params.kv)));
  }
  const int blocks = static_cast<int>(std::min<std::int64_t>((units + kThreads - 1) / kThreads, 1 << 16));
  append_kernel<<<blocks, kThreads, 0, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    return make_status(Status::Code::kCudaError, "append_kernel, %d blocks: %s (%s)", blocks,
                       cudaGetErrorName(error), cudaGetErrorString(error));
  }
  return {};
}

}  // namespace uvm_kv
