// Forward: FlashAttention-2's loop with the left bound of groups.h. The sink is a tile of one key.
//
// Scores are kept transposed, [keys, query rows]: lanes are query rows, so the online softmax needs no
// reduction across lanes, and K and V are read as they lie.
//
// In the paper's letters (FlashAttention-2, algorithm 1): `scores` are S, and `weights` P, not yet divided by their
// sums; `out` is O, `lse` L.
#pragma once

#include "blocks.h"
#include "scratch.h"
#include "weighted_sum.h"

namespace longlora::cpu::LONGLORA_ISA {

template <typename T>
struct Forward {
  using E = Multiplied<T>;
  using Acc = Accumulate<T>;

  Forward(const ForwardParams& params, Arena& arena)
      : p(params),
        head_dim(static_cast<int>(params.problem.head_dim)),
        pitch(static_cast<int>(round_up(head_dim, kPad))),
        scale_log2(scale_log2_of<Acc>(params.problem)),
        q_t(arena.take<E>(head_dim / kPack<E> * kForwardRows)),
        out(head_dim, pitch, arena),
        row_max(arena.take<Acc>(kForwardRows)),
        row_sum(arena.take<Acc>(kForwardRows)),
        scores(arena.take<Acc>(kForwardKeys * kForwardRows)),
        weights(arena.take<E>(kForwardKeys / kPack<E> * kForwardRows)),
        k(arena.take<E>(kForwardKeys * pitch / kPack<E>)),
        v(head_dim, pitch, arena.take<E>(SummedRows<T, kForwardKeys>::size(pitch))) {}

  void run(int64_t batch, int64_t head, int64_t row) {
    const Problem& problem = p.problem;
    const QueryBlock<kForwardRows> block(problem, batch, head, row, row + kForwardRows);
    const int64_t kv_head = head / (problem.heads / problem.kv_heads);

    load_transposed<T>({p.q, batch, row, head, block.rows}, head_dim, kForwardRows, q_t);
    out.clear();
    for (int r = 0; r < kForwardRows; ++r) {
      row_max[r] = -INFINITY;
      row_sum[r] = 0;
    }
    block.for_each_sink(problem, batch, [&](int64_t d, int begin, int end) {
      load_rows<T>({p.k, batch, d, kv_head, 1}, head_dim, pitch, k);
      v.load({p.v, batch, d, kv_head, 1});
      step_of_sink(begin, end);
    });
    for (int64_t key = block.begin_key(); key < block.end_key(); key += kForwardKeys) {
      const int keys = static_cast<int>(lesser<int64_t>(kForwardKeys, block.end_key() - key));
      const RowRun<Acc, kForwardRows> run(block, key, keys);
      if (run.size() <= 0) continue;  // the end of a document that this block does not reach back to
      load_rows<T>({p.k, batch, key, kv_head, keys}, head_dim, pitch, k);
      v.load({p.v, batch, key, kv_head, keys});
      step(block, run, key, keys);
    }
    finish(block, batch, head);
  }

 private:
  void step(const QueryBlock<kForwardRows>& block, const RowRun<Acc, kForwardRows>& run, int64_t key, int keys) {
    score(run, keys);
    block.mask(scores, key, keys, run.begin, run.end);
    for (int r = run.begin; r < run.end; r += kLanes<Acc>) softmax(keys, r);
    const int summed = (keys + kPack<E> - 1) / kPack<E>;
    out.add(run.begin, run.size(), summed, weights + run.begin, kForwardRows, v, 0);
  }

  // Rows [begin, end), among which the neighbours in their vectors are not, see the one key.
  void step_of_sink(int begin, int end) {
    const RowRun<Acc, kForwardRows> run(begin, end);
    score(run, 1);
    for (int r = run.begin; r < begin; ++r) scores[r] = -INFINITY;
    for (int r = end; r < run.end; ++r) scores[r] = -INFINITY;
    for (int r = run.begin; r < run.end; r += kLanes<Acc>) softmax(1, r);
    out.add_one(begin, end, weights, v);
  }

  void score(const RowRun<Acc, kForwardRows>& run, int keys) {
    gemm<Operand::kPlain>(Update::kStore, keys, run.size(), head_dim / kPack<E>, k, pitch / kPack<E>, q_t + run.begin,
                          kForwardRows, scores + run.begin, kForwardRows);
  }

  // Online softmax in base 2 over one tile of keys, for kLanes query rows from row r on: scores become
  // weights relative to the running maximum, and what was summed before is rescaled to it.
  void softmax(int keys, int r) {
    Vector<Acc> tile_max = as_vector(scores + r);
    for (int j = 1; j < keys; ++j) tile_max = maximum<Acc>(tile_max, as_vector(scores + j * kForwardRows + r));
    const Vector<Acc> old_max = as_vector(row_max + r);
    const Vector<Acc> new_max = maximum<Acc>(old_max, tile_max * scale_log2);
    // A row that has seen no key yet keeps -inf; subtracting 0 instead avoids inf - inf.
    const Vector<Acc> origin = new_max == -INFINITY ? Vector<Acc>{} : new_max;
    Vector<Acc> sum = {};
    for (int j = 0; j < keys; j += kPack<E>) {
      Vector<Acc> weight[kPack<E>] = {};
      for (int i = 0; i < kPack<E> && j + i < keys; ++i) {
        weight[i] = exp2(as_vector(scores + (j + i) * kForwardRows + r) * scale_log2 - origin);
        sum += weight[i];
      }
      as_vector(weights + j / kPack<E> * kForwardRows + r) = pack(weight, E());
    }
    const Vector<Acc> rescale = exp2(old_max - origin);
    as_vector(row_max + r) = new_max;
    as_vector(row_sum + r) = as_vector(row_sum + r) * rescale + sum;
    out.scale(r, rescale);
  }

  void finish(const QueryBlock<kForwardRows>& block, int64_t batch, int64_t head) {
    Acc* lse = static_cast<Acc*>(p.lse) + (batch * p.problem.heads + head) * p.problem.seqlen + block.row;
    out.for_each_row(block.rows, [&](int r, const Acc* values) {
      lse[r] = static_cast<Acc>(row_max[r] * M_LN2 + ::log(row_sum[r]));
      store_row<T>(values, 1 / row_sum[r], head_dim, row_of<T>(p.out, batch, block.row + r, head));
    });
  }

  const ForwardParams& p;
  const int head_dim;
  const int pitch;
  const Acc scale_log2;
  E* const q_t;                             // [head_dim, rows]
  const WeightedSums<T, kForwardRows> out;  // not yet divided by row_sum
  Acc* const row_max;  // of the scores times scale_log2, rounded: where it stays, the rescaling is exactly 1
  Acc* const row_sum;
  Acc* const scores;  // [keys, rows]
  E* const weights;   // [keys, rows]
  E* const k;         // [keys, pitch]
  const SummedRows<T, kForwardKeys> v;
};

}  // namespace longlora::cpu::LONGLORA_ISA
