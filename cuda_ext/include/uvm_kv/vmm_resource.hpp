// One virtual range over two tiers: the first part is device memory, the rest is host memory next to the card.
//
//   address   0           device_bytes                bytes
//             |-- device --|---- host (NUMA node) ----|      kernels reach all of it through one pointer, without
//             '------------ device access ------------'      page faults; the CPU reaches the host part only
//                          '------ CPU access --------'
//
// Copies and fills are cut at the seam (Slab::seam), so that no copy engine meets two kinds of memory in one request.
#pragma once

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "uvm_kv/capabilities.hpp"
#include "uvm_kv/driver_api.hpp"
#include "uvm_kv/memory_resource.hpp"
#include "uvm_kv/numa.hpp"

namespace uvm_kv {
namespace detail {

/// A reserved range of addresses with nothing behind it yet.
class ReservedRange {
 public:
  ReservedRange(std::size_t bytes, std::size_t alignment) : bytes_(bytes) {
    UVM_KV_DRIVER_BYTES(DriverApi::get().cuMemAddressReserve(&begin_, bytes, alignment, 0, 0), bytes);
  }
  ~ReservedRange() {
    if (begin_ != 0) DriverApi::get().cuMemAddressFree(begin_, bytes_);
  }
  ReservedRange(ReservedRange&& other) noexcept : begin_(std::exchange(other.begin_, 0)), bytes_(other.bytes_) {}
  ReservedRange(const ReservedRange&) = delete;
  ReservedRange& operator=(const ReservedRange&) = delete;
  CUdeviceptr begin() const { return begin_; }

 private:
  CUdeviceptr begin_ = 0;
  std::size_t bytes_;
};

/// Physical memory mapped at an address. The handle is released at once: the mapping keeps the memory alive.
class MappedPart {
 public:
  MappedPart(CUdeviceptr at, std::size_t bytes, const CUmemAllocationProp& properties) : at_(at), bytes_(bytes) {
    const DriverApi& api = DriverApi::get();
    CUmemGenericAllocationHandle handle = 0;
    UVM_KV_DRIVER_BYTES(api.cuMemCreate(&handle, bytes, &properties, 0), bytes);
    const CUresult mapped = api.cuMemMap(at, bytes, 0, handle, 0);
    api.cuMemRelease(handle);
    check_driver(mapped, "cuMemMap", bytes, __FILE__, __LINE__);
  }
  ~MappedPart() {
    if (bytes_ > 0) DriverApi::get().cuMemUnmap(at_, bytes_);
  }
  MappedPart(MappedPart&& other) noexcept : at_(other.at_), bytes_(std::exchange(other.bytes_, 0)) {}
  MappedPart(const MappedPart&) = delete;
  MappedPart& operator=(const MappedPart&) = delete;

 private:
  CUdeviceptr at_;
  std::size_t bytes_;
};

inline CUmemAllocationProp physical(CUmemLocationType type, int id) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {type, id};
  return properties;
}

inline std::size_t granularity_of(const CUmemAllocationProp& properties) {
  std::size_t granularity = 0;
  UVM_KV_DRIVER(
      DriverApi::get().cuMemGetAllocationGranularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM));
  return granularity;
}

}  // namespace detail

class VmmResource final : public MemoryResource {
 public:
  /// Every slab of this resource has its first `device_bytes` on the device. `numa_node`: of the host part; -1 lets the
  /// driver choose, and 0 is right where the system has no NUMA.
  VmmResource(int device, std::size_t device_bytes, int numa_node)
      : device_(device), device_bytes_(device_bytes), numa_node_(numa_node) {
    require(device >= 0 && device < num_devices(), "no device " + std::to_string(device));
    require(numa_node >= -1 && numa_node < num_numa_nodes(), "no NUMA node " + std::to_string(numa_node));
    const DeviceScope scope(device);
    need(virtual_memory_management(device), "virtual memory management", device);
    if (numa_node >= 0)
      need(host_virtual_memory(device), "virtual memory management of host memory on a NUMA node", device);
    else
      need(host_virtual_memory_of_any_node(device), "virtual memory management of host memory on any node", device);
    granularity_ = std::max({detail::granularity_of(device_part()), detail::granularity_of(host_part()), kChunkBytes});
  }

