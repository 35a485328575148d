// Split planning: which piece of which context is one unit of work, and in which order units are offered. Host only.
//
//   one query tile    tokens   0            S            2S           3S      kv_end
//                              |  split 0   |  split 1   |  split 2   | split 3 |     S = split_tokens
//   its items                  '- device    '- device    '- HOST      '- device        by where their blocks lie
//
// Boundaries depend on positions, and on how many tokens the sequence asks with, alone: not on where blocks lie nor on
// the rest of the batch. Only the order of the items does: those with a host-resident block come first, as a list of
// their own. Within a list they go sequence by sequence, as a decode step walks them.
//
// Sequences whose query rows fit one warp's tile are `narrow` items, the others `wide` ones (several warps share each
// load of K and V). Chunks of more than kMaxSplitQueryTokens walk their context in one piece, without partials.
//
// A plan is one buffer, the same on the host and on the device. Its places depend on the capacity alone, so that a
// captured graph may be replayed with a new plan in the same buffer:
//
//   | PlanHeader | narrow WorkItem [capacity] | wide WorkItem [capacity] | MergeItem [capacity] |
#pragma once

#include <algorithm>
#include <cstring>
#include <span>
#include <vector>

#include "uvm_kv/paged_kv.cuh"

namespace uvm_kv {

inline constexpr int kSplitMultiple = 128;          // so that no two splits share a block
inline constexpr int kMaxSplitQueryTokens = 16;
inline constexpr int kWideRows = 32;                // query rows (tokens x heads of a group) of a wide tile
inline constexpr int kNumPasses = 2;                // narrow, wide

struct alignas(16) WorkItem {  // so that the kernels load it by 16 bytes
  std::int32_t seq;
  std::int32_t query_row;       // first query token of the tile, in the packed batch
  std::int32_t first_position;  // its position in the sequence
  std::int32_t num_rows;        // tokens of the tile x query heads per KV head
  std::int32_t begin;           // cached tokens [begin, end)
  std::int32_t end;
  std::int32_t partial_row;     // first row of its partials; negative: the piece is the whole context
  std::int32_t reserved;
};
static_assert(sizeof(WorkItem) == 32);

// One query token whose context was split. Row of (split i, query head h) in the partials:
//   first_row + (i * num_kv_heads + h / group) * rows_per_head + h % group
struct alignas(16) MergeItem {
  std::int32_t query_row;
  std::int32_t num_splits;
  std::int32_t first_row;
  std::int32_t rows_per_head;
};
static_assert(sizeof(MergeItem) == 16);

struct PlanHeader {
  std::int32_t num_host_items[kNumPasses];  // the first items of a pass; the device-resident ones follow
  std::int32_t num_items[kNumPasses];
  std::int32_t num_merges;
  std::int32_t reserved[11];
};
static_assert(sizeof(PlanHeader) == 64);

struct PlanCapacity {
  std::int64_t items[kNumPasses] = {0, 0};
  std::int64_t merges = 0;
  std::int64_t partial_rows = 0;

  std::int64_t items_offset(int pass) const {
    const std::int64_t before = pass == 0 ? 0 : items[0];
    return static_cast<std::int64_t>(sizeof(PlanHeader)) + before * static_cast<std::int64_t>(sizeof(WorkItem));
  }
  std::int64_t merges_offset() const {
    return items_offset(1) + items[1] * static_cast<std::int64_t>(sizeof(WorkItem));
  }
  std::int64_t bytes() const { return merges_offset() + merges * static_cast<std::int64_t>(sizeof(MergeItem)); }
};

struct PlanInput {
  int num_q_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int element_bytes = 0;
  int block_size = 0;
  int split_tokens = 0;  // 0: default_split_tokens
  std::span<const std::int32_t> query_lens;    // new tokens of each sequence; 0: it has no part in this step
  std::span<const std::int32_t> context_lens;  // tokens of each sequence, the new ones included
  BlockTable table;                            // host memory
  std::int32_t first_host_block = kNoSplit;    // blocks from here on are read over the link,
  std::int32_t first_staged_block = kNoSplit;  // .. up to here; staged copies lie in device memory ..
  std::span<const std::uint8_t> block_on_host; // .. or one flag for each block, which then decides alone; none: device
};

// About 128 KiB of K and V for each piece: enough to hide the start of a piece, small enough to balance.
constexpr int default_split_tokens(int head_dim, int element_bytes) {
  const int row_bytes = head_dim * element_bytes;
  return row_bytes <= 128 ? 512 : row_bytes <= 256 ? 256 : 128;
}

// Query rows that one warp of the narrow kernel serves, 0 where every sequence takes the wide one.
constexpr int narrow_rows(int head_dim, int group) {
  const bool tuned = head_dim == 64 || head_dim == 128;
  if (tuned && group == 1) {
    return 1;
  }
  if (group <= 4) {
    return 4;
  }
  return tuned && group <= 8 ? 8 : 0;
}

namespace detail {

struct Tile {
  int seq;
  int pass;
  std::int64_t query_row;
  int num_tokens;
  int first_position;
  int split_tokens;  // length of its pieces

