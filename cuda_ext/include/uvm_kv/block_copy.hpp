// Copies of runs of blocks between slabs, on a given stream.
//
// batch   one cudaMemcpyBatchAsync for all runs: the copy engines move them while kernels run. Not capturable.
// each    one cudaMemcpyAsync a run: what one would do without batches, kept for comparison. Capturable.
// kernel  a gather/scatter kernel: for pieces so small that a copy engine spends its time on overhead. Capturable.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <span>

#include "uvm_kv/block_runs.hpp"
#include "uvm_kv/memory_resource.hpp"

namespace uvm_kv {

enum class CopyMethod : int { automatic = 0, batch = 1, each = 2, kernel = 3 };

/// Below this mean length of a run the kernel is chosen. A copy call costs 5 to 7 us, which is what the link needs for
/// about 128 KiB; batching removes most but not all of it. An estimate until experiments.microbench has measured it.
inline constexpr std::size_t kSmallRunBytes = std::size_t{32} << 10;

/// What `automatic` means for these runs: `kernel` for short ones, `batch` for long ones, and never `each`, so that a
/// driver or a stream that cannot take a batch is an error and not another path.
CopyMethod choose_method(std::span<const CopyRun> runs, CopyMethod asked);

/// Enqueues the copies; they have no order among themselves. Both slabs and the stream belong to one device.
/// Returns the method that was used.
CopyMethod copy(const Slab& target, const Slab& source, std::span<const CopyRun> runs, CopyMethod asked,
                std::uintptr_t stream);

/// Sets bytes of a slab, for poison and tests.
void fill(const Slab& slab, ByteRange range, unsigned char value, std::uintptr_t stream);

}  // namespace uvm_kv
