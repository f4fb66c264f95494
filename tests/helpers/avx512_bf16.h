// What csrc/cpu takes of AVX-512 for bfloat16 in pairs, in software: with it and -D__AVX512BF16__ g++ makes kernels
// that differ from the real ones in these six functions alone. Rounding and NaN are as in the instructions; subnormal
// numbers, which they take for 0, are kept.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

template <typename T, int kBytes>
struct Lanes {
  typedef T type __attribute__((vector_size(kBytes)));
};
using __m512 = Lanes<float, 64>::type;
using __m512i = Lanes<uint32_t, 64>::type;
using __m512bh = Lanes<uint16_t, 64>::type;
using __m256i = Lanes<uint64_t, 32>::type;
using __m256bh = Lanes<uint16_t, 32>::type;

inline float widened(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  for (int i = 0; i < 16; ++i) {
    sum[i] += widened(a[2 * i + 1]) * widened(b[2 * i + 1]);
    sum[i] += widened(a[2 * i]) * widened(b[2 * i]);
  }
  return sum;
}
inline __m256bh _mm512_cvtneps_pbh(__m512 x) {
  __m256bh narrowed;
  for (int i = 0; i < 16; ++i) {
    const float value = x[i];
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    narrowed[i] = (std::isnan(value) ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  }
  return narrowed;
}
inline __m512i _mm512_cvtepu16_epi32(__m256i x) {
  return __builtin_convertvector(reinterpret_cast<__m256bh>(x), __m512i);
}
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i _mm512_slli_epi32(__m512i x, unsigned int count) { return x << count; }
inline void _mm256_store_si256(__m256i* target, __m256i x) { *target = x; }
