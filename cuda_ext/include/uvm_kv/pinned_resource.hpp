// Pinned host memory, mapped into the device's address space: the GPU reads it in place over the link.
//
// The pages are ours (mmap), so that they can be bound to the NUMA node next to the card and aligned to 2 MiB; the
// driver then pins them (cudaHostRegister).
#pragma once

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "uvm_kv/capabilities.hpp"
#include "uvm_kv/memory_resource.hpp"
#include "uvm_kv/numa.hpp"

namespace uvm_kv {
namespace detail {

/// Anonymous pages, aligned to 2 MiB.
class HostPages {
 public:
  explicit HostPages(std::size_t bytes) : bytes_(bytes) {
    void* all = mmap(nullptr, bytes + kChunkBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED)
      fail(std::strerror(errno), errno, true, "mmap(host pages)", bytes + kChunkBytes, __FILE__, __LINE__);
    const auto address = reinterpret_cast<std::uintptr_t>(all);
    const std::uintptr_t begin = (address + kChunkBytes - 1) / kChunkBytes * kChunkBytes;
    if (begin > address) munmap(all, begin - address);
    munmap(reinterpret_cast<void*>(begin + bytes), address + kChunkBytes - begin);
    data_ = reinterpret_cast<void*>(begin);
    madvise(data_, bytes, MADV_HUGEPAGE);  // Fewer and larger pages to map; a kernel without them changes nothing.
  }
  ~HostPages() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }
  HostPages(const HostPages&) = delete;
  HostPages& operator=(const HostPages&) = delete;

  void* data() const { return data_; }
  void* release() { return std::exchange(data_, nullptr); }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

}  // namespace detail

class PinnedResource final : public MemoryResource {
 public:
  /// `numa_node`: -1 lets the kernel choose.
  PinnedResource(int device, int numa_node) : device_(device), numa_node_(numa_node) {
    require(device >= 0 && device < num_devices(), "no device " + std::to_string(device));
    require(numa_node >= -1 && numa_node < num_numa_nodes(), "no NUMA node " + std::to_string(numa_node));
    need(mapped_host_memory(device), "mapped host memory", device);
  }

  void* allocate(std::size_t bytes) override {
    const DeviceScope scope(device_);
    detail::HostPages pages(bytes);
    if (numa_node_ >= 0 && num_numa_nodes() > 1) bind_to_node(pages.data(), bytes, numa_node_);
    UVM_KV_CUDA_BYTES(cudaHostRegister(pages.data(), bytes, cudaHostRegisterMapped | cudaHostRegisterPortable), bytes);
    return pages.release();
  }

  void deallocate(void* data, std::size_t bytes) noexcept override {
    wait_for_device(device_);
    cudaHostUnregister(data);
    munmap(data, bytes);
  }
  Properties properties() const override {
    return {.host_accessible = true, .device_accessible = true, .managed = false};
  }
  std::string kind() const override { return "pinned"; }
  int device() const override { return device_; }
  int numa_node() const { return numa_node_; }

 private:
  int device_;
  int numa_node_;
};

}  // namespace uvm_kv
