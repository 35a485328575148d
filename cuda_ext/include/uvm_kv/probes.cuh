// Probes of the microbenchmark: plain kernels over any memory that the device reaches, with as little of our own in them
// as can be. What the attention kernel and the driver are held against.
//
//   read      every byte once, coalesced, 16 bytes a lane; a sum of all words, so that nothing can be left out
//   add_one   grid-stride over 32-bit words, in ascending order; or one thread a page, in an order that is given
//   fill      pseudorandom numbers that depend on seed and place alone
//   delay     holds a stream while the work behind it is enqueued
//
// Pointers and a stream; whose memory it is, is the caller's business. Everything is checked before a launch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "uvm_kv/attention_math.cuh"

namespace uvm_kv {

inline constexpr std::size_t kProbePageBytes = 4096;
inline constexpr std::size_t kProbePageWords = kProbePageBytes / sizeof(std::uint32_t);
/// Well below what a watchdog of a display card allows.
inline constexpr std::int64_t kMaxDelayNs = 500'000'000;

/// What a word of a filled range holds: 32 random bits, two fp16 or bf16 numbers, or one fp32 number.
enum class FillKind : int { words = 0, fp16 = 1, bf16 = 2, fp32 = 3 };

/// Bits for each (seed, index): two rounds of a multiply-xorshift hash, which changes half of the bits for each bit of
/// its input.
UVM_KV_HD std::uint32_t random_word(std::uint32_t seed, std::uint64_t index) {
  std::uint32_t x = static_cast<std::uint32_t>(index) + seed * 0x9e3779b9u;
  x ^= static_cast<std::uint32_t>(index >> 32) * 0x85ebca6bu;
  for (int round = 0; round < 2; ++round) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    x ^= x >> 16;
  }
  return x;
}

/// From 16 random bits: uniform in [-scale, scale), in steps of scale / 32768.
UVM_KV_HD float uniform16(std::uint32_t bits, float scale) {
  return scale * (static_cast<float>(static_cast<std::int16_t>(bits & 0xffffu)) * 0x1p-15f);
}

/// The word at `index` of a filled range.
UVM_KV_HD std::uint32_t fill_word(FillKind kind, std::uint32_t seed, std::uint64_t index, float scale) {
  const std::uint32_t word = random_word(seed, index);
  const float low = uniform16(word, scale);
  const float high = uniform16(word >> 16, scale);
  std::uint32_t result = word;
  if (kind == FillKind::fp16) {
    result = from_float<Fp16>(low).bits | static_cast<std::uint32_t>(from_float<Fp16>(high).bits) << 16;
  } else if (kind == FillKind::bf16) {
    result = from_float<Bf16>(low).bits | static_cast<std::uint32_t>(from_float<Bf16>(high).bits) << 16;
  } else if (kind == FillKind::fp32) {
#if defined(__CUDA_ARCH__)
    result = __float_as_uint(low);
#else
    result = std::bit_cast<std::uint32_t>(low);
#endif
  }
  return result;
}

/// Adds the sum of all 32-bit words in [address, address + bytes) to the 64-bit word at `total`, modulo 2^64. Bytes and
/// address in multiples of 16.
void probe_read(std::uintptr_t address, std::size_t bytes, std::uintptr_t total, std::uintptr_t stream);

/// Adds one to every 32-bit word, ascending.
void probe_add_one(std::uintptr_t address, std::size_t bytes, std::uintptr_t stream);

/// Adds one to the first `words_per_page` words of every page: thread i takes page order[i]. `order` holds each page
/// number once, as 32-bit words in memory that the device reaches; the probe cannot check that.
void probe_add_one_pages(std::uintptr_t address, std::size_t bytes, std::uintptr_t order, std::size_t words_per_page,
                         std::uintptr_t stream);

void probe_fill(std::uintptr_t address, std::size_t bytes, FillKind kind, std::uint32_t seed, float scale,
                std::uintptr_t stream);

/// Occupies the stream for about `ns`, at most kMaxDelayNs, with one thread. It ends by itself, so that whatever the
/// caller does meanwhile cannot wait for it forever.
void probe_delay(std::int64_t ns, std::uintptr_t stream);

}  // namespace uvm_kv
