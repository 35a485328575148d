// Paged decode attention, split over the context, with an exact merge in a fixed order.
//
// Workers pull pieces (one WorkItem, one KV head) from two queues: some workers start with the pieces that read over
// the link, the others with those in device memory, and who runs dry helps with the other queue. So the link and HBM
// work at the same time, a bounded number of workers waits for slow blocks, and no piece is bound to a worker. The
// arithmetic of a piece is the same whoever takes it.
//
// In a warp, a team of lanes reads one slot, 16 bytes per lane; a stage is kTeamTokens consecutive slots of every team:
//
//   128 fp16:   lanes 0-15   |t0 t1 t2 t3|          lanes 16-31  |t4 t5 t6 t7|        8 tokens, 4 KiB of K and V
//    64 fp16:   lanes 0-7    |t0 .. t3|  8-15 |t4 .. t7|  16-23 |t8 .. t11|  24-31 |t12 .. t15|
//
// Shared memory is a ring of kStages stages between global memory and registers. In a narrow piece (query rows that fit
// one warp) a lane reads back just what it copied itself, so that warps never wait for each other. In a wide piece the
// warps of a CTA copy a stage each and all of them read all stages, each for query rows of its own: K and V are read
// once for up to kWideRows rows.
//
// The code of a piece is written against a Lane (its index, exchange with other lanes, copies, queues), so that the
// tests run it on the CPU, lane by lane. DeviceLane below is the real one.
#pragma once

#include "uvm_kv/attention_math.cuh"
#include "uvm_kv/split_plan.hpp"

namespace uvm_kv {

inline constexpr int kWarpLanes = 32;
inline constexpr int kCtaWarps = 4;
inline constexpr int kStages = 3;
inline constexpr int kWideWarpRows = kWideRows / kCtaWarps;
inline constexpr int kMergeParts = 8;  // how many sums a merge runs side by side

// Queues of one pass. The last worker to leave sets all to zero again, for the next launch.
struct QueueState {
  std::int32_t next_host;
  std::int32_t next_device;
  std::uint32_t num_left;
  std::int32_t reserved;
};

struct Partials {
  float* stats = nullptr;  // [row, 2]: maximum (base 2) and sum
  float* acc = nullptr;    // [row, head_dim]
};

// What the kernels get. Pointers are device-accessible.
struct AttentionParams {
  PagedKV kv;  // at_layer()
  BlockTable table;
  std::int32_t num_q_heads = 0;
  const std::byte* query = nullptr;  // [token, num_q_heads, head_dim], rows query_stride_bytes apart
  std::byte* out = nullptr;          // the same shape
  std::int64_t query_stride_bytes = 0;
  std::int64_t out_stride_bytes = 0;
  float scale_log2 = 0.0f;           // softmax scale x log2(e)
  std::int32_t num_host_workers = 0;  // workers that start with the host queue

  const PlanHeader* plan = nullptr;
  const WorkItem* items[kNumPasses] = {};
  const MergeItem* merges = nullptr;
  QueueState* queues = nullptr;      // [kNumPasses]
  Partials partials;

  UVM_KV_HD int group() const { return num_q_heads / kv.num_kv_heads; }
};

// How a slot of kHeadDim elements is spread over lanes.
template <class T, int kHeadDim>
struct RowShape {
  static constexpr int pow2_at_least(int value) { return value <= 1 ? 1 : 2 * pow2_at_least((value + 1) / 2); }

  static constexpr int kVec = kChunkElements<T>;
  static constexpr int kChunks = kHeadDim / kVec;
  static constexpr int kLanes = pow2_at_least(kChunks) < kWarpLanes ? pow2_at_least(kChunks) : kWarpLanes;
  static constexpr int kLaneChunks = (kChunks + kLanes - 1) / kLanes;
  static constexpr int kLaneElements = kVec * kLaneChunks;
  static constexpr int kTeams = kWarpLanes / kLanes;
  static constexpr int kTeamTokens = 4 / kLaneChunks;  // divides the smallest block, so a team stays in one block
  static constexpr int kStageTokens = kTeams * kTeamTokens;
  static constexpr int kStageChunks = 2 * kTeamTokens * kLaneChunks * kWarpLanes;  // K and V, of one warp

  static_assert(kHeadDim % kVec == 0 && kLaneChunks <= 2 && kMinBlockSize % kTeamTokens == 0);
};

template <class T, int kHeadDim>
constexpr int ring_bytes_per_warp() {
  return kStages * RowShape<T, kHeadDim>::kStageChunks * static_cast<int>(sizeof(Chunk16));
}

// One piece as a warp sees it. Rows are (token of the tile, query head of the group), heads fastest.
struct Piece {
  WorkItem item;
  int kv_head;
  int group;
  int row0;         // first query row of this warp
  int num_rows;     // rows from there on, may be negative
  int visible_end;  // tokens before here exist, and every row may see them

