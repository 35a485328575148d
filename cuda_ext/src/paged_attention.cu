// Launcher of paged attention: checks, dispatch by dtype, head size and query rows, launch.
#include "uvm_kv/paged_attention.cuh"

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>

namespace uvm_kv {
namespace {

constexpr int kMostDevices = 64;

// Workers that start with the host queue. Each keeps about 8 KiB in flight: a PCIe 5.0 x16 link with 2 us of latency
// wants some 120 KiB, so this saturates it and leaves nearly all of the card to device memory.
constexpr int kHostWarps = 32;
constexpr int kHostCtas = kHostWarps / kCtaWarps;

Status cuda_status(cudaError_t error, const char* call) {
  if (error == cudaSuccess) {
    return {};
  }
  cudaGetLastError();  // the answer says it; the next caller's check must not
  return make_status(Status::Code::kCudaError, "%s: %s (%s)", call, cudaGetErrorName(error),
                     cudaGetErrorString(error));
}

// CTAs that fill the current device; asked of the driver once for each kernel and device.
using KnownCtas = std::array<std::atomic<int>, kMostDevices>;

template <class Kernel>
Status resident_ctas(Kernel kernel, int shared_bytes, KnownCtas& known, int* num_ctas) {
  int device = 0;
  Status status = cuda_status(cudaGetDevice(&device), "cudaGetDevice");
  if (!status.ok()) {
    return status;
  }
  if (device >= kMostDevices) {
    return make_status(Status::Code::kNotSupported, "device %d; %d devices are the most", device, kMostDevices);
  }
  *num_ctas = known[static_cast<std::size_t>(device)].load(std::memory_order_relaxed);
  if (*num_ctas > 0) {
    return {};
  }
  int num_sms = 0;
  int per_sm = 0;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kCtaWarps * kWarpLanes,
                                                          static_cast<std::size_t>(shared_bytes));
  }
  status = cuda_status(error, "occupancy of the attention kernel");
  if (status.ok() && per_sm == 0) {
    return make_status(Status::Code::kNotSupported, "the attention kernel does not fit this device (%d bytes of shared "
                       "memory)", shared_bytes);
  }
  if (status.ok()) {
    *num_ctas = num_sms * per_sm;
    known[static_cast<std::size_t>(device)].store(*num_ctas, std::memory_order_relaxed);
  }
  return status;
}

// Units that the plan may hold in a pass.
std::int64_t most_units(const AttentionArgs& args, int pass) {
  const int group = args.num_q_heads / args.kv.num_kv_heads;
  return args.capacity.items[pass] * args.kv.num_kv_heads * row_blocks_of(pass == 1, group);
}

template <class T, int kHeadDim, int kRows, bool kWide>
Status launch_pass(AttentionParams params, const AttentionArgs& args, CUstream_st* stream) {
  static KnownCtas known{};
  constexpr int kSharedBytes = kCtaWarps * ring_bytes_per_warp<T, kHeadDim>();
  int num_ctas = 0;
  const Status status =
      resident_ctas(attention_kernel<T, kHeadDim, kRows, kWide>, kSharedBytes, known, &num_ctas);
  if (!status.ok()) {
    return status;
  }
  // Never more CTAs than units: each worker costs some atomic operations on one address.
  num_ctas = static_cast<int>(std::min<std::int64_t>(num_ctas, most_units(args, kWide ? 1 : 0)));
  params.num_host_workers = args.num_host_workers > 0 ? args.num_host_workers : kWide ? kHostCtas : kHostWarps;
  attention_kernel<T, kHeadDim, kRows, kWide>
      <<<num_ctas, kCtaWarps * kWarpLanes, kSharedBytes, stream>>>(params);
  return cuda_status(cudaGetLastError(), kWide ? "wide attention kernel" : "narrow attention kernel");
}

template <class T, int kHeadDim>
Status launch_narrow(const AttentionParams& params, const AttentionArgs& args, CUstream_st* stream) {
  const int rows = narrow_rows(kHeadDim, params.group());
  if constexpr (kHeadDim == 64 || kHeadDim == 128) {
    if (rows == 1) {
      return launch_pass<T, kHeadDim, 1, false>(params, args, stream);
    }
    if (rows == 8) {
      return launch_pass<T, kHeadDim, 8, false>(params, args, stream);
    }
  }
  return launch_pass<T, kHeadDim, 4, false>(params, args, stream);
}

// As many CTAs as the capacity may need, up to a few waves: the kernel strides over what the plan really holds.
template <class T, int kHeadDim>
Status launch_merge(const AttentionParams& params, std::int64_t merges, CUstream_st* stream) {
  constexpr int kThreads = kMergeParts * kHeadDim / 4;
  const auto num_ctas = static_cast<int>(std::min<std::int64_t>(merges * params.num_q_heads, 8192));
  merge_kernel<T, kHeadDim><<<num_ctas, kThreads, 0, stream>>>(params);
  return cuda_status(cudaGetLastError(), "merge kernel");
}

template <class T, int kHeadDim>
Status launch_all(const AttentionParams& params, const AttentionArgs& args, CUstream_st* stream) {
  Status status;
  if (args.capacity.items[0] > 0) {
    status = launch_narrow<T, kHeadDim>(params, args, stream);
  }
  if (status.ok() && args.capacity.items[1] > 0) {
    status = launch_pass<T, kHeadDim, kWideWarpRows, true>(params, args, stream);
  }
  if (status.ok() && args.capacity.merges > 0) {
    status = launch_merge<T, kHeadDim>(params, args.capacity.merges, stream);
  }
  return status;
}

