// Blocks of query rows, and which keys they see.
#pragma once

#include "../groups.h"
#include "../params.h"
#include "simd.h"

namespace longlora::cpu::LONGLORA_ISA {

// Tile sizes, by L2: of 1 MB or more where AVX-512 is, else mostly of 512 KB or less, and forward at head dim 128 a
// tile of 256 rows takes 448 KB, one of 64 rows 160 KB. Measured with AVX2 on Zen 3, fp32, d128, in GFLOP/s of a
// thread: forward at G = 1024 48 with 256 rows and 57 with 64; backward at G = 128 17 in blocks of 128 and 25 in blocks
// of 64. On Zen 4 with AVX-512 256 rows are 5 to 15% faster than 128.
constexpr bool kLargeTiles = LONGLORA_VECTOR_BYTES == 64;
constexpr int kForwardRows = kLargeTiles ? 256 : 64;
constexpr int kForwardKeys = 64;
constexpr int kBackwardBlock = kLargeTiles ? 128 : 64;  // of query rows and of keys
constexpr int kStrip = 32;  // of a block on the diagonal, computed up to the last key that a strip sees

// What scores are multiplied with for a softmax in base 2. Above zero, so that masked scores stay -inf.
template <typename Acc>
Acc scale_log2_of(const Problem& problem) {
  return greater(static_cast<Acc>(problem.scale * M_LOG2E), static_cast<Acc>(1.2e-38));
}

// One block of query rows of one head, and which keys each row sees: row r of it sees first[r]..row+r. `first`
// never decreases, so the rows that see a given key are one run, [row_begin(key), row_end(key)).
template <int kRows>
struct QueryBlock {
  int64_t row;
  int rows;
  int64_t first[kRows];

  QueryBlock(const Problem& p, int64_t batch, int64_t head, int64_t first_row)
      : row(first_row), rows(static_cast<int>(lesser<int64_t>(kRows, p.seqlen - first_row))) {
    const auto first_of = [&](int r) {
      const int64_t doc_start = p.doc_start ? p.doc_start[batch * p.seqlen + row + r] : 0;
      return first_key<int64_t>(row + r, doc_start, p.group_size, head >= p.first_shifted_head);
    };
    first[0] = first_of(0);
    first[rows - 1] = first_of(rows - 1);
    const bool same = first[0] == first[rows - 1];  // then so are those between, and no division is needed
    for (int r = 1; r < rows - 1; ++r) first[r] = same ? first[0] : first_of(r);
  }

  int64_t begin_key() const { return first[0]; }
  int64_t end_key() const { return row + rows; }

  int row_begin(int64_t key) const { return static_cast<int>(lesser<int64_t>(greater<int64_t>(key - row, 0), rows)); }
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

  // scores[keys, kRows], transposed: -inf where a row in [begin, end) does not see one of the keys.
  template <typename Acc>
  void mask(Acc* scores, int64_t key, int keys, int begin, int end) const {
    if (first[rows - 1] <= key && key + keys - 1 <= row + begin) return;
    for (int j = 0; j < keys; ++j) {
      Acc* line = scores + j * kRows;
      const int run_begin = lesser(row_begin(key + j), end);
      for (int r = begin; r < run_begin; ++r) line[r] = -INFINITY;
      for (int r = greater(row_end(key + j), begin); r < end; ++r) line[r] = -INFINITY;
    }
  }
};

// The vectors of query rows that take part in one tile of keys: those that see any of it, rounded to whole
// vectors. Above the diagonal and past a group's end nothing is computed.
template <typename Acc, int kRows>
struct RowRun {
  int begin, end;

  RowRun(const QueryBlock<kRows>& block, int64_t key, int keys)
      : begin(block.row_begin(key) / kLanes<Acc> * kLanes<Acc>),
        end(static_cast<int>(round_up(block.row_end(key + keys - 1), kLanes<Acc>))) {}

  int size() const { return end - begin; }
};

}  // namespace longlora::cpu::LONGLORA_ISA
