// What can go wrong besides a failing CUDA call. Host only: no CUDA header here.
//
// A wrong argument is std::invalid_argument (ValueError in Python): it says what was given and what is allowed.
#pragma once

#include <stdexcept>
#include <string>

namespace uvm_kv {

/// Managed memory that would not fit beside what is already held; see guard.hpp.
struct OversubscriptionError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Something this device or driver cannot do. There is no quiet substitute.
struct MissingCapability : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A call that must not be captured into a CUDA graph met a capturing stream.
struct CapturingStreamError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace uvm_kv
