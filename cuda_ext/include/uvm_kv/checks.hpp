// Checks of arguments, all made before the first driver call, so that a bad element leaves nothing half done.
// Host only: no CUDA header here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace uvm_kv {

/// Unit of residency of managed memory, and the alignment of every slab.
inline constexpr std::size_t kChunkBytes = std::size_t{2} << 20;
/// Unit of the driver's masks: a hint cannot say less than a page.
inline constexpr std::size_t kPageBytes = 4096;

/// Part of a slab: [offset, offset + bytes).
struct ByteRange {
  std::size_t offset;
  std::size_t bytes;
};

/// The values of cudaMemoryAdvise, CUDA 13.0.
enum class Advice : int {
  set_read_mostly = 1,
  unset_read_mostly = 2,
  set_preferred_location = 3,
  unset_preferred_location = 4,
  set_accessed_by = 5,
  unset_accessed_by = 6,
};

/// The values of cudaMemLocationType, CUDA 13.0.
enum class LocationType : int { invalid = 0, device = 1, host = 2, host_numa = 3, host_numa_current = 4 };

/// Where memory lies or should lie. `id` is a device ordinal or a NUMA node, and 0 for the host as a whole.
struct Location {
  LocationType type;
  int id;
};

inline void require(bool holds, const std::string& otherwise) {
  if (!holds) throw std::invalid_argument(otherwise);
}

inline std::string text(std::size_t bytes) { return std::to_string(bytes) + " B"; }

inline void require_slab_bytes(std::size_t bytes) {
  require(bytes > 0 && bytes % kChunkBytes == 0,
          "a slab of " + text(bytes) + "; its size must be a positive multiple of " + text(kChunkBytes));
}

inline void require_aligned(std::uintptr_t address, std::size_t alignment, const std::string& what) {
  require(address % alignment == 0,
          what + " at address " + std::to_string(address) + " is not aligned to " + text(alignment));
}

/// Bytes of an array; a shape whose product does not fit into a word is refused, not wrapped.
inline std::size_t array_bytes(std::span<const std::size_t> shape, std::size_t item_bytes) {
  std::size_t bytes = item_bytes;
  for (const std::size_t extent : shape) {
    require(extent == 0 || bytes <= std::numeric_limits<std::size_t>::max() / extent,
            "an array of more bytes than any slab has");
    bytes *= extent;
  }
  return bytes;
}

/// Does not overflow: offset and bytes may be anything.
inline void require_inside(ByteRange range, std::size_t slab_bytes) {
  require(range.bytes > 0, "a range of 0 B at offset " + text(range.offset) + "; it must hold at least one byte");
  require(range.bytes <= slab_bytes && range.offset <= slab_bytes - range.bytes,
          "a range of " + text(range.bytes) + " at offset " + text(range.offset) + " leaves its slab of " +
              text(slab_bytes));
}

inline void require_inside(std::span<const ByteRange> ranges, std::size_t slab_bytes) {
  require(!ranges.empty(), "no ranges given");
  for (const ByteRange range : ranges) require_inside(range, slab_bytes);
}

/// A discard drops whole pages: a range that ends inside one would drop its neighbour's bytes too. CUDA 13.0 documents
/// no rounding for it (advice and prefetch round outwards), so nothing but whole pages is safe.
inline void require_whole_pages(std::span<const ByteRange> ranges) {
  for (const ByteRange range : ranges) {
    require(range.offset % kPageBytes == 0 && range.bytes % kPageBytes == 0,
            "a discard of " + text(range.bytes) + " at offset " + text(range.offset) + " cuts a page of " +
                text(kPageBytes) + ", so it would drop the neighbour's bytes");
  }
}

inline Advice to_advice(int value) {
  require(value >= 1 && value <= 6, "advice " + std::to_string(value) + "; it is one of 1 to 6 (cudaMemoryAdvise)");
  return static_cast<Advice>(value);
}

inline Location to_location(int type, int id, int num_devices, int num_numa_nodes) {
  const std::string given = "location type " + std::to_string(type) + " id " + std::to_string(id);
  require(type >= 1 && type <= 4, given + "; the type is one of 1 to 4 (cudaMemLocationType)");
  const auto kind = static_cast<LocationType>(type);
  if (kind == LocationType::device)
    require(id >= 0 && id < num_devices, given + "; there are " + std::to_string(num_devices) + " devices");
  if (kind == LocationType::host_numa)
    require(id >= 0 && id < num_numa_nodes, given + "; there are " + std::to_string(num_numa_nodes) + " NUMA nodes");
  if (kind == LocationType::host || kind == LocationType::host_numa_current)
    require(id == 0, given + "; the id must be 0 here");
  return {kind, id};
}

/// Where an advice may point. Read-mostly takes no location: the driver ignores it.
inline void require_location_fits(Advice advice, Location location) {
  if (advice == Advice::set_accessed_by || advice == Advice::unset_accessed_by)
    require(location.type == LocationType::device || location.type == LocationType::host,
            "accessed-by takes a device or the host, not a NUMA node");
}

/// 0 and 1 are the legacy stream, which waits for everything and which the batch calls refuse. 0 is also what torch's
/// current stream says of itself until another one is entered, so that is what the message must help with.
inline void require_stream(std::uintptr_t stream) {
  require(stream > 1, "stream " + std::to_string(stream) +
                          " is the legacy default stream (torch's current one too, outside `with torch.cuda.stream(s)`)"
                          "; give a stream of your own: uvm_kv.memory.new_stream() or torch.cuda.Stream()");
}

/// The two parts of a virtual range: both whole granules, at least one of them not empty.
inline void require_parts(std::size_t device_bytes, std::size_t total_bytes, std::size_t granularity) {
  require(device_bytes <= total_bytes, "a device part of " + text(device_bytes) + " of a slab of " + text(total_bytes) +
                                           "; it cannot be the larger");
  require(device_bytes % granularity == 0 && total_bytes % granularity == 0,
          "a slab of " + text(total_bytes) + " with a device part of " + text(device_bytes) +
              "; both must be multiples of this device's granularity of " + text(granularity));
}

}  // namespace uvm_kv
