// Numbers and the online softmax, the same on host and device.
//
// Softmax runs in base 2 on scores scaled by log2(e): state (m, l, acc) = (maximum, sum of 2^(s - m), weighted V).
// Products and sums are written as explicit fused multiply-adds, so that every kernel variant rounds alike.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "uvm_kv/paged_kv.cuh"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

// The host compiler does not know the pragma.
#if defined(__CUDA_ARCH__)
#define UVM_KV_UNROLL _Pragma("unroll")
#else
#define UVM_KV_UNROLL
#endif

namespace uvm_kv {

// Storage types: the bits alone, so that no CUDA header is needed on the host.
struct Fp16 {
  std::uint16_t bits;
};
struct Bf16 {
  std::uint16_t bits;
};

inline float fp16_to_float_on_host(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fu;
  const std::uint32_t fraction = bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const std::uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
  return std::bit_cast<float>(sign | (wide << 23) | (fraction << 13));
}

inline std::uint16_t float_to_fp16_on_host(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const float magnitude = std::fabs(value);
  if (!(magnitude < 65520.0f)) {  // rounds to infinity, or is no number
    return static_cast<std::uint16_t>(sign | (std::isnan(value) ? 0x7e00u : 0x7c00u));
  }
  if (magnitude < 0x1p-14f) {  // subnormal: the sum rounds to a multiple of 2^-24
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(magnitude + 0.5f) - 0x3f000000u));
  }
  const std::uint32_t absolute = bits & 0x7fffffffu;
  const std::uint32_t rounded = absolute + 0xfffu + ((absolute >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

UVM_KV_HD float to_float(float value) { return value; }

UVM_KV_HD float to_float(Bf16 value) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(static_cast<std::uint32_t>(value.bits) << 16);
#else
  return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
#endif
}

UVM_KV_HD float to_float(Fp16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  return fp16_to_float_on_host(value.bits);
#endif
}

template <class T>
UVM_KV_HD T from_float(float value);

template <>
UVM_KV_HD float from_float<float>(float value) {
  return value;
}

template <>
UVM_KV_HD Fp16 from_float<Fp16>(float value) {
#if defined(__CUDA_ARCH__)
  return Fp16{__half_as_ushort(__float2half_rn(value))};
#else
  return Fp16{float_to_fp16_on_host(value)};
#endif
}

template <>
UVM_KV_HD Bf16 from_float<Bf16>(float value) {
#if defined(__CUDA_ARCH__)
  return Bf16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) {
    return Bf16{0x7fff};
  }
  return Bf16{static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <class T>
inline constexpr int kChunkElements = 16 / static_cast<int>(sizeof(T));

// 16 bytes to floats and back; the loops unroll into register moves and conversions.
template <class T>
UVM_KV_HD void unpack(const Chunk16& chunk, float* out) {
  if constexpr (sizeof(T) == 4) {
    UVM_KV_UNROLL
    for (int i = 0; i < 4; ++i) {
#if defined(__CUDA_ARCH__)
      out[i] = __uint_as_float(chunk.words[i]);
#else
      out[i] = std::bit_cast<float>(chunk.words[i]);
#endif
    }
  } else {
    UVM_KV_UNROLL
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = to_float(T{static_cast<std::uint16_t>(chunk.words[i] & 0xffffu)});
      out[2 * i + 1] = to_float(T{static_cast<std::uint16_t>(chunk.words[i] >> 16)});
    }
  }
}

template <class T>
UVM_KV_HD Chunk16 pack(const float* in) {
  Chunk16 chunk;
  UVM_KV_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
#if defined(__CUDA_ARCH__)
      chunk.words[i] = __float_as_uint(in[i]);
#else
      chunk.words[i] = std::bit_cast<std::uint32_t>(in[i]);
#endif
    } else {
      const std::uint32_t low = from_float<T>(in[2 * i]).bits;
      const std::uint32_t high = from_float<T>(in[2 * i + 1]).bits;
      chunk.words[i] = low | (high << 16);
    }
  }
  return chunk;
}

UVM_KV_HD float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// Starting maximum: finite, so that a row that has seen no token yet gives weights of 0 or 1 and never inf - inf.
inline constexpr float kLowestScore = -1e30f;
inline constexpr float kLog2E = 1.4426950408889634f;

inline constexpr float kMaskedScore = -std::numeric_limits<float>::infinity();

struct MergeWeights {
  float m;  // maximum of both
  float a;  // what the sums of the first are multiplied with
  float b;
};

UVM_KV_HD MergeWeights merge_weights(float m_a, float m_b) {
  const float m = fmaxf(m_a, m_b);
  return {m, exp2_fast(m_a - m), exp2_fast(m_b - m)};
}

UVM_KV_HD float merge_sum(const MergeWeights& weights, float x_a, float x_b) {
  return fmaf(x_a, weights.a, x_b * weights.b);
}

}  // namespace uvm_kv
