// Rows of a tensor brought into aligned scratch as operands of gemm, and results brought back.
#pragma once

#include "../params.h"
#include "convert.h"
#include "transpose.h"

namespace longlora::cpu::LONGLORA_ISA {

template <typename T>
T* row_of(const TensorView& tensor, int64_t batch, int64_t row, int64_t head) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch_stride + row * tensor.row_stride +
         head * tensor.head_stride;
}

// `rows` rows from row `first` on of one head.
struct Rows {
  const TensorView& tensor;
  int64_t batch, first, head;
  int rows;

  template <typename T>
  const T* at(int r) const {
    return row_of<T>(tensor, batch, first + r, head);
  }
};

// tile[rows, pitch / kPack]: A of a sum over head_dim or, one value an element, B of a sum over rows. Columns from
// head_dim on are zero in the latter, which is read up to pitch; of pairs they are left as they are.
template <typename T>
void load_rows(const Rows& source, int head_dim, int pitch, Multiplied<T>* tile) {
  for (int r = 0; r < source.rows; ++r) {
    const T* row = source.at<T>(r);
    if constexpr (kPack<Multiplied<T>> == 2) {
      std::memcpy(tile + r * pitch / 2, row, sizeof(T) * head_dim);
    } else {
      for (int d = 0; d < head_dim; ++d) tile[r * pitch + d] = widen(row[d]);
      for (int d = head_dim; d < pitch; ++d) tile[r * pitch + d] = 0;
    }
  }
}

// tile[rows / kPack, pitch]: B of a sum over rows. Columns from head_dim on are zero, and so is a row that makes the
// last pair whole.
template <typename T>
void load_summed_rows(const Rows& source, int head_dim, int pitch, Multiplied<T>* tile) {
  if constexpr (kPack<Multiplied<T>> == 2) {
    for (int r = 0; r < source.rows; r += 2, tile += pitch) {
      const T* row = source.at<T>(r);
      const bool pair = r + 1 < source.rows;
      const T* next = source.at<T>(pair ? r + 1 : r);
      for (int d = 0; d < head_dim; ++d) tile[d] = row[d].bits | static_cast<Pair>(next[d].bits) << 16;
      if (!pair)
        for (int d = 0; d < head_dim; ++d) tile[d] &= 0xffffu;
      for (int d = head_dim; d < pitch; ++d) tile[d] = 0;
    }
  } else {
    load_rows<T>(source, head_dim, pitch, tile);
  }
}

// tile[head_dim / kPack, pitch]: B of a sum over head_dim. Columns from `rows` on are zero.
template <typename T>
void load_transposed(const Rows& source, int head_dim, int pitch, Multiplied<T>* tile) {
  if constexpr (kPack<Multiplied<T>> == 2) {
    const int pairs = head_dim / 2;
    for (int r = 0; r < pitch; r += 16) {
      for (int d = 0; d < pairs; d += 16) {
        const int count = lesser(16, pairs - d);
        Vector<Pair> block[16] = {};
        for (int i = 0; i < lesser(16, source.rows - r); ++i)
          std::memcpy(&block[i], source.at<T>(r + i) + 2 * d, sizeof(Pair) * count);
        transpose(block);
        for (int i = 0; i < count; ++i) as_vector(tile + (d + i) * pitch + r) = block[i];
      }
    }
  } else {
    for (int r = 0; r < pitch; ++r) {
      if (r >= source.rows) {
        for (int d = 0; d < head_dim; ++d) tile[d * pitch + r] = 0;
        continue;
      }
      const T* row = source.at<T>(r);
      for (int d = 0; d < head_dim; ++d) tile[d * pitch + r] = widen(row[d]);
    }
  }
}

// tile[head_dim, pitch] of pairs: A of a sum over rows, in tiles. Of columns those of whole blocks of 32 rows are
// written; a row that makes the last pair whole is zero.
template <typename T>
void load_summed_transposed(const Rows& source, int head_dim, int pitch, Pair* tile) {
  for (int r = 0; r < source.rows; r += 32) {
    for (int d = 0; d < head_dim; d += 16) {
      const int count = lesser(16, head_dim - d);
      Vector<Pair> block[16] = {};
      for (int i = 0; i < 16 && r + 2 * i < source.rows; ++i) {
        const T* row = source.at<T>(r + 2 * i) + d;
        for (int c = 0; c < count; ++c) block[i][c] = row[c].bits;
        if (r + 2 * i + 1 == source.rows) break;
        const T* next = source.at<T>(r + 2 * i + 1) + d;
        for (int c = 0; c < count; ++c) block[i][c] |= static_cast<Pair>(next[c].bits) << 16;
      }
      transpose(block);
      for (int c = 0; c < count; ++c) as_vector(tile + (d + c) * pitch + r / 2) = block[c];
    }
  }
}

// One row of a tensor = one row of a tile times `factor`, narrowed.
template <typename T>
void store_row(const Accumulate<T>* tile, Accumulate<T> factor, int head_dim, T* target) {
  for (int d = 0; d < head_dim; ++d) narrow(tile[d] * factor, target + d);
}

// Results that go on as operands: kPack vectors, neighbours along a sum, as one vector of elements.
inline Vector<float> pack(const Vector<float>* x, float) { return x[0]; }
inline Vector<double> pack(const Vector<double>* x, double) { return x[0]; }
#ifdef __AVX512BF16__
inline Vector<Pair> pack(const Vector<float>* x, Pair) {
  const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x[0])));
  const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x[1])));
  return reinterpret_cast<Vector<Pair>>(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif

// The same for one vector whose lanes are neighbours along the sum: kLanes / kPack elements.
inline void store_packed(Vector<float> x, float* target) { as_vector(target) = x; }
inline void store_packed(Vector<double> x, double* target) { as_vector(target) = x; }
#ifdef __AVX512BF16__
inline void store_packed(Vector<float> x, Pair* target) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(target), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
#endif

}  // namespace longlora::cpu::LONGLORA_ISA
