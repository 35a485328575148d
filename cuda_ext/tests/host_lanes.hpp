// The attention kernels' lanes on the CPU, for host_kernels.cpp and host_runtime.cpp.
//
// Pieces, queues and merge are the headers' own. What stands in for the device is here: every lane is a fiber, lanes
// meet where the device would synchronise them, and an asynchronous copy lands at the last moment that the code's own
// waits allow: until then its target holds NaN, and another copy to it is an error.
#pragma once

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

}  // namespace
}  // namespace uvm_kv
