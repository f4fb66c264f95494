// What the kernels of the backward pass share: tiles, products, and the gradient of the scores.
#pragma once

#include "copy.h"
#include "gemm.h"
#include "mask.h"
#include "softmax.h"
#include "tile_config.h"

namespace longlora::cuda {

template <typename Element, int kHeadDim>
struct BackwardTiles {
  static constexpr BackwardTile kTile = backward_tile(kHeadDim);
  static constexpr int kRows = kTile.rows, kKeys = kTile.keys, kThreads = kTile.warps * 32;
  using RowsTile = SharedTile<kRows, kHeadDim>;  // q, dout
  using KeysTile = SharedTile<kKeys, kHeadDim>;  // k, v
  using ScoresTile = SharedTile<kRows, kKeys>;   // weights, ds
  using ScoresMma = WarpMma<Element, kTile.warps, kTile.score_warps>;
  using DkvMma = WarpMma<Element, kTile.warps, kTile.dkv_warps>;
  using DqMma = WarpMma<Element, kTile.warps, kTile.dq_warps>;
  static constexpr int kRowsSize = kRows * kHeadDim, kKeysSize = kKeys * kHeadDim, kScoresSize = kRows * kKeys;

  // dq's sums in scratch: for each tile of rows what the accumulators hold, element by element over the threads, so
  // that a warp adds to 32 neighbours at a time.
  DEVICE static float* dq_sums(const BackwardParams& params, int batch, int head, int tile) {
    const int64_t tiles = (params.problem.seqlen + kRows - 1) / kRows;
    return params.dq_scratch + ((batch * params.problem.heads + head) * tiles + tile) * kRowsSize;
  }
};

// lse and delta of a thread's rows of a tile; 0 past the end, where dout is 0 and nothing comes of it.
template <class Where>
struct RowStatistics {
  static constexpr int kCount = decltype(size<0>(Where{}))::value;
  float lse_log2[kCount];
  float delta[kCount];

  DEVICE RowStatistics(const BackwardParams& params, const Where& where, int batch, int head, int row) {
    const int64_t first = (batch * params.problem.heads + head) * params.problem.seqlen;
    CUTE_UNROLL
    for (int m = 0; m < kCount; ++m) {
      const int i = row + get<0>(where(m, 0));
      const bool inside = i < params.problem.seqlen;
      lse_log2[m] = inside ? static_cast<const float*>(params.lse)[first + i] * kLog2e : 0.0f;
      delta[m] = inside ? static_cast<const float*>(params.delta)[first + i] : 0.0f;
    }
  }

  // Scores become weights: exp(scale * s - lse).
  template <class Scores>
  DEVICE void normalize(Scores&& scores, float scale_log2) const {
    CUTE_UNROLL
    for (int m = 0; m < size<0>(scores); ++m) {
      CUTE_UNROLL
      for (int n = 0; n < size<1>(scores); ++n) scores(m, n) = exp2_fast(scores(m, n) * scale_log2 - lse_log2[m]);
    }
  }

  // d(weights) becomes d(scale * scores).
  template <class Gradient, class Weights>
  DEVICE void differentiate(Gradient&& gradient, const Weights& weights) const {
    CUTE_UNROLL
    for (int m = 0; m < size<0>(gradient); ++m) {
      CUTE_UNROLL
      for (int n = 0; n < size<1>(gradient); ++n) gradient(m, n) = weights(m, n) * (gradient(m, n) - delta[m]);
    }
  }
};

// Writes an accumulator, rounded, to shared memory.
template <class Accumulator, class Mma, class Shared>
DEVICE void share(const Accumulator& acc, const Mma& mma, Shared& tile, int thread) {
  using Element = typename Shared::value_type;
  const auto copy = make_tiled_copy_C(Copy_Atom<Move<uint32_t>, Element>{}, mma);
  const auto writer = copy.get_thread_slice(thread);
  const auto fragment = rounded<Element>(acc);
  auto target = writer.partition_D(tile);
  cute::copy(copy, writer.retile_S(fragment), target);
}

template <class Accumulator>
DEVICE void scale_by(Accumulator& acc, float factor) {
  CUTE_UNROLL
  for (int i = 0; i < size(acc); ++i) acc(i) *= factor;
}

}  // namespace longlora::cuda
