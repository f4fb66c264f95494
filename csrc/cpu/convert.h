// The 16-bit types, and how they widen and narrow.
#pragma once

#include <cstdint>
#include <cstring>

#include "gemm.h"

namespace longlora::cpu::LONGLORA_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {  // not _Float16, which g++ 11 lacks and whose conversions would tie the wheel to a newer libgcc
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  // Exponent and mantissa moved into place, then 2^112 corrects the bias, of subnormal numbers too.
  const uint32_t finite = to_bits(from_bits(magnitude << 13) * 0x1p112f);
  const uint32_t inf_or_nan = 0x7f800000u | magnitude << 13;
  return from_bits(sign | (magnitude < 0x7c00u ? finite : inf_or_nan));
}

// To the nearest value, ties to the even one.
inline void narrow(double x, double* out) { *out = x; }
inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, BFloat16* out) {
  const uint32_t bits = to_bits(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  out->bits = static_cast<uint16_t>((is_nan ? bits | 0x400000u : rounded) >> 16);
}
inline void narrow(float x, Float16* out) {
  const uint32_t sign = to_bits(x) >> 16 & 0x8000u;
  const uint32_t magnitude = to_bits(x) & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 1/2 makes the float unit round where the 10 bits of a subnormal end.
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t inf_or_nan = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  out->bits = static_cast<uint16_t>(sign | (magnitude < 0x47800000u ? finite : inf_or_nan));
}

template <typename T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateOf<T>::type;

// What T is multiplied as. bfloat16 goes in pairs where the processor multiplies those; else all but fp64 is widened to
// fp32.
template <typename T>
struct OperandOf {
  using type = Accumulate<T>;
};
#ifdef __AVX512BF16__
template <>
struct OperandOf<BFloat16> {
  using type = Pair;
};
#endif
template <typename T>
using Multiplied = typename OperandOf<T>::type;

}  // namespace longlora::cpu::LONGLORA_ISA
