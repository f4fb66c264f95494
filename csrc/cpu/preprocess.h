// What the backward pass needs of each query row besides the forward's results: delta and, of the sink, its weight and
// the gradient of its score.
#pragma once

#include "blocks.h"
#include "pack.h"
#include "scratch.h"

namespace longlora::cpu::LONGLORA_ISA {

// delta = rowsum(dout * out) - dlse of one block of query rows, lanes being rows, summed in gemm's order: in a row that
// sees one key, where out = v, it then cancels dout * v to exactly nothing. And the rows' sinks.
template <typename T>
struct Preprocess {
  using E = Multiplied<T>;
  using Acc = Accumulate<T>;

  Preprocess(const BackwardParams& params, Arena& arena)
      : p(params),
        head_dim(static_cast<int>(params.problem.head_dim)),
        pitch(static_cast<int>(round_up(head_dim, kPad))),
        scale_log2(scale_log2_of<Acc>(params.problem)),
        dout_t(arena.take<E>(head_dim / kPack<E> * kBackwardBlock)),
        out_t(arena.take<E>(head_dim / kPack<E> * kBackwardBlock)),
        delta(arena.take<Acc>(kBackwardBlock)),
        sink_row(arena.take<E>(pitch / kPack<E>)),
        weights(arena.take<Acc>(kBackwardBlock)),
        ds(arena.take<Acc>(kBackwardBlock)),
        dout(kTiles<E> ? arena.take<E>(16 * pitch / kPack<E>) : nullptr),
        square(kTiles<E> ? arena.take<Acc>(16 * 16) : nullptr) {}

  void run(int64_t batch, int64_t head, int64_t row) {
    const int rows = static_cast<int>(lesser<int64_t>(kBackwardBlock, p.problem.seqlen - row));
    const int64_t row_stats = (batch * p.problem.heads + head) * p.problem.seqlen + row;
    load_transposed<T>({p.dout, batch, row, head, rows}, head_dim, kBackwardBlock, dout_t);
    load_transposed<T>({p.out, batch, row, head, rows}, head_dim, kBackwardBlock, out_t);
    for (int r = 0; r < rows; r += kLanes<Acc>) {
      if constexpr (kTiles<E>)
        sum_in_tiles(batch, head, row + r, lesser(kLanes<Acc>, rows - r), r);
      else
        sum_in_vectors(r);
    }
    if (p.dlse)
      for (int r = 0; r < rows; ++r) delta[r] -= static_cast<const Acc*>(p.dlse)[row_stats + r];
    std::memcpy(static_cast<Acc*>(p.delta) + row_stats, delta, sizeof(Acc) * rows);
    if (p.problem.sink)
      sinks(QueryBlock<kBackwardBlock>(p.problem, batch, head, row, row + rows), batch, head, row_stats);
  }

 private:
  void sum_in_vectors(int r) {
    const int summed = head_dim / kPack<E>;
    Vector<Acc> sum = {};
    for (int begin = 0; begin < summed; begin += kChain) {
      Vector<Acc> chain = {};
      for (int d = begin; d < lesser(begin + kChain, summed); ++d)
        chain =
            multiply_add(as_vector(dout_t + d * kBackwardBlock + r), as_vector(out_t + d * kBackwardBlock + r), chain);
      sum += chain;
    }
    as_vector(delta + r) = sum;
  }

  // In what order tiles sum is the processor's: the products of 16 rows with 16, of which the diagonal is wanted.
  void sum_in_tiles(int64_t batch, int64_t head, int64_t row, int count, int r) {
    load_rows<T>({p.dout, batch, row, head, count}, head_dim, pitch, dout);
    gemm<Operand::kPlain>(Update::kStore, count, 16, head_dim / kPack<E>, dout, pitch / kPack<E>, out_t + r,
                          kBackwardBlock, square, 16);
    for (int i = 0; i < count; ++i) delta[r + i] = square[i * 16 + i];
  }

  void sinks(const QueryBlock<kBackwardBlock>& block, int64_t batch, int64_t head, int64_t row_stats) {
    const int64_t kv_head = head / (p.problem.heads / p.problem.kv_heads);
    const Acc* lse = static_cast<const Acc*>(p.lse) + row_stats;
    E* const q_t = out_t;  // no longer needed
    bool loaded = false;
    block.for_each_sink(p.problem, batch, [&](int64_t d, int begin, int end) {
      if (!loaded) load_transposed<T>({p.q, batch, block.row, head, block.rows}, head_dim, kBackwardBlock, q_t);
      loaded = true;
      products({p.k, batch, d, kv_head, 1}, q_t, begin, end, weights);
      products({p.v, batch, d, kv_head, 1}, dout_t, begin, end, ds);
      for (int r = begin / kLanes<Acc> * kLanes<Acc>; r < end; r += kLanes<Acc>) {
        Vector<Acc> lse_log2 = {};
        for (int lane = 0; lane < kLanes<Acc>; ++lane)
          if (r + lane < block.rows) lse_log2[lane] = static_cast<Acc>(lse[r + lane] * M_LOG2E);
        as_vector(weights + r) = exp2(as_vector(weights + r) * scale_log2 - lse_log2);
        as_vector(ds + r) = as_vector(weights + r) * (as_vector(ds + r) - as_vector(delta + r));
      }
      std::memcpy(static_cast<Acc*>(p.sink_weight) + row_stats + begin, weights + begin, sizeof(Acc) * (end - begin));
      std::memcpy(static_cast<Acc*>(p.sink_ds) + row_stats + begin, ds + begin, sizeof(Acc) * (end - begin));
    });
  }

  // out[r] = the one row times row r of a transposed tile, for the vectors of the rows [begin, end).
  void products(const Rows& source, const E* tile_t, int begin, int end, Acc* out) {
    load_rows<T>(source, head_dim, pitch, sink_row);
    const RowRun<Acc, kBackwardBlock> run(begin, end);
    gemm<Operand::kPlain>(Update::kStore, 1, run.size(), head_dim / kPack<E>, sink_row, pitch / kPack<E>,
                          tile_t + run.begin, kBackwardBlock, out + run.begin, kBackwardBlock);
  }

  const BackwardParams& p;
  const int head_dim;
  const int pitch;
  const Acc scale_log2;
  E* const dout_t;  // [head_dim, rows]
  E* const out_t;
  Acc* const delta;
  E* const sink_row;   // [head_dim], of k or v
  Acc* const weights;  // of a sink
  Acc* const ds;       // and the gradient of its scores
  E* const dout;       // 16 rows of it, for tiles
  Acc* const square;   // their products with 16 of out
};

}  // namespace longlora::cpu::LONGLORA_ISA
