// What this device and driver can do: one predicate each, asked of the driver every time.
//
// A missing capability is an error that names it (`need`), never a quiet substitute.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "uvm_kv/device.hpp"
#include "uvm_kv/driver_api.hpp"
#include "uvm_kv/errors.hpp"

namespace uvm_kv {

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  UVM_KV_CUDA(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

/// For attributes that the runtime does not name.
inline int driver_attribute(CUdevice_attribute which, int device) {
  num_devices();  // Starts the driver, which the runtime does by itself and the driver API does not.
  CUdevice handle = 0;
  int value = 0;
  UVM_KV_DRIVER(DriverApi::get().cuDeviceGet(&handle, device));
  UVM_KV_DRIVER(DriverApi::get().cuDeviceGetAttribute(&value, which, handle));
  return value;
}

/// 1000 * major + 10 * minor of the newest CUDA the driver knows; 0 without a driver.
inline int driver_version() {
  int version = 0;
  UVM_KV_CUDA(cudaDriverGetVersion(&version));
  return version;
}

/// 10 * major + minor.
inline int compute_capability(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

inline bool managed_memory(int device) { return attribute(cudaDevAttrManagedMemory, device) != 0; }

/// GPU page faults, hints and oversubscription. 0 on Windows and WSL2.
inline bool concurrent_managed_access(int device) { return attribute(cudaDevAttrConcurrentManagedAccess, device) != 0; }

/// The GPU reads plain malloc memory (HMM or ATS).
inline bool pageable_memory_access(int device) { return attribute(cudaDevAttrPageableMemoryAccess, device) != 0; }

/// Pinned host memory has one address on both sides.
inline bool mapped_host_memory(int device) {
  return attribute(cudaDevAttrCanMapHostMemory, device) != 0 &&
         attribute(cudaDevAttrHostRegisterSupported, device) != 0 &&
         attribute(cudaDevAttrCanUseHostPointerForRegisteredMem, device) != 0;
}

inline bool virtual_memory_management(int device) {
  return driver_attribute(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device) != 0;
}

/// cuMemCreate on a host NUMA node.
inline bool host_virtual_memory(int device) {
  return driver_attribute(CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device) != 0;
}

/// The same on the host as a whole, where the driver chooses the node. Came with CUDA 13.0.
inline bool host_virtual_memory_of_any_node(int device) {
  return driver_attribute(CU_DEVICE_ATTRIBUTE_HOST_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device) != 0;
}

/// cudaMemcpyBatchAsync came with CUDA 12.8.
inline bool batch_copy() { return driver_version() >= 12080; }

/// Batched prefetch and discard came with CUDA 13.0 and need concurrent managed access on *every* device.
inline bool batch_prefetch() {
  if (driver_version() < 13000) return false;
  for (int device = 0; device < num_devices(); ++device)
    if (!concurrent_managed_access(device)) return false;
  return true;
}

/// The host NUMA node next to the device, or -1 where the system has no NUMA.
inline int host_numa_node(int device) { return attribute(cudaDevAttrHostNumaId, device); }

inline void need(bool present, const std::string& capability, int device) {
  if (present) return;
  throw MissingCapability("device " + std::to_string(device) + " has no " + capability);
}

}  // namespace uvm_kv
