// The kernels' shared code on the CPU, behind a C interface for tests/memory/test_kernels_host.py.
//
// Planning, index arithmetic, pieces, queues and merge are the headers' own. What stands in for the device is below:
// every lane is a fiber, lanes meet where the device would synchronise them, and an asynchronous copy lands at the last
// moment that the code's own waits allow: until then its target holds NaN, and another copy to it is an error.
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <unordered_set>
#include <vector>

#include "uvm_kv/append.cuh"
#include "uvm_kv/paged_attention.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace uvm_kv {
namespace {

// ---- fibers

constexpr std::size_t kStackBytes = 256 * 1024;

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  std::function<void()> body;
  bool done = false;
};

class Machine {
 public:
  // Runs all bodies by turns, in another order each time, until each has returned.
  void run(std::vector<std::function<void()>> bodies) {
    fibers_.clear();
    for (auto& body : bodies) {
      fibers_.push_back(std::make_unique<Fiber>());
      start(*fibers_.back(), std::move(body));
    }
    std::minstd_rand random;
    for (std::size_t left = fibers_.size(); left > 0;) {
      std::shuffle(fibers_.begin(), fibers_.end(), random);
      for (auto& fiber : fibers_) {
        if (!fiber->done) {
          enter(*fiber);
          left -= fiber->done ? 1 : 0;
        }
      }
    }
  }

  void yield() { leave(*current_, false); }

 private:
  static void trampoline(unsigned high, unsigned low) {
    auto* machine = reinterpret_cast<Machine*>((std::uintptr_t{high} << 32) | low);
    Fiber& fiber = *machine->current_;
    machine->arrived(nullptr);
    fiber.body();
    fiber.done = true;
    machine->leave(fiber, true);
  }

  void start(Fiber& fiber, std::function<void()> body) {
    fiber.body = std::move(body);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    const auto self = reinterpret_cast<std::uintptr_t>(this);
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(trampoline), 2, static_cast<unsigned>(self >> 32),
                static_cast<unsigned>(self & 0xffffffffu));
  }

  void enter(Fiber& fiber) {
    current_ = &fiber;
    void* fake_stack = nullptr;
    leaving(&fake_stack, fiber.stack.get(), kStackBytes);
    swapcontext(&main_, &fiber.context);
    arrived(fake_stack);
  }

  void leave(Fiber& fiber, bool for_good) {
    void* fake_stack = nullptr;
    leaving(for_good ? nullptr : &fake_stack, main_stack_, main_stack_bytes_);
    swapcontext(&fiber.context, &main_);
    arrived(fake_stack);
  }

#if defined(__SANITIZE_ADDRESS__)
  void leaving(void** fake_stack, const void* target, std::size_t bytes) {
    __sanitizer_start_switch_fiber(fake_stack, target, bytes);
  }
  void arrived(void* fake_stack) {
    const void* from = nullptr;
    std::size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fake_stack, &from, &bytes);
    if (main_stack_ == nullptr) {  // the first switch comes from there
      main_stack_ = from;
      main_stack_bytes_ = bytes;
    }
  }
#else
  void leaving(void**, const void*, std::size_t) {}
  void arrived(void*) {}
#endif

  std::vector<std::unique_ptr<Fiber>> fibers_;
  ucontext_t main_{};
  Fiber* current_ = nullptr;
  const void* main_stack_ = nullptr;
  std::size_t main_stack_bytes_ = 0;
};

// Where the lanes of a warp, or the threads of a CTA, meet.
class Meeting {
 public:
  Meeting(Machine& machine, int size) : machine_(machine), size_(size) {}

  void wait() {
    const int round = round_;
    if (++arrived_ == size_) {
      arrived_ = 0;
      ++round_;
    }
    while (round_ == round) {
      machine_.yield();
    }
  }

 private:
  Machine& machine_;
  int size_;
  int arrived_ = 0;
  int round_ = 0;
};

// ---- lanes

struct Copy {
  Chunk16* target;
  const std::byte* source;  // null: zeros
};

struct HostWarp {
  static constexpr int kMostValues = 64;

  explicit HostWarp(Machine& machine) : meeting(machine, kWarpLanes) {}

  Meeting meeting;
  float mailbox[2][kWarpLanes][kMostValues];
  int unit = 0;
};