  UVM_KV_HD Piece(const WorkItem& of, int head, int heads_per_kv_head, int first_row)
      : item(of), kv_head(head), group(heads_per_kv_head), row0(first_row), num_rows(of.num_rows - first_row) {
    visible_end = last_visible(0) < item.end ? last_visible(0) + 1 : item.end;
  }

  // Last position that a row may see.
  UVM_KV_HD int last_visible(int row) const { return item.first_position + (row0 + row) / group; }
};

// Exchanges at kDistance and below; values[0 .. kHeld) are this lane's share by now.
template <int kDistance, int kHeld, int kCount, class Lane>
UVM_KV_HD void sum_halves(Lane& lane, float (&values)[kCount]) {
  if constexpr (kDistance > 0) {
    constexpr int kKept = kHeld > 1 ? kHeld / 2 : 1;
    const bool keeps_upper = kHeld > 1 && (lane.index() & kDistance) != 0;
    float other[kKept];
    UVM_KV_UNROLL
    for (int i = 0; i < kKept; ++i) {
      const float upper = values[kHeld > 1 ? i + kKept : i];
      other[i] = keeps_upper ? values[i] : upper;
      values[i] = keeps_upper ? upper : values[i];
    }
    lane.exchange(other, kDistance);
    UVM_KV_UNROLL
    for (int i = 0; i < kKept; ++i) {
      values[i] += other[i];
    }
    sum_halves<kDistance / 2, kKept>(lane, values);
  }
}

// Every lane of a team gets the team's sum of each value. At each distance a lane keeps half of its values and gives
// the others away; the sums it is left with are handed round. So a value takes 2 exchanges and 1 addition where summing
// each by itself takes log2(kLanes) of both; the additions are the same, in the same order.
template <int kLanes, int kCount, class Lane>
UVM_KV_HD void sum_team(Lane& lane, float (&values)[kCount]) {
  static_assert((kCount & (kCount - 1)) == 0);
  sum_halves<kLanes / 2, kCount>(lane, values);
  lane.template hand_round<kLanes>(values);
}

// Copies the stages of a piece into a warp's ring, always one table entry ahead of itself.
template <class T, int kHeadDim>
class StageCopier {
  using Shape = RowShape<T, kHeadDim>;
  static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(T));

 public:
  UVM_KV_HD StageCopier(const AttentionParams& params, const Piece& piece, Chunk16* ring, int lane, int first_token,
                        int token_step)
      : kv_(params.kv),
        blocks_(params.table.row(piece.item.seq)),
        ring_(ring + lane),
        head_offset_(static_cast<int>(kv_.slot_offset(0, piece.kv_head, 0))),
        value_offset_(static_cast<int>(kv_.slot_offset(1, 0, 0))),
        chunk_(lane % Shape::kLanes),
        token_(first_token + lane / Shape::kLanes * Shape::kTeamTokens),
        token_step_(token_step),
        end_(piece.item.end) {
    look_up();
  }

  // The next stage, into place `slot` of the ring. Slots past the end become zeros and are not read.
  template <class Lane>
  UVM_KV_HD void copy_stage(Lane& lane, int slot) {
    const std::byte* key = kv_.device.base;  // past the end nothing is read from it
    if (token_ < end_) {
      key = kv_.block(block_) + head_offset_ + (token_ & (kv_.block_size - 1)) * kRowBytes;
    }
    Chunk16* target = ring_ + slot * Shape::kStageChunks;
    copy_rows(lane, target, key);
    copy_rows(lane, target + Shape::kStageChunks / 2, key + value_offset_);
    token_ += token_step_;
    look_up();
  }

 private:
  UVM_KV_HD void look_up() { block_ = token_ < end_ ? blocks_[token_ >> kv_.log2_block_size] : 0; }

  template <class Lane>
  UVM_KV_HD void copy_rows(Lane& lane, Chunk16* target, const std::byte* row) const {
    UVM_KV_UNROLL
    for (int t = 0; t < Shape::kTeamTokens; ++t) {
      UVM_KV_UNROLL
      for (int c = 0; c < Shape::kLaneChunks; ++c) {
        const int chunk = chunk_ + c * Shape::kLanes;
        const bool valid = token_ + t < end_ && chunk < Shape::kChunks;
        lane.copy_chunk(target + (t * Shape::kLaneChunks + c) * kWarpLanes, row + t * kRowBytes + chunk * 16, valid);
      }
    }
  }

