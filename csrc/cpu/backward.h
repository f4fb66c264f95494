// Backward in one pass over the tiles, five matrix products each: dK and dV of a block of keys stay in scratch while
// its queries pass by, dQ is summed in query_gradient.h.
//
// In the paper's letters (FlashAttention-2, algorithm 2): `scores` are S, `weights` P, `dweights` dP, `ds` dS and
// `delta` D.
#pragma once

#include "blocks.h"
#include "pack.h"
#include "query_gradient.h"
#include "scratch.h"

namespace longlora::cpu::LONGLORA_ISA {

// delta = rowsum(dout * out) of one block of query rows, lanes being rows, summed in gemm's order: in a row that sees
// one key, where out = v, it then cancels dout * v to exactly nothing.
template <typename T>
struct Preprocess {
  using E = Multiplied<T>;
  using Acc = Accumulate<T>;

  Preprocess(const BackwardParams& params, Arena& arena)
      : p(params),
        head_dim(static_cast<int>(params.problem.head_dim)),
        dout_t(arena.take<E>(head_dim / kPack<E> * kBackwardBlock)),
        out_t(arena.take<E>(head_dim / kPack<E> * kBackwardBlock)),
        delta(arena.take<Acc>(kBackwardBlock)) {}

  void run(int64_t batch, int64_t head, int64_t row) {
    const int rows = static_cast<int>(lesser<int64_t>(kBackwardBlock, p.problem.seqlen - row));
    load_transposed<T>({p.dout, batch, row, head, rows}, head_dim, kBackwardBlock, dout_t);
    load_transposed<T>({p.out, batch, row, head, rows}, head_dim, kBackwardBlock, out_t);
    const int summed = head_dim / kPack<E>;
    for (int r = 0; r < rows; r += kLanes<Acc>) {
      Vector<Acc> sum = {};
      for (int begin = 0; begin < summed; begin += kChain) {
        Vector<Acc> chain = {};
        for (int d = begin; d < lesser(begin + kChain, summed); ++d)
          chain = multiply_add(as_vector(dout_t + d * kBackwardBlock + r), as_vector(out_t + d * kBackwardBlock + r),
                               chain);
        sum += chain;
      }
      as_vector(delta + r) = sum;
    }
    const int64_t row_stats = (batch * p.problem.heads + head) * p.problem.seqlen + row;
    std::memcpy(static_cast<Acc*>(p.delta) + row_stats, delta, sizeof(Acc) * rows);
  }

 private:
  const BackwardParams& p;
  const int head_dim;
  E* const dout_t;  // [head_dim, rows]
  E* const out_t;
  Acc* const delta;
};

// dK and dV of one block of keys, over every query head of its group (GQA is reduced here) and every query block from
// the diagonal up to the first whose keys all lie past this block; and its part of their dQ.
template <typename T>
struct Backward {
  using E = Multiplied<T>;
  using Acc = Accumulate<T>;

  Backward(const BackwardParams& params, Arena& arena)
      : p(params),
        head_dim(static_cast<int>(params.problem.head_dim)),
        pitch(static_cast<int>(round_up(head_dim, kPad))),
        scale_log2(scale_log2_of<Acc>(params.problem)),
        k_t(arena.take<E>(head_dim / kPack<E> * kBackwardBlock)),
        v_t(arena.take<E>(head_dim / kPack<E> * kBackwardBlock)),
        k(arena.take<E>(kBackwardBlock / kPack<E> * pitch)),
        q(arena.take<E>(kBackwardBlock * pitch / kPack<E>)),
        dout(arena.take<E>(kBackwardBlock * pitch / kPack<E>)),
        summed_q(kPack<E> == 1 ? q : arena.take<E>(kBackwardBlock / kPack<E> * pitch)),
        summed_dout(kPack<E> == 1 ? dout : arena.take<E>(kBackwardBlock / kPack<E> * pitch)),
        dk(arena.take<Acc>(kBackwardBlock * pitch)),
        dv(arena.take<Acc>(kBackwardBlock * pitch)),
        scores(arena.take<Acc>(kBackwardBlock * kBackwardBlock)),
        dweights(arena.take<Acc>(kBackwardBlock * kBackwardBlock)),
        weights(arena.take<E>(kBackwardBlock * kBackwardBlock / kPack<E>)),
        ds(arena.take<E>(kBackwardBlock * kBackwardBlock / kPack<E>)),
        ds_rows(kPack<E> == 1 ? ds : arena.take<E>(kBackwardBlock * kBackwardBlock / kPack<E>)) {}

