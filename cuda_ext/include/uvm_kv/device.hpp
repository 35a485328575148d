// The current device, for the length of a scope.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "uvm_kv/cuda_check.hpp"
#include "uvm_kv/numa.hpp"

namespace uvm_kv {

/// Makes `device` current and puts the one before back.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    UVM_KV_CUDA(cudaGetDevice(&before_));
    UVM_KV_CUDA(cudaSetDevice(device));  // Creates the primary context too, which the driver API needs.
  }
  ~DeviceScope() { succeeded(cudaSetDevice(before_)); }
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

/// Before memory is unmapped: nothing may still run on it. (cudaFree waits by itself.) A device that is capturing
/// cannot be waited for, and the attempt ends its capture: slabs are closed outside captures.
inline void wait_for_device(int device) noexcept {
  int before = 0;
  succeeded(cudaGetDevice(&before));
  succeeded(cudaSetDevice(device));
  succeeded(cudaDeviceSynchronize());
  succeeded(cudaSetDevice(before));
}

/// Free bytes of the card at this moment, whoever holds the rest.
inline std::size_t free_bytes(int device) {
  const DeviceScope scope(device);
  std::size_t free = 0, total = 0;
  UVM_KV_CUDA(cudaMemGetInfo(&free, &total));
  return free;
}

/// Before host memory is pinned, by whichever call.
inline void require_host_room(std::size_t bytes) {
  if (host_has_room(bytes)) return;
  detail::fail("the host has only " + text(available_host_bytes()) + " available", ENOMEM, true, "pinned host memory",
               bytes, __FILE__, __LINE__);
}

inline std::size_t total_bytes(int device) {
  const DeviceScope scope(device);
  std::size_t free = 0, total = 0;
  UVM_KV_CUDA(cudaMemGetInfo(&free, &total));
  return total;
}

}  // namespace uvm_kv
