// The current device, for the length of a scope.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "uvm_kv/cuda_check.hpp"

namespace uvm_kv {

/// Makes `device` current and puts the one before back.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    UVM_KV_CUDA(cudaGetDevice(&before_));
    UVM_KV_CUDA(cudaSetDevice(device));  // Creates the primary context too, which the driver API needs.
  }
  ~DeviceScope() { cudaSetDevice(before_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
};

inline int num_devices() {
  int count = 0;
  UVM_KV_CUDA(cudaGetDeviceCount(&count));
  return count;
}

/// Before memory goes whose end the driver does not wait for by itself: nothing may still run on it.
inline void wait_for_device(int device) noexcept {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device);
  cudaDeviceSynchronize();
  cudaSetDevice(before);
}

/// Free bytes of the card at this moment, whoever holds the rest.
inline std::size_t free_bytes(int device) {
  const DeviceScope scope(device);
  std::size_t free = 0, total = 0;
  UVM_KV_CUDA(cudaMemGetInfo(&free, &total));
  return free;
}

inline std::size_t total_bytes(int device) {
  const DeviceScope scope(device);
  std::size_t free = 0, total = 0;
  UVM_KV_CUDA(cudaMemGetInfo(&free, &total));
  return total;
}

}  // namespace uvm_kv
