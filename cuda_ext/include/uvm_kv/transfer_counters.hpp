// Bytes and time of our own transfers, by CUDA events around each call. Time is the device's, not the caller's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "uvm_kv/stream.hpp"

namespace uvm_kv {

struct TransferTotals {
  std::size_t num_calls = 0;
  std::size_t bytes = 0;
  std::int64_t ns = 0;  ///< Sum over calls; overlapping calls on two streams count twice.
};

class TransferCounters final {
 public:
  /// `device`: of the streams that will be measured.
  explicit TransferCounters(int device) : device_(device) {}

  /// Runs `enqueue` between two events on `stream` and books `bytes` under `label` ("h2d", "d2h", "prefetch", ...).
  /// A call that throws is not booked.
  template <class Enqueue>
  void measure(const std::string& label, std::size_t bytes, std::uintptr_t stream, Enqueue&& enqueue) {
    require_not_capturing(to_stream(stream), "a timed transfer");
    Pending pending{label, bytes, take(), take()};
    pending.begin.record(stream, false);
    enqueue();
    pending.end.record(stream, false);
    const std::lock_guard lock(mutex_);
    pending_.push_back(std::move(pending));
    while (pending_.size() > kMaxPending && pending_.front().end.done()) {
      book(pending_.front());
      pending_.pop_front();
    }
  }

  /// Totals by label of the transfers that have ended. `wait`: waits for those that have not.
  std::map<std::string, TransferTotals> totals(bool wait) {
    const std::lock_guard lock(mutex_);
    for (auto at = pending_.begin(); at != pending_.end();) {
      if (wait) at->end.synchronize();
      if (!at->end.done()) {
        ++at;
        continue;
      }
      book(*at);
      at = pending_.erase(at);
    }
    return totals_;
  }

  std::size_t num_pending() const {
    const std::lock_guard lock(mutex_);
    return pending_.size();
  }

 private:
  struct Pending {
    std::string label;
    std::size_t bytes;
    Event begin;
    Event end;
  };

  /// Events are kept for the next call: creating one costs more than recording it.
  Event take() {
    const std::lock_guard lock(mutex_);
    if (spare_.empty()) return Event(true, device_);
    Event event = std::move(spare_.back());
    spare_.pop_back();
    return event;
  }

  void book(Pending& ended) {
    TransferTotals& total = totals_[ended.label];
    ++total.num_calls;
    total.bytes += ended.bytes;
    total.ns += ended.end.ns_since(ended.begin);
    spare_.push_back(std::move(ended.begin));
    spare_.push_back(std::move(ended.end));
  }

  /// Above this, what has ended is booked at once, so that a long run does not gather events.
  static constexpr std::size_t kMaxPending = 64;

  int device_;
  mutable std::mutex mutex_;
  std::deque<Pending> pending_;
  std::vector<Event> spare_;
  std::map<std::string, TransferTotals> totals_;
};

}  // namespace uvm_kv