  const PagedKV& kv_;
  const std::int32_t* blocks_;
  Chunk16* ring_;
  int head_offset_;  // of this head's K in a block; far below 2 GiB
  int value_offset_;  // from K to V
  int chunk_;
  int token_;  // first token of this lane's team in the next stage
  int token_step_;
  int end_;
  int block_;
};

// Online softmax of kRows query rows over the tokens of a lane's team; a lane holds its elements of each row.
template <class T, int kHeadDim, int kRows>
struct RowStates {
  using Shape = RowShape<T, kHeadDim>;
  static constexpr int kElements = Shape::kLaneElements;

  float query[kRows][kElements];
  float acc[kRows][kElements];
  float m[kRows];
  float l[kRows];

  // Rows that do not exist stay zero. Lanes past the head size too.
  UVM_KV_HD void load(const AttentionParams& params, const Piece& piece, int lane) {
    UVM_KV_UNROLL
    for (int r = 0; r < kRows; ++r) {
      m[r] = kLowestScore;
      l[r] = 0.0f;
      const int row = piece.row0 + r;
      const int token = piece.item.query_row + row / piece.group;
      const int head = piece.kv_head * piece.group + row % piece.group;
      UVM_KV_UNROLL
      for (int c = 0; c < Shape::kLaneChunks; ++c) {
        const int chunk = lane % Shape::kLanes + c * Shape::kLanes;
        load_chunk(params, r, c, r < piece.num_rows && chunk < Shape::kChunks, token, head, chunk);
      }
    }
  }

  // One stage: scores, new maximum, weights, weighted V.
  template <class Lane>
  UVM_KV_HD void consume(Lane& lane, const Chunk16* stage, const Piece& piece, int token) {
    float scores[Shape::kTeamTokens * kRows];
    const Chunk16* keys = stage + lane.index();
    dot_keys(keys, scores);
    sum_team<Shape::kLanes>(lane, scores);
    mask(piece, token, scores);
    to_weights(scores);
    add_values(keys + Shape::kStageChunks / 2, scores);
  }

  // Joins the teams of a warp, nearest first; team 0 holds the result.
  template <class Lane>
  UVM_KV_HD void join_teams(Lane& lane) {
    UVM_KV_UNROLL
    for (int distance = Shape::kLanes; distance < kWarpLanes; distance *= 2) {
      UVM_KV_UNROLL
      for (int r = 0; r < kRows; ++r) {
        float other[kElements + 2];
        UVM_KV_UNROLL
        for (int e = 0; e < kElements; ++e) {
          other[e] = acc[r][e];
        }
        other[kElements] = m[r];
        other[kElements + 1] = l[r];
        lane.exchange(other, distance);
        const MergeWeights weights = merge_weights(m[r], other[kElements]);
        m[r] = weights.m;
        l[r] = merge_sum(weights, l[r], other[kElements + 1]);
        UVM_KV_UNROLL
        for (int e = 0; e < kElements; ++e) {
          acc[r][e] = merge_sum(weights, acc[r][e], other[e]);
        }
      }
    }
  }

