// Launchers of block_copy.hpp: check, choose, enqueue.
#include <algorithm>
#include <vector>

#include "uvm_kv/block_copy.hpp"
#include "uvm_kv/capabilities.hpp"
#include "uvm_kv/stream.hpp"

namespace uvm_kv {
namespace {

/// Runs that travel as a kernel argument, so that no list needs device memory and a capture keeps its own copy. 128 of
/// them take 3 KiB of the 4 KiB that every supported device allows.
constexpr std::size_t kRunsPerLaunch = 128;
constexpr int kThreads = 256;
/// Bytes that one block of threads moves at most before another one helps.
constexpr std::size_t kBytesPerBlock = std::size_t{16} << 10;

struct RunList {
  CopyRun runs[kRunsPerLaunch];
};

/// T is the widest word that divides all addresses and sizes. blockIdx.y is the run.
template <class T>
__global__ void __launch_bounds__(kThreads) copy_kernel(char* target, const char* source, const RunList list) {
  const CopyRun run = list.runs[blockIdx.y];
  const T* from = reinterpret_cast<const T*>(source + run.source);
  T* to = reinterpret_cast<T*>(target + run.target);
  const std::size_t count = run.bytes / sizeof(T);
  const std::size_t stride = std::size_t{gridDim.x} * kThreads;
  for (std::size_t i = std::size_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += stride) to[i] = from[i];
}

bool divisible(std::span<const CopyRun> runs, const Slab& target, const Slab& source, std::size_t width) {
  if (target.address() % width != 0 || source.address() % width != 0) return false;
  return std::all_of(runs.begin(), runs.end(), [width](const CopyRun& run) {
    return run.source % width == 0 && run.target % width == 0 && run.bytes % width == 0;
  });
}

template <class T>
void launch(const Slab& target, const Slab& source, std::span<const CopyRun> runs, cudaStream_t stream) {
  for (std::size_t first = 0; first < runs.size(); first += kRunsPerLaunch) {
    const auto part = runs.subspan(first, std::min(kRunsPerLaunch, runs.size() - first));
    RunList list{};
    std::copy(part.begin(), part.end(), list.runs);
    std::size_t longest = 0;
    for (const CopyRun& run : part) longest = std::max(longest, run.bytes);
    const auto blocks = std::clamp<std::size_t>((longest + kBytesPerBlock - 1) / kBytesPerBlock, 1, 1024);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(part.size()));
    copy_kernel<T><<<grid, kThreads, 0, stream>>>(reinterpret_cast<char*>(target.data()),
                                                  reinterpret_cast<const char*>(source.data()), list);
    UVM_KV_CUDA(cudaGetLastError());
  }
}

void copy_by_kernel(const Slab& target, const Slab& source, std::span<const CopyRun> runs, cudaStream_t stream) {
  if (divisible(runs, target, source, sizeof(uint4))) return launch<uint4>(target, source, runs, stream);
  launch<char>(target, source, runs, stream);
}

void copy_each(const Slab& target, const Slab& source, std::span<const CopyRun> runs, cudaStream_t stream) {
  for (const CopyRun& run : runs)
    UVM_KV_CUDA_BYTES(
        cudaMemcpyAsync(target.data() + run.target, source.data() + run.source, run.bytes, cudaMemcpyDefault, stream),
        run.bytes);
}

void copy_batch(const Slab& target, const Slab& source, std::span<const CopyRun> runs, cudaStream_t stream) {
  std::vector<void*> targets;
  std::vector<const void*> sources;
  std::vector<std::size_t> sizes;
  std::size_t bytes = 0;
  for (const CopyRun& run : runs) {
    targets.push_back(target.data() + run.target);
    sources.push_back(source.data() + run.source);
    sizes.push_back(run.bytes);
    bytes += run.bytes;
  }
  cudaMemcpyAttributes attributes{};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
  std::size_t first = 0;
  UVM_KV_CUDA_BYTES(
      cudaMemcpyBatchAsync(targets.data(), sources.data(), sizes.data(), sizes.size(), &attributes, &first, 1, stream),
      bytes);
}

}  // namespace

CopyMethod choose_method(std::span<const CopyRun> runs, CopyMethod asked) {
  require(asked >= CopyMethod::automatic && asked <= CopyMethod::kernel,
          "copy method " + std::to_string(static_cast<int>(asked)) + "; it is one of 0 to 3");
  if (asked != CopyMethod::automatic) return asked;
  std::size_t bytes = 0;
  for (const CopyRun& run : runs) bytes += run.bytes;
  if (bytes / std::max<std::size_t>(1, runs.size()) < kSmallRunBytes) return CopyMethod::kernel;
  return CopyMethod::batch;
}

CopyMethod copy(const Slab& target, const Slab& source, std::span<const CopyRun> runs, CopyMethod asked,
                std::uintptr_t stream) {
  const cudaStream_t on = to_stream(stream);
  const int device = source.resource().device();
  require(target.resource().device() == device, "copies between slabs of device " + std::to_string(device) + " and " +
                                                    std::to_string(target.resource().device()));
  require_inside(runs, source.bytes(), target.bytes());
  require_independent(runs, source.address(), target.address());
  const CopyMethod method = choose_method(runs, asked);
  if (runs.empty()) return method;
  const DeviceScope scope(device);  // A kernel is launched on the current device, whatever its stream says.
  if (method == CopyMethod::kernel) {
    copy_by_kernel(target, source, runs, on);
    return method;
  }
  const std::vector<CopyRun> pieces = cut(runs, source.seam(), target.seam());
  if (method == CopyMethod::each) {
    copy_each(target, source, pieces, on);
    return method;
  }
  require_not_capturing(on, "a batch copy");
  need(batch_copy(), "batched copies (cudaMemcpyBatchAsync, CUDA 12.8)", device);
  copy_batch(target, source, pieces, on);
  return method;
}

void fill(const Slab& slab, ByteRange range, unsigned char value, std::uintptr_t stream) {
  const cudaStream_t on = to_stream(stream);
  require_inside(range, slab.bytes());
  const DeviceScope scope(slab.resource().device());
  const CopyRun whole{range.offset, range.offset, range.bytes};
  for (const CopyRun& part : cut({&whole, 1}, slab.seam(), 0))
    UVM_KV_CUDA_BYTES(cudaMemsetAsync(slab.data() + part.source, value, part.bytes, on), part.bytes);
}

}  // namespace uvm_kv
