// Hints on parts of a managed slab, and the state that the driver keeps of them.
//
// Every argument is checked before the first driver call that changes anything. Nothing is mirrored here: `query` asks
// the driver. There is no attribute for where a page lies now; the last prefetch is the nearest thing, and it says what
// was asked for, not whether it has been done. Advice and prefetch round a range outwards to pages of 4 KiB: a block
// that is smaller takes its neighbour's bytes along.
#pragma once

#include <cuda_runtime_api.h>

#include <span>
#include <string>
#include <vector>

#include "uvm_kv/capabilities.hpp"
#include "uvm_kv/memory_resource.hpp"
#include "uvm_kv/numa.hpp"
#include "uvm_kv/stream.hpp"

namespace uvm_kv {
namespace detail {

inline cudaMemLocation to_cuda(Location location) {
  cudaMemLocation result{};
  result.type = static_cast<cudaMemLocationType>(location.type);
  result.id = location.id;
  return result;
}

inline void require_hintable(const Slab& slab, std::span<const ByteRange> ranges, const char* what) {
  require(slab.resource().properties().managed,
          std::string(what) + " is for managed memory; this slab is " + slab.resource().kind());
  require_inside(ranges, slab.bytes());
}

/// After the checks that ask nobody: what the driver must be asked first.
inline cudaStream_t ready_stream(std::uintptr_t handle, const char* what) {
  const cudaStream_t stream = to_stream(handle);
  require_not_capturing(stream, what);
  return stream;
}

/// The three parallel lists that the batch calls take.
struct Batch {
  Batch(const Slab& slab, std::span<const ByteRange> ranges) {
    for (const ByteRange range : ranges) {
      pointers.push_back(slab.data() + range.offset);
      sizes.push_back(range.bytes);
    }
  }
  std::vector<void*> pointers;
  std::vector<std::size_t> sizes;
  std::size_t first = 0;  ///< One location for all: it starts at element 0.
};

inline std::size_t total(std::span<const ByteRange> ranges) {
  std::size_t sum = 0;
  for (const ByteRange range : ranges) sum += range.bytes;
  return sum;
}

inline void need_batches(const Slab& slab, const char* what) {
  need(batch_prefetch(), std::string(what) + " (CUDA 13.0 and concurrent managed access on every device)",
       slab.resource().device());
}

}  // namespace detail

inline Location checked_location(int type, int id) { return to_location(type, id, num_devices(), num_numa_nodes()); }

/// Advice holds from now on, in no stream's order; `stream` is asked only whether it is capturing.
inline void advise(const Slab& slab, std::span<const ByteRange> ranges, Advice advice, Location location,
                   std::uintptr_t stream) {
  detail::require_hintable(slab, ranges, "advice");
  require_location_fits(advice, location);
  detail::ready_stream(stream, "advice");
  for (const ByteRange range : ranges)
    UVM_KV_CUDA_BYTES(cudaMemAdvise(slab.data() + range.offset, range.bytes, static_cast<cudaMemoryAdvise>(advice),
                                    detail::to_cuda(location)),
                      range.bytes);
}

/// One call a range, in the order given.
inline void prefetch(const Slab& slab, std::span<const ByteRange> ranges, Location to, std::uintptr_t stream) {
  detail::require_hintable(slab, ranges, "prefetch");
  const cudaStream_t on = detail::ready_stream(stream, "prefetch");
  for (const ByteRange range : ranges)
    UVM_KV_CUDA_BYTES(cudaMemPrefetchAsync(slab.data() + range.offset, range.bytes, detail::to_cuda(to), 0, on),
                      range.bytes);
}

/// One call for all ranges.
inline void prefetch_batch(const Slab& slab, std::span<const ByteRange> ranges, Location to, std::uintptr_t stream) {
  detail::require_hintable(slab, ranges, "batched prefetch");
  const cudaStream_t on = detail::ready_stream(stream, "batched prefetch");
  detail::need_batches(slab, "batched prefetch");
  detail::Batch batch(slab, ranges);
  cudaMemLocation location = detail::to_cuda(to);
  UVM_KV_CUDA_BYTES(cudaMemPrefetchBatchAsync(batch.pointers.data(), batch.sizes.data(), batch.sizes.size(), &location,
                                              &batch.first, 1, 0, on),
                    detail::total(ranges));
}

/// The bytes are no longer needed: an eviction drops them without a copy. Reading them before a write is undefined.
inline void discard(const Slab& slab, std::span<const ByteRange> ranges, std::uintptr_t stream) {
  detail::require_hintable(slab, ranges, "discard");
  require_whole_pages(ranges);
  const cudaStream_t on = detail::ready_stream(stream, "discard");
  detail::need_batches(slab, "discard");
  detail::Batch batch(slab, ranges);
  UVM_KV_CUDA_BYTES(cudaMemDiscardBatchAsync(batch.pointers.data(), batch.sizes.data(), batch.sizes.size(), 0, on),
                    detail::total(ranges));
}

/// Room at `to` without moving the old bytes there: for blocks that will be written next.
inline void discard_and_prefetch(const Slab& slab, std::span<const ByteRange> ranges, Location to,
                                 std::uintptr_t stream) {
  detail::require_hintable(slab, ranges, "discard-and-prefetch");
  require_whole_pages(ranges);
  const cudaStream_t on = detail::ready_stream(stream, "discard-and-prefetch");
  detail::need_batches(slab, "discard-and-prefetch");
  detail::Batch batch(slab, ranges);
  cudaMemLocation location = detail::to_cuda(to);
  UVM_KV_CUDA_BYTES(cudaMemDiscardAndPrefetchBatchAsync(batch.pointers.data(), batch.sizes.data(), batch.sizes.size(),
                                                        &location, &batch.first, 1, 0, on),
                    detail::total(ranges));
}

/// What the driver says of one range. A location of type `invalid`: none, or not the same for all of its pages.
struct RangeState {
  bool read_mostly;
  Location preferred;
  Location last_prefetch;
  std::vector<int> accessed_by;  ///< Device ordinals; -1 is the CPU.
};

inline RangeState query(const Slab& slab, ByteRange range) {
  detail::require_hintable(slab, {&range, 1}, "a query of hints");
  const auto ask = [&](cudaMemRangeAttribute which, void* out, std::size_t bytes) {
    UVM_KV_CUDA_BYTES(cudaMemRangeGetAttribute(out, bytes, which, slab.data() + range.offset, range.bytes),
                      range.bytes);
  };
  const auto location = [&](cudaMemRangeAttribute type, cudaMemRangeAttribute id) {
    cudaMemLocationType found{};
    int ordinal = 0;
    ask(type, &found, sizeof(found));
    ask(id, &ordinal, sizeof(ordinal));
    const bool has_id = found == cudaMemLocationTypeDevice || found == cudaMemLocationTypeHostNuma;
    return Location{static_cast<LocationType>(found), has_id ? ordinal : 0};
  };
  int read_mostly = 0;
  ask(cudaMemRangeAttributeReadMostly, &read_mostly, sizeof(read_mostly));
  std::vector<int> processors(static_cast<std::size_t>(num_devices()) + 1);
  ask(cudaMemRangeAttributeAccessedBy, processors.data(), processors.size() * sizeof(int));
  std::erase(processors, cudaInvalidDeviceId);
  return {read_mostly != 0,
          location(cudaMemRangeAttributePreferredLocationType, cudaMemRangeAttributePreferredLocationId),
          location(cudaMemRangeAttributeLastPrefetchLocationType, cudaMemRangeAttributeLastPrefetchLocationId),
          std::move(processors)};
}

}  // namespace uvm_kv
