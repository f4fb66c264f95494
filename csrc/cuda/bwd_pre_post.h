// Before and after the backward kernel: delta, what the sink has to do with each row, and dq's sums set to zero; and dq
// from its sums.
#pragma once

#include "bwd_tiles.h"

namespace longlora::cuda {

// delta = rowsum(dout * out) - dlse of a tile of rows, the paper's D; and the weights of their sinks, with the
// gradients of these scores. Eight threads share a row.
template <typename Element, int kHeadDim>
struct Preprocess : BackwardTiles<Element, kHeadDim> {
  using Tiles = BackwardTiles<Element, kHeadDim>;
  using Tiles::kRows, Tiles::kThreads;
  using Shared = NothingShared;

  DEVICE static void run(const BackwardParams& params, const Turn& turn, Shared&) {
    const Problem& problem = params.problem;
    const int batch = turn.batch, head = turn.head, row = turn.tile * kRows, thread = threadIdx.x;
    const int rows = cute::min(+kRows, static_cast<int>(problem.seqlen) - row);
    const auto out = global_tile<Element, kRows, kHeadDim>(params.out, batch, head, row);
    const auto dout = global_tile<Element, kRows, kHeadDim>(params.dout, batch, head, row);
    const int64_t statistics = (batch * problem.heads + head) * problem.seqlen + row;
    const Visibility visible(problem, batch, head);
    const int kv_head = static_cast<int>(head / (problem.heads / problem.kv_heads));
    for (int i = thread / 8; i < kRows; i += kThreads / 8) {
      const int d = problem.sink ? visible.sink(row + i) : -1;
      float delta = 0, score = 0, dweight = 0;
      for (int column = thread % 8 * 8; column < problem.head_dim && i < rows; column += 64) {
        const Piece of_dout(dout(i, column));
        add_product<Element>(delta, Piece(out(i, column)), of_dout);
        if (d < 0) continue;
        add_product<Element>(score, Piece(row_of<Element>(params.q, batch, head, row + i)[column]),
                             Piece(row_of<Element>(params.k, batch, kv_head, d)[column]));
        add_product<Element>(dweight, of_dout, Piece(row_of<Element>(params.v, batch, kv_head, d)[column]));
      }
      delta = row_sum_of_eight(delta);
      if (problem.sink) score = row_sum_of_eight(score), dweight = row_sum_of_eight(dweight);
      if (thread % 8 != 0 || i >= rows) continue;
      if (params.dlse) delta -= static_cast<const float*>(params.dlse)[statistics + i];
      static_cast<float*>(params.delta)[statistics + i] = delta;
      if (d < 0) continue;
      const float lse_log2 = static_cast<const float*>(params.lse)[statistics + i] * kLog2e;
      const float weight = exp2_fast(score * scale_log2_of(problem) - lse_log2);
      static_cast<float*>(params.sink_weight)[statistics + i] = weight;
      static_cast<float*>(params.sink_ds)[statistics + i] = weight * (dweight - delta);
    }
    if (params.dq_scratch) {
      float* sums = Tiles::dq_sums(params, Tiles::row_tile(problem, batch, head, turn.tile));
      for (int i = thread; i < Tiles::kRowsSize; i += kThreads) sums[i] = 0;
    }
  }
};

// dq of a tile of rows, from the sums that the atomics left.
template <typename Element, int kHeadDim>
struct Postprocess : BackwardTiles<Element, kHeadDim> {
  using Tiles = BackwardTiles<Element, kHeadDim>;
  using Tiles::kRows, Tiles::kThreads;
  using Shared = PostprocessShared<Element, kHeadDim>;

  DEVICE static void run(const BackwardParams& params, const Turn& turn, Shared& shared) {
    const Problem& problem = params.problem;
    const int row = turn.tile * kRows, thread = threadIdx.x;
    const typename Tiles::DqMma mma;
    auto dq = zeros<kRows, kHeadDim>(mma);
    const float* sums = Tiles::dq_sums(params, Tiles::row_tile(problem, turn.batch, turn.head, turn.tile)) + thread;
    CUTE_UNROLL
    for (int i = 0; i < size(dq); ++i) dq(i) = sums[i * kThreads];
    if (problem.sink)
      add_sinks_to_dq<Element>(params, turn.batch, turn.head, row, coordinates<kRows, kHeadDim>(mma, thread),
                               as_matrix(dq));
    scale_by(dq, static_cast<float>(problem.scale));
    store_tile<kThreads>(dq, mma, make_tensor(make_smem_ptr(shared.dq), typename Tiles::RowsTile{}),
                         global_tile<Element, kRows, kHeadDim>(params.dq, turn.batch, turn.head, row),
                         static_cast<int>(problem.seqlen) - row, static_cast<int>(problem.head_dim), thread);
  }
};

}  // namespace longlora::cuda
