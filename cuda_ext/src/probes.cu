// Launchers of probes.cuh: check, enqueue.
#include "uvm_kv/probes.cuh"

#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "uvm_kv/capabilities.hpp"
#include "uvm_kv/checks.hpp"
#include "uvm_kv/stream.hpp"

namespace uvm_kv {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 8;
/// Independent loads in flight for each thread.
constexpr int kLoads = 4;

__device__ std::uint64_t words_of(const uint4 chunk) {
  return std::uint64_t{chunk.x} + chunk.y + (std::uint64_t{chunk.z} + chunk.w);
}

/// Sum over the block's threads, in thread 0.
__device__ std::uint64_t block_sum(std::uint64_t value) {
  __shared__ std::uint64_t sums[kThreads / 32];
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_down_sync(0xffffffffu, value, lanes);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  if (threadIdx.x == 0) {
    for (const std::uint64_t sum : sums) value += sum;
  }
  return value;
}

__global__ void __launch_bounds__(kThreads) read_kernel(const uint4* data, std::size_t count,
                                                        unsigned long long* total) {
  const std::size_t step = std::size_t{gridDim.x} * kThreads;
  std::size_t i = std::size_t{blockIdx.x} * kThreads + threadIdx.x;
  std::uint64_t sum = 0;
  for (; i + (kLoads - 1) * step < count; i += kLoads * step) {
    uint4 chunks[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) chunks[k] = data[i + k * step];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) sum += words_of(chunks[k]);
  }
  for (; i < count; i += step) sum += words_of(data[i]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) atomicAdd(total, static_cast<unsigned long long>(sum));
}

__global__ void __launch_bounds__(kThreads) add_one_kernel(std::uint32_t* data, std::size_t count) {
  const std::size_t step = std::size_t{gridDim.x} * kThreads;
  for (std::size_t i = std::size_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) data[i] += 1;
}

__global__ void __launch_bounds__(kThreads) add_one_pages_kernel(std::uint32_t* data, std::size_t num_pages,
                                                                 const std::uint32_t* order, int words_per_page) {
  const std::size_t thread = std::size_t{blockIdx.x} * kThreads + threadIdx.x;
  if (thread >= num_pages) return;
  std::uint32_t* page = data + order[thread] * kProbePageWords;
  for (int word = 0; word < words_per_page; ++word) page[word] += 1;
}

__global__ void __launch_bounds__(kThreads) fill_kernel(std::uint32_t* data, std::size_t count, FillKind kind,
                                                        std::uint32_t seed, float scale) {
  const std::size_t step = std::size_t{gridDim.x} * kThreads;
  for (std::size_t i = std::size_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step)
    data[i] = fill_word(kind, seed, i, scale);
}

__device__ std::uint64_t now_ns() {
  std::uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

__global__ void delay_kernel(std::uint64_t ns) {
  const std::uint64_t begin = now_ns();
  while (now_ns() - begin < ns) __nanosleep(1000);
}

/// Enough for every multiprocessor, and no more than there is work for.
unsigned blocks_for(std::size_t items) {
  int device = 0;
  UVM_KV_CUDA(cudaGetDevice(&device));
  const auto all = static_cast<std::size_t>(attribute(cudaDevAttrMultiProcessorCount, device));
  return static_cast<unsigned>(
      std::clamp<std::size_t>((items + kThreads - 1) / kThreads, 1, all * kBlocksPerMultiprocessor));
}

void require_span(std::uintptr_t address, std::size_t bytes, std::size_t unit, const char* what) {
  require(address != 0, std::string(what) + " at address 0");
  require_aligned(address, unit, what);
  require(bytes > 0 && bytes % unit == 0,
          std::string(what) + " of " + text(bytes) + "; it must be a positive multiple of " + text(unit));
}

}  // namespace

void probe_read(std::uintptr_t address, std::size_t bytes, std::uintptr_t total, std::uintptr_t stream) {
  const cudaStream_t on = to_stream(stream);
  require_span(address, bytes, sizeof(uint4), "a read");
  require_span(total, sizeof(std::uint64_t), sizeof(std::uint64_t), "its total");
  const std::size_t count = bytes / sizeof(uint4);
  read_kernel<<<blocks_for(count), kThreads, 0, on>>>(reinterpret_cast<const uint4*>(address), count,
                                                      reinterpret_cast<unsigned long long*>(total));
  UVM_KV_CUDA_BYTES(cudaGetLastError(), bytes);
}

void probe_add_one(std::uintptr_t address, std::size_t bytes, std::uintptr_t stream) {
  const cudaStream_t on = to_stream(stream);
  require_span(address, bytes, sizeof(std::uint32_t), "a range");
  const std::size_t count = bytes / sizeof(std::uint32_t);
  add_one_kernel<<<blocks_for(count), kThreads, 0, on>>>(reinterpret_cast<std::uint32_t*>(address), count);
  UVM_KV_CUDA_BYTES(cudaGetLastError(), bytes);
}

void probe_add_one_pages(std::uintptr_t address, std::size_t bytes, std::uintptr_t order, std::size_t words_per_page,
                         std::uintptr_t stream) {
  const cudaStream_t on = to_stream(stream);
  require_span(address, bytes, kProbePageBytes, "pages");
  const std::size_t num_pages = bytes / kProbePageBytes;
  require_span(order, num_pages * sizeof(std::uint32_t), sizeof(std::uint32_t), "an order of pages");
  require(words_per_page >= 1 && words_per_page <= kProbePageWords,
          std::to_string(words_per_page) + " words a page; it is 1 to " + std::to_string(kProbePageWords));
  require(num_pages <= std::size_t{1} << 31, std::to_string(num_pages) + " pages; at most 2^31");
  const auto blocks = static_cast<unsigned>((num_pages + kThreads - 1) / kThreads);
  add_one_pages_kernel<<<blocks, kThreads, 0, on>>>(reinterpret_cast<std::uint32_t*>(address), num_pages,
                                                    reinterpret_cast<const std::uint32_t*>(order),
                                                    static_cast<int>(words_per_page));
  UVM_KV_CUDA_BYTES(cudaGetLastError(), bytes);
}

void probe_fill(std::uintptr_t address, std::size_t bytes, FillKind kind, std::uint32_t seed, float scale,
                std::uintptr_t stream) {
  const cudaStream_t on = to_stream(stream);
  require_span(address, bytes, sizeof(std::uint32_t), "a fill");
  require(kind >= FillKind::words && kind <= FillKind::fp32,
          "fill kind " + std::to_string(static_cast<int>(kind)) + "; it is one of 0 to 3");
  const std::size_t count = bytes / sizeof(std::uint32_t);
  fill_kernel<<<blocks_for(count), kThreads, 0, on>>>(reinterpret_cast<std::uint32_t*>(address), count, kind, seed,
                                                      scale);
  UVM_KV_CUDA_BYTES(cudaGetLastError(), bytes);
}

void probe_delay(std::int64_t ns, std::uintptr_t stream) {
  const cudaStream_t on = to_stream(stream);
  require(ns > 0 && ns <= kMaxDelayNs,
          "a delay of " + std::to_string(ns) + " ns; it is 1 to " + std::to_string(kMaxDelayNs));
  delay_kernel<<<1, 1, 0, on>>>(static_cast<std::uint64_t>(ns));
  UVM_KV_CUDA(cudaGetLastError());
}

}  // namespace uvm_kv