  // Run by team 0. Writes the output where the piece is the whole context, else a partial.
  UVM_KV_HD void store(const AttentionParams& params, const Piece& piece, int lane) const {
    UVM_KV_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (r >= piece.num_rows) {
        return;
      }
      if (piece.item.partial_row < 0) {
        store_output(params, piece, r, lane);
      } else {
        store_partial(params, piece, r, lane);
      }
    }
  }

 private:
  UVM_KV_HD void load_chunk(const AttentionParams& params, int r, int c, bool exists, int token, int head, int chunk) {
    float values[Shape::kVec] = {};
    if (exists) {
      const std::byte* row = params.query + token * params.query_stride_bytes;
      const Chunk16* chunks = reinterpret_cast<const Chunk16*>(row + std::int64_t{head} * kHeadDim * sizeof(T));
      unpack<T>(chunks[chunk], values);
    }
    UVM_KV_UNROLL
    for (int e = 0; e < Shape::kVec; ++e) {
      query[r][c * Shape::kVec + e] = values[e] * params.scale_log2;
      acc[r][c * Shape::kVec + e] = 0.0f;
    }
  }

  UVM_KV_HD void dot_keys(const Chunk16* keys, float* scores) const {
    UVM_KV_UNROLL
    for (int t = 0; t < Shape::kTeamTokens; ++t) {
      float key[kElements];
      unpack_row(keys, t, key);
      UVM_KV_UNROLL
      for (int r = 0; r < kRows; ++r) {
        float sum = 0.0f;
        UVM_KV_UNROLL
        for (int e = 0; e < kElements; ++e) {
          sum = fmaf(query[r][e], key[e], sum);
        }
        scores[t * kRows + r] = sum;
      }
    }
  }

  UVM_KV_HD static void unpack_row(const Chunk16* rows, int t, float* out) {
    UVM_KV_UNROLL
    for (int c = 0; c < Shape::kLaneChunks; ++c) {
      unpack<T>(rows[(t * Shape::kLaneChunks + c) * kWarpLanes], out + c * Shape::kVec);
    }
  }

  // Only the stages at the end of a piece, or beyond the first row's position, take the slow way.
  UVM_KV_HD static void mask(const Piece& piece, int token, float* scores) {
    if (token + Shape::kTeamTokens <= piece.visible_end) {
      return;
    }
    UVM_KV_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int last = piece.last_visible(r);
      UVM_KV_UNROLL
      for (int t = 0; t < Shape::kTeamTokens; ++t) {
        if (token + t > last || token + t >= piece.item.end) {
          scores[t * kRows + r] = kMaskedScore;
        }
      }
    }
  }

  // Scores become weights 2^(s - m). What was summed before is scaled only where the maximum grew.
  UVM_KV_HD void to_weights(float* scores) {
    UVM_KV_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float highest = m[r];
      UVM_KV_UNROLL
      for (int t = 0; t < Shape::kTeamTokens; ++t) {
        highest = fmaxf(highest, scores[t * kRows + r]);
      }
      if (highest > m[r]) {
        const float scale = exp2_fast(m[r] - highest);
        m[r] = highest;
        l[r] *= scale;
        UVM_KV_UNROLL
        for (int e = 0; e < kElements; ++e) {
          acc[r][e] *= scale;
        }
      }
      UVM_KV_UNROLL
      for (int t = 0; t < Shape::kTeamTokens; ++t) {
        scores[t * kRows + r] = exp2_fast(scores[t * kRows + r] - m[r]);
        l[r] += scores[t * kRows + r];
      }
    }
  }

  UVM_KV_HD void add_values(const Chunk16* values, const float* weights) {
    UVM_KV_UNROLL
    for (int t = 0; t < Shape::kTeamTokens; ++t) {
      float value[kElements];
      unpack_row(values, t, value);
      UVM_KV_UNROLL
      for (int r = 0; r < kRows; ++r) {
        UVM_KV_UNROLL
        for (int e = 0; e < kElements; ++e) {
          acc[r][e] = fmaf(weights[t * kRows + r], value[e], acc[r][e]);
        }
      }
    }
  }

  UVM_KV_HD void store_output(const AttentionParams& params, const Piece& piece, int r, int lane) const {
    const int row = piece.row0 + r;
    const std::int64_t token = piece.item.query_row + row / piece.group;
    const int head = piece.kv_head * piece.group + row % piece.group;
    std::byte* out = params.out + token * params.out_stride_bytes + std::int64_t{head} * kHeadDim * sizeof(T);
    const float inverse = 1.0f / l[r];
    UVM_KV_UNROLL
    for (int c = 0; c < Shape::kLaneChunks; ++c) {
      const int chunk = lane + c * Shape::kLanes;
      float values[Shape::kVec];
      UVM_KV_UNROLL
      for (int e = 0; e < Shape::kVec; ++e) {
        values[e] = acc[r][c * Shape::kVec + e] * inverse;
      }
      if (chunk < Shape::kChunks) {
        reinterpret_cast<Chunk16*>(out)[chunk] = pack<T>(values);
      }
    }
  }

  UVM_KV_HD void store_partial(const AttentionParams& params, const Piece& piece, int r, int lane) const {
    const std::int64_t row =
        piece.item.partial_row + std::int64_t{piece.kv_head} * piece.item.num_rows + piece.row0 + r;
    if (lane == 0) {
      params.partials.stats[2 * row] = m[r];
      params.partials.stats[2 * row + 1] = l[r];
    }
    UVM_KV_UNROLL
    for (int c = 0; c < Shape::kLaneChunks; ++c) {
      const int chunk = lane + c * Shape::kLanes;
      if (chunk < Shape::kChunks) {
        float* out = params.partials.acc + row * kHeadDim + chunk * Shape::kVec;
        UVM_KV_UNROLL
        for (int e = 0; e < Shape::kVec; e += 4) {
          *reinterpret_cast<Chunk16*>(out + e) = pack<float>(&acc[r][c * Shape::kVec + e]);
        }
      }
    }
  }
};

