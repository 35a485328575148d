// What a resource was asked for, counted by wrapping it.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>

#include "uvm_kv/memory_resource.hpp"

namespace uvm_kv {

struct Statistics {
  std::size_t held_bytes = 0;
  std::size_t peak_bytes = 0;
  std::size_t total_bytes = 0;  ///< Ever allocated.
  std::size_t num_held = 0;
  std::size_t num_allocations = 0;  ///< That succeeded.
};

class StatisticsResource final : public MemoryResource {
 public:
  explicit StatisticsResource(std::shared_ptr<MemoryResource> inner) : inner_(std::move(inner)) {}

  void* allocate(std::size_t bytes) override {
    void* data = inner_->allocate(bytes);
    const std::lock_guard lock(mutex_);
    counts_.held_bytes += bytes;
    counts_.peak_bytes = std::max(counts_.peak_bytes, counts_.held_bytes);
    counts_.total_bytes += bytes;
    ++counts_.num_held;
    ++counts_.num_allocations;
    return data;
  }

  void deallocate(void* data, std::size_t bytes) noexcept override {
    inner_->deallocate(data, bytes);
    const std::lock_guard lock(mutex_);
    counts_.held_bytes -= bytes;
    --counts_.num_held;
  }

  Properties properties() const override { return inner_->properties(); }
  std::string kind() const override { return inner_->kind(); }
  int device() const override { return inner_->device(); }
  std::size_t host_offset(std::size_t bytes) const override { return inner_->host_offset(bytes); }

  Statistics statistics() const {
    const std::lock_guard lock(mutex_);
    return counts_;
  }

 private:
  std::shared_ptr<MemoryResource> inner_;
  mutable std::mutex mutex_;
  Statistics counts_;
};

}  // namespace uvm_kv
