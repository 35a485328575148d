// Pinned host memory, mapped into the device's address space: the GPU reads it in place over the link.
//
// The pages are ours (mmap), so that they can be bound to the NUMA node next to the card and aligned to 2 MiB; the
// driver then pins them (cudaHostRegister).
#pragma once

#include <cuda_runtime_api.h>

#include "uvm_kv/capabilities.hpp"
#include "uvm_kv/memory_resource.hpp"
#include "uvm_kv/numa.hpp"

namespace uvm_kv {

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
    require_host_room(bytes);
    HostPages pages(bytes);
    if (numa_node_ >= 0 && num_numa_nodes() > 1) bind_to_node(pages.data(), bytes, numa_node_);
    UVM_KV_CUDA_BYTES(cudaHostRegister(pages.data(), bytes, cudaHostRegisterMapped | cudaHostRegisterPortable), bytes);
    return pages.release();
  }

  void deallocate(void* data, std::size_t bytes) noexcept override {
    wait_for_device(device_);
    // Pages that stay pinned must keep their address: another mapping there could not be registered.
    if (succeeded(cudaHostUnregister(data))) munmap(data, bytes);
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
