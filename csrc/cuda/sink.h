// The sink: the first token of a row's document, where it is not among the row's keys. One more term of each row's
// sums, so it is the business of what comes before and after the loops over tiles; these do not know of it.
#pragma once

#include "copy.h"
#include "layouts.h"
#include "mask.h"
#include "softmax.h"

namespace longlora::cuda {

// Of a tensor of Elements, row `row` of a head.
template <typename Element>
DEVICE const Element* row_of(const TensorView& view, int batch, int head, int64_t row) {
  return static_cast<const Element*>(view.data) + batch * view.batch_stride + head * view.head_stride +
         row * view.row_stride;
}

// Two neighbours in a row of global memory; zeros past its end.
template <typename Element>
DEVICE float2 pair_of(const Element* row, int column, int columns) {
  if (column >= columns) return {0, 0};
  uint32_t pair;
  Move<uint32_t>::copy(reinterpret_cast<const uint32_t&>(row[column]), pair);
  return unpack2<Element>(pair);
}

// Eight elements, from `first` on.
struct Piece {
  alignas(16) uint32_t pairs[4];

  template <typename Element>
  DEVICE explicit Piece(const Element& first) {
    Move<uint128_t>::copy(reinterpret_cast<const uint128_t&>(first), reinterpret_cast<uint128_t&>(pairs));
  }
};

// Adds the product of eight elements each.
template <typename Element>
DEVICE void add_product(float& sum, const Piece& a, const Piece& b) {
  CUTE_UNROLL
  for (int pair = 0; pair < 4; ++pair) {
    const float2 p = unpack2<Element>(a.pairs[pair]), q = unpack2<Element>(b.pairs[pair]);
    sum += p.x * q.x + p.y * q.y;
  }
}

// Forward: the sums of a tile's rows begin with the sink. `q_tile` is in shared memory; `where` tells the rows and
// columns of `out`, of each thread.
template <typename Element, class QueryTile, class Where, class Out, class Softmax>
DEVICE void begin_with_sinks(const ForwardParams& params, const Visibility& visible, int batch, int kv_head, int row,
                             const QueryTile& q_tile, const Where& where, int thread, Out&& out, Softmax& softmax) {
  const int columns = static_cast<int>(params.problem.head_dim);
  constexpr int kPieces = decltype(size<1>(q_tile))::value / 8;
  CUTE_UNROLL
  for (int m = 0; m < size<0>(where); ++m) {
    const int i = get<0>(where(m, 0)), d = visible.sink(row + i);
    const Element* k = row_of<Element>(params.k, batch, kv_head, cute::max(d, 0));
    const Element* v = row_of<Element>(params.v, batch, kv_head, cute::max(d, 0));
    // Four threads share a row: each takes every fourth piece of eight elements. Rows of odd numbers begin with the
    // other four of eight pieces, so that two rows read at once touch every bank once.
    float score = 0;
    for (int piece = thread % 4; piece < kPieces; piece += 4) {
      const int column = (piece ^ (i % 2 * 4)) * 8;
      const Piece q(q_tile(i, column));  // in all lanes, past the last column as well: zeros
      if (column < columns) add_product<Element>(score, q, Piece(k[column]));
    }
    score = row_sum_of_four(score);
    if (d < 0) continue;
    softmax.maximum[m] = score;
    softmax.sum[m] = thread % 4 == 0 ? 1 : 0;
    CUTE_UNROLL
    for (int n = 0; n < size<1>(where); n += 2) {
      const float2 value = pair_of(v, get<1>(where(m, n)), columns);
      out(m, n) = value.x, out(m, n + 1) = value.y;
    }
  }
}

// Backward: what the sink adds to dq of a tile of rows, not yet times scale.
template <typename Element, class Where, class Dq>
DEVICE void add_sinks_to_dq(const BackwardParams& params, int batch, int head, int row, const Where& where, Dq&& dq) {
  const Problem& problem = params.problem;
  const Visibility visible(problem, batch, head);
  const int kv_head = static_cast<int>(head / (problem.heads / problem.kv_heads));
  const int columns = static_cast<int>(problem.head_dim);
  const float* ds = static_cast<const float*>(params.sink_ds) + (batch * problem.heads + head) * problem.seqlen + row;
  CUTE_UNROLL
  for (int m = 0; m < size<0>(where); ++m) {
    const int i = get<0>(where(m, 0)), d = visible.sink(row + i);
    if (d < 0 || row + i >= visible.seqlen) continue;
    const Element* k = row_of<Element>(params.k, batch, kv_head, d);
    const float factor = ds[i];
    CUTE_UNROLL
    for (int n = 0; n < size<1>(where); n += 2) {
      const float2 key = pair_of(k, get<1>(where(m, n)), columns);
      dq(m, n) += factor * key.x, dq(m, n + 1) += factor * key.y;
    }
  }
}

// Backward: what a tile of keys gets from the rows that see some of them as sinks. A block goes through all rows of the
// documents that begin in its tile, in an order that is always the same: no atomics, so both ways to dq have it.
template <typename Element, int kHeadDim, int kKeys, int kThreads>
struct SinkGradients {
  static constexpr int kPairs = kHeadDim / 2, kGroups = kThreads / kPairs;  // groups of threads that share a row
  static constexpr int kAtOnce = 4;                                         // rows of a group
  static_assert(kThreads % kPairs == 0 && kKeys <= kThreads);

