// The sink: the first token of a row's document, where it is not among the row's keys. One more term of each row's
// sums, so it is the business of what comes before and after the loops over tiles; these do not know of it.
#pragma once

#include "copy.h"
#include "layouts.h"
#include "mask.h"
#include "scheduler.h"
#include "shared_memory.h"
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

// Backward, after all else: what the first tokens of documents get from the rows that see them as sinks, added to dk
// and dv. A block does so for a tile of keys and a few columns, going through all rows of each document that begins in
// the tile, in an order that is always the same: no atomics.
template <typename Element, int kHeadDim>
struct SinkGradients {
  using Params = BackwardParams;
  using Shared = SinkShared<kHeadDim>;
  static constexpr int kKeys = Shared::kKeys, kThreads = Shared::kThreads;
  static constexpr int kPieces = Shared::kPieces, kGroups = kThreads / kPieces;  // of eight columns; of threads
  static constexpr int kSlices = kHeadDim / 8 / kPieces;                         // of columns, a block each
  static constexpr int kAtOnce = 4;                                              // rows of a group
  static constexpr bool kLastFirst = false;
  static_assert(kKeys <= kThreads && kPieces == 2);

  static Schedule schedule(const Problem& problem) {
    const int64_t heads = problem.kv_heads * kSlices;
    return Schedule(problem, problem.seqlen_k, kKeys, heads, heads, kHeadDim * sizeof(Element));
  }

  DEVICE static void run(const BackwardParams& params, const Turn& turn, Shared& shared) {
    const int kv_head = turn.head / kSlices, key = turn.tile * kKeys, thread = threadIdx.x;
    const int columns = static_cast<int>(params.problem.head_dim);
    const int first_column = turn.head % kSlices * kPieces * 8;
    find_rows(params, turn.batch, key, shared, thread);
    sync_block();  // the rows of all keys are found
    for (int j = 0; j < kKeys; ++j) {
      int end;
      Move<int>::copy(shared.row_ends[j], end);
      if (end == 0) continue;
      const int column = first_column + thread % kPieces * 8;
      sum_rows(params, turn.batch, kv_head, key + j, end, column, column < columns, shared, thread);
      sync_block();  // all have summed
      // Four elements of one of the two gradients, a thread.
      const int which = thread / (2 * kPieces), half = thread / kPieces % 2;
      if (which < 2 && column < columns) {
        const auto& view = which == 0 ? params.dk : params.dv;
        const float factor = which == 0 ? static_cast<float>(params.problem.scale) : 1.0f;
        Element* row = const_cast<Element*>(row_of<Element>(view, turn.batch, kv_head, key + j));
        add_sums(shared.sums[2 * which + half] + thread % kPieces, factor, row[column + 4 * half]);
      }
      sync_block();  // nobody reads the sums any more
    }
  }

 private:
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

  // One key a thread: past the last row that sees it as its sink; 0 where none does. Of its document, rows that do not
  // come first.
  DEVICE static void find_rows(const BackwardParams& params, int batch, int key, Shared& shared, int thread) {
    if (thread >= kKeys) return;
    const Problem& problem = params.problem;
    const int d = key + thread;
    const Visibility visible(problem, batch, 0), last_head(problem, batch, static_cast<int>(problem.heads) - 1);
    const int first = cute::max(d - visible.offset, 0);
    int end = 0;
    if (first < visible.seqlen && visible.document(first) == d) {
      end = visible.doc_start ? first_of(first, visible.seqlen, [&](int row) { return visible.document(row) > d; })
                              : visible.seqlen;
      if (!visible.sees_sink_of(end - 1, d) && !last_head.sees_sink_of(end - 1, d)) end = 0;
    }
    Move<int>::copy(end, shared.row_ends[thread]);
  }

  // Of eight columns, over every kGroups-th row of the document that key `d` begins.
  DEVICE static void sum_rows(const BackwardParams& params, int batch, int kv_head, int d, int end, int column,
                              bool inside, Shared& shared, int thread) {
    const Problem& problem = params.problem;
    const int heads_per_kv = static_cast<int>(problem.heads / problem.kv_heads), group = thread / kPieces;
    float dk[8] = {}, dv[8] = {};
    for (int head = kv_head * heads_per_kv; inside && head < (kv_head + 1) * heads_per_kv; ++head) {
      const Visibility visible(problem, batch, head);
      const int begin =
          first_of(cute::max(d - visible.offset, 0), end, [&](int row) { return visible.sees_sink_of(row, d); });
      const int64_t statistics = (batch * problem.heads + head) * problem.seqlen;
      const float* weights = static_cast<const float*>(params.sink_weight) + statistics;
      const float* ds = static_cast<const float*>(params.sink_ds) + statistics;
      for (int row = begin + group; row < end; row += kAtOnce * kGroups) {
        CUTE_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {  // past the last row the last one again, for nothing
          const int next = cute::min(row + i * kGroups, end - 1);
          const bool counts = row + i * kGroups < end;
          add_times(dk, counts ? ds[next] : 0, Piece(row_of<Element>(params.q, batch, head, next)[column]));
          add_times(dv, counts ? weights[next] : 0, Piece(row_of<Element>(params.dout, batch, head, next)[column]));
        }
      }
    }
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float* from = (i < 2 ? dk : dv) + i % 2 * 4;
      alignas(16) float four[] = {from[0], from[1], from[2], from[3]};
      Move<uint128_t>::copy(reinterpret_cast<const uint128_t&>(four),
                            reinterpret_cast<uint128_t&>(shared.sums[i][thread]));
    }
  }

  DEVICE static void add_times(float (&sums)[8], float factor, const Piece& piece) {
    CUTE_UNROLL
    for (int pair = 0; pair < 4; ++pair) {
      const float2 x = unpack2<Element>(piece.pairs[pair]);
      sums[2 * pair] += factor * x.x, sums[2 * pair + 1] += factor * x.y;
    }
  }

  // The sums of all groups, to four elements.
  DEVICE static void add_sums(const typename Shared::Four* of_group, float factor, Element& first) {
    float4 sum = {0, 0, 0, 0};
    for (int group = 0; group < kGroups; ++group) {
      alignas(16) float four[4];
      Move<uint128_t>::copy(reinterpret_cast<const uint128_t&>(of_group[group * kPieces]),
                            reinterpret_cast<uint128_t&>(four));
      sum.x += four[0], sum.y += four[1], sum.z += four[2], sum.w += four[3];
    }
    alignas(8) uint32_t pairs[2];
    Move<uint64_t>::copy(reinterpret_cast<const uint64_t&>(first), reinterpret_cast<uint64_t&>(pairs));
    const float2 low = unpack2<Element>(pairs[0]), high = unpack2<Element>(pairs[1]);
    pairs[0] = pack2<Element>(low.x + sum.x * factor, low.y + sum.y * factor);
    pairs[1] = pack2<Element>(high.x + sum.z * factor, high.y + sum.w * factor);
    Move<uint64_t>::copy(reinterpret_cast<const uint64_t&>(pairs), reinterpret_cast<uint64_t&>(first));
  }
};

}  // namespace longlora::cuda
