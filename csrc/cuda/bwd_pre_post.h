// Before and after the backward kernel: delta, what the sink has to do with each row, and the beginning of dq's sums;
// and dq from its sums.
#pragma once

#include <type_traits>

#include "bwd_tiles.h"
#include "sink_gradients.h"

namespace longlora::cuda {

// delta = rowsum(dout * out) - dlse of a tile of rows, the paper's D. Where there is a sink (kSink), also its weight in
// each row, the gradient of its score, what these add to dq, and, of the sink before the tile, to dk and dv. Eight
// threads share a row.
template <typename Element, int kHeadDim, int kKib, bool kSink>
struct Preprocess : BackwardTiles<Element, kHeadDim, kKib> {
  using Tiles = BackwardTiles<Element, kHeadDim, kKib>;
  using Tiles::kRows, Tiles::kThreads;
  using Shared = std::conditional_t<kSink, PreprocessShared<kHeadDim, kKib>, NothingShared>;
  using Lines = SinkLines<kHeadDim>;
  static constexpr int kPieces = kHeadDim / 64;  // of a row, a thread's: eight columns, then those 64 further on

  DEVICE static void run(const BackwardParams& params, const Turn& turn, Shared& shared) {
    const Problem& problem = params.problem;
    const int batch = turn.batch, head = turn.head, row = turn.tile * kRows, thread = threadIdx.x;
    const int rows = cute::min(+kRows, static_cast<int>(problem.seqlen) - row);
    const int columns = static_cast<int>(problem.head_dim);
    const auto out = global_tile<Element, kRows, kHeadDim>(params.out, batch, head, row);
    const auto dout = global_tile<Element, kRows, kHeadDim>(params.dout, batch, head, row);
    const int64_t statistics = (batch * problem.heads + head) * problem.seqlen + row;
    [[maybe_unused]] SinkSums<Element, kPieces> sums;
    CUTE_NO_UNROLL
    for (int i = thread / 8; i < kRows; i += kThreads / 8) {
      float delta = 0;
      Piece of_dout[kPieces];
      CUTE_UNROLL
      for (int piece = 0; piece < kPieces; ++piece) {
        const int column = thread % 8 * 8 + piece * 64;
        const bool inside = i < rows && column < columns;
        of_dout[piece] = Piece(dout(i, column), inside);
        add_product<Element>(delta, Piece(out(i, column), inside), of_dout[piece]);
      }
      delta = row_sum_of_eight(delta);
      if (params.dlse && i < rows) delta -= static_cast<const float*>(params.dlse)[statistics + i];
      if (thread % 8 == 0 && i < rows) static_cast<float*>(params.delta)[statistics + i] = delta;
      if constexpr (kSink) differentiate_sink(params, batch, head, row, i, of_dout, delta, thread, sums);
    }
    if constexpr (kSink) store_sums(params, Tiles::row_tile(problem, batch, head, turn.tile), sums, shared, thread);
    if (params.dq_scratch) {
      const typename Tiles::DqMma mma;
      auto dq = zeros<kRows, kHeadDim>(mma);
      if constexpr (kSink)  // what the rows' sinks have comes from before the last barrier
        add_sinks_to_dq<Element>(params, batch, head, row, coordinates<kRows, kHeadDim>(mma, thread), as_matrix(dq));
      float* dq_sums = Tiles::dq_sums(params, Tiles::row_tile(problem, batch, head, turn.tile)) + thread;
      CUTE_UNROLL
      for (int i = 0; i < size(dq); ++i) dq_sums[i * kThreads] = dq(i);
    }
  }