  void run(const QueryGradients<Acc>& dq, int64_t dq_head, int64_t batch, int64_t kv_head, int64_t key) {
    const Problem& problem = p.problem;
    const int keys = static_cast<int>(lesser<int64_t>(kBackwardBlock, problem.seqlen - key));
    load_transposed<T>({p.k, batch, key, kv_head, keys}, head_dim, kBackwardBlock, k_t);
    load_transposed<T>({p.v, batch, key, kv_head, keys}, head_dim, kBackwardBlock, v_t);
    load_summed_rows<T>({p.k, batch, key, kv_head, keys}, head_dim, pitch, k);
    std::memset(dk, 0, sizeof(Acc) * kBackwardBlock * pitch);
    std::memset(dv, 0, sizeof(Acc) * kBackwardBlock * pitch);

    const int64_t heads_per_kv = problem.heads / problem.kv_heads;
    for (int64_t i = 0; i < heads_per_kv; ++i) {
      const int64_t head = kv_head * heads_per_kv + i;
      for (int64_t row = key; row < problem.seqlen; row += kBackwardBlock) {
        const QueryBlock<kBackwardBlock> block(problem, batch, head, row);
        const int rows = block.row_end(key + keys - 1);
        if (rows == 0) break;  // nor does any later row look back this far
        load(batch, head, row, rows);
        products(block, batch, head, key, keys, rows);
        const int64_t key_block = key / kBackwardBlock, query_block = row / kBackwardBlock;
        Acc* sums = dq.wait_for_turn(dq_head + i, query_block, key_block, block.begin_key() / kBackwardBlock);
        add_to_dq(sums, row - key, keys, rows);
        for (int r = 0; row == key && r < rows; ++r)  // the diagonal comes last
          store_row<T>(sums + r * pitch, static_cast<Acc>(problem.scale), head_dim,
                       row_of<T>(p.dq, batch, row + r, head));
        dq.pass_turn(dq_head + i, query_block, key_block);
      }
    }
    for (int j = 0; j < keys; ++j) {
      store_row<T>(dk + j * pitch, static_cast<Acc>(problem.scale), head_dim, row_of<T>(p.dk, batch, key + j, kv_head));
      store_row<T>(dv + j * pitch, 1, head_dim, row_of<T>(p.dv, batch, key + j, kv_head));
    }
  }

 private:
  void load(int64_t batch, int64_t head, int64_t row, int rows) {
    load_rows<T>({p.q, batch, row, head, rows}, head_dim, pitch, q);
    load_rows<T>({p.dout, batch, row, head, rows}, head_dim, pitch, dout);
    if (kPack<E> == 1) return;
    load_summed_rows<T>({p.q, batch, row, head, rows}, head_dim, pitch, summed_q);
    load_summed_rows<T>({p.dout, batch, row, head, rows}, head_dim, pitch, summed_dout);
  }

  // How many keys the rows up to `row` see, where the block of rows is `ahead` of that of keys.
  static int keys_seen(int64_t ahead, int row, int keys) {
    return static_cast<int>(lesser<int64_t>(ahead + row, keys));
  }

