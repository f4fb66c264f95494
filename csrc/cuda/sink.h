// The sink: the first token of a row's document, where it is not among the row's keys. One more term of each row's
// sums, so it is the business of what comes before and after the loops over tiles; these do not know of it.
// sink_gradients.h has its dk and dv.
#pragma once

#include "mask.h"
#include "rows.h"
#include "softmax.h"

namespace longlora::cuda {

// Forward: takes the sinks of a tile's rows into their sums, one key more. `q_tile` and `first_keys` are those of the
// loop over keys, in shared memory; `where` tells each thread the rows and columns of `out`.
template <typename Element, class QueryTile, class FirstKeyOf, class Where, class Out, class Softmax>
DEVICE void add_sinks(const ForwardParams& params, int batch, int head, int row, const QueryTile& q_tile,
                      const FirstKeyOf& first_keys, const Where& where, int thread, Out&& out, Softmax& softmax) {
  const Visibility visible(params.problem, batch, head);
  const int kv_head = static_cast<int>(head / (params.problem.heads / params.problem.kv_heads));
  const int columns = static_cast<int>(params.problem.head_dim);
  constexpr int kPieces = decltype(size<1>(q_tile))::value / 8;
  CUTE_UNROLL
  for (int m = 0; m < size<0>(where); ++m) {
    const int i = get<0>(where(m, 0)), document = visible.document(row + i);
    const int d = sees_sink(first_keys(i), document) ? document : -1;
    const Element* k = row_of<Element>(params.k, batch, kv_head, cute::max(d, 0));
    const Element* v = row_of<Element>(params.v, batch, kv_head, cute::max(d, 0));
    // Four threads share a row: each takes every fourth piece of eight elements. Rows of odd numbers begin with the
    // other four of eight pieces, so that two rows read at once touch every bank once.
    float score = 0;
    CUTE_UNROLL
    for (int piece = 0; piece < kPieces; piece += 4) {
      const int column = ((piece + thread % 4) ^ (i % 2 * 4)) * 8;
      // In all lanes, past the last column as well, where q has zeros.
      add_product<Element>(score, Piece(q_tile(i, column)), Piece(k[column], column < columns));
    }
    score = row_sum_of_four(score);
    if (d < 0) continue;
    const float weight = softmax.add_one(m, score, thread % 4 == 0, out);
    CUTE_UNROLL
    for (int n = 0; n < size<1>(where); n += 2) {
      const float2 value = pair_of(v, get<1>(where(m, n)), columns);
      out(m, n) += weight * value.x, out(m, n + 1) += weight * value.y;
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

}  // namespace longlora::cuda