struct HostCta {
  HostCta(Machine& machine, std::size_t ring_chunks) : meeting(machine, kCtaWarps * kWarpLanes), ring(ring_chunks) {
    for (int w = 0; w < kCtaWarps; ++w) {
      warps.emplace_back(machine);
    }
  }

  Meeting meeting;
  std::deque<HostWarp> warps;
  std::vector<Chunk16> ring;
  std::unordered_set<const Chunk16*> in_flight;  // targets of copies that have not landed
  int num_clashes = 0;                           // copies to a target that had one in flight: nobody knows which wins
  int unit = 0;
};

class HostLane {
 public:
  HostLane(HostCta& state, int cta, int num_ctas, int thread)
      : state_(state), cta_(cta), num_ctas_(num_ctas), thread_(thread) {}

  int index() const { return thread_ % kWarpLanes; }
  int warp() const { return thread_ / kWarpLanes; }
  int cta() const { return cta_; }
  int num_ctas() const { return num_ctas_; }
  void cta_barrier() { state_.meeting.wait(); }

  template <int kCount>
  void exchange(float (&values)[kCount], int distance) {
    static_assert(kCount <= HostWarp::kMostValues);
    HostWarp& warp = my_warp();
    auto& mailbox = warp.mailbox[turn_];
    turn_ = 1 - turn_;  // so that no lane overwrites what another has yet to read
    std::copy(values, values + kCount, mailbox[index()]);
    warp.meeting.wait();
    std::copy(mailbox[index() ^ distance], mailbox[index() ^ distance] + kCount, values);
  }

  template <int kLanes, int kCount>
  void hand_round(float (&values)[kCount]) {
    constexpr int kHeld = kCount > kLanes ? kCount / kLanes : 1;
    HostWarp& warp = my_warp();
    auto& mailbox = warp.mailbox[turn_];
    turn_ = 1 - turn_;
    std::copy(values, values + kHeld, mailbox[index()]);
    warp.meeting.wait();
    for (int i = 0; i < kCount; ++i) {
      values[i] = mailbox[index() / kLanes * kLanes + i * kLanes / kCount][i % kHeld];
    }
  }

  void copy_chunk(Chunk16* target, const std::byte* source, bool valid) {
    state_.num_clashes += state_.in_flight.insert(target).second ? 0 : 1;
    std::memset(target, 0xff, sizeof(Chunk16));
    open_.push_back({target, valid ? source : nullptr});
  }

  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }

  template <int kGroups>
  void wait_all_but() {
    while (groups_.size() > kGroups) {
      for (const Copy& copy : groups_.front()) {
        *copy.target = copy.source == nullptr ? Chunk16{} : *reinterpret_cast<const Chunk16*>(copy.source);
        state_.in_flight.erase(copy.target);
      }
      groups_.pop_front();
    }
  }

  template <bool kWholeCta>
  int pull(std::int32_t* next) {
    if constexpr (kWholeCta) {
      return pull_with(state_.meeting, state_.unit, thread_ == 0, next);
    } else {
      return pull_with(my_warp().meeting, my_warp().unit, index() == 0, next);
    }
  }

  template <bool kWholeCta>
  void leave(QueueState* queue, int num_workers) {
    if ((kWholeCta ? thread_ : index()) != 0) {
      return;
    }
    queue->num_left = queue->num_left + 1 == static_cast<unsigned>(num_workers) ? 0 : queue->num_left + 1;
    if (queue->num_left == 0) {
      queue->next_host = 0;
      queue->next_device = 0;
    }
  }

 private:
  static int pull_with(Meeting& meeting, int& unit, bool speaks, std::int32_t* next) {
    meeting.wait();
    if (speaks) {
      unit = (*next)++;
    }
    meeting.wait();
    return unit;
  }

  HostWarp& my_warp() { return state_.warps[static_cast<std::size_t>(warp())]; }

  HostCta& state_;
  int cta_;
  int num_ctas_;
  int thread_;
  int turn_ = 0;
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
};

// ---- the kernels

