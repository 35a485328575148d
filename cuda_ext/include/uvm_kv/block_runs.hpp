// Where blocks lie in a slab, and how lists of blocks become few long runs of bytes. Host only: no CUDA header here.
//
//   layer_major                              block_major
//   layer 0: |b0 b1 .. b7|b8 ..     |        b0: |l0 l1 .. |     a piece is one block of one layer, or one whole block;
//   layer 1: |b0 b1 .. b7|b8 ..     |        b1: |l0 l1 .. |     pieces_per_group of them share a group of chunks, and
//            '-- group --'                                       what is left of a group stays empty
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "uvm_kv/checks.hpp"

namespace uvm_kv {

struct SlabLayout {
  std::size_t num_blocks;
  std::size_t num_layers;
  std::size_t layer_block_bytes;  ///< K and V of one block in one layer.
  bool layer_major;
  std::size_t pieces_per_group;
  std::size_t group_bytes;  ///< From one group of pieces to the next; at least pieces_per_group pieces.
  std::size_t base_bytes;   ///< Offset of the first piece in its slab: two tiers can share one slab.

  std::size_t piece_bytes() const { return layer_major ? layer_block_bytes : layer_block_bytes * num_layers; }
  std::size_t num_groups() const { return (num_blocks + pieces_per_group - 1) / pieces_per_group; }
  std::size_t layer_stride_bytes() const { return layer_major ? num_groups() * group_bytes : layer_block_bytes; }
  std::size_t end_bytes() const { return base_bytes + num_groups() * group_bytes * (layer_major ? num_layers : 1); }
  std::size_t offset(std::size_t block, std::size_t layer) const {
    return base_bytes + layer * layer_stride_bytes() + block / pieces_per_group * group_bytes +
           block % pieces_per_group * piece_bytes();
  }
};

/// Layers [first, last).
struct LayerRange {
  std::size_t first;
  std::size_t last;
};

struct BlockPair {
  std::size_t source;
  std::size_t target;
};

/// Bytes to copy: offsets into the source slab and into the target slab.
struct CopyRun {
  std::size_t source;
  std::size_t target;
  std::size_t bytes;
};

/// A product that does not wrap is left to the caller: sizes come from a KVCacheSpec, which is far below 2**63.
inline void require_sound(const SlabLayout& layout) {
  require(layout.num_layers > 0 && layout.layer_block_bytes > 0 && layout.pieces_per_group > 0,
          "a slab layout needs at least one layer, one byte a block and one piece a group");
  require(layout.group_bytes / layout.pieces_per_group >= layout.piece_bytes(),
          "groups of " + text(layout.group_bytes) + " cannot hold " + std::to_string(layout.pieces_per_group) +
              " pieces of " + text(layout.piece_bytes()));
}

inline void require_blocks(const SlabLayout& layout, std::span<const std::size_t> blocks) {
  for (const std::size_t block : blocks)
    require(block < layout.num_blocks,
            "block " + std::to_string(block) + " of a slab of " + std::to_string(layout.num_blocks) + " blocks");
}

inline void require_layers(const SlabLayout& layout, LayerRange layers) {
  require(layers.first < layers.last && layers.last <= layout.num_layers,
          "layers [" + std::to_string(layers.first) + ", " + std::to_string(layers.last) + ") of " +
              std::to_string(layout.num_layers) + "; at least one must be named");
}

/// Neighbours in both slabs become one run. Sorts by source: copies of one call have no order among themselves.
inline std::vector<CopyRun> merged(std::vector<CopyRun> pieces) {
  std::sort(pieces.begin(), pieces.end(), [](const CopyRun& a, const CopyRun& b) { return a.source < b.source; });
  std::vector<CopyRun> runs;
  for (const CopyRun& piece : pieces) {
    if (!runs.empty() && runs.back().source + runs.back().bytes == piece.source &&
        runs.back().target + runs.back().bytes == piece.target) {
      runs.back().bytes += piece.bytes;
    } else {
      runs.push_back(piece);
    }
  }
  return runs;
}

/// Cuts runs at a place of the source and at one of the target; 0 cuts nowhere. Two kinds of memory meet there in one
/// range, and a copy engine is given one kind at a time.
inline std::vector<CopyRun> cut(std::span<const CopyRun> runs, std::size_t source_at, std::size_t target_at) {
  std::vector<CopyRun> pieces;
  const auto part_before = [](std::size_t begin, std::size_t bytes, std::size_t at) {
    return begin < at && at < begin + bytes ? at - begin : bytes;
  };
  for (CopyRun rest : runs) {
    while (rest.bytes > 0) {
      const std::size_t bytes =
          std::min(part_before(rest.source, rest.bytes, source_at), part_before(rest.target, rest.bytes, target_at));
      pieces.push_back({rest.source, rest.target, bytes});
      rest = {rest.source + bytes, rest.target + bytes, rest.bytes - bytes};
    }
  }
  return pieces;
}

/// Calls visit(layer, num_layers) for each part of a block that lies together in every one of the layouts.
template <class Visit>
void for_each_part(bool layer_major, LayerRange layers, Visit&& visit) {
  if (!layer_major) return visit(layers.first, layers.last - layers.first);
  for (std::size_t layer = layers.first; layer < layers.last; ++layer) visit(layer, std::size_t{1});
}

/// Runs that copy `pairs` in `layers` of the source to as many layers of the target from `target_layer` on. The two
/// slabs may differ in layout and in their number of layers, not in the shape of a block.
inline std::vector<CopyRun> copy_runs(const SlabLayout& source, const SlabLayout& target,
                                      std::span<const BlockPair> pairs, LayerRange layers, std::size_t target_layer) {
  require_sound(source);
  require_sound(target);
  require(source.layer_block_bytes == target.layer_block_bytes,
          "slabs of different blocks: " + text(source.layer_block_bytes) + " in a layer, and " +
              text(target.layer_block_bytes));
  require_layers(source, layers);
  require_layers(target, {target_layer, target_layer + layers.last - layers.first});
  std::vector<CopyRun> pieces;
  for (const BlockPair& pair : pairs) {
    require_blocks(source, {&pair.source, 1});
    require_blocks(target, {&pair.target, 1});
    for_each_part(source.layer_major || target.layer_major, layers, [&](std::size_t layer, std::size_t count) {
      pieces.push_back({source.offset(pair.source, layer),
                        target.offset(pair.target, target_layer + layer - layers.first),
                        count * source.layer_block_bytes});
    });
  }
  return merged(std::move(pieces));
}

/// Ranges that cover `blocks` in `layers`, neighbours joined, each byte once.
inline std::vector<ByteRange> block_ranges(const SlabLayout& layout, std::span<const std::size_t> blocks,
                                           LayerRange layers) {
  require_sound(layout);
  require_layers(layout, layers);
  require_blocks(layout, blocks);
  std::vector<std::size_t> once(blocks.begin(), blocks.end());
  std::sort(once.begin(), once.end());
  once.erase(std::unique(once.begin(), once.end()), once.end());
  std::vector<CopyRun> pieces;
  for (const std::size_t block : once) {
    for_each_part(layout.layer_major, layers, [&](std::size_t layer, std::size_t count) {
      const std::size_t offset = layout.offset(block, layer);
      pieces.push_back({offset, offset, count * layout.layer_block_bytes});
    });
  }
  std::vector<ByteRange> ranges;
  for (const CopyRun& run : merged(std::move(pieces))) ranges.push_back({run.source, run.bytes});
  return ranges;
}

/// Every run stays inside both slabs.
inline void require_inside(std::span<const CopyRun> runs, std::size_t source_bytes, std::size_t target_bytes) {
  for (const CopyRun& run : runs) {
    require_inside(ByteRange{run.source, run.bytes}, source_bytes);
    require_inside(ByteRange{run.target, run.bytes}, target_bytes);
  }
}

/// Copies of one call run in any order, so none may write what another reads or writes. `source_base` and
/// `target_base` are the addresses of the slabs, which may be one and the same.
inline void require_independent(std::span<const CopyRun> runs, std::uintptr_t source_base, std::uintptr_t target_base) {
  struct Use {
    std::uintptr_t begin, end;
    bool writes;
  };
  std::vector<Use> uses;
  for (const CopyRun& run : runs) {
    uses.push_back({source_base + run.source, source_base + run.source + run.bytes, false});
    uses.push_back({target_base + run.target, target_base + run.target + run.bytes, true});
  }
  std::sort(uses.begin(), uses.end(), [](const Use& a, const Use& b) { return a.begin < b.begin; });
  std::uintptr_t written = 0;  // End of what is written by the uses seen so far; `used`: of what is touched at all.
  std::uintptr_t used = 0;
  for (const Use& use : uses) {
    require(use.begin >= (use.writes ? used : written),
            "copies of one call overlap: a block is a target twice, or both source and target");
    used = std::max(used, use.end);
    if (use.writes) written = std::max(written, use.end);
  }
}

}  // namespace uvm_kv
