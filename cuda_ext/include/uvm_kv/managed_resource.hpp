// Managed memory: one address on both sides, moved by the driver. The guard against oversubscription is on by default.
#pragma once

#include <cuda_runtime_api.h>

#include <mutex>
#include <unordered_map>

#include "uvm_kv/capabilities.hpp"
#include "uvm_kv/guard.hpp"
#include "uvm_kv/memory_resource.hpp"

namespace uvm_kv {

class ManagedResource final : public MemoryResource {
 public:
  ManagedResource(int device, GuardOptions guard) : device_(device), guard_(guard) {
    require(device >= 0 && device < num_devices(), "no device " + std::to_string(device));
    need(managed_memory(device), "managed memory", device);
    need(concurrent_managed_access(device), "concurrent managed access", device);
  }

  void* allocate(std::size_t bytes) override {
    const DeviceScope scope(device_);
    const std::lock_guard lock(mutex_);
    return aligned_.allocate(
        bytes, [this](std::size_t size) { return ask(size); }, [this](void* base) { give_back(base); });
  }

  void deallocate(void* data, std::size_t) noexcept override {
    const std::lock_guard lock(mutex_);
    give_back(aligned_.take_base(data));
  }

  Properties properties() const override {
    return {.host_accessible = true, .device_accessible = true, .managed = true};
  }
  std::string kind() const override { return "managed"; }
  int device() const override { return device_; }
  const GuardOptions& guard() const { return guard_; }

 private:
  /// Booked before the driver is asked, so that the guard stands first; a failing driver call unbooks.
  void* ask(std::size_t size) {
    Booking booking(size, [this] { return free_bytes(device_); }, guard_);
    void* base = nullptr;
    UVM_KV_CUDA_BYTES(cudaMallocManaged(&base, size, cudaMemAttachGlobal), size);
    try {
      booked_.emplace(base, std::move(booking));
    } catch (...) {
      succeeded(cudaFree(base));
      throw;
    }
    return base;
  }

  /// What could not be freed is still held, and stays booked.
  void give_back(void* base) noexcept {
    const bool freed = succeeded(cudaFree(base));
    const auto found = booked_.find(base);
    if (found == booked_.end()) return;
    if (!freed) found->second.keep();
    booked_.erase(found);
  }

  int device_;
  GuardOptions guard_;
  std::mutex mutex_;
  AlignedAllocations aligned_;
  std::unordered_map<void*, Booking> booked_;
};

}  // namespace uvm_kv
