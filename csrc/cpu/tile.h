// Tiles: rows of a tensor brought into aligned scratch of the accumulation type, and back.
#pragma once

#include <cstdint>
#include <cstring>

#include "../groups.h"
#include "../params.h"
#include "simd.h"

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

template <typename T>
T* row_of(const TensorView& tensor, int64_t batch, int64_t row, int64_t head) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch_stride + row * tensor.row_stride +
         head * tensor.head_stride;
}

// tile[rows, pitch] = tensor rows times `factor`; columns from head_dim to pitch are zero.
template <typename T>
void load_rows(const TensorView& tensor, int64_t batch, int64_t first, int64_t head, int rows, int head_dim, int pitch,
               Accumulate<T> factor, Accumulate<T>* tile) {
  for (int r = 0; r < rows; ++r) {
    const T* source = row_of<T>(tensor, batch, first + r, head);
    for (int d = 0; d < head_dim; ++d) tile[r * pitch + d] = widen(source[d]) * factor;
    for (int d = head_dim; d < pitch; ++d) tile[r * pitch + d] = 0;
  }
}

// tile[head_dim, pitch] = tensor rows times `factor`, transposed; columns from rows to pitch are zero.
template <typename T>
void load_transposed(const TensorView& tensor, int64_t batch, int64_t first, int64_t head, int rows, int head_dim,
                     int pitch, Accumulate<T> factor, Accumulate<T>* tile) {
  for (int r = 0; r < pitch; ++r) {
    const T* source = r < rows ? row_of<T>(tensor, batch, first + r, head) : nullptr;
    for (int d = 0; d < head_dim; ++d)
      tile[static_cast<int64_t>(d) * pitch + r] = source ? widen(source[d]) * factor : 0;
  }
}

// One row of a tensor = one row of a tile times `factor`, narrowed.
template <typename T>
void store_row(const Accumulate<T>* tile, Accumulate<T> factor, int head_dim, T* target) {
  for (int d = 0; d < head_dim; ++d) narrow(tile[d] * factor, target + d);
}

// One block of query rows of one head, and which keys each row sees: row r sees first[r]..m0+r. `first`
// never decreases, so the rows that see a given key are one run, [row_begin(key), row_end(key)).
template <int kRows>
struct QueryBlock {
  int64_t m0;
  int rows;
  int64_t first[kRows];

  QueryBlock(const Problem& p, int64_t batch, int64_t head, int64_t m0_)
      : m0(m0_), rows(static_cast<int>(lesser<int64_t>(kRows, p.seqlen - m0_))) {
    const bool shifted = head >= p.first_shifted_head;
    for (int r = 0; r < rows; ++r) {
      const int64_t doc_start = p.doc_start ? p.doc_start[batch * p.seqlen + m0 + r] : 0;
      first[r] = first_key<int64_t>(m0 + r, doc_start, p.group_size, shifted);
    }
  }

  int64_t begin_key() const { return first[0]; }
  int64_t end_key() const { return m0 + rows; }

  int row_begin(int64_t key) const { return static_cast<int>(lesser<int64_t>(greater<int64_t>(key - m0, 0), rows)); }
  int row_end(int64_t key) const {  // how many rows have first <= key
    int low = 0;
    for (int high = rows; low < high;) {
      const int middle = (low + high) / 2;
      if (first[middle] <= key)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  // scores[keys, kRows], transposed: -inf where a row in [begin, end) does not see a key of n0.. .
  template <typename Acc>
  void mask(Acc* scores, int64_t n0, int keys, int begin, int end) const {
    for (int j = 0; j < keys; ++j) {
      Acc* row = scores + j * kRows;
      const int run_begin = lesser(row_begin(n0 + j), end);
      for (int r = begin; r < run_begin; ++r) row[r] = -INFINITY;
      for (int r = greater(row_end(n0 + j), begin); r < end; ++r) row[r] = -INFINITY;
    }
  }
};

// The vectors of query rows that take part in one tile of keys: those that see any of it, rounded to whole
// vectors. Above the diagonal and past a group's end nothing is computed.
template <typename Acc, int kRows>
struct RowRun {
  int begin, end;

  RowRun(const QueryBlock<kRows>& block, int64_t n0, int keys)
      : begin(block.row_begin(n0) / kLanes<Acc> * kLanes<Acc>),
        end(static_cast<int>(round_up(block.row_end(n0 + keys - 1), kLanes<Acc>))) {}

  int size() const { return end - begin; }
};

}  // namespace longlora::cpu::LONGLORA_ISA