// One warp, its own ring: stages are copied kStages - 1 ahead.
template <class T, int kHeadDim, int kRows, class Lane>
UVM_KV_HD void attend_narrow(Lane& lane, const AttentionParams& params, const Piece& piece, Chunk16* ring) {
  using Shape = RowShape<T, kHeadDim>;
  const int team_token = lane.index() / Shape::kLanes * Shape::kTeamTokens;
  const int begin = piece.item.begin;
  const int num_stages = (piece.item.end - begin + Shape::kStageTokens - 1) / Shape::kStageTokens;

  StageCopier<T, kHeadDim> copier(params, piece, ring, lane.index(), begin, Shape::kStageTokens);
  UVM_KV_UNROLL
  for (int s = 0; s < kStages - 1; ++s) {
    copier.copy_stage(lane, s);
    lane.commit();
  }
  RowStates<T, kHeadDim, kRows> rows;
  rows.load(params, piece, lane.index());
  int slot = 0;
  for (int s = 0; s < num_stages; ++s) {
    lane.template wait_all_but<kStages - 2>();
    copier.copy_stage(lane, slot == 0 ? kStages - 1 : slot - 1);
    lane.commit();
    rows.consume(lane, ring + slot * Shape::kStageChunks, piece, begin + s * Shape::kStageTokens + team_token);
    slot = slot == kStages - 1 ? 0 : slot + 1;
  }
  lane.template wait_all_but<0>();  // the zeros of stages past the end: the next piece copies into the same slots
  rows.join_teams(lane);
  if (lane.index() < Shape::kLanes) {
    rows.store(params, piece, lane.index());
  }
}

// Four warps, one ring: warp w copies stage 4 i + w, and all four read each of them, in the same order as above.
template <class T, int kHeadDim, class Lane>
UVM_KV_HD void attend_wide(Lane& lane, const AttentionParams& params, const Piece& piece, Chunk16* cta_ring) {
  using Shape = RowShape<T, kHeadDim>;
  constexpr int kRingChunks = kStages * Shape::kStageChunks;
  constexpr int kStep = kCtaWarps * Shape::kStageTokens;
  const int team_token = lane.index() / Shape::kLanes * Shape::kTeamTokens;
  const int begin = piece.item.begin;
  const int num_steps = (piece.item.end - begin + kStep - 1) / kStep;

  StageCopier<T, kHeadDim> copier(params, piece, cta_ring + lane.warp() * kRingChunks, lane.index(),
                                  begin + lane.warp() * Shape::kStageTokens, kStep);
  UVM_KV_UNROLL
  for (int s = 0; s < kStages - 1; ++s) {
    copier.copy_stage(lane, s);
    lane.commit();
  }
  RowStates<T, kHeadDim, kWideWarpRows> rows;
  rows.load(params, piece, lane.index());
  int slot = 0;
  for (int s = 0; s < num_steps; ++s) {
    lane.template wait_all_but<kStages - 2>();
    lane.cta_barrier();  // stage s is there for all, and all are done with stage s - 1
    copier.copy_stage(lane, slot == 0 ? kStages - 1 : slot - 1);
    lane.commit();
    for (int w = 0; w < kCtaWarps; ++w) {
      const int token = begin + s * kStep + w * Shape::kStageTokens;
      if (piece.num_rows > 0 && token < piece.item.end) {  // the same for all lanes of a warp
        rows.consume(lane, cta_ring + w * kRingChunks + slot * Shape::kStageChunks, piece, token + team_token);
      }
    }
    slot = slot == kStages - 1 ? 0 : slot + 1;
  }
  lane.template wait_all_but<0>();  // as above
  rows.join_teams(lane);
  if (lane.index() < Shape::kLanes) {
    rows.store(params, piece, lane.index());
  }
}

// Blocks of query rows of an item: more than one where the heads of a group alone exceed a wide tile.
UVM_KV_HD int row_blocks_of(bool wide, int group) { return wide ? (group + kWideRows - 1) / kWideRows : 1; }

