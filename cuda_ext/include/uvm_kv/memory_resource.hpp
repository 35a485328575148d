// The one interface of all kinds of memory, and the slab that owns a piece of it.
//
// A slab is allocated once, aligned to 2 MiB, and given back when the slab and all views of it have ended; blocks are
// parts of it.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "uvm_kv/checks.hpp"

namespace uvm_kv {

struct Properties {
  bool host_accessible;    ///< The CPU may touch every byte.
  bool device_accessible;  ///< Kernels may touch every byte.
  bool managed;            ///< The driver moves it; hints apply.
};

/// What a resource is asked for, and the whole of it.
class MemoryResource {
 public:
  virtual ~MemoryResource() = default;

  /// `bytes` is a positive multiple of 2 MiB, checked by the slab. Aligned to 2 MiB.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void deallocate(void* data, std::size_t bytes) noexcept = 0;
  virtual Properties properties() const = 0;
  virtual std::string kind() const = 0;
  virtual int device() const = 0;
  /// The CPU may touch [host_offset, bytes) of a slab; == bytes where it may touch nothing.
  virtual std::size_t host_offset(std::size_t bytes) const { return properties().host_accessible ? 0 : bytes; }

 protected:
  MemoryResource() = default;
  MemoryResource(const MemoryResource&) = delete;
  MemoryResource& operator=(const MemoryResource&) = delete;
};

/// Owner of one allocation, with its views. Keeps its resource alive.
class Slab final {
 public:
  Slab(std::shared_ptr<MemoryResource> resource, std::size_t bytes) : resource_(std::move(resource)), bytes_(bytes) {
    require_slab_bytes(bytes);
    // A forked child owns nothing: CUDA does not survive a fork, and unmapping there could hit what took the address.
    const auto give_back = [resource = resource_, bytes, owner = getpid()](void* data) noexcept {
      if (getpid() == owner) resource->deallocate(data, bytes);
    };
    memory_ = std::shared_ptr<void>(resource_->allocate(bytes), give_back);
  }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  /// Gives the memory back: now, or when the last view of it ends. A second call does nothing.
  void close() noexcept { memory_.reset(); }

  bool closed() const { return memory_ == nullptr; }
  /// Address of an open slab. A closed slab has no address, and asking for it is an error.
  std::byte* data() const {
    require(!closed(), "this slab is closed");
    return static_cast<std::byte*>(memory_.get());
  }
  /// What a view holds, so that no view ever outlives its memory.
  std::shared_ptr<void> hold() const {
    require(!closed(), "this slab is closed");
    return memory_;
  }
  /// The address of a part, for a view of it.
  std::byte* part(ByteRange range) const {
    require_inside(range, bytes_);
    return data() + range.offset;
  }
  /// The same for the CPU, which may not reach all of the slab.
  std::byte* host_part(ByteRange range) const {
    std::byte* begin = part(range);
    require(range.offset >= host_offset(), "the CPU cannot reach offset " + text(range.offset) + " of this " +
                                               resource_->kind() + " slab; it may touch what lies from " +
                                               text(host_offset()) + " on");
    return begin;
  }
  std::uintptr_t address() const { return reinterpret_cast<std::uintptr_t>(data()); }
  std::size_t bytes() const { return bytes_; }
  const MemoryResource& resource() const { return *resource_; }
  std::size_t host_offset() const { return resource_->host_offset(bytes_); }
  /// Where device memory ends and host memory begins inside this one slab; 0 where it is all of one kind.
  std::size_t seam() const { return host_offset() < bytes_ ? host_offset() : 0; }

 private:
  std::shared_ptr<MemoryResource> resource_;
  std::size_t bytes_;
  std::shared_ptr<void> memory_;
};

/// cudaMalloc and cudaMallocManaged promise 256 B of alignment. Large allocations come aligned to 2 MiB in practice;
/// where one does not, it is asked for once more with a chunk to spare, and the difference is remembered here.
class AlignedAllocations {
 public:
  template <class Allocate, class Free>
  void* allocate(std::size_t bytes, Allocate&& allocate, Free&& free) {
    void* base = allocate(bytes);
    if (is_aligned(base)) return base;
    free(base);
    base = allocate(bytes + kChunkBytes);
    const auto address = reinterpret_cast<std::uintptr_t>(base);
    void* data = reinterpret_cast<void*>((address + kChunkBytes - 1) / kChunkBytes * kChunkBytes);
    const std::lock_guard lock(mutex_);
    try {
      bases_[data] = base;
    } catch (...) {
      free(base);
      throw;
    }
    return data;
  }

  /// The pointer that the driver gave for `data`; forgets it.
  void* take_base(void* data) noexcept {
    const std::lock_guard lock(mutex_);
    const auto found = bases_.find(data);
    if (found == bases_.end()) return data;
    void* base = found->second;
    bases_.erase(found);
    return base;
  }

 private:
  static bool is_aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % kChunkBytes == 0; }
  std::mutex mutex_;
  std::unordered_map<void*, void*> bases_;
};

}  // namespace uvm_kv
