// Before and after the backward kernel: delta, and dq's sums set to zero; and dq from its sums.
#pragma once

#include "bwd_tiles.h"

namespace longlora::cuda {

// delta = rowsum(dout * out) of a tile of rows. Eight threads share a row.
template <typename Element, int kHeadDim>
DEVICE void prepare_rows(const BackwardParams& params, int batch, int head, int tile, int thread) {
  using Tiles = BackwardTiles<Element, kHeadDim>;
  const Problem& problem = params.problem;
  const int rows = cute::min(+Tiles::kRows, static_cast<int>(problem.seqlen) - tile * Tiles::kRows);
  const auto out = global_tile<Element, Tiles::kRows, kHeadDim>(params.out, batch, head, tile * Tiles::kRows);
  const auto dout = global_tile<Element, Tiles::kRows, kHeadDim>(params.dout, batch, head, tile * Tiles::kRows);
  float* delta = static_cast<float*>(params.delta) + (batch * problem.heads + head) * problem.seqlen +
                 int64_t{tile} * Tiles::kRows;
  for (int row = thread / 8; row < Tiles::kRows; row += Tiles::kThreads / 8) {
    float sum = 0;
    for (int column = thread % 8 * 8; column < problem.head_dim && row < rows; column += 64) {
      alignas(16) uint32_t a[4], b[4];
      Move<uint128_t>::copy(reinterpret_cast<const uint128_t&>(out(row, column)), reinterpret_cast<uint128_t&>(a));
      Move<uint128_t>::copy(reinterpret_cast<const uint128_t&>(dout(row, column)), reinterpret_cast<uint128_t&>(b));
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack2<Element>(a[i]), y = unpack2<Element>(b[i]);
        sum += x.x * y.x + x.y * y.y;
      }
    }
    for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
    if (thread % 8 == 0 && row < rows) delta[row] = sum;
  }
  if (params.dq_scratch) {
    float* sums = Tiles::dq_sums(params, Tiles::row_tile(problem, batch, head, tile));
    for (int i = thread; i < Tiles::kRowsSize; i += Tiles::kThreads) sums[i] = 0;
  }
}

template <typename Element, int kHeadDim>
DEVICE void finish_dq(const BackwardParams& params, int batch, int head, int tile, Element* shared, int thread) {
  using Tiles = BackwardTiles<Element, kHeadDim>;
  const typename Tiles::DqMma mma;
  auto dq = zeros<Tiles::kRows, kHeadDim>(mma);
  const float* sums = Tiles::dq_sums(params, Tiles::row_tile(params.problem, batch, head, tile)) + thread;
  CUTE_UNROLL
  for (int i = 0; i < size(dq); ++i) dq(i) = sums[i * Tiles::kThreads] * static_cast<float>(params.problem.scale);
  store_tile<Tiles::kThreads>(dq, mma, make_tensor(make_smem_ptr(shared), typename Tiles::RowsTile{}),
                              global_tile<Element, Tiles::kRows, kHeadDim>(params.dq, batch, head, tile * Tiles::kRows),
                              static_cast<int>(params.problem.seqlen) - tile * Tiles::kRows,
                              static_cast<int>(params.problem.head_dim), thread);
}

}  // namespace longlora::cuda