// Units of a pass: (item, KV head, block of query rows); KV heads side by side, as they lie in a block.
template <class T, int kHeadDim, int kRows, bool kWide, class Lane>
UVM_KV_HD void attend_unit(Lane& lane, const AttentionParams& params, int unit, int row_blocks, Chunk16* ring) {
  const int per_item = params.kv.num_kv_heads * row_blocks;
  const int item = unit / per_item;
  const int in_item = unit - item * per_item;
  const int first_row = kWide ? in_item % row_blocks * kWideRows + lane.warp() * kWideWarpRows : 0;
  const Piece piece(params.items[kWide ? 1 : 0][item], in_item / row_blocks, params.group(), first_row);
  if constexpr (kWide) {
    attend_wide<T, kHeadDim>(lane, params, piece, ring);
  } else {
    constexpr int kRingChunks = kStages * RowShape<T, kHeadDim>::kStageChunks;
    attend_narrow<T, kHeadDim, kRows>(lane, params, piece, ring + lane.warp() * kRingChunks);
  }
}

// The life of a worker: a warp in the narrow pass, a CTA in the wide one.
template <class T, int kHeadDim, int kRows, bool kWide, class Lane>
UVM_KV_HD void run_worker(Lane& lane, const AttentionParams& params, Chunk16* ring) {
  constexpr int kPass = kWide ? 1 : 0;
  const int num_workers = kWide ? lane.num_ctas() : lane.num_ctas() * kCtaWarps;
  // Warp 0 of every CTA comes first, so that the workers on the link are spread over the chip.
  const int worker = kWide ? lane.cta() : lane.warp() * lane.num_ctas() + lane.cta();
  const int row_blocks = row_blocks_of(kWide, params.group());
  const int per_item = params.kv.num_kv_heads * row_blocks;
  const int num_host = params.plan->num_host_items[kPass] * per_item;
  const int num_device = params.plan->num_items[kPass] * per_item - num_host;
  QueueState* queue = params.queues + kPass;
  bool on_host = worker < params.num_host_workers;
  for (int turn = 0; turn < 2; ++turn) {
    const int count = on_host ? num_host : num_device;
    const int first = on_host ? 0 : num_host;
    std::int32_t* next = on_host ? &queue->next_host : &queue->next_device;
    int unit = count > 0 ? lane.template pull<kWide>(next) : 0;
    while (unit < count) {
      attend_unit<T, kHeadDim, kRows, kWide>(lane, params, first + unit, row_blocks, ring);
      unit = lane.template pull<kWide>(next);
    }
    on_host = !on_host;
  }
  lane.template leave<kWide>(queue, num_workers);
}

// ---- the merge: one query row of one head

struct MergeRow {
  const float* stats;
  const float* acc;
  std::int64_t split_rows;  // rows from one split to the next
  int num_splits;
};

UVM_KV_HD MergeRow merge_row(const AttentionParams& params, const MergeItem& item, int q_head) {
  const int group = params.group();
  const std::int64_t row = item.first_row + std::int64_t{q_head / group} * item.rows_per_head + q_head % group;
  return {params.partials.stats + 2 * row, params.partials.acc + row * params.kv.head_dim,
          std::int64_t{params.kv.num_kv_heads} * item.rows_per_head, item.num_splits};
}

struct MergeSum {
  float m;
  float l;
  float acc[4];
};

// Splits part, part + kMergeParts, .. in ascending order, of four elements.
UVM_KV_HD MergeSum merge_part(const MergeRow& row, int head_dim, int part, int element) {
  MergeSum sum{kLowestScore, 0.0f, {}};
#if defined(__CUDA_ARCH__)
#pragma unroll 8
#endif
  for (int i = part; i < row.num_splits; i += kMergeParts) {
    sum.m = fmaxf(sum.m, row.stats[2 * i * row.split_rows]);
  }
#if defined(__CUDA_ARCH__)
#pragma unroll 4
#endif
  for (int i = part; i < row.num_splits; i += kMergeParts) {
    const std::int64_t at = i * row.split_rows;
    const float weight = exp2_fast(row.stats[2 * at] - sum.m);
    const Chunk16 chunk = *reinterpret_cast<const Chunk16*>(row.acc + at * head_dim + element);
    float values[4];
    unpack<float>(chunk, values);
    sum.l = fmaf(weight, row.stats[2 * at + 1], sum.l);
    UVM_KV_UNROLL
    for (int e = 0; e < 4; ++e) {
      sum.acc[e] = fmaf(weight, values[e], sum.acc[e]);
    }
  }
  return sum;
}

UVM_KV_HD void merge_add(MergeSum& sum, const MergeSum& other) {
  const MergeWeights weights = merge_weights(sum.m, other.m);
  sum.m = weights.m;
  sum.l = merge_sum(weights, sum.l, other.l);
  UVM_KV_UNROLL
  for (int e = 0; e < 4; ++e) {
    sum.acc[e] = merge_sum(weights, sum.acc[e], other.acc[e]);
  }
}