  int kv_end() const { return first_position + num_tokens; }
  int num_splits() const { return (kv_end() - 1) / split_tokens + 1; }
};

inline Status check_plan_input(const PlanInput& input) {
  if (input.num_kv_heads < 1 || input.num_q_heads < 1 || input.num_q_heads % input.num_kv_heads != 0) {
    return make_status(Status::Code::kInvalidArgument,
                       "num_q_heads=%d, num_kv_heads=%d: each KV head serves the same number of query heads",
                       input.num_q_heads, input.num_kv_heads);
  }
  if (!is_power_of_two(input.block_size) || input.block_size < kMinBlockSize || input.block_size > kMaxBlockSize) {
    return make_status(Status::Code::kNotSupported, "block_size=%d; the kernels take 8, 16, 32, 64 or 128",
                       input.block_size);
  }
  if (input.split_tokens < 0 || input.split_tokens % kSplitMultiple != 0) {
    return make_status(Status::Code::kInvalidArgument, "split_tokens=%d; it must be a multiple of %d, or 0",
                       input.split_tokens, kSplitMultiple);
  }
  if (input.query_lens.size() != input.context_lens.size()) {
    return make_status(Status::Code::kInvalidArgument, "%zu query lengths for %zu context lengths",
                       input.query_lens.size(), input.context_lens.size());
  }
  for (std::size_t s = 0; s < input.query_lens.size(); ++s) {
    if (input.query_lens[s] < 0 || input.query_lens[s] > input.context_lens[s]) {
      return make_status(Status::Code::kInvalidArgument,
                         "sequence %zu: query_len=%d, context_len=%d; the context includes the new tokens", s,
                         input.query_lens[s], input.context_lens[s]);
    }
    // Kernels look a stage past the end before they compare.
    if (input.context_lens[s] > std::numeric_limits<std::int32_t>::max() / 2) {
      return make_status(Status::Code::kNotSupported, "sequence %zu: context_len=%d is above 2^30", s,
                         input.context_lens[s]);
    }
  }
  return {};
}

// Calls visit(tile) in the order of the packed batch.
template <class Visit>
void for_each_tile(const PlanInput& input, Visit visit) {
  const int group = input.num_q_heads / input.num_kv_heads;
  const int narrow = narrow_rows(input.head_dim, group);
  const int split_tokens =
      input.split_tokens > 0 ? input.split_tokens : default_split_tokens(input.head_dim, input.element_bytes);
  std::int64_t query_row = 0;
  for (std::size_t s = 0; s < input.query_lens.size(); ++s) {
    const int query_len = input.query_lens[s];
    const int context = input.context_lens[s] - query_len;
    const bool is_narrow = std::int64_t{query_len} * group <= narrow;
    const int tile_tokens = is_narrow ? query_len : std::max(1, kWideRows / group);
    for (int first = 0; first < query_len; first += tile_tokens) {
      const int num_tokens = std::min(tile_tokens, query_len - first);
      const int end = context + first + num_tokens;
      const int piece = query_len <= kMaxSplitQueryTokens ? split_tokens : end;
      visit(Tile{static_cast<int>(s), is_narrow ? 0 : 1, query_row + first, num_tokens, context + first, piece});
    }
    query_row += query_len;
  }
}

inline bool any_on_host(const PlanInput& input, int seq, int begin, int end) {
  if (input.first_host_block == kNoSplit && input.block_on_host.empty()) {
    return false;
  }
  const std::int32_t* row = input.table.row(seq);
  for (int i = begin / input.block_size; i <= (end - 1) / input.block_size; ++i) {
    const bool far = row[i] >= input.first_host_block && row[i] < input.first_staged_block;
    const auto id = static_cast<std::size_t>(row[i]);  // Those of staged copies lie behind the flags.
    const bool flagged = id < input.block_on_host.size() && input.block_on_host[id] != 0;
    if (flagged || (input.block_on_host.empty() && far)) {
      return true;
    }
  }
  return false;
}

struct ItemLists {
  std::vector<WorkItem> host[kNumPasses];
  std::vector<WorkItem> device[kNumPasses];
  std::vector<MergeItem> merges;
};

inline void add_merges(const PlanInput& input, const Tile& tile, std::int64_t first_row, ItemLists& lists) {
  const int group = input.num_q_heads / input.num_kv_heads;
  for (int t = 0; t < tile.num_tokens; ++t) {
    lists.merges.push_back({static_cast<std::int32_t>(tile.query_row + t), tile.num_splits(),
                            static_cast<std::int32_t>(first_row + t * group), tile.num_tokens * group});
  }
}

// Adds the items of a tile; answers how many rows of partials they take.
inline std::int64_t add_items(const PlanInput& input, const Tile& tile, std::int64_t first_row, ItemLists& lists) {
  const int group = input.num_q_heads / input.num_kv_heads;
  const int num_splits = tile.num_splits();
  const std::int64_t rows_per_split = std::int64_t{input.num_kv_heads} * tile.num_tokens * group;
  for (int i = 0; i < num_splits; ++i) {
    const int begin = i * tile.split_tokens;
    const int end = std::min(begin + tile.split_tokens, tile.kv_end());
    const std::int64_t row = num_splits == 1 ? -1 : first_row + i * rows_per_split;
    const bool on_host = any_on_host(input, tile.seq, begin, end);
    auto& list = on_host ? lists.host[tile.pass] : lists.device[tile.pass];
    list.push_back({tile.seq, static_cast<std::int32_t>(tile.query_row), tile.first_position, tile.num_tokens * group,
                    begin, end, static_cast<std::int32_t>(row), 0});
  }
  return num_splits == 1 ? 0 : num_splits * rows_per_split;
}

template <class T>
void put(std::span<std::byte> buffer, std::int64_t offset, const std::vector<T>& values) {
  if (!values.empty()) {
    std::memcpy(buffer.data() + offset, values.data(), values.size() * sizeof(T));
  }
}

}  // namespace detail

// What the plan of a batch takes. Give a captured graph the most that any of its steps will take.
inline Status count_plan(const PlanInput& input, PlanCapacity* capacity) {
  *capacity = {};
  const Status status = detail::check_plan_input(input);
  if (!status.ok()) {
    return status;
  }
  const int group = input.num_q_heads / input.num_kv_heads;
  detail::for_each_tile(input, [&](const detail::Tile& tile) {
    const std::int64_t num_splits = tile.num_splits();
    capacity->items[tile.pass] += num_splits;
    if (num_splits > 1) {
      capacity->merges += tile.num_tokens;
      capacity->partial_rows += num_splits * input.num_kv_heads * tile.num_tokens * group;
    }
  });
  if (capacity->partial_rows > std::numeric_limits<std::int32_t>::max()) {
    return make_status(Status::Code::kNotSupported, "%lld rows of partials; 2^31 - 1 is the most",
                       static_cast<long long>(capacity->partial_rows));
  }
  return {};
}

// Writes the plan of a batch into a buffer of capacity.bytes().
inline Status fill_plan(const PlanInput& input, const PlanCapacity& capacity, std::span<std::byte> buffer) {
  PlanCapacity needed;
  Status status = count_plan(input, &needed);
  if (!status.ok()) {
    return status;
  }
  const bool fits = needed.items[0] <= capacity.items[0] && needed.items[1] <= capacity.items[1] &&
                    needed.merges <= capacity.merges && needed.partial_rows <= capacity.partial_rows;
  if (!fits || static_cast<std::int64_t>(buffer.size()) < capacity.bytes()) {
    return make_status(Status::Code::kInvalidArgument,
                       "the plan takes %lld narrow and %lld wide items, %lld merges and %lld rows of partials; the "
                       "capacity is %lld, %lld, %lld and %lld in a buffer of %zu bytes",
                       static_cast<long long>(needed.items[0]), static_cast<long long>(needed.items[1]),
                       static_cast<long long>(needed.merges), static_cast<long long>(needed.partial_rows),
                       static_cast<long long>(capacity.items[0]), static_cast<long long>(capacity.items[1]),
                       static_cast<long long>(capacity.merges), static_cast<long long>(capacity.partial_rows),
                       buffer.size());
  }
  detail::ItemLists lists;
  std::int64_t row = 0;
  detail::for_each_tile(input, [&](const detail::Tile& tile) {
    if (tile.num_splits() > 1) {
      detail::add_merges(input, tile, row, lists);
    }
    row += detail::add_items(input, tile, row, lists);
  });
  PlanHeader header{};
  for (int pass = 0; pass < kNumPasses; ++pass) {
    header.num_host_items[pass] = static_cast<std::int32_t>(lists.host[pass].size());
    header.num_items[pass] = static_cast<std::int32_t>(lists.host[pass].size() + lists.device[pass].size());
    const std::int64_t offset = capacity.items_offset(pass);
    detail::put(buffer, offset, lists.host[pass]);
    detail::put(buffer, offset + header.num_host_items[pass] * static_cast<std::int64_t>(sizeof(WorkItem)),
                lists.device[pass]);
  }
  header.num_merges = static_cast<std::int32_t>(lists.merges.size());
  detail::put(buffer, capacity.merges_offset(), lists.merges);
  std::memcpy(buffer.data(), &header, sizeof(header));
  return {};
}

}  // namespace uvm_kv