template <class T>
Status dispatch_head_dim(const AttentionParams& params, const AttentionArgs& args, CUstream_st* stream) {
  switch (params.kv.head_dim) {
    case 64:
      return launch_all<T, 64>(params, args, stream);
    case 80:
      return launch_all<T, 80>(params, args, stream);
    case 96:
      return launch_all<T, 96>(params, args, stream);
    case 128:
      return launch_all<T, 128>(params, args, stream);
    case 256:
      return launch_all<T, 256>(params, args, stream);
    default:
      return make_status(Status::Code::kNotSupported, "head_dim=%d; the kernels take 64, 80, 96, 128 or 256",
                         params.kv.head_dim);
  }
}

Status dispatch_dtype(const AttentionParams& params, const AttentionArgs& args, CUstream_st* stream) {
  switch (args.dtype) {
    case DType::kFp16:
      return dispatch_head_dim<Fp16>(params, args, stream);
    case DType::kBf16:
      return dispatch_head_dim<Bf16>(params, args, stream);
    case DType::kFp32:
      return dispatch_head_dim<float>(params, args, stream);
    case DType::kFp8E4M3:
      return make_status(Status::Code::kNotSupported, "fp8 KV is not supported yet; use fp16, bf16 or fp32");
    case DType::kInt8:
      return make_status(Status::Code::kNotSupported, "int8 KV is not supported yet; use fp16, bf16 or fp32");
  }
  return make_status(Status::Code::kInvalidArgument, "dtype %d is unknown", static_cast<int>(args.dtype));
}

Status check_rows(const void* rows, std::int64_t stride_bytes, const AttentionArgs& args, const char* name) {
  const std::int64_t token_bytes = args.num_q_heads * args.kv.row_bytes();
  if (rows == nullptr || !is_aligned(rows, 16) || stride_bytes % 16 != 0 || stride_bytes < token_bytes) {
    return make_status(Status::Code::kInvalidArgument,
                       "%s at %p, rows %lld bytes apart: they must be multiples of 16 bytes, the pointer not null and "
                       "the rows at least %lld bytes apart",
                       name, rows, static_cast<long long>(stride_bytes), static_cast<long long>(token_bytes));
  }
  return {};
}

Status check_workspace(const AttentionArgs& args) {
  if (args.plan == nullptr || !is_aligned(args.plan, 16) || args.table.blocks == nullptr) {
    return make_status(Status::Code::kInvalidArgument, "attention needs a block table and a plan aligned to 16 bytes");
  }
  const std::int64_t needed = attention_workspace_bytes(args.capacity, args.kv.head_dim);
  if (args.workspace == nullptr || !is_aligned(args.workspace, 256) || args.workspace_bytes < needed) {
    return make_status(Status::Code::kInvalidArgument,
                       "workspace of %lld bytes at %p; this capacity takes %lld, aligned to 256",
                       static_cast<long long>(args.workspace_bytes), static_cast<const void*>(args.workspace),
                       static_cast<long long>(needed));
  }
  return {};
}

Status check_units(const AttentionArgs& args) {
  const std::int64_t units =
      std::max({most_units(args, 0), most_units(args, 1), args.capacity.merges * args.num_q_heads});
  if (units > std::numeric_limits<std::int32_t>::max() / 2) {  // counters go a little past the end
    return make_status(Status::Code::kNotSupported, "%lld units of work; 2^30 in one launch are the most",
                       static_cast<long long>(units));
  }
  return {};
}

Status check(const AttentionArgs& args) {
  Status status = check_paged_kv(args.kv);
  if (!status.ok()) {
    return status;
  }
  if (args.num_q_heads < 1 || args.num_q_heads % args.kv.num_kv_heads != 0) {
    return make_status(Status::Code::kInvalidArgument,
                       "num_q_heads=%d, num_kv_heads=%d: each KV head serves the same number of query heads",
                       args.num_q_heads, args.kv.num_kv_heads);
  }
  if (args.kv.element_bytes != element_bytes(args.dtype)) {
    return make_status(Status::Code::kInvalidArgument, "the cache has elements of %d bytes, dtype %d has %d",
                       args.kv.element_bytes, static_cast<int>(args.dtype), element_bytes(args.dtype));
  }
  status = check_rows(args.query, args.query_stride_bytes, args, "query");
  if (status.ok()) {
    status = check_rows(args.out, args.out_stride_bytes, args, "out");
  }
  if (status.ok()) {
    status = check_workspace(args);
  }
  return status.ok() ? check_units(args) : status;
}

}  // namespace

Status init_attention_workspace(std::byte* workspace, CUstream_st* stream) {
  if (workspace == nullptr) {
    return make_status(Status::Code::kInvalidArgument, "the workspace is null");
  }
  return cuda_status(cudaMemsetAsync(workspace, 0, WorkspaceLayout::kQueueBytes, stream), "cudaMemsetAsync");
}

Status paged_attention(const AttentionArgs& args, CUstream_st* stream) {
  const Status status = check(args);
  if (!status.ok()) {
    return status;
  }
  AttentionParams params;
  params.kv = args.kv;
  params.table = args.table;
  params.num_q_heads = args.num_q_heads;
  params.query = static_cast<const std::byte*>(args.query);
  params.out = static_cast<std::byte*>(args.out);
  params.query_stride_bytes = args.query_stride_bytes;
  params.out_stride_bytes = args.out_stride_bytes;
  params.scale_log2 = args.scale * kLog2E;
  set_plan(&params, args.capacity, args.plan, args.workspace);
  return dispatch_dtype(params, args, stream);
}

}  // namespace uvm_kv