template <class T>
UVM_KV_HD void merge_store(const AttentionParams& params, const MergeItem& item, int q_head, int element,
                           const MergeSum& sum) {
  std::byte* out = params.out + item.query_row * params.out_stride_bytes;
  T* row = reinterpret_cast<T*>(out) + q_head * params.kv.head_dim + element;
  const float inverse = 1.0f / sum.l;
  UVM_KV_UNROLL
  for (int e = 0; e < 4; ++e) {
    row[e] = from_float<T>(sum.acc[e] * inverse);
  }
}

// ---- what a caller prepares

// Workspace: queues, then statistics, then accumulators of the partials.
//   | QueueState [kNumPasses], padded to 256 B | stats [rows, 2] padded to 256 B | acc [rows, head_dim] |
struct WorkspaceLayout {
  static constexpr std::int64_t kQueueBytes = 256;

  std::int64_t stats_bytes;
  std::int64_t acc_bytes;

  std::int64_t bytes() const { return kQueueBytes + stats_bytes + acc_bytes; }
};

inline WorkspaceLayout workspace_layout(const PlanCapacity& capacity, int head_dim) {
  const std::int64_t stats = capacity.partial_rows * 2 * static_cast<std::int64_t>(sizeof(float));
  return {(stats + 255) / 256 * 256, capacity.partial_rows * head_dim * static_cast<std::int64_t>(sizeof(float))};
}

inline std::int64_t attention_workspace_bytes(const PlanCapacity& capacity, int head_dim) {
  return workspace_layout(capacity, head_dim).bytes();
}

// Points the parameters at a plan and a workspace.
inline void set_plan(AttentionParams* params, const PlanCapacity& capacity, const std::byte* plan,
                     std::byte* workspace) {
  const WorkspaceLayout layout = workspace_layout(capacity, params->kv.head_dim);
  params->plan = reinterpret_cast<const PlanHeader*>(plan);
  for (int pass = 0; pass < kNumPasses; ++pass) {
    params->items[pass] = reinterpret_cast<const WorkItem*>(plan + capacity.items_offset(pass));
  }
  params->merges = reinterpret_cast<const MergeItem*>(plan + capacity.merges_offset());
  params->queues = reinterpret_cast<QueueState*>(workspace);
  params->partials.stats = reinterpret_cast<float*>(workspace + WorkspaceLayout::kQueueBytes);
  params->partials.acc = reinterpret_cast<float*>(workspace + WorkspaceLayout::kQueueBytes + layout.stats_bytes);
}

struct AttentionArgs {
  DType dtype = DType::kFp16;  // of K, V, query and output
  PagedKV kv;                  // at_layer()
  BlockTable table;            // device memory
  int num_q_heads = 0;
  float scale = 0.0f;          // softmax scale, usually 1 / sqrt(head_dim)
  const void* query = nullptr;  // [token, num_q_heads, head_dim]; rows may lie further apart
  void* out = nullptr;         // [token, num_q_heads, head_dim]; must not overlap the query
  std::int64_t query_stride_bytes = 0;
  std::int64_t out_stride_bytes = 0;
  const std::byte* plan = nullptr;  // device copy of what fill_plan wrote, 16-byte aligned
  PlanCapacity capacity;            // that it was written for; passes and merges of capacity 0 are not launched
  std::byte* workspace = nullptr;   // attention_workspace_bytes(), 256-byte aligned; zeroed once, used by one stream
  std::int64_t workspace_bytes = 0;
  int num_host_workers = 0;         // warps of the narrow pass, CTAs of the wide one; 0: the default
};

}  // namespace uvm_kv

struct CUstream_st;  // cudaStream_t without the CUDA headers

namespace uvm_kv {

// Zeroes the queues of a new workspace. Every launch leaves them at zero.
Status init_attention_workspace(std::byte* workspace, CUstream_st* stream);

// Launches on `stream` (at most three kernels); no allocation, no wait: capturable.
//   kInvalidArgument: null or unaligned pointers, strides, head counts, a workspace that is too small
//   kNotSupported: dtype (fp8, int8), head_dim other than 64, 80, 96, 128, 256, block size
//   kCudaError: what the launch said
// Run once before a capture, so that the kernels are loaded. A replay may find another plan in the same buffer, as long
// as it was filled with the same capacity.
Status paged_attention(const AttentionArgs& args, CUstream_st* stream);

#if defined(__CUDACC__)

// ---- the device

class DeviceLane {
 public:
  __device__ DeviceLane(int* cta_slot) : cta_slot_(cta_slot) {}

