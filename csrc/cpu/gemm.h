// The one matrix product that every step of the CPU kernels is made of, and what it multiplies.
#pragma once

#include "simd.h"
#include "tiles.h"

namespace longlora::cpu::LONGLORA_ISA {

// Two bfloat16 that are neighbours along the sum of a product, the first in the low half: what one lane of
// AVX512_BF16's dot product takes, twice the rate of fp32. Each product is exact, the sum is kept in fp32.
using Pair = uint32_t;

// How many values along the sum one operand element holds, and the type that their products are summed in.
template <typename E>
struct Summed {
  using Acc = E;
  static constexpr int kPack = 1;
};
template <>
struct Summed<Pair> {
  using Acc = float;
  static constexpr int kPack = 2;
};
template <typename E>
constexpr int kPack = Summed<E>::kPack;
template <typename E>
using Sum = typename Summed<E>::Acc;

// Whether products of E run in AMX tiles, which cannot read A transposed.
#ifdef __AMX_BF16__
template <typename E>
constexpr bool kTiles = kPack<E> == 2;
#else
template <typename E>
constexpr bool kTiles = false;
#endif

template <typename E>
inline Vector<E> broadcast(E value) {
  return value - Vector<E>{};
}

inline Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> sum) { return sum + a * b; }
inline Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> sum) { return sum + a * b; }
#ifdef __AVX512BF16__
inline Vector<float> multiply_add(Vector<Pair> a, Vector<Pair> b, Vector<float> sum) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#endif

// How A is read: as it lies ([m, k], rows lda apart) or transposed ([k, m], rows lda apart).
enum class Operand { kPlain, kTransposed };
// What becomes of C.
enum class Update { kStore, kAdd };

// The longest sum in one register, in elements: with 256, the fp32 error of dK is 3x larger.
constexpr int kChain = 64;

// The block of C that is held in registers: with two vectors of B and one of A it fits 16 of them; AVX-512 has 32.
// Either has enough sums at once to cover the latency of two multiply-adds a cycle.
constexpr int kBlockRows = 4;
constexpr int kBlockVectors = LONGLORA_VECTOR_BYTES == 64 ? 4 : 2;

template <Operand kA, typename E, int kRows, int kVectors>
inline void gemm_block(Update update, int k, const E* a, int64_t lda, const E* b, int64_t ldb, Sum<E>* c, int64_t ldc) {
  constexpr int kWidth = kLanes<Sum<E>>;
  Vector<Sum<E>> acc[kRows][kVectors] = {};
  for (int kk = 0; kk < k; ++kk) {
    Vector<E> row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = as_vector(b + kk * ldb + v * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const Vector<E> value = broadcast(kA == Operand::kPlain ? a[r * lda + kk] : a[kk * lda + r]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = multiply_add(value, row[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      Vector<Sum<E>>& target = as_vector(c + r * ldc + v * kWidth);
      target = update == Update::kStore ? acc[r][v] : target + acc[r][v];
    }
  }
}

template <Operand kA, typename E, int kVectors>
inline void gemm_columns(Update update, int m, int k, const E* a, int64_t lda, const E* b, int64_t ldb, Sum<E>* c,
                         int64_t ldc) {
  const int64_t a_row = kA == Operand::kPlain ? lda : 1;
  int r = 0;
  for (; r + kBlockRows <= m; r += kBlockRows)
    gemm_block<kA, E, kBlockRows, kVectors>(update, k, a + r * a_row, lda, b, ldb, c + r * ldc, ldc);
  for (; r < m; ++r) gemm_block<kA, E, 1, kVectors>(update, k, a + r * a_row, lda, b, ldb, c + r * ldc, ldc);
}

// gemm in vectors. Each chain starts from zero and is added to C, so that long sums round like sums of partial sums.
template <Operand kA, typename E>
inline void gemm_vectors(Update update, int m, int n, int k, const E* a, int64_t lda, const E* b, int64_t ldb,
                         Sum<E>* c, int64_t ldc) {
  constexpr int kWidth = kLanes<Sum<E>>;
  for (; k > 0; k -= kChain, a += kA == Operand::kPlain ? kChain : kChain * lda, b += kChain * ldb) {
    const int chain = lesser(k, kChain);
    int col = 0;
    for (; col + kBlockVectors * kWidth <= n; col += kBlockVectors * kWidth)
      gemm_columns<kA, E, kBlockVectors>(update, m, chain, a, lda, b + col, ldb, c + col, ldc);
    for (; col + 2 * kWidth <= n; col += 2 * kWidth)
      gemm_columns<kA, E, 2>(update, m, chain, a, lda, b + col, ldb, c + col, ldc);
    for (; col < n; col += kWidth) gemm_columns<kA, E, 1>(update, m, chain, a, lda, b + col, ldb, c + col, ldc);
    update = Update::kAdd;
  }
}

// C[m, n] = or += A[m, k] * B[k, n], k in elements of E. n is a multiple of kLanes; B's and C's rows are aligned. Tiles
// multiply what is whole in all three, vectors the rest.
template <Operand kA, typename E>
inline void gemm(Update update, int m, int n, int k, const E* a, int64_t lda, const E* b, int64_t ldb, Sum<E>* c,
                 int64_t ldc) {
#ifdef __AMX_BF16__
  if constexpr (kTiles<E>) {
    static_assert(kA == Operand::kPlain, "A of tiles lies as it is read");
    const int whole = k / kTile * kTile, rows = whole ? m / kTile * kTile : 0;
    if (rows) {
      gemm_tiles(update == Update::kAdd, rows, n, whole, a, lda, b, ldb, c, ldc);
      gemm_vectors<kA>(Update::kAdd, rows, n, k - whole, a + whole, lda, b + whole * ldb, ldb, c, ldc);
      a += rows * lda;
      c += rows * ldc;
    }
    gemm_vectors<kA>(update, m - rows, n, k, a, lda, b, ldb, c, ldc);
    return;
  }
#endif
  gemm_vectors<kA>(update, m, n, k, a, lda, b, ldb, c, ldc);
}

}  // namespace longlora::cpu::LONGLORA_ISA