  const BackwardParams& params;
  int batch, kv_head, key;
  int* row_ends;  // [kKeys], in shared memory: past the last row that sees the key as its sink; 0: none does
  float2* sums;   // [dk and dv, kGroups, kPairs], in shared memory

  // The first of the rows [begin, end) for which `holds`; from there on it does.
  template <class Holds>
  DEVICE static int first_of(int begin, int end, const Holds& holds) {
    while (begin < end) {
      const int middle = begin + (end - begin) / 2;
      if (holds(middle))
        end = middle;
      else
        begin = middle + 1;
    }
    return begin;
  }

  // One key a thread. Of its document, rows that do not see it come first.
  DEVICE void find_rows(int thread) const {
    if (thread >= kKeys) return;
    const Problem& problem = params.problem;
    const int d = key + thread, heads = static_cast<int>(problem.heads);
    const Visibility visible(problem, batch, 0), last_head(problem, batch, heads - 1);
    const int first = cute::max(d - visible.offset, 0);
    int end = 0;
    if (first < visible.seqlen && visible.document(first) == d) {
      end = visible.doc_start ? first_of(first, visible.seqlen, [&](int row) { return visible.document(row) > d; })
                              : visible.seqlen;
      if (!visible.sees_sink_of(end - 1, d) && !last_head.sees_sink_of(end - 1, d)) end = 0;
    }
    Move<int>::copy(end, row_ends[thread]);
  }

  // Sums over the rows of the document that key `d` begins, into `sums`: a group's, each.
  DEVICE void sum_rows(int d, int end, int thread) const {
    const Problem& problem = params.problem;
    const int columns = static_cast<int>(problem.head_dim),
              heads_per_kv = static_cast<int>(problem.heads / problem.kv_heads);
    const int group = thread / kPairs, column = thread % kPairs * 2;
    float2 dk = {0, 0}, dv = {0, 0};
    for (int head = kv_head * heads_per_kv; head < (kv_head + 1) * heads_per_kv; ++head) {
      const Visibility visible(problem, batch, head);
      const int begin =
          first_of(cute::max(d - visible.offset, 0), end, [&](int row) { return visible.sees_sink_of(row, d); });
      const int64_t statistics = (batch * problem.heads + head) * problem.seqlen;
      const float* weights = static_cast<const float*>(params.sink_weight) + statistics;
      const float* ds = static_cast<const float*>(params.sink_ds) + statistics;
      for (int row = begin + group; row < end; row += kAtOnce * kGroups) {
        float2 q[kAtOnce], dout[kAtOnce];
        float weight[kAtOnce], of_score[kAtOnce];
        CUTE_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const int next = cute::min(row + i * kGroups, end - 1);
          q[i] = pair_of(row_of<Element>(params.q, batch, head, next), column, columns);
          dout[i] = pair_of(row_of<Element>(params.dout, batch, head, next), column, columns);
          weight[i] = weights[next], of_score[i] = ds[next];
        }
        CUTE_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          if (row + i * kGroups >= end) break;
          dk.x += of_score[i] * q[i].x, dk.y += of_score[i] * q[i].y;
          dv.x += weight[i] * dout[i].x, dv.y += weight[i] * dout[i].y;
        }
      }
    }
    store(dk, sums[thread]);
    store(dv, sums[kThreads + thread]);
  }

  // To the accumulators of a tile of keys, where key `j` of the tile is this thread's.
  template <class Where, class Sums>
  DEVICE void add(int j, int which, const Where& where, Sums&& acc) const {
    CUTE_UNROLL
    for (int m = 0; m < size<0>(where); ++m) {
      if (get<0>(where(m, 0)) != j) continue;
      CUTE_UNROLL
      for (int n = 0; n < size<1>(where); n += 2) {
        for (int group = 0; group < kGroups; ++group) {
          uint64_t bits;
          Move<uint64_t>::copy(
              reinterpret_cast<const uint64_t&>(sums[which * kThreads + group * kPairs + get<1>(where(m, n)) / 2]),
              bits);
          const float2 sum = reinterpret_cast<const float2&>(bits);
          acc(m, n) += sum.x, acc(m, n + 1) += sum.y;
        }
      }
    }
  }

  // A barrier has to stand before: the shared memory was something else's.
  template <class Where, class Dk, class Dv>
  DEVICE void run(const Where& where, int thread, Dk&& dk, Dv&& dv) const {
    find_rows(thread);
    sync_block();  // the rows of all keys are found
    for (int j = 0; j < kKeys; ++j) {
      int end;
      Move<int>::copy(row_ends[j], end);
      if (end == 0) continue;
      sum_rows(key + j, end, thread);
      sync_block();  // all have summed
      add(j, 0, where, dk);
      add(j, 1, where, dv);
      sync_block();  // nobody reads the sums any more
    }
  }

 private:
  DEVICE static void store(const float2& value, float2& to) {
    Move<uint64_t>::copy(reinterpret_cast<const uint64_t&>(value), reinterpret_cast<uint64_t&>(to));
  }
};

}  // namespace longlora::cuda
