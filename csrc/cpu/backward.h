// Backward in one pass over the tiles, five matrix products each: dK and dV of a block of keys stay in scratch while
// its queries pass by, dQ is summed in query_gradient.h. What the sink has to do with a row is worked out once, with
// delta: its weight and the gradient of its score.
//
// In the paper's letters (FlashAttention-2, algorithm 2): `scores` are S, `weights` P, `dweights` dP, `ds` dS and
// `delta` D.
#pragma once

#include "blocks.h"
#include "query_gradient.h"
#include "scratch.h"
#include "weighted_sum.h"

namespace longlora::cpu::LONGLORA_ISA {

// dK and dV of one block of keys, over every query head of its group (GQA is reduced here) and every query block from
// the diagonal up to the first whose keys all lie past this block; and its part of their dQ.
template <typename T>
struct Backward {
  using E = Multiplied<T>;
  using Acc = Accumulate<T>;
  using Summed = SummedRows<T, kBackwardBlock>;
  using Sums = WeightedSums<T, kBackwardBlock>;

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
        summed_q(head_dim, pitch, kPack<E> == 1 ? q : arena.take<E>(Summed::size(pitch))),
        summed_dout(head_dim, pitch, kPack<E> == 1 ? dout : arena.take<E>(Summed::size(pitch))),
        dk(head_dim, pitch, arena),
        dv(head_dim, pitch, arena),
        scores(arena.take<Acc>(kBackwardBlock * kBackwardBlock)),
        dweights(arena.take<Acc>(kBackwardBlock * kBackwardBlock)),
        weights(arena.take<E>(kBackwardBlock * kBackwardBlock / kPack<E>)),
        ds(arena.take<E>(kBackwardBlock * kBackwardBlock / kPack<E>)),
        ds_rows(kPack<E> == 1 ? ds : arena.take<E>(kBackwardBlock * kBackwardBlock / kPack<E>)),
        of_sinks(arena.take<Acc>(2 * pitch)) {}

  void run(const QueryGradients<Acc>& dq, int64_t dq_head, int64_t batch, int64_t kv_head, int64_t key) {
    const Problem& problem = p.problem;
    const int keys = static_cast<int>(lesser<int64_t>(kBackwardBlock, problem.seqlen_k - key));
    load_transposed<T>({p.k, batch, key, kv_head, keys}, head_dim, kBackwardBlock, k_t);
    load_transposed<T>({p.v, batch, key, kv_head, keys}, head_dim, kBackwardBlock, v_t);
    load_summed_rows<T>({p.k, batch, key, kv_head, keys}, head_dim, pitch, k);
    dk.clear();
    dv.clear();

    const int64_t heads_per_kv = problem.heads / problem.kv_heads;
    for (int64_t i = 0; i < heads_per_kv; ++i) {
      const int64_t head = kv_head * heads_per_kv + i;
      const int64_t key_block = key / kBackwardBlock, offset = problem.query_offset();
      int64_t query_block = greater(key_block, offset / kBackwardBlock);
      for (; query_block * kBackwardBlock < problem.seqlen_k; ++query_block) {
        const int64_t row = greater<int64_t>(query_block * kBackwardBlock - offset, 0);
        const QueryBlock<kBackwardBlock> block(problem, batch, head, row, (query_block + 1) * kBackwardBlock - offset);
        const int rows = block.row_end(key + keys - 1);
        if (rows == 0) break;  // nor does any later row look back this far
        load(batch, head, row, rows);
        products(block, batch, head, key, keys, rows);
        const int64_t first_block = block.begin_key() / kBackwardBlock;
        Acc* sums = dq.wait_for_turn(dq_head + i, query_block, key_block, first_block);
        if (key_block == first_block) begin_with_sinks(block, batch, head, kv_head, sums);
        add_to_dq(sums, block.own_key - key, keys, rows);
        for (int r = 0; query_block == key_block && r < rows; ++r)  // the diagonal comes last
          store_row<T>(sums + r * pitch, static_cast<Acc>(problem.scale), head_dim,
                       row_of<T>(p.dq, batch, row + r, head));
        dq.pass_turn(dq_head + i, query_block, key_block);
      }
    }
    if (problem.sink) add_sinks_of_documents(batch, kv_head, key, keys);
    dk.for_each_row(keys, [&](int j, const Acc* values) {
      store_row<T>(values, static_cast<Acc>(problem.scale), head_dim, row_of<T>(p.dk, batch, key + j, kv_head));
    });
    dv.for_each_row(keys, [&](int j, const Acc* values) {
      store_row<T>(values, 1, head_dim, row_of<T>(p.dv, batch, key + j, kv_head));
    });
  }

 private:
  void load(int64_t batch, int64_t head, int64_t row, int rows) {
    load_rows<T>({p.q, batch, row, head, rows}, head_dim, pitch, q);
    load_rows<T>({p.dout, batch, row, head, rows}, head_dim, pitch, dout);
    if (kPack<E> == 1) return;
    summed_q.load({p.q, batch, row, head, rows});
    summed_dout.load({p.dout, batch, row, head, rows});
  }

  // What dq of the rows that see a sink besides begins with.
  void begin_with_sinks(const QueryBlock<kBackwardBlock>& block, int64_t batch, int64_t head, int64_t kv_head,
                        Acc* sums) {
    const Acc* sink_ds = static_cast<const Acc*>(p.sink_ds) + stats_of(batch, head, block.row);
    block.for_each_sink(p.problem, batch, [&](int64_t d, int begin, int end) {
      const T* k_row = row_of<T>(p.k, batch, d, kv_head);
      for (int c = 0; c < head_dim; ++c) of_sinks[c] = widen(k_row[c]);
      for (int r = begin; r < end; ++r)
        for (int c = 0; c < head_dim; ++c) sums[r * pitch + c] = sink_ds[r] * of_sinks[c];
    });
  }