  // Scores and weights, and what they give dK and dV.
  void products(const QueryBlock<kBackwardBlock>& block, int64_t batch, int64_t head, int64_t key, int keys, int rows) {
    const int64_t ahead = block.row - key;
    const int strip = ahead == 0 ? kStrip : kBackwardBlock;
    const int64_t row_stats = (batch * p.problem.heads + head) * p.problem.seqlen + block.row;
    const Acc* lse = static_cast<const Acc*>(p.lse) + row_stats;
    const Acc* delta = static_cast<const Acc*>(p.delta) + row_stats;
    for (int r = 0; r < rows; r += strip) {
      const int count = lesser(strip, rows - r);
      const int seen = static_cast<int>(round_up(keys_seen(ahead, r + count, keys), kLanes<Acc>));
      const int64_t at = r * pitch / kPack<E>;
      gemm<Operand::kPlain>(Update::kStore, count, seen, head_dim / kPack<E>, q + at, pitch / kPack<E>, k_t,
                            kBackwardBlock, scores + r * kBackwardBlock, kBackwardBlock);
      gemm<Operand::kPlain>(Update::kStore, count, seen, head_dim / kPack<E>, dout + at, pitch / kPack<E>, v_t,
                            kBackwardBlock, dweights + r * kBackwardBlock, kBackwardBlock);
      for (int i = r; i < r + count; i += kPack<E>)
        softmax(block, key, i, lesser(kPack<E>, rows - i), keys, seen, lse, delta);
    }
    for (int j = 0; j < keys; j += strip) {
      const int count = lesser(strip, keys - j);
      const int first = ahead == 0 ? j : 0;  // rows above see none of these keys
      if (first >= rows) break;
      const int summed = (rows - first + kPack<E> - 1) / kPack<E>;
      const int64_t from = first / kPack<E>;
      gemm<Operand::kTransposed>(Update::kAdd, count, pitch, summed, weights + from * kBackwardBlock + j,
                                 kBackwardBlock, summed_dout + from * pitch, pitch, dv + j * pitch, pitch);
      gemm<Operand::kTransposed>(Update::kAdd, count, pitch, summed, ds + from * kBackwardBlock + j, kBackwardBlock,
                                 summed_q + from * pitch, pitch, dk + j * pitch, pitch);
    }
  }

  // Weights and ds of `count` rows from r on, which make one row of operand elements.
  void softmax(const QueryBlock<kBackwardBlock>& block, int64_t key, int r, int count, int keys, int seen,
               const Acc* lse, const Acc* delta) {
    Acc lse_log2[kPack<E>];
    for (int i = 0; i < count; ++i) {
      Acc* const score = scores + (r + i) * kBackwardBlock;
      const int begin = static_cast<int>(greater<int64_t>(block.first[r + i] - key, 0));
      const int end = static_cast<int>(lesser<int64_t>(block.row + r + i + 1 - key, keys));
      for (int j = 0; j < begin; ++j) score[j] = -INFINITY;
      for (int j = end; j < seen; ++j) score[j] = -INFINITY;
      lse_log2[i] = static_cast<Acc>(lse[r + i] * M_LOG2E);
    }
    for (int j = 0; j < seen; j += kLanes<Acc>) {
      Vector<Acc> weight[kPack<E>] = {}, ds_lanes[kPack<E>] = {};
      for (int i = 0; i < count; ++i) {
        const int64_t at = (r + i) * kBackwardBlock + j;
        weight[i] = exp2(as_vector(scores + at) * scale_log2 - lse_log2[i]);
        ds_lanes[i] = weight[i] * (as_vector(dweights + at) - delta[r + i]);
        store_packed(ds_lanes[i], ds_rows + at / kPack<E>);
      }
      const int64_t at = r / kPack<E> * kBackwardBlock + j;
      as_vector(weights + at) = pack(weight, E());
      as_vector(ds + at) = pack(ds_lanes, E());
    }
  }

  void add_to_dq(Acc* sums, int64_t ahead, int keys, int rows) {
    const int strip = ahead == 0 ? kStrip : kBackwardBlock;
    for (int r = 0; r < rows; r += strip) {
      const int count = lesser(strip, rows - r);
      const int summed = (keys_seen(ahead, r + count, keys) + kPack<E> - 1) / kPack<E>;
      gemm<Operand::kPlain>(Update::kAdd, count, pitch, summed, ds_rows + r * kBackwardBlock / kPack<E>,
                            kBackwardBlock / kPack<E>, k, pitch, sums + r * pitch, pitch);
    }
  }

  const BackwardParams& p;
  const int head_dim;
  const int pitch;
  const Acc scale_log2;
  E* const k_t;  // [head_dim, keys]
  E* const v_t;
  E* const k;         // [keys, pitch], summed over keys
  E* const q;         // [rows, pitch], summed over head_dim
  E* const dout;      // likewise
  E* const summed_q;  // [rows, pitch], summed over rows
  E* const summed_dout;
  Acc* const dk;  // [keys, pitch], not yet times scale
  Acc* const dv;
  Acc* const scores;  // [rows, keys]
  Acc* const dweights;
  E* const weights;  // [rows, keys], summed over rows
  E* const ds;       // likewise
  E* const ds_rows;  // [rows, keys], summed over keys
};

}  // namespace longlora::cpu::LONGLORA_ISA