// Answers how many copies clashed.
template <class T, int kHeadDim, int kRows, bool kWide>
int run_pass(const AttentionParams& params, int num_ctas) {
  Machine machine;
  std::deque<HostCta> ctas;
  std::vector<std::function<void()>> bodies;
  for (int c = 0; c < num_ctas; ++c) {
    ctas.emplace_back(machine, kCtaWarps * kStages * RowShape<T, kHeadDim>::kStageChunks);
    for (int t = 0; t < kCtaWarps * kWarpLanes; ++t) {
      bodies.emplace_back([&params, &cta = ctas.back(), c, num_ctas, t] {
        HostLane lane(cta, c, num_ctas, t);
        run_worker<T, kHeadDim, kRows, kWide>(lane, params, cta.ring.data());
      });
    }
  }
  machine.run(std::move(bodies));
  return std::accumulate(ctas.begin(), ctas.end(), 0, [](int sum, const HostCta& c) { return sum + c.num_clashes; });
}

template <class T>
void run_merge(const AttentionParams& params) {
  const int head_dim = params.kv.head_dim;
  for (int i = 0; i < params.plan->num_merges; ++i) {
    const MergeItem& item = params.merges[i];
    for (int head = 0; head < params.num_q_heads; ++head) {
      const MergeRow row = merge_row(params, item, head);
      for (int element = 0; element < head_dim; element += 4) {
        MergeSum sum = merge_part(row, head_dim, 0, element);
        for (int part = 1; part < kMergeParts; ++part) {
          merge_add(sum, merge_part(row, head_dim, part, element));
        }
        merge_store<T>(params, item, head, element, sum);
      }
    }
  }
}

template <class T, int kHeadDim>
int run_passes(const AttentionParams& params, const PlanCapacity& capacity, int num_ctas) {
  const int rows = narrow_rows(kHeadDim, params.group());
  constexpr bool kTuned = kHeadDim == 64 || kHeadDim == 128;
  int num_clashes = 0;
  if (capacity.items[0] > 0) {
    if (rows == 4) {
      num_clashes += run_pass<T, kHeadDim, 4, false>(params, num_ctas);
    } else if constexpr (kTuned) {
      num_clashes += rows == 1 ? run_pass<T, kHeadDim, 1, false>(params, num_ctas)
                               : run_pass<T, kHeadDim, 8, false>(params, num_ctas);
    }
  }
  if (capacity.items[1] > 0) {
    num_clashes += run_pass<T, kHeadDim, kWideWarpRows, true>(params, num_ctas);
  }
  run_merge<T>(params);
  return num_clashes;
}

template <class T>
int run_head_dim(const AttentionParams& params, const PlanCapacity& capacity, int num_ctas) {
  switch (params.kv.head_dim) {
    case 64:
      return run_passes<T, 64>(params, capacity, num_ctas);
    case 80:
      return run_passes<T, 80>(params, capacity, num_ctas);
    case 96:
      return run_passes<T, 96>(params, capacity, num_ctas);
    case 128:
      return run_passes<T, 128>(params, capacity, num_ctas);
    case 256:
      return run_passes<T, 256>(params, capacity, num_ctas);
    default:
      std::abort();
  }
}

int run_attention(DType dtype, const AttentionParams& params, const PlanCapacity& capacity, int num_ctas) {
  switch (dtype) {
    case DType::kFp16:
      return run_head_dim<Fp16>(params, capacity, num_ctas);
    case DType::kBf16:
      return run_head_dim<Bf16>(params, capacity, num_ctas);
    case DType::kFp32:
      return run_head_dim<float>(params, capacity, num_ctas);
    default:
      std::abort();
  }
}

}  // namespace
}  // namespace uvm_kv

// ---- C interface; the structs are repeated in the test

