// Backward in one pass over the tiles, five matrix products each: dK and dV of a block of keys stay in scratch while
// its queries pass by, dQ is summed in query_gradient.h. What the sink has to do with a row is worked out once, with
// delta: its weight and the gradient of its score.
#pragma once

#include "blocks.h"
#include "pack.h"
#include "query_gradient.h"
#include "scratch.h"

namespace longlora::cpu::LONGLORA_ISA {

// delta = rowsum(dout * out) - dlse of one block of query rows, lanes being rows, summed in gemm's order: in a row that
// sees one key, where out = v, it then cancels dout * v to exactly nothing. And the rows' sinks.
template <typename T>
struct DeltaTile {
  using E = Multiplied<T>;
  using Acc = Accumulate<T>;

  DeltaTile(const BackwardParams& params, Arena& arena)
      : p(params),
        head_dim(static_cast<int>(params.problem.head_dim)),
        pitch(static_cast<int>(round_up(head_dim, kPad))),
        scale_log2(scale_log2_of<Acc>(params.problem)),
        dout_t(arena.take<E>(head_dim / kPack<E> * kBackwardBlock)),
        out_t(arena.take<E>(head_dim / kPack<E> * kBackwardBlock)),
        delta(arena.take<Acc>(kBackwardBlock)),
        sink_row(arena.take<E>(pitch / kPack<E>)),
        weights(arena.take<Acc>(kBackwardBlock)),
        ds(arena.take<Acc>(kBackwardBlock)) {}

  void run(int64_t batch, int64_t head, int64_t row) {
    const int rows = static_cast<int>(lesser<int64_t>(kBackwardBlock, p.problem.seqlen - row));
    const int64_t row_stats = (batch * p.problem.heads + head) * p.problem.seqlen + row;
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
    if (p.dlse)
      for (int r = 0; r < rows; ++r) delta[r] -= static_cast<const Acc*>(p.dlse)[row_stats + r];
    std::memcpy(static_cast<Acc*>(p.delta) + row_stats, delta, sizeof(Acc) * rows);
    if (p.problem.sink)
      sinks(QueryBlock<kBackwardBlock>(p.problem, batch, head, row, row + rows), batch, head, row_stats);
  }

 private:
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
};

// dK and dV of one block of keys, over every query head of its group (GQA is reduced here) and every query block from
// the diagonal up to the first whose keys all lie past this block; and its part of their dQ.
template <typename T>
struct GradientTile {
  using E = Multiplied<T>;
  using Acc = Accumulate<T>;

  GradientTile(const BackwardParams& params, Arena& arena)
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
        dprobs(arena.take<Acc>(kBackwardBlock * kBackwardBlock)),
        probs(arena.take<E>(kBackwardBlock * kBackwardBlock / kPack<E>)),
        dscores(arena.take<E>(kBackwardBlock * kBackwardBlock / kPack<E>)),
        dscore_rows(kPack<E> == 1 ? dscores : arena.take<E>(kBackwardBlock * kBackwardBlock / kPack<E>)),
        of_sinks(arena.take<Acc>(2 * pitch)) {}

