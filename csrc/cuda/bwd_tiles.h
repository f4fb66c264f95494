// What the kernels of the backward pass share: tiles, products, and the gradient of the scores.
#pragma once

#include <algorithm>

#include "copy.h"
#include "gemm.h"
#include "mask.h"
#include "scheduler.h"
#include "shared_memory.h"
#include "sink.h"
#include "softmax.h"
#include "tile_config.h"

namespace longlora::cuda {

// The kernels of the backward pass are Works (kernel.h) that go by tiles of query rows, or, as Backward says itself, of
// keys.
template <typename Element, int kHeadDim, int kKib>
struct BackwardTiles {
  using Params = BackwardParams;
  static constexpr BackwardTile kTile = backward_tile(kHeadDim, kKib);
  static constexpr int kRows = kTile.rows, kKeys = kTile.keys, kThreads = kTile.warps * 32;
  static constexpr bool kLastFirst = true;
  using RowsTile = SharedTile<kRows, kHeadDim>;  // q, dout
  using KeysTile = SharedTile<kKeys, kHeadDim>;  // k, v
  using ScoresTile = SharedTile<kRows, kKeys>;   // weights, ds
  using ScoresMma = WarpMma<Element, kTile.warps, kTile.score_warps>;
  using DkvMma = WarpMma<Element, kTile.warps, kTile.dkv_warps>;
  using DqMma = WarpMma<Element, kTile.warps, kTile.dq_warps>;
  static constexpr int kRowsSize = kRows * kHeadDim, kRowBytes = kHeadDim * sizeof(Element);
  static_assert(kTile.warps % kTile.score_warps == 0 && kTile.warps % kTile.dkv_warps == 0 &&
                kTile.warps % kTile.dq_warps == 0);

  // What tiles of query rows share are keys.
  static Schedule schedule(const Problem& problem, int64_t l2_bytes) {
    const int64_t shared_bytes = 2 * kRowBytes / (problem.heads / problem.kv_heads);
    return Schedule(problem, l2_bytes, problem.seqlen, kRows, problem.heads, problem.first_shifted_head,
                    std::max<int64_t>(1, shared_bytes));
  }

  // A tile of rows among those of all heads and sequences. Each has a block (of Preprocess): 32 bits count them.
  DEVICE static int row_tile(const Problem& problem, int batch, int head, int tile) {
    const int heads = static_cast<int>(problem.heads), seqlen = static_cast<int>(problem.seqlen);
    return (batch * heads + head) * ((seqlen + kRows - 1) / kRows) + tile;
  }
  // dq's sums in scratch: for each tile of rows what the accumulators hold, element by element over the threads, so
  // that a warp adds to 32 neighbours at a time.
  DEVICE static float* dq_sums(const BackwardParams& params, int row_tile) {
    return params.dq_scratch + int64_t{row_tile} * kRowsSize;
  }
};

// lse and delta of a tile of rows, in shared memory. They come with the tile: fetched to registers when they are
// needed, they took 8% of an H200's time at a head dim of 128, and there are no registers to fetch them earlier.
template <int kRows>
struct RowStatistics {
  static constexpr int kSize = 2 * kRows;
  float* shared;  // lse, then delta

  // Starts to copy. Past the last row come zeros: dout is 0 there, and nothing comes of them.
  template <int kThreads>
  DEVICE void load(const BackwardParams& params, int batch, int head, int row, int thread) const {
    static_assert(kSize <= kThreads);
    if (thread >= kSize) return;
    const Problem& problem = params.problem;
    const auto from = static_cast<const float*>(thread < kRows ? params.lse : params.delta);
    const int64_t i = row + thread % kRows;
    CpAsync4::copy(from[(batch * problem.heads + head) * problem.seqlen + i], shared[thread], i < problem.seqlen);
  }

  // Scores become weights: exp(scale * s - lse).
  template <class Scores, class Where>
  DEVICE void normalize(Scores&& scores, const Where& where, float scale_log2) const {
    CUTE_UNROLL
    for (int m = 0; m < size<0>(scores); ++m) {
      const float lse_log2 = at(get<0>(where(m, 0))) * kLog2e;
      CUTE_UNROLL
      for (int n = 0; n < size<1>(scores); ++n) scores(m, n) = exp2_fast(scores(m, n) * scale_log2 - lse_log2);
    }
  }

  // d(weights) become ds, d(scale * scores).
  template <class Dweights, class Weights, class Where>
  DEVICE void differentiate(Dweights&& dweights, const Weights& weights, const Where& where) const {
    CUTE_UNROLL
    for (int m = 0; m < size<0>(dweights); ++m) {
      const float delta = at(kRows + get<0>(where(m, 0)));
      CUTE_UNROLL
      for (int n = 0; n < size<1>(dweights); ++n) dweights(m, n) = weights(m, n) * (dweights(m, n) - delta);
    }
  }

 private:
  DEVICE float at(int i) const {
    float value;
    Move<float>::copy(shared[i], value);
    return value;
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
