// Device memory by cudaMalloc. Never evicted, never touched by the CPU.
#pragma once

#include <cuda_runtime_api.h>

#include "uvm_kv/device.hpp"
#include "uvm_kv/memory_resource.hpp"

namespace uvm_kv {

class DeviceResource final : public MemoryResource {
 public:
  explicit DeviceResource(int device) : device_(device) {
    require(device >= 0 && device < num_devices(), "no device " + std::to_string(device));
  }

  void* allocate(std::size_t bytes) override {
    const DeviceScope scope(device_);
    const auto ask = [](std::size_t size) {
      void* data = nullptr;
      UVM_KV_CUDA_BYTES(cudaMalloc(&data, size), size);
      return data;
    };
    return aligned_.allocate(bytes, ask, [](void* data) { UVM_KV_CUDA(cudaFree(data)); });
  }

  void deallocate(void* data, std::size_t) noexcept override { succeeded(cudaFree(aligned_.take_base(data))); }
  Properties properties() const override {
    return {.host_accessible = false, .device_accessible = true, .managed = false};
  }
  std::string kind() const override { return "device"; }
  int device() const override { return device_; }

 private:
  int device_;
  AlignedAllocations aligned_;
};

}  // namespace uvm_kv