  __device__ int index() const { return threadIdx.x % kWarpLanes; }
  __device__ int warp() const { return threadIdx.x / kWarpLanes; }
  __device__ int cta() const { return blockIdx.x; }
  __device__ int num_ctas() const { return gridDim.x; }
  __device__ void cta_barrier() { __syncthreads(); }

  template <int kCount>
  __device__ void exchange(float (&values)[kCount], int distance) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = __shfl_xor_sync(kAll, values[i], distance);
    }
  }

  // Sum i lies with lane i x kLanes / kCount of the team; where there are more sums than lanes, one after the other.
  template <int kLanes, int kCount>
  __device__ void hand_round(float (&values)[kCount]) {
    constexpr int kHeld = kCount > kLanes ? kCount / kLanes : 1;
    float held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      held[i] = values[i];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = __shfl_sync(kAll, held[i % kHeld], i * kLanes / kCount, kLanes);
    }
  }

  // Asynchronous from compute capability 8.0 on; not valid: 16 zero bytes, and nothing is read.
  __device__ void copy_chunk(Chunk16* target, const std::byte* source, bool valid) {
#if __CUDA_ARCH__ >= 800
    const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(target));
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(source), "r"(bytes) : "memory");
#else
    *target = valid ? *reinterpret_cast<const Chunk16*>(source) : Chunk16{};
#endif
  }

  __device__ void commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }

  template <int kGroups>
  __device__ void wait_all_but() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
  }

  // The next unit of a queue, for the whole CTA or for this warp.
  template <bool kWholeCta>
  __device__ int pull(std::int32_t* next) {
    if constexpr (kWholeCta) {
      __syncthreads();  // nobody still reads the ring or the slot
      if (threadIdx.x == 0) {
        *cta_slot_ = atomicAdd(next, 1);
      }
      __syncthreads();
      return *cta_slot_;
    } else {
      int unit = 0;
      if (index() == 0) {
        unit = atomicAdd(next, 1);
      }
      return __shfl_sync(kAll, unit, 0);
    }
  }

  template <bool kWholeCta>
  __device__ void leave(QueueState* queue, int num_workers) {
    const bool speaks = kWholeCta ? threadIdx.x == 0 : index() == 0;
    // atomicInc wraps to 0 by itself with the last worker.
    if (speaks && atomicInc(&queue->num_left, num_workers - 1) == static_cast<unsigned>(num_workers - 1)) {
      queue->next_host = 0;
      queue->next_device = 0;
    }
  }

 private:
  static constexpr unsigned kAll = 0xffffffffu;
  int* cta_slot_;
};

// CTAs whose rings fit the shared memory of an SM. Up to 4 rows the registers are held to that number too, so that they
// do not limit the bytes in flight; more rows take what they take.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
inline constexpr int kCtasPerSm = 3;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
inline constexpr int kCtasPerSm = 4;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
inline constexpr int kCtasPerSm = 2;
#else
inline constexpr int kCtasPerSm = 1;
#endif

template <class T, int kHeadDim, int kRows, bool kWide>
__global__ void __launch_bounds__(kCtaWarps* kWarpLanes, kRows <= 4 || kCtasPerSm < 2 ? kCtasPerSm : 2)
    attention_kernel(const __grid_constant__ AttentionParams params) {
  extern __shared__ Chunk16 ring[];
  __shared__ int cta_slot;
  DeviceLane lane(&cta_slot);
  run_worker<T, kHeadDim, kRows, kWide>(lane, params, ring);
}

// One CTA for one (query token, head) at a time; thread = (part, four elements).
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kMergeParts* kHeadDim / 4)
    merge_kernel(const __grid_constant__ AttentionParams params) {
  __shared__ MergeSum sums[kMergeParts - 1][kHeadDim / 4];
  const int part = threadIdx.x / (kHeadDim / 4);
  const int quad = threadIdx.x % (kHeadDim / 4);
  const int num_units = params.plan->num_merges * params.num_q_heads;
  for (int unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
    const MergeItem item = params.merges[unit / params.num_q_heads];
    const int q_head = unit % params.num_q_heads;
    const MergeRow row = merge_row(params, item, q_head);
    MergeSum sum = merge_part(row, kHeadDim, part, 4 * quad);
    if (part > 0) {
      sums[part - 1][quad] = sum;
    }
    __syncthreads();
    if (part == 0) {
      for (int p = 0; p < kMergeParts - 1; ++p) {
        merge_add(sum, sums[p][quad]);
      }
      merge_store<T>(params, item, q_head, 4 * quad, sum);
    }
    __syncthreads();
  }
}

#endif  // __CUDACC__

}  // namespace uvm_kv