  void* allocate(std::size_t bytes) override {
    require_parts(device_bytes_, bytes, granularity_);
    const std::size_t host_bytes = bytes - device_bytes_;
    const DeviceScope scope(device_);
    require_host_room(host_bytes);
    Mapping mapping{detail::ReservedRange(bytes, granularity_), {}};
    const CUdeviceptr begin = mapping.range.begin();
    mapping.parts.reserve(2);
    if (device_bytes_ > 0) {
      mapping.parts.emplace_back(begin, device_bytes_, device_part());
      allow(begin, device_bytes_, {CU_MEM_LOCATION_TYPE_DEVICE, device_});
    }
    if (host_bytes > 0) {
      mapping.parts.push_back(host_memory(begin + device_bytes_, host_bytes));
      allow(begin + device_bytes_, host_bytes, {CU_MEM_LOCATION_TYPE_DEVICE, device_});
      allow(begin + device_bytes_, host_bytes, host_part().location);
    }
    void* data = reinterpret_cast<void*>(begin);
    const std::lock_guard lock(mutex_);
    mappings_.emplace(data, std::move(mapping));
    return data;
  }

  void deallocate(void* data, std::size_t) noexcept override {
    wait_for_device(device_);
    const std::lock_guard lock(mutex_);
    mappings_.erase(data);
  }

  /// The CPU reaches the host part only, so a slab is host accessible as a whole only without a device part.
  Properties properties() const override {
    return {.host_accessible = device_bytes_ == 0, .device_accessible = true, .managed = false};
  }
  std::string kind() const override { return "vmm"; }
  int device() const override { return device_; }
  std::size_t host_offset(std::size_t bytes) const override { return std::min(device_bytes_, bytes); }
  std::size_t device_bytes() const { return device_bytes_; }
  std::size_t granularity() const { return granularity_; }
  int numa_node() const { return numa_node_; }

 private:
  /// Members end in reverse order: first the parts are unmapped, then the range is freed.
  struct Mapping {
    detail::ReservedRange range;
    std::vector<detail::MappedPart> parts;
  };

  CUmemAllocationProp device_part() const { return detail::physical(CU_MEM_LOCATION_TYPE_DEVICE, device_); }
  CUmemAllocationProp host_part() const {
    if (numa_node_ < 0) return detail::physical(CU_MEM_LOCATION_TYPE_HOST, 0);
    return detail::physical(CU_MEM_LOCATION_TYPE_HOST_NUMA, numa_node_);
  }

  /// A container may deny NUMA placement, which the driver then reports as anything: say what can be done.
  detail::MappedPart host_memory(CUdeviceptr at, std::size_t bytes) const {
    try {
      return {at, bytes, host_part()};
    } catch (const OutOfMemory&) {
      throw;
    } catch (const CudaError& error) {
      if (numa_node_ < 0) throw;
      throw CudaError(std::string(error.what()) + " for NUMA node " + std::to_string(numa_node_) +
                          "; numa_node=-1 lets the driver choose",
                      error.code);
    }
  }

  /// One part at a time: the driver promises nothing for a range over two kinds of memory.
  static void allow(CUdeviceptr begin, std::size_t bytes, CUmemLocation whom) {
    const CUmemAccessDesc access{whom, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    UVM_KV_DRIVER_BYTES(DriverApi::get().cuMemSetAccess(begin, bytes, &access, 1), bytes);
  }

  int device_;
  std::size_t device_bytes_;
  int numa_node_;
  std::size_t granularity_ = 0;
  std::mutex mutex_;
  std::unordered_map<void*, Mapping> mappings_;
};

}  // namespace uvm_kv