extern "C" {

struct HkCache {
  std::int32_t dtype, layout, num_layers, num_kv_heads, head_dim, block_size, split_block;
  std::int64_t chunk_bytes;
  std::byte* device;
  std::int64_t num_device_blocks;
  std::byte* host;
  std::int64_t num_host_blocks;
};

struct HkBatch {
  std::int32_t num_seqs, num_q_heads, split_tokens, first_host_block;
  const std::int32_t* query_lens;
  const std::int32_t* context_lens;
  const std::int32_t* blocks;
  const std::int32_t* indptr;
  std::int64_t row_stride;
  const std::uint8_t* block_on_host;
  std::int64_t num_flags;
};

static uvm_kv::KVGeometry geometry_of(const HkCache& c) {
  const int bytes = uvm_kv::element_bytes(static_cast<uvm_kv::DType>(c.dtype));
  return {c.num_layers, c.num_kv_heads, c.head_dim, bytes, c.block_size};
}

static uvm_kv::PagedKV view_of(const HkCache& c) {
  const auto layout = static_cast<uvm_kv::Layout>(c.layout);
  const auto geometry = geometry_of(c);
  const auto device = uvm_kv::make_slab_view(c.device, layout, geometry, c.num_device_blocks, c.chunk_bytes);
  const auto host = uvm_kv::make_slab_view(c.host, layout, geometry, c.num_host_blocks, c.chunk_bytes);
  return uvm_kv::make_paged_kv(device, host, c.split_block, geometry);
}

static uvm_kv::PlanInput plan_input(const HkCache& c, const HkBatch& b) {
  uvm_kv::PlanInput input;
  const auto geometry = geometry_of(c);
  input.num_q_heads = b.num_q_heads;
  input.num_kv_heads = c.num_kv_heads;
  input.head_dim = c.head_dim;
  input.element_bytes = geometry.element_bytes;
  input.block_size = c.block_size;
  input.split_tokens = b.split_tokens;
  input.query_lens = {b.query_lens, static_cast<std::size_t>(b.num_seqs)};
  input.context_lens = {b.context_lens, static_cast<std::size_t>(b.num_seqs)};
  input.table = {b.blocks, b.indptr, b.row_stride};
  input.first_host_block = b.first_host_block;
  input.block_on_host = {b.block_on_host, static_cast<std::size_t>(b.num_flags)};
  return input;
}

static int answer(const uvm_kv::Status& status, char* text) {
  std::memcpy(text, status.text, sizeof(status.text));
  return static_cast<int>(status.code);
}

int hk_check(const HkCache* cache, char* text) { return answer(uvm_kv::check_paged_kv(view_of(*cache)), text); }

// Byte offset of a slot; *on_host says in which slab.
std::int64_t hk_slot(const HkCache* cache, int layer, int block, int which, int head, int slot, int* on_host) {
  const uvm_kv::PagedKV kv = view_of(*cache);
  *on_host = block >= kv.split_block ? 1 : 0;
  return kv.block(layer, block) + kv.slot_offset(which, head, slot) - (*on_host != 0 ? cache->host : cache->device);
}

void hk_to_float(int dtype, const std::uint16_t* in, float* out, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    out[i] = dtype == 0 ? uvm_kv::to_float(uvm_kv::Fp16{in[i]}) : uvm_kv::to_float(uvm_kv::Bf16{in[i]});
  }
}

void hk_from_float(int dtype, const float* in, std::uint16_t* out, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    out[i] = dtype == 0 ? uvm_kv::from_float<uvm_kv::Fp16>(in[i]).bits : uvm_kv::from_float<uvm_kv::Bf16>(in[i]).bits;
  }
}

// counts: narrow items, wide items, merges, rows of partials; bytes of the plan.
int hk_count_plan(const HkCache* cache, const HkBatch* batch, std::int64_t* counts, char* text) {
  uvm_kv::PlanCapacity capacity;
  const uvm_kv::Status status = uvm_kv::count_plan(plan_input(*cache, *batch), &capacity);
  counts[0] = capacity.items[0];
  counts[1] = capacity.items[1];
  counts[2] = capacity.merges;
  counts[3] = capacity.partial_rows;
  counts[4] = capacity.bytes();
  return answer(status, text);
}

int hk_fill_plan(const HkCache* cache, const HkBatch* batch, const std::int64_t* counts, std::byte* plan,
                 std::int64_t bytes, char* text) {
  uvm_kv::PlanCapacity capacity{{counts[0], counts[1]}, counts[2], counts[3]};
  const std::span<std::byte> buffer{plan, static_cast<std::size_t>(bytes)};
  return answer(uvm_kv::fill_plan(plan_input(*cache, *batch), capacity, buffer), text);
}

