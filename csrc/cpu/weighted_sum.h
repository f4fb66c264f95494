// Sums of rows by weights, C += W^T X: the output of the forward pass, dK and dV of the backward pass. W comes from the
// softmax as [summed, rows of C].
//
// Vectors read W transposed. Tiles cannot: they compute C^T += X^T W, so there X and C lie transposed in scratch.
#pragma once

#include "pack.h"
#include "scratch.h"

namespace longlora::cpu::LONGLORA_ISA {

// X of at most kRows rows.
template <typename T, int kRows>
class SummedRows {
 public:
  using E = Multiplied<T>;
  static constexpr int kElements = kRows / kPack<E>;  // along the sum

  static constexpr int64_t size(int pitch) { return kElements * pitch; }

  // `tile` has size(pitch) elements; where one holds one value, load_rows may have filled it.
  SummedRows(int head_dim, int pitch, E* tile)
      : head_dim_(head_dim), pitch_(kTiles<E> ? kElements : pitch), tile_(tile) {}

  void load(const Rows& source) const {
    if constexpr (kTiles<E>)
      load_summed_transposed<T>(source, head_dim_, pitch_, tile_);
    else
      load_summed_rows<T>(source, head_dim_, pitch_, tile_);
  }

  int pitch() const { return pitch_; }
  // From element `from` of the sum on.
  const E* from(int64_t from) const { return tile_ + (kTiles<E> ? from : from * pitch_); }

 private:
  const int head_dim_;
  const int pitch_;
  E* const tile_;  // [kElements, pitch], or [head_dim, kElements]
};

// C, of kRows rows.
template <typename T, int kRows>
class WeightedSums {
 public:
  using E = Multiplied<T>;
  using Acc = Accumulate<T>;

  WeightedSums(int head_dim, int pitch, Arena& arena)
      : head_dim_(head_dim),
        pitch_(pitch),
        sums_(arena.take<Acc>(kRows * pitch)),
        lines_(kTiles<E> ? arena.take<Acc>(16 * pitch) : nullptr) {}

  void clear() const { std::memset(sums_, 0, sizeof(Acc) * kRows * pitch_); }
  Acc& at(int row, int d) const { return sums_[kTiles<E> ? d * kRows + row : row * pitch_ + d]; }

  // Rows [row, row + count) += the transpose of `weights`, [summed, count] in rows `ldw` apart, times x. Tiles take
  // whole vectors of rows, which begin at `row`: those past `count` have weights too, or are none that anyone reads.
  template <int kSummedRows>
  void add(int row, int count, int summed, const E* weights, int64_t ldw, const SummedRows<T, kSummedRows>& x,
           int64_t from) const {
    if constexpr (kTiles<E>)
      gemm<Operand::kPlain>(Update::kAdd, head_dim_, static_cast<int>(round_up(count, kLanes<Acc>)), summed,
                            x.from(from), x.pitch(), weights, ldw, sums_ + row, kRows);
    else
      gemm<Operand::kTransposed>(Update::kAdd, count, pitch_, summed, weights, ldw, x.from(from), x.pitch(),
                                 sums_ + row * pitch_, pitch_);
  }

  // Rows [begin, end) += the one row of x, each times its weight, and no other row.
  template <int kSummedRows>
  void add_one(int begin, int end, const E* weights, const SummedRows<T, kSummedRows>& x) const {
    if constexpr (kTiles<E>) {
      for (int d = 0; d < head_dim_; ++d) {
        const float value = from_bits(x.from(0)[d * x.pitch()] << 16);  // of pairs the first
        for (int r = begin; r < end; ++r) at(r, d) += from_bits(weights[r] << 16) * value;
      }
    } else {
      add(begin, end - begin, 1, weights + begin, kRows, x, 0);
    }
  }

  // The kLanes rows from `row` on, each times its lane.
  void scale(int row, Vector<Acc> factors) const {
    if constexpr (kTiles<E>) {
      const auto changes = factors != 1.0f;
      bool any = false;
      for (int lane = 0; lane < kLanes<Acc>; ++lane) any |= changes[lane] != 0;
      for (int d = 0; any && d < head_dim_; ++d) as_vector(&at(row, d)) *= factors;
    } else {
      for (int lane = 0; lane < kLanes<Acc>; ++lane) {
        const Acc factor = factors[lane];
        if (factor == 1) continue;
        Acc* line = &at(row + lane, 0);
        for (int d = 0; d < pitch_; ++d) line[d] *= factor;
      }
    }
  }

  // Calls f(r, values) with the head_dim values of each of the first `rows` rows.
  template <typename F>
  void for_each_row(int rows, F&& f) const {
    if constexpr (kTiles<E>) {
      for (int begin = 0; begin < rows; begin += 16) {
        for (int d = 0; d < head_dim_; d += 16) {
          Vector<uint32_t> block[16] = {};
          for (int i = 0; i < lesser(16, head_dim_ - d); ++i) std::memcpy(&block[i], &at(begin, d + i), 64);
          transpose(block);
          for (int i = 0; i < 16; ++i) std::memcpy(lines_ + i * pitch_ + d, &block[i], 64);
        }
        for (int r = begin; r < lesser(begin + 16, rows); ++r) f(r, lines_ + (r - begin) * pitch_);
      }
    } else {
      for (int r = 0; r < rows; ++r) f(r, &at(r, 0));
    }
  }

 private:
  const int head_dim_;
  const int pitch_;
  Acc* const sums_;   // [kRows, pitch], or [head_dim, kRows]
  Acc* const lines_;  // 16 rows, transposed back
};

}  // namespace longlora::cpu::LONGLORA_ISA
