// Vectors, exp2 and the one matrix product that every step of the CPU kernels is made of.
//
// Compiled once per instruction set (see kernels.cpp): LONGLORA_ISA names the namespace,
// LONGLORA_VECTOR_BYTES the register width. No function template of the standard library is used here:
// the linker may keep any one copy of it, and that one may need instructions this machine lacks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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

// 2^x for x <= 0 up to rounding; results below the smallest normal number become 0, -inf gives 0, NaN stays.
// Cody-Waite: x = n + f with |f| <= 1/2, a degree-6 polynomial for 2^f (relative error 1.6e-8, 0.13 ulp, before
// rounding), n added to the exponent bits.
inline Vector<float> exp2(Vector<float> x) {
  typedef int32_t IntVector __attribute__((vector_size(LONGLORA_VECTOR_BYTES)));
  const IntVector in_range = x >= -126.0f;
  const Vector<float> out_of_range = x < 0.0f ? Vector<float>{} : x;
  x = in_range ? x : Vector<float>{} - 126.0f;
  const Vector<float> shifted = x + 12582912.0f;  // 1.5 * 2^23: rounds x to an integer in the low bits
  const Vector<float> f = x - (shifted - 12582912.0f);
  Vector<float> p = 1.5353361959569156e-4f * f + 1.3398875016719103e-3f;
  p = p * f + 9.61843691766262e-3f;
  p = p * f + 5.5503323674201965e-2f;
  p = p * f + 2.4022647738456726e-1f;
  p = p * f + 6.931471824645996e-1f;
  p = p * f + 1.0f;
  IntVector bits;
  IntVector n;
  std::memcpy(&bits, &p, sizeof(bits));
  std::memcpy(&n, &shifted, sizeof(n));
  bits += n << 23;
  std::memcpy(&p, &bits, sizeof(p));
  return in_range ? p : out_of_range;
}

// fp64 serves gradcheck and tests: the scalar function is right to the last bit, and fast enough.
inline Vector<double> exp2(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = ::exp2(x[lane]);
  return x;
}

template <typename T>
inline Vector<T> maximum(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

// How A is read: as it lies ([m, k], rows lda apart) or transposed ([k, m], rows lda apart).
enum class Operand { kPlain, kTransposed };

// A block of C held in registers over the k loop: kRows x (kVectors * kLanes). It starts from zero and is added to
// C at the end, so that long sums round like sums of partial sums, not like one long chain.
template <Operand kA, typename T, int kRows, int kVectors>
inline void gemm_block(int k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
  Vector<T> acc[kRows][kVectors] = {};
  for (int kk = 0; kk < k; ++kk) {
    Vector<T> row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = as_vector(b + kk * ldb + v * kLanes<T>);
    for (int r = 0; r < kRows; ++r) {
      const T scalar = kA == Operand::kPlain ? a[r * lda + kk] : a[kk * lda + r];
      for (int v = 0; v < kVectors; ++v) acc[r][v] += scalar * row[v];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) as_vector(c + r * ldc + v * kLanes<T>) += acc[r][v];
}

template <Operand kA, typename T, int kVectors>
inline void gemm_columns(int m, int k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
  constexpr int kRows = 4;  // 4 x 4 accumulators cover the latency of two FMA pipes
  const int64_t a_row = kA == Operand::kPlain ? lda : 1;
  int r = 0;
  for (; r + kRows <= m; r += kRows)
    gemm_block<kA, T, kRows, kVectors>(k, a + r * a_row, lda, b, ldb, c + r * ldc, ldc);
  for (; r < m; ++r) gemm_block<kA, T, 1, kVectors>(k, a + r * a_row, lda, b, ldb, c + r * ldc, ldc);
}

// The longest sum in one register: with 256, the fp32 error of dK is 3x larger.
constexpr int kChain = 64;

// C[m, n] += A[m, k] * B[k, n]. n is a multiple of kLanes; B's and C's rows are aligned.
template <Operand kA, typename T>
inline void gemm(int m, int n, int k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
  constexpr int kWidth = kLanes<T>;
  for (; k > 0; k -= kChain, a += kA == Operand::kPlain ? kChain : kChain * lda, b += kChain * ldb) {
    const int chain = lesser(k, kChain);
    int col = 0;
    for (; col + 4 * kWidth <= n; col += 4 * kWidth)
      gemm_columns<kA, T, 4>(m, chain, a, lda, b + col, ldb, c + col, ldc);
    for (; col + 2 * kWidth <= n; col += 2 * kWidth)
      gemm_columns<kA, T, 2>(m, chain, a, lda, b + col, ldb, c + col, ldc);
    for (; col < n; col += kWidth) gemm_columns<kA, T, 1>(m, chain, a, lda, b + col, ldb, c + col, ldc);
  }
}

}  // namespace longlora::cpu::LONGLORA_ISA