  // What the first tokens of documents among the keys get from the rows that see them as sinks.
  void add_sinks_of_documents(int64_t batch, int64_t kv_head, int64_t key, int keys) {
    const Problem& problem = p.problem;
    const int64_t offset = problem.query_offset();
    // Those that begin among the keys have their first row there too, or are the first row's.
    for (int64_t row = greater<int64_t>(key - offset, 0), end; row < problem.seqlen; row = end) {
      const int64_t d = document_of(problem, batch, row);
      const int64_t stop = d < key ? lesser(key + keys - offset, problem.seqlen) : problem.seqlen;
      if (d >= key + keys || row >= stop) break;
      for (end = row + 1; end < stop && document_of(problem, batch, end) == d;) ++end;
      if (d >= key) add_sink(batch, kv_head, d, row, end, static_cast<int>(d - key));
    }
  }

  // From the rows [row, end) of document d, key j of the block.
  void add_sink(int64_t batch, int64_t kv_head, int64_t d, int64_t row, int64_t end, int j) {
    const Problem& problem = p.problem;
    const int64_t heads_per_kv = problem.heads / problem.kv_heads, offset = problem.query_offset();
    for (int64_t head = kv_head * heads_per_kv; head < (kv_head + 1) * heads_per_kv; ++head) {
      const auto sees = [&](int64_t i) {
        const int64_t first =
            first_key(i + offset, d, problem.group_size, head >= problem.first_shifted_head, problem.window);
        return sees_sink(first, d);
      };
      int64_t begin = row;
      for (int64_t high = end; begin < high;) {  // later rows do where one does
        const int64_t middle = (begin + high) / 2;
        if (sees(middle))
          high = middle;
        else
          begin = middle + 1;
      }
      const Acc* sink_weight = static_cast<const Acc*>(p.sink_weight) + stats_of(batch, head, 0);
      const Acc* sink_ds = static_cast<const Acc*>(p.sink_ds) + stats_of(batch, head, 0);
      for (; begin < end; begin += kChain) {
        Acc *const chain_dk = of_sinks, *const chain_dv = of_sinks + pitch;
        std::memset(of_sinks, 0, sizeof(Acc) * 2 * pitch);
        for (int64_t i = begin; i < lesser(begin + kChain, end); ++i) {
          const T *q_row = row_of<T>(p.q, batch, i, head), *dout_row = row_of<T>(p.dout, batch, i, head);
          for (int c = 0; c < head_dim; ++c) chain_dk[c] += sink_ds[i] * widen(q_row[c]);
          for (int c = 0; c < head_dim; ++c) chain_dv[c] += sink_weight[i] * widen(dout_row[c]);
        }
        for (int c = 0; c < head_dim; ++c) dk.at(j, c) += chain_dk[c];
        for (int c = 0; c < head_dim; ++c) dv.at(j, c) += chain_dv[c];
      }
    }
  }

  int64_t stats_of(int64_t batch, int64_t head, int64_t row) const {
    return (batch * p.problem.heads + head) * p.problem.seqlen + row;
  }

  // How many keys the rows up to `row` see, where the block of rows is `ahead` of that of keys.
  static int keys_seen(int64_t ahead, int row, int keys) {
    return static_cast<int>(lesser<int64_t>(ahead + row, keys));
  }

  // Scores and weights, and what they give dK and dV.
  void products(const QueryBlock<kBackwardBlock>& block, int64_t batch, int64_t head, int64_t key, int keys, int rows) {
    const int64_t ahead = block.own_key - key;
    const int strip = ahead == 0 ? kStrip : kBackwardBlock;
    const int64_t row_stats = stats_of(batch, head, block.row);
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
      const int64_t at = from * kBackwardBlock + j;
      dv.add(j, count, summed, weights + at, kBackwardBlock, summed_dout, from);
      dk.add(j, count, summed, ds + at, kBackwardBlock, summed_q, from);
    }
  }

  // Weights and ds of `count` rows from r on, which make one row of operand elements.
  void softmax(const QueryBlock<kBackwardBlock>& block, int64_t key, int r, int count, int keys, int seen,
               const Acc* lse, const Acc* delta) {
    Acc lse_log2[kPack<E>];
    for (int i = 0; i < count; ++i) {
      Acc* const score = scores + (r + i) * kBackwardBlock;
      const int begin = static_cast<int>(greater<int64_t>(block.first[r + i] - key, 0));
      const int end = static_cast<int>(lesser<int64_t>(block.own_key + r + i + 1 - key, keys));
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
  E* const k;     // [keys, pitch], summed over keys
  E* const q;     // [rows, pitch], summed over head_dim
  E* const dout;  // likewise
  const Summed summed_q;
  const Summed summed_dout;
  const Sums dk;  // not yet times scale
  const Sums dv;
  Acc* const scores;  // [rows, keys]
  Acc* const dweights;
  E* const weights;     // [rows, keys], summed over rows
  E* const ds;          // likewise
  E* const ds_rows;     // [rows, keys], summed over keys
  Acc* const of_sinks;  // two rows of head_dim
};

}  // namespace longlora::cpu::LONGLORA_ISA
