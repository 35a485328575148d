// From slabs and layouts to what the kernels see, and the checks of a batch that need the host's copy of it. Host only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

#include "uvm_kv/block_runs.hpp"
#include "uvm_kv/paged_kv.cuh"

namespace uvm_kv {

/// `slab`: address of the slab that the layout describes a part of. A sound layout has at most 2^31 - 1 blocks.
inline SlabView slab_view(std::uintptr_t slab, const SlabLayout& layout) {
  return {reinterpret_cast<std::byte*>(slab) + layout.base_bytes,
          static_cast<std::int64_t>(layout.layer_stride_bytes()),
          static_cast<std::int64_t>(layout.piece_bytes()),
          static_cast<std::int64_t>(layout.group_bytes),
          static_cast<std::int32_t>(layout.pieces_per_group)};
}

inline DType to_kv_dtype(const std::string& name) {
  if (name == "float16") return DType::kFp16;
  if (name == "bfloat16") return DType::kBf16;
  if (name == "float32") return DType::kFp32;
  throw std::invalid_argument("KV of dtype " + name + "; the kernels take float16, bfloat16 or float32");
}

/// The K and V of all layers, in one tier or in two, and what is needed to check calls against them.
struct KVView {
  PagedKV kv;
  DType dtype;
  int num_layers;
  std::size_t num_blocks;  ///< Blocks of both tiers.
  std::size_t num_staged;
  int device;

  std::size_t num_ids() const { return num_blocks + num_staged; }

  void set_staged_first(int place) {
    require(place >= 0 && place < kv.staged_layers,
            "staged_first=" + std::to_string(place) + " of a ring of " + std::to_string(kv.staged_layers));
    kv.staged_first = place;
  }
};

struct Tier {
  std::uintptr_t slab;
  const SlabLayout* layout;  // null: there is no such tier
};

/// `staged`: layers of its layout are places of a ring; see paged_kv.cuh.
inline KVView make_kv_view(Tier near, Tier far, Tier staged, int num_kv_heads, int head_dim, int block_size,
                           DType dtype, int device) {
  const SlabLayout& layout = *near.layout;
  const KVGeometry geometry{static_cast<int>(layout.num_layers), num_kv_heads, head_dim, element_bytes(dtype),
                            block_size};
  const auto needed = static_cast<std::size_t>(geometry.layer_block_bytes());
  for (const Tier& tier : {near, far, staged}) {
    require(tier.layout == nullptr || tier.layout->layer_block_bytes == needed,
            "a block of " + std::to_string(num_kv_heads) + " KV heads of " + std::to_string(head_dim) + " and " +
                std::to_string(block_size) + " slots takes " + text(needed) + " in a layer; the layout says " +
                text(tier.layout == nullptr ? 0 : tier.layout->layer_block_bytes));
  }
  require(far.layout == nullptr || far.layout->num_layers == layout.num_layers, "two tiers of different layers");
  const std::size_t num_far = far.layout == nullptr ? 0 : far.layout->num_blocks;
  const std::size_t num_blocks = layout.num_blocks + num_far;
  const std::size_t num_staged = staged.layout == nullptr ? 0 : staged.layout->num_blocks;
  require(num_blocks + num_staged < static_cast<std::size_t>(kNoSplit),
          std::to_string(num_blocks + num_staged) + " blocks; 2^31 - 2 is the most");
  require(num_staged == 0 || num_far > 0, "staged copies of host blocks, and no host blocks");
  const SlabView host = far.layout == nullptr ? SlabView{} : slab_view(far.slab, *far.layout);
  PagedKV kv = make_paged_kv(slab_view(near.slab, layout), host, static_cast<std::int32_t>(layout.num_blocks), geometry);
  if (num_staged > 0) {
    kv.staged = slab_view(staged.slab, *staged.layout);
    kv.staged_block = static_cast<std::int32_t>(num_blocks);
    kv.staged_layers = static_cast<std::int32_t>(staged.layout->num_layers);
  }
  return {kv, dtype, geometry.num_layers, num_blocks, num_staged, device};
}

/// Every block that the kernels will read or write exists. `row_blocks(seq)`: entries of that sequence's row.
template <class RowBlocks>
void require_known_blocks(const KVView& view, const BlockTable& table, std::span<const std::int32_t> query_lens,
                          std::span<const std::int32_t> context_lens, RowBlocks&& row_blocks) {
  for (std::size_t s = 0; s < context_lens.size(); ++s) {
    if (query_lens[s] <= 0) continue;  // no part in this step
    const std::int64_t needed = (std::int64_t{context_lens[s]} + view.kv.block_size - 1) / view.kv.block_size;
    require(needed <= row_blocks(s), "sequence " + std::to_string(s) + ": context_len=" +
                                         std::to_string(context_lens[s]) + " takes " + std::to_string(needed) +
                                         " blocks; its row of the block table has " + std::to_string(row_blocks(s)));
    const std::int32_t* row = table.row(static_cast<int>(s));
    for (std::int64_t i = 0; i < needed; ++i) {
      require(row[i] >= 0 && static_cast<std::size_t>(row[i]) < view.num_ids(),
              "sequence " + std::to_string(s) + ": block " + std::to_string(row[i]) + " of " +
                  std::to_string(view.num_ids()));
    }
  }
}

}  // namespace uvm_kv