// Planning, pieces on num_ctas CTAs, merge. The workspace starts as NaN, but for the queues, and the plan as all ones.
// counts: as of hk_count_plan, or more, as in a captured graph.
int hk_attention(const HkCache* cache, const HkBatch* batch, const std::int64_t* counts, int layer, float scale,
                 const std::byte* query, std::byte* out, std::int64_t query_stride_bytes, int num_ctas,
                 int num_host_workers, char* text) {
  const uvm_kv::PlanCapacity capacity{{counts[0], counts[1]}, counts[2], counts[3]};
  const uvm_kv::PlanInput input = plan_input(*cache, *batch);
  std::vector<uvm_kv::Chunk16> plan(static_cast<std::size_t>(capacity.bytes()) / 16);
  std::vector<uvm_kv::Chunk16> workspace(
      static_cast<std::size_t>(uvm_kv::attention_workspace_bytes(capacity, cache->head_dim) + 15) / 16);
  auto* plan_bytes = reinterpret_cast<std::byte*>(plan.data());
  auto* workspace_bytes = reinterpret_cast<std::byte*>(workspace.data());
  std::memset(plan_bytes, 0xff, plan.size() * 16);
  const uvm_kv::Status status = uvm_kv::fill_plan(input, capacity, {plan_bytes, plan.size() * 16});
  if (!status.ok()) {
    return answer(status, text);
  }
  std::memset(workspace_bytes, 0xff, workspace.size() * 16);
  std::memset(workspace_bytes, 0, uvm_kv::WorkspaceLayout::kQueueBytes);

  uvm_kv::AttentionParams params;
  params.kv = view_of(*cache);
  params.table = input.table;
  params.layer = layer;
  params.num_q_heads = batch->num_q_heads;
  params.query = query;
  params.out = out;
  params.query_stride_bytes = query_stride_bytes;
  params.out_stride_bytes = batch->num_q_heads * params.kv.row_bytes();
  params.scale_log2 = scale * uvm_kv::kLog2E;
  params.num_host_workers = num_host_workers;
  uvm_kv::set_plan(&params, capacity, plan_bytes, workspace_bytes);
  if (const int clashes = uvm_kv::run_attention(static_cast<uvm_kv::DType>(cache->dtype), params, capacity, num_ctas)) {
    return answer(uvm_kv::make_status(uvm_kv::Status::Code::kCudaError,
                                      "%d copies went to a target that had one in flight", clashes), text);
  }
  for (const std::byte* b = workspace_bytes; b < workspace_bytes + uvm_kv::WorkspaceLayout::kQueueBytes; ++b) {
    if (*b != std::byte{0}) {
      return answer(uvm_kv::make_status(uvm_kv::Status::Code::kCudaError, "the queues were not left at zero"), text);
    }
  }
  return answer(status, text);
}

void hk_append(const HkCache* cache, const HkBatch* batch, int layer, std::int32_t num_tokens, const std::int32_t* seqs,
               const std::int32_t* positions, const std::byte* key, const std::byte* value,
               std::int64_t key_stride_bytes, std::int64_t value_stride_bytes) {
  uvm_kv::AppendParams params;
  params.kv = view_of(*cache);
  params.table = {batch->blocks, batch->indptr, batch->row_stride};
  params.layer = layer;
  params.num_tokens = num_tokens;
  params.seqs = seqs;
  params.positions = positions;
  params.key = key;
  params.value = value;
  params.key_stride_bytes = key_stride_bytes;
  params.value_stride_bytes = value_stride_bytes;
  const std::int64_t units = std::int64_t{num_tokens} * uvm_kv::append_units_per_token(params.kv);
  for (std::int64_t unit = 0; unit < units; ++unit) {
    uvm_kv::append_unit(params, static_cast<int>(unit));
  }
}

// Merges `count` states (m, l, acc [dim]) one after the other, as teams do, and all at once, as splits are.
void hk_merge(const float* stats, const float* acc, int count, int dim, float* folded, float* merged) {
  float m = stats[0];
  float l = stats[1];
  std::copy(acc, acc + dim, folded);
  for (int i = 1; i < count; ++i) {
    const uvm_kv::MergeWeights weights = uvm_kv::merge_weights(m, stats[2 * i]);
    m = weights.m;
    l = uvm_kv::merge_sum(weights, l, stats[2 * i + 1]);
    for (int d = 0; d < dim; ++d) {
      folded[d] = uvm_kv::merge_sum(weights, folded[d], acc[i * dim + d]);
    }
  }
  for (int d = 0; d < dim; ++d) {
    folded[d] /= l;
  }
  const uvm_kv::MergeRow row{stats, acc, 1, count};
  for (int d = 0; d < dim; d += 4) {
    uvm_kv::MergeSum sum = uvm_kv::merge_part(row, dim, 0, d);
    for (int part = 1; part < uvm_kv::kMergeParts; ++part) {
      uvm_kv::merge_add(sum, uvm_kv::merge_part(row, dim, part, d));
    }
    for (int e = 0; e < 4; ++e) {
      merged[d + e] = sum.acc[e] / sum.l;
    }
  }
}

}  // extern "C"
