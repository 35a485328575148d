// A guard against oversubscription: managed memory beyond the card's free memory is refused unless the user asks for
// it, since oversubscribing a shared card can hang it for everybody. Host only: no CUDA header here.
//
// It looks once, when memory is asked for, and counts this process's slabs in full wherever their pages lie now. What
// it cannot see: managed memory that other libraries of this process hold (CuPy, cuda.core: give it a Booking), managed
// memory of other processes that is not on the card yet, and what anybody allocates afterwards, which then evicts ours.
// The reserve stands for those; on a card with other users it should be larger than the default.
#pragma once

#include <algorithm>
#include <cstddef>
#include <mutex>
#include <string>
#include <utility>

#include "uvm_kv/checks.hpp"
#include "uvm_kv/errors.hpp"

namespace uvm_kv {

/// Kept free for the context, page tables and what other libraries allocate.
inline constexpr std::size_t kDefaultReserveBytes = std::size_t{512} << 20;

struct GuardOptions {
  std::size_t reserve_bytes = kDefaultReserveBytes;
  bool allow_oversubscription = false;
};

/// held + asked <= free - reserve, in arithmetic that cannot wrap.
inline bool fits(std::size_t held, std::size_t asked, std::size_t free, std::size_t reserve) {
  const std::size_t room = free - std::min(free, reserve);
  return asked <= room && held <= room - asked;
}

/// The bytes held are counted in full although the part of them that lies on the card is no longer free: the sum is on
/// the safe side, as it must be for memory whose place is not known.
inline void require_fits(std::size_t held, std::size_t asked, std::size_t free, const GuardOptions& options) {
  if (options.allow_oversubscription || fits(held, asked, free, options.reserve_bytes)) return;
  const std::size_t room = free - std::min(free, options.reserve_bytes);
  throw OversubscriptionError("managed memory refused: " + text(held) + " held in all pools and " + text(asked) +
                              " asked exceed " + text(room) + " (" + text(free) +
                              " free on the card now, less a reserve of " + text(options.reserve_bytes) +
                              "); ask for less, or set allow_oversubscription=true on a card that is yours alone");
}

/// Bytes of managed memory over all pools of this process.
class ManagedLedger {
 public:
  /// Checks and books in one step, so that two threads cannot both take the last room. `free_now` is asked inside.
  template <class FreeNow>
  void book(std::size_t bytes, FreeNow&& free_now, const GuardOptions& options) {
    const std::lock_guard lock(mutex_);
    require_fits(held_, bytes, free_now(), options);
    held_ += bytes;
  }

  void release(std::size_t bytes) noexcept {
    const std::lock_guard lock(mutex_);
    held_ -= std::min(held_, bytes);
  }

  std::size_t held() const {
    const std::lock_guard lock(mutex_);
    return held_;
  }

  /// One for the process, and for all its cards: on the safe side where there are several.
  static ManagedLedger& of_process() {
    static ManagedLedger ledger;
    return ledger;
  }

 private:
  mutable std::mutex mutex_;
  std::size_t held_ = 0;
};

/// Bytes that are in the ledger as long as this lives.
class Booking final {
 public:
  template <class FreeNow>
  Booking(std::size_t bytes, FreeNow&& free_now, const GuardOptions& options,
          ManagedLedger& ledger = ManagedLedger::of_process())
      : ledger_(&ledger), bytes_(bytes) {
    ledger.book(bytes, std::forward<FreeNow>(free_now), options);
  }
  ~Booking() { end(); }
  Booking(Booking&& other) noexcept : ledger_(other.ledger_), bytes_(std::exchange(other.bytes_, 0)) {}
  Booking(const Booking&) = delete;
  Booking& operator=(const Booking&) = delete;

  /// A second call does nothing.
  void end() noexcept { ledger_->release(std::exchange(bytes_, 0)); }
  /// The memory could not be given back: it stays in the ledger for good.
  void keep() noexcept { bytes_ = 0; }

 private:
  ManagedLedger* ledger_;
  std::size_t bytes_;
};

}  // namespace uvm_kv