  void run(const QueryGradients<Acc>& dq, int64_t dq_head, int64_t batch, int64_t kv_head, int64_t n0) {
    const Problem& problem = p.problem;
    const int keys = static_cast<int>(lesser<int64_t>(kBackwardBlock, problem.seqlen_k - n0));
    load_transposed<T>({p.k, batch, n0, kv_head, keys}, head_dim, kBackwardBlock, k_t);
    load_transposed<T>({p.v, batch, n0, kv_head, keys}, head_dim, kBackwardBlock, v_t);
    load_summed_rows<T>({p.k, batch, n0, kv_head, keys}, head_dim, pitch, k);
    std::memset(dk, 0, sizeof(Acc) * kBackwardBlock * pitch);
    std::memset(dv, 0, sizeof(Acc) * kBackwardBlock * pitch);

    const int64_t heads_per_kv = problem.heads / problem.kv_heads;
    for (int64_t i = 0; i < heads_per_kv; ++i) {
      const int64_t head = kv_head * heads_per_kv + i;
      const int64_t key_block = n0 / kBackwardBlock, offset = problem.query_offset();
      int64_t query_block = greater(key_block, offset / kBackwardBlock);
      for (; query_block * kBackwardBlock < problem.seqlen_k; ++query_block) {
        const int64_t row = greater<int64_t>(query_block * kBackwardBlock - offset, 0);
        const QueryBlock<kBackwardBlock> block(problem, batch, head, row, (query_block + 1) * kBackwardBlock - offset);
        const int rows = block.row_end(n0 + keys - 1);
        if (rows == 0) break;  // nor does any later row look back this far
        load(batch, head, row, rows);
        products(block, batch, head, n0, keys, rows);
        const int64_t first_block = block.begin_key() / kBackwardBlock;
        Acc* sums = dq.wait_for_turn(dq_head + i, query_block, key_block, first_block);
        if (key_block == first_block) begin_with_sinks(block, batch, head, kv_head, sums);
        add_to_dq(sums, block.m0 - n0, keys, rows);
        for (int r = 0; query_block == key_block && r < rows; ++r)  // the diagonal comes last
          store_row<T>(sums + r * pitch, static_cast<Acc>(problem.scale), head_dim,
                       row_of<T>(p.dq, batch, row + r, head));
        dq.pass_turn(dq_head + i, query_block, key_block);
      }
    }
    if (problem.sink) add_sinks_of_documents(batch, kv_head, n0, keys);
    for (int j = 0; j < keys; ++j) {
      store_row<T>(dk + j * pitch, static_cast<Acc>(problem.scale), head_dim, row_of<T>(p.dk, batch, n0 + j, kv_head));
      store_row<T>(dv + j * pitch, 1, head_dim, row_of<T>(p.dv, batch, n0 + j, kv_head));
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

  // What dq of the rows that see a sink besides begins with.
  void begin_with_sinks(const QueryBlock<kBackwardBlock>& block, int64_t batch, int64_t head, int64_t kv_head,
                        Acc* sums) {
    const Acc* ds = static_cast<const Acc*>(p.sink_ds) + stats_of(batch, head, block.row);
    block.for_each_sink(p.problem, batch, [&](int64_t d, int begin, int end) {
      const T* key = row_of<T>(p.k, batch, d, kv_head);
      for (int c = 0; c < head_dim; ++c) of_sinks[c] = widen(key[c]);
      for (int r = begin; r < end; ++r)
        for (int c = 0; c < head_dim; ++c) sums[r * pitch + c] = ds[r] * of_sinks[c];
    });
  }

  // What the first tokens of documents among the keys get from the rows that see them as sinks.
  void add_sinks_of_documents(int64_t batch, int64_t kv_head, int64_t n0, int keys) {
    const Problem& problem = p.problem;
    const int64_t offset = problem.query_offset();
    // Those that begin among the keys have their first row there too, or are the first row's.
    for (int64_t row = greater<int64_t>(n0 - offset, 0), end; row < problem.seqlen; row = end) {
      const int64_t d = document_of(problem, batch, row);
      const int64_t stop = d < n0 ? lesser(n0 + keys - offset, problem.seqlen) : problem.seqlen;
      if (d >= n0 + keys || row >= stop) break;
      for (end = row + 1; end < stop && document_of(problem, batch, end) == d;) ++end;
      if (d >= n0) add_sink(batch, kv_head, d, row, end, static_cast<int>(d - n0));
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
      const Acc* weight = static_cast<const Acc*>(p.sink_weight) + stats_of(batch, head, 0);
      const Acc* ds = static_cast<const Acc*>(p.sink_ds) + stats_of(batch, head, 0);
      for (; begin < end; begin += kChain) {
        Acc *const chain_dk = of_sinks, *const chain_dv = of_sinks + pitch;
        std::memset(of_sinks, 0, sizeof(Acc) * 2 * pitch);
        for (int64_t i = begin; i < lesser(begin + kChain, end); ++i) {
          const T *q_row = row_of<T>(p.q, batch, i, head), *dout_row = row_of<T>(p.dout, batch, i, head);
          for (int c = 0; c < head_dim; ++c) chain_dk[c] += ds[i] * widen(q_row[c]);
          for (int c = 0; c < head_dim; ++c) chain_dv[c] += weight[i] * widen(dout_row[c]);
        }
        for (int c = 0; c < head_dim; ++c) dk[j * pitch + c] += chain_dk[c];
        for (int c = 0; c < head_dim; ++c) dv[j * pitch + c] += chain_dv[c];
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

  // Scores and probabilities, and what they give dK and dV.
  void products(const QueryBlock<kBackwardBlock>& block, int64_t batch, int64_t head, int64_t n0, int keys, int rows) {
    const int64_t ahead = block.m0 - n0;
    const int strip = ahead == 0 ? kStrip : kBackwardBlock;
    const int64_t row_stats = stats_of(batch, head, block.row);
    const Acc* lse = static_cast<const Acc*>(p.lse) + row_stats;
    const Acc* delta = static_cast<const Acc*>(p.delta) + row_stats;
    for (int r = 0; r < rows; r += strip) {
      const int count = lesser(strip, rows - r);
      const int seen = static_cast<int>(round_up(keys_seen(ahead, r + count, keys), kLanes<Acc>));
      const int64_t row = r * pitch / kPack<E>;
      gemm<Operand::kPlain>(Update::kStore, count, seen, head_dim / kPack<E>, q + row, pitch / kPack<E>, k_t,
                            kBackwardBlock, scores + r * kBackwardBlock, kBackwardBlock);
      gemm<Operand::kPlain>(Update::kStore, count, seen, head_dim / kPack<E>, dout + row, pitch / kPack<E>, v_t,
                            kBackwardBlock, dprobs + r * kBackwardBlock, kBackwardBlock);
      for (int i = r; i < r + count; i += kPack<E>)
        softmax(block, n0, i, lesser(kPack<E>, rows - i), keys, seen, lse, delta);
    }
    for (int j = 0; j < keys; j += strip) {
      const int count = lesser(strip, keys - j);
      const int first = ahead == 0 ? j : 0;  // rows above see none of these keys
      if (first >= rows) break;
      const int summed = (rows - first + kPack<E> - 1) / kPack<E>;
      const int64_t from = first / kPack<E>;
      gemm<Operand::kTransposed>(Update::kAdd, count, pitch, summed, probs + from * kBackwardBlock + j, kBackwardBlock,
                                 summed_dout + from * pitch, pitch, dv + j * pitch, pitch);
      gemm<Operand::kTransposed>(Update::kAdd, count, pitch, summed, dscores + from * kBackwardBlock + j,
                                 kBackwardBlock, summed_q + from * pitch, pitch, dk + j * pitch, pitch);
    }
  }

  // P and dS of `count` rows from r on, which make one row of operand elements.
  void softmax(const QueryBlock<kBackwardBlock>& block, int64_t n0, int r, int count, int keys, int seen,
               const Acc* lse, const Acc* delta) {
    Acc lse_log2[kPack<E>];
    for (int i = 0; i < count; ++i) {
      Acc* const score = scores + (r + i) * kBackwardBlock;
      const int begin = static_cast<int>(greater<int64_t>(block.first[r + i] - n0, 0));
      const int end = static_cast<int>(lesser<int64_t>(block.m0 + r + i + 1 - n0, keys));
      for (int j = 0; j < begin; ++j) score[j] = -INFINITY;
      for (int j = end; j < seen; ++j) score[j] = -INFINITY;
      lse_log2[i] = static_cast<Acc>(lse[r + i] * M_LOG2E);
    }
    for (int j = 0; j < seen; j += kLanes<Acc>) {
      Vector<Acc> prob[kPack<E>] = {}, dscore[kPack<E>] = {};
      for (int i = 0; i < count; ++i) {
        const int64_t at = (r + i) * kBackwardBlock + j;
        prob[i] = exp2(as_vector(scores + at) * scale_log2 - lse_log2[i]);
        dscore[i] = prob[i] * (as_vector(dprobs + at) - delta[r + i]);
        store_packed(dscore[i], dscore_rows + at / kPack<E>);
      }
      const int64_t at = r / kPack<E> * kBackwardBlock + j;
      as_vector(probs + at) = pack(prob, E());
      as_vector(dscores + at) = pack(dscore, E());
    }
  }

  void add_to_dq(Acc* sums, int64_t ahead, int keys, int rows) {
    const int strip = ahead == 0 ? kStrip : kBackwardBlock;
    for (int r = 0; r < rows; r += strip) {
      const int count = lesser(strip, rows - r);
      const int summed = (keys_seen(ahead, r + count, keys) + kPack<E> - 1) / kPack<E>;
      gemm<Operand::kPlain>(Update::kAdd, count, pitch, summed, dscore_rows + r * kBackwardBlock / kPack<E>,
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
  Acc* const dprobs;
  E* const probs;        // [rows, keys], summed over rows
  E* const dscores;      // likewise
  E* const dscore_rows;  // [rows, keys], summed over keys
  Acc* const of_sinks;   // two rows of head_dim
};

}  // namespace longlora::cpu::LONGLORA_ISA
