// Who sees whom, by the one formula of groups.h. Two others know of groups: scheduler.h, where they say which tiles
// share what they read, and QueryWalk (mainloop_bwd.h), which asks here where they end.
#pragma once

#include <cute/tensor.hpp>

#include "../groups.h"
#include "../params.h"
#include "layouts.h"

namespace longlora::cuda {

// One head of one sequence: row i sees the keys first_key(i)..offset + i, the last of which is its own.
struct Visibility {
  static constexpr int kFarthest = -(1 << 29);

  const int32_t* doc_start;  // of this sequence, or null
  int seqlen;                // of the queries
  int offset;                // the key that is row 0's own
  int group_size;
  int window;
  bool shifted;

  DEVICE Visibility(const Problem& problem, int64_t batch, int head)
      : doc_start(problem.doc_start ? problem.doc_start + batch * problem.seqlen : nullptr),
        seqlen(static_cast<int>(problem.seqlen)),
        offset(static_cast<int>(problem.seqlen_k) - static_cast<int>(problem.seqlen)),
        group_size(static_cast<int>(problem.group_size)),
        window(static_cast<int>(problem.window)),
        shifted(head >= problem.first_shifted_head) {}

  // A row past the end counts as the last one, here and below. What doc_start holds is clamped, so that whatever it is,
  // no key outside the row is ever read.
  DEVICE int document(int row) const {
    row = cute::min(row, seqlen - 1);
    return doc_start ? cute::max(+kFarthest, cute::min(doc_start[row], row + offset)) : 0;
  }
  DEVICE int first_key(int row) const { return first_key_in(row, document(row)); }
  // Whether a row of document `d` sees its first token besides; and that token, or -1 where it does not.
  DEVICE bool sees_sink_of(int row, int d) const { return sees_sink(first_key_in(row, d), d); }
  DEVICE int sink(int row) const {
    const int d = document(row);
    return sees_sink_of(row, d) ? d : -1;
  }
  // Rows from here on do not see `key`. Before, those do not that are in a later document. The document of a key before
  // the first row's own is the first row's, if any row sees it.
  DEVICE int last_row_end(int key) const {
    key = cute::min(key, seqlen - 1 + offset);
    const int d = document(cute::max(key - offset, 0));
    return cute::min(longlora::last_row_end(key, d, group_size, shifted, window) - offset, seqlen);
  }

 private:
  DEVICE int first_key_in(int row, int d) const {
    return longlora::first_key(cute::min(row, seqlen - 1) + offset, d, group_size, shifted, window);
  }
};

// A tile of query rows, by the first keys of its first and of its last row; those between lie between.
struct RowTile {
  int own_key;  // of its first row
  int rows;
  int lowest;
  int highest;

  DEVICE RowTile(const Visibility& visible, int row, int rows)
      : own_key(row + visible.offset),
        rows(rows),
        lowest(visible.first_key(row)),
        highest(visible.first_key(row + rows - 1)) {}

  // Whether some row does not see the last of the keys; the first of them; some of them.
  DEVICE bool masks_last(int key, int keys) const { return key + keys - 1 > own_key; }
  DEVICE bool masks_first(int key) const { return key < highest; }
  DEVICE bool masks(int key, int keys) const { return masks_last(key, keys) || masks_first(key); }
};

// The first keys of a tile's rows, in shared memory: only the few tiles that are masked read them, and registers that
// held them would be missing in all others (fetched or computed anew they still would: that is moved out of the loop).
template <int kRows>
struct FirstKeys {
  int* shared;

  // To be followed by a barrier.
  template <int kThreads>
  DEVICE void fill(const Visibility& visible, int row, int thread) const {
    static_assert(kRows <= kThreads);
    if (thread < kRows) Move<int>::copy(visible.first_key(row + thread), shared[thread]);
  }
  DEVICE int operator()(int i) const {
    int key;
    Move<int>::copy(shared[i], key);
    return key;
  }
};

// Writes -inf over the scores of keys past a row's own. `own_key` is that of the tile's first row. Nearly all tiles
// that have a border have one alone, so there is a mask for each. How far the scores of a thread lie from its first,
// the compiler knows: all are compared with one number.
template <class Scores, class Where>
DEVICE void mask_later_keys(Scores& scores, const Where& where, int own_key, int key) {
  const int i = get<0>(where(0, 0)), j = get<1>(where(0, 0));
  const int own = anew(own_key + i - key - j);
  keep_branch();
  CUTE_UNROLL
  for (int m = 0; m < size<0>(scores); ++m) {
    CUTE_UNROLL
    for (int n = 0; n < size<1>(scores); ++n)
      if (get<1>(where(m, n)) - j - (get<0>(where(m, n)) - i) > own) scores(m, n) = -INFINITY;
  }
}

// The same over those of keys before a row's first.
template <class Scores, class Where, int kRows>
DEVICE void mask_earlier_keys(Scores& scores, const Where& where, const FirstKeys<kRows>& first_keys, int key) {
  const int j = get<1>(where(0, 0));
  keep_branch();
  CUTE_UNROLL
  for (int m = 0; m < size<0>(scores); ++m) {
    const int first = anew(first_keys(get<0>(where(m, 0))) - key - j);
    CUTE_UNROLL
    for (int n = 0; n < size<1>(scores); ++n)
      if (get<1>(where(m, n)) - j < first) scores(m, n) = -INFINITY;
  }
}

}  // namespace longlora::cuda
