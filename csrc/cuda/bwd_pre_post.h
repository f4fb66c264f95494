// Before and after the backward kernel: delta, and dq's sums set to zero; and dq from its sums.
#pragma once

#include "bwd_tiles.h"

namespace longlora::cuda {

// delta = rowsum(dout * out) of a tile of rows, the paper's D. Eight threads share a row.
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
    float* delta = static_cast<float*>(params.delta) + (batch * problem.heads + head) * problem.seqlen +
                   int64_t{turn.tile} * kRows;
    for (int i = thread / 8; i < kRows; i += kThreads / 8) {
      float sum = 0;
      for (int column = thread % 8 * 8; column < problem.head_dim && i < rows; column += 64) {
        alignas(16) uint32_t a[4], b[4];
        Move<uint128_t>::copy(reinterpret_cast<const uint128_t&>(out(i, column)), reinterpret_cast<uint128_t&>(a));
        Move<uint128_t>::copy(reinterpret_cast<const uint128_t&>(dout(i, column)), reinterpret_cast<uint128_t&>(b));
        CUTE_UNROLL
        for (int pair = 0; pair < 4; ++pair) {
          const float2 x = unpack2<Element>(a[pair]), y = unpack2<Element>(b[pair]);
          sum += x.x * y.x + x.y * y.y;
        }
      }
      for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
      if (thread % 8 == 0 && i < rows) delta[i] = sum;
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
    for (int i = 0; i < size(dq); ++i) dq(i) = sums[i * kThreads] * static_cast<float>(problem.scale);
    store_tile<kThreads>(dq, mma, make_tensor(make_smem_ptr(shared.dq), typename Tiles::RowsTile{}),
                         global_tile<Element, kRows, kHeadDim>(params.dq, turn.batch, turn.head, row),
                         static_cast<int>(problem.seqlen) - row, static_cast<int>(problem.head_dim), thread);
  }
};

}  // namespace longlora::cuda
