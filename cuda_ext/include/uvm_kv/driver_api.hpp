// The driver API, reached through the runtime and never linked: the extension imports where there is no driver.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

#include "uvm_kv/cuda_check.hpp"
#include "uvm_kv/errors.hpp"

namespace uvm_kv {
namespace detail {

/// The entry point `name` as of CUDA `version` (1000 * major + 10 * minor), or an error that names what lacks it.
template <class Function>
Function entry_point(const char* name, unsigned version, const char* capability) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  UVM_KV_CUDA(cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &result));
  if (result == cudaDriverEntryPointSuccess && found != nullptr) return reinterpret_cast<Function>(found);
  throw MissingCapability(std::string(capability) + ": this driver has no " + name + " of CUDA " +
                          std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10));
}

}  // namespace detail

/// What vmm_resource.hpp needs. Built once, on first use.
struct DriverApi {
  PFN_cuGetErrorName_v6000 cuGetErrorName;
  PFN_cuGetErrorString_v6000 cuGetErrorString;
  PFN_cuDeviceGet_v2000 cuDeviceGet;
  PFN_cuDeviceGetAttribute_v2000 cuDeviceGetAttribute;
  PFN_cuMemGetAllocationGranularity_v10020 cuMemGetAllocationGranularity;
  PFN_cuMemAddressReserve_v10020 cuMemAddressReserve;
  PFN_cuMemAddressFree_v10020 cuMemAddressFree;
  PFN_cuMemCreate_v10020 cuMemCreate;
  PFN_cuMemRelease_v10020 cuMemRelease;
  PFN_cuMemMap_v10020 cuMemMap;
  PFN_cuMemUnmap_v10020 cuMemUnmap;
  PFN_cuMemSetAccess_v10020 cuMemSetAccess;

  static const DriverApi& get() {
    static const DriverApi api = load();
    return api;
  }

 private:
  static DriverApi load() {
    constexpr const char* kVmm = "virtual memory management";
    using detail::entry_point;
    return {
        entry_point<PFN_cuGetErrorName_v6000>("cuGetErrorName", 6000, "the driver API"),
        entry_point<PFN_cuGetErrorString_v6000>("cuGetErrorString", 6000, "the driver API"),
        entry_point<PFN_cuDeviceGet_v2000>("cuDeviceGet", 2000, "the driver API"),
        entry_point<PFN_cuDeviceGetAttribute_v2000>("cuDeviceGetAttribute", 2000, "the driver API"),
        entry_point<PFN_cuMemGetAllocationGranularity_v10020>("cuMemGetAllocationGranularity", 10020, kVmm),
        entry_point<PFN_cuMemAddressReserve_v10020>("cuMemAddressReserve", 10020, kVmm),
        entry_point<PFN_cuMemAddressFree_v10020>("cuMemAddressFree", 10020, kVmm),
        entry_point<PFN_cuMemCreate_v10020>("cuMemCreate", 10020, kVmm),
        entry_point<PFN_cuMemRelease_v10020>("cuMemRelease", 10020, kVmm),
        entry_point<PFN_cuMemMap_v10020>("cuMemMap", 10020, kVmm),
        entry_point<PFN_cuMemUnmap_v10020>("cuMemUnmap", 10020, kVmm),
        entry_point<PFN_cuMemSetAccess_v10020>("cuMemSetAccess", 10020, kVmm),
    };
  }
};

namespace detail {

inline void check_driver(CUresult status, const char* call, std::size_t bytes, const char* file, int line) {
  if (status == CUDA_SUCCESS) return;
  const char* name = nullptr;
  const char* meaning = nullptr;
  DriverApi::get().cuGetErrorName(status, &name);
  DriverApi::get().cuGetErrorString(status, &meaning);
  const std::string what = std::string(name ? name : "unknown error") + ", " + (meaning ? meaning : "no description");
  fail(what, status, status == CUDA_ERROR_OUT_OF_MEMORY, call, bytes, file, line);
}

}  // namespace detail
}  // namespace uvm_kv

#define UVM_KV_DRIVER(call) ::uvm_kv::detail::check_driver((call), #call, 0, __FILE__, __LINE__)
#define UVM_KV_DRIVER_BYTES(call, bytes) ::uvm_kv::detail::check_driver((call), #call, (bytes), __FILE__, __LINE__)