 private:
  // Of row i of the tile. The sink's sums are those of the one before the tile: that of its first row.
  DEVICE static void differentiate_sink(const BackwardParams& params, int batch, int head, int row, int i,
                                        const Piece (&of_dout)[kPieces], float delta, int thread,
                                        SinkSums<Element, kPieces>& sums) {
    const Problem& problem = params.problem;
    const int columns = static_cast<int>(problem.head_dim);
    const int kv_head = static_cast<int>(head / (problem.heads / problem.kv_heads));
    const Visibility visible(problem, batch, head);
    const int d = row + i < visible.seqlen ? visible.sink(row + i) : -1;
    const Element* q = row_of<Element>(params.q, batch, head, cute::min(row + i, visible.seqlen - 1));
    const Element* k = row_of<Element>(params.k, batch, kv_head, cute::max(d, 0));
    const Element* v = row_of<Element>(params.v, batch, kv_head, cute::max(d, 0));
    Piece of_q[kPieces];
    float score = 0, dweight = 0;
    CUTE_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) {
      const int column = thread % 8 * 8 + piece * 64;
      const bool inside = d >= 0 && column < columns;
      of_q[piece] = Piece(q[column], inside);
      add_product<Element>(score, of_q[piece], Piece(k[column], inside));
      add_product<Element>(dweight, of_dout[piece], Piece(v[column], inside));
    }
    score = row_sum_of_eight(score), dweight = row_sum_of_eight(dweight);
    if (d < 0) return;
    const int64_t statistics = (batch * problem.heads + head) * problem.seqlen + row + i;
    const float lse_log2 = static_cast<const float*>(params.lse)[statistics] * kLog2e;
    const float weight = exp2_fast(score * scale_log2_of(problem) - lse_log2), ds = weight * (dweight - delta);
    if (thread % 8 == 0) {
      static_cast<float*>(params.sink_weight)[statistics] = weight;
      static_cast<float*>(params.sink_ds)[statistics] = ds;
    }
    if (d >= row + visible.offset) return;  // it begins within the tile; of those before, rows see one alone
    CUTE_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) sums.add(piece, ds, of_q[piece], weight, of_dout[piece]);
  }

  // Adds up the sums of all threads that share columns, and writes the tile's. Of four lanes, 8 apart, each is left
  // with the sum of one line. A barrier stands between its two halves.
  DEVICE static void store_sums(const BackwardParams& params, int row_tile, const SinkSums<Element, kPieces>& sums,
                                Shared& shared, int thread) {
    const bool of_values = thread & 16, last_half = thread & 8;
    CUTE_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) {
      float half[8];
      CUTE_UNROLL
      for (int x = 0; x < 8; ++x) {
        const float dk = sums.dk[piece][x], dv = sums.dv[piece][x];
        half[x] = (of_values ? dv : dk) + shuffle_xor(of_values ? dk : dv, 16);
      }
      alignas(16) float four[4];
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x)
        four[x] = (last_half ? half[x + 4] : half[x]) + shuffle_xor(last_half ? half[x] : half[x + 4], 8);
      Four& part = shared.parts[thread / 32][thread % 32 / 8 * Lines::kPieces + piece * 8 + thread % 8];
      Move<uint128_t>::copy(reinterpret_cast<const uint128_t&>(four), reinterpret_cast<uint128_t&>(part));
    }
    sync_block();  // all warps' sums have come, and the gradients of the sinks' scores
    if (thread >= Lines::kFours) return;
    alignas(16) float total[4] = {};
    Lines::template sum<kThreads / 32>(shared.parts[0], thread, total);
    Move<uint128_t>::copy(reinterpret_cast<const uint128_t&>(total),
                          reinterpret_cast<uint128_t&>(Lines::of_tile(params, row_tile)[4 * thread]));
  }
};

// dq of a tile of rows, from the sums that the atomics left.
template <typename Element, int kHeadDim, int kKib>
struct Postprocess : BackwardTiles<Element, kHeadDim, kKib> {
  using Tiles = BackwardTiles<Element, kHeadDim, kKib>;
  using Tiles::kRows, Tiles::kThreads;
  using Shared = PostprocessShared<Element, kHeadDim, kKib>;

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
