// Vectors and exp2 of one instruction set.
//
// Compiled once per instruction set (see kernels.cpp): LONGLORA_ISA names the namespace,
// LONGLORA_VECTOR_BYTES the register width. No function template of the standard library is used here:
// the linker may keep any one copy of it, and that one may need instructions this machine lacks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace longlora::cpu::LONGLORA_ISA {

template <typename T>
struct Simd {
  typedef T Vector __attribute__((vector_size(LONGLORA_VECTOR_BYTES)));
  static constexpr int kLanes = LONGLORA_VECTOR_BYTES / sizeof(T);
};
template <typename T>
using Vector = typename Simd<T>::Vector;
template <typename T>
constexpr int kLanes = Simd<T>::kLanes;

// The widest register over all instruction sets and types, in elements: tiles are padded to it.
constexpr int kPad = 16;

template <typename Int>
constexpr Int lesser(Int a, Int b) {
  return a < b ? a : b;
}
template <typename Int>
constexpr Int greater(Int a, Int b) {
  return a > b ? a : b;
}
constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// p points to kLanes values, aligned like a Vector: all tiles are.
template <typename T>
inline Vector<T>& as_vector(T* p) {
  return *reinterpret_cast<Vector<T>*>(p);
}
template <typename T>
inline const Vector<T>& as_vector(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}

template <typename T>
inline Vector<T> maximum(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

// 2^f for |f| <= 1/2: a polynomial of degree 6 (relative error 1.6e-8, 0.13 ulp, before rounding).
inline Vector<float> exp2_of_fraction(Vector<float> f) {
  Vector<float> p = 1.5353361959569156e-4f * f + 1.3398875016719103e-3f;
  p = p * f + 9.61843691766262e-3f;
  p = p * f + 5.5503323674201965e-2f;
  p = p * f + 2.4022647738456726e-1f;
  p = p * f + 6.931471824645996e-1f;
  return p * f + 1.0f;
}

// 2^x for x <= 0 (up to the rounding of a difference), within 2 ulp; results below the smallest normal number may
// become 0, -inf gives 0, NaN stays. x = n + f with |f| <= 1/2, and n goes to the exponent.
inline Vector<float> exp2(Vector<float> x) {
#ifdef __AVX512F__
  // 2^-200 is 0 in fp32. Of maximum's operands NaN comes from the second alone.
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-200.0f), reinterpret_cast<__m512>(x));
  const __m512 n = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_of_fraction(bounded - n), n);
#else
  typedef int32_t IntVector __attribute__((vector_size(LONGLORA_VECTOR_BYTES)));
  const IntVector in_range = x >= -126.0f;
  const Vector<float> out_of_range = x < 0.0f ? Vector<float>{} : x;
  x = in_range ? x : Vector<float>{} - 126.0f;
  const Vector<float> shifted = x + 12582912.0f;  // 1.5 * 2^23: rounds x to an integer in the low bits
  Vector<float> p = exp2_of_fraction(x - (shifted - 12582912.0f));
  IntVector bits;
  IntVector n;
  std::memcpy(&bits, &p, sizeof(bits));
  std::memcpy(&n, &shifted, sizeof(n));
  bits += n << 23;
  std::memcpy(&p, &bits, sizeof(p));
  return in_range ? p : out_of_range;
#endif
}

// fp64 serves gradcheck and tests: the scalar function is right to the last bit, and fast enough.
inline Vector<double> exp2(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = ::exp2(x[lane]);
  return x;
}

}  // namespace longlora::cpu::LONGLORA_ISA
