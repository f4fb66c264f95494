// Backward, in two passes that never write to the same place: dK and dV per block of keys, dQ per block of
// query rows. Probabilities are computed anew in each (7 matrix products for 5), which saves an fp32 dQ the
// size of q and makes the result the same from run to run and for any number of threads.
#pragma once

#include "tile.h"

namespace longlora::cpu::LONGLORA_ISA {

constexpr int kBackwardRows = 64;
constexpr int kBackwardKeys = 64;

// delta = rowsum(dout * out) of one block of query rows, lanes being rows, summed in gemm's order: in a row that sees
// one key, where out = v, it then cancels dout * v to exactly nothing.
template <typename T>
struct DeltaTile {
  using Acc = Accumulate<T>;

  static int64_t scratch_size(int64_t head_dim) { return 2 * head_dim * kBackwardRows + kBackwardRows; }

  DeltaTile(const BackwardParams& params, Acc* scratch)
      : p(params),
        head_dim(static_cast<int>(params.problem.head_dim)),
        dout_t(scratch),
        out_t(dout_t + head_dim * kBackwardRows),
        delta(out_t + head_dim * kBackwardRows) {}

  void run(int64_t batch, int64_t head, int64_t m0) {
    const int rows = static_cast<int>(lesser<int64_t>(kBackwardRows, p.problem.seqlen - m0));
    load_transposed<T>(p.dout, batch, m0, head, rows, head_dim, kBackwardRows, 1, dout_t);
    load_transposed<T>(p.out, batch, m0, head, rows, head_dim, kBackwardRows, 1, out_t);
    for (int r = 0; r < kBackwardRows; r += kLanes<Acc>) {
      Vector<Acc> sum = {};
      for (int begin = 0; begin < head_dim; begin += kChain) {
        Vector<Acc> chain = {};
        for (int d = begin; d < lesser(begin + kChain, head_dim); ++d)
          chain += as_vector(dout_t + d * kBackwardRows + r) * as_vector(out_t + d * kBackwardRows + r);
        sum += chain;
      }
      as_vector(delta + r) = sum;
    }
    const int64_t row_stats = (batch * p.problem.heads + head) * p.problem.seqlen + m0;
    std::memcpy(static_cast<Acc*>(p.delta) + row_stats, delta, sizeof(Acc) * rows);
  }

 private:
  const BackwardParams& p;
  const int head_dim;
  Acc* const dout_t;  // [head_dim, rows]
  Acc* const out_t;
  Acc* const delta;
};

// dK and dV of one block of keys, over every query head of its group (GQA is reduced here, in registers and
// scratch) and every query block from the diagonal up to the first whose keys all lie past this block.
template <typename T>
struct KeyGradientTile {
  using Acc = Accumulate<T>;

  static int64_t scratch_size(int64_t head_dim) {
    const int64_t pitch = round_up(head_dim, kPad);
    return kBackwardKeys * 2 * (head_dim + pitch) + kBackwardRows * 2 * (pitch + kBackwardKeys);
  }

  KeyGradientTile(const BackwardParams& params, Acc* scratch)
      : p(params),
        head_dim(static_cast<int>(params.problem.head_dim)),
        pitch(static_cast<int>(round_up(head_dim, kPad))),
        k_t(scratch),
        v_t(k_t + head_dim * kBackwardKeys),
        dk(v_t + head_dim * kBackwardKeys),
        dv(dk + kBackwardKeys * pitch),
        q(dv + kBackwardKeys * pitch),
        dout(q + kBackwardRows * pitch),
        probs(dout + kBackwardRows * pitch),
        dscores(probs + kBackwardRows * kBackwardKeys) {}

  void run(int64_t batch, int64_t kv_head, int64_t n0) {
    const Problem& problem = p.problem;
    const int keys = static_cast<int>(lesser<int64_t>(kBackwardKeys, problem.seqlen - n0));
    load_transposed<T>(p.k, batch, n0, kv_head, keys, head_dim, kBackwardKeys, 1, k_t);
    load_transposed<T>(p.v, batch, n0, kv_head, keys, head_dim, kBackwardKeys, 1, v_t);
    std::memset(dk, 0, sizeof(Acc) * kBackwardKeys * pitch);
    std::memset(dv, 0, sizeof(Acc) * kBackwardKeys * pitch);

    const int64_t heads_per_kv = problem.heads / problem.kv_heads;
    for (int64_t head = kv_head * heads_per_kv; head < (kv_head + 1) * heads_per_kv; ++head) {
      for (int64_t m0 = n0; m0 < problem.seqlen; m0 += kBackwardRows) {
        const QueryBlock<kBackwardRows> block(problem, batch, head, m0);
        const int rows = block.row_end(n0 + keys - 1);
        if (rows == 0) break;  // nor does any later row look back this far
        step(block, batch, head, n0, keys, rows);
      }
    }
    for (int j = 0; j < keys; ++j) {
      store_row<T>(dk + j * pitch, static_cast<Acc>(M_LN2), head_dim, row_of<T>(p.dk, batch, n0 + j, kv_head));
      store_row<T>(dv + j * pitch, 1, head_dim, row_of<T>(p.dv, batch, n0 + j, kv_head));
    }
  }

 private:
  void step(const QueryBlock<kBackwardRows>& block, int64_t batch, int64_t head, int64_t n0, int keys, int rows) {
    // The same products in the same order as in the forward: scores that match lse to the bit.
    const Acc scale_log2 = static_cast<Acc>(p.problem.scale * M_LOG2E);
    load_rows<T>(p.q, batch, block.m0, head, rows, head_dim, pitch, scale_log2, q);
    load_rows<T>(p.dout, batch, block.m0, head, rows, head_dim, pitch, 1, dout);
    std::memset(probs, 0, sizeof(Acc) * rows * kBackwardKeys);
    std::memset(dscores, 0, sizeof(Acc) * rows * kBackwardKeys);
    gemm<Operand::kPlain>(rows, kBackwardKeys, head_dim, q, pitch, k_t, kBackwardKeys, probs, kBackwardKeys);
    gemm<Operand::kPlain>(rows, kBackwardKeys, head_dim, dout, pitch, v_t, kBackwardKeys, dscores, kBackwardKeys);

    const int64_t row_stats = (batch * p.problem.heads + head) * p.problem.seqlen + block.m0;
    const Acc* lse = static_cast<const Acc*>(p.lse) + row_stats;
    const Acc* delta = static_cast<const Acc*>(p.delta) + row_stats;
    for (int r = 0; r < rows; ++r) {
      Acc* prob = probs + r * kBackwardKeys;
      Acc* dscore = dscores + r * kBackwardKeys;
      const int begin = static_cast<int>(greater<int64_t>(block.first[r] - n0, 0));
      const int end = static_cast<int>(lesser<int64_t>(block.m0 + r + 1 - n0, keys));
      for (int j = 0; j < begin; ++j) prob[j] = -INFINITY;
      for (int j = end; j < kBackwardKeys; ++j) prob[j] = -INFINITY;
      const Acc lse_log2 = static_cast<Acc>(lse[r] * M_LOG2E);
      for (int j = 0; j < kBackwardKeys; j += kLanes<Acc>) {
        const Vector<Acc> probability = exp2(as_vector(prob + j) - lse_log2);
        as_vector(prob + j) = probability;
        as_vector(dscore + j) = probability * (as_vector(dscore + j) - delta[r]);
      }
    }
    gemm<Operand::kTransposed>(keys, pitch, rows, probs, kBackwardKeys, dout, pitch, dv, pitch);
    gemm<Operand::kTransposed>(keys, pitch, rows, dscores, kBackwardKeys, q, pitch, dk, pitch);
  }

  const BackwardParams& p;
  const int head_dim;
  const int pitch;
  Acc* const k_t;  // [head_dim, keys]
  Acc* const v_t;
  Acc* const dk;  // [keys, pitch], times log2(e) too much, as q is
  Acc* const dv;
  Acc* const q;  // [rows, pitch], times scale * log2(e)
  Acc* const dout;
  Acc* const probs;  // [rows, keys]
  Acc* const dscores;
};

// dQ of one block of query rows: the forward's walk over its keys, scores transposed as there.
template <typename T>
struct QueryGradientTile {
  using Acc = Accumulate<T>;

  static int64_t scratch_size(int64_t head_dim) {
    const int64_t pitch = round_up(head_dim, kPad);
    return kBackwardRows * (2 * head_dim + pitch + 2 + 2 * kBackwardKeys) + 2 * kBackwardKeys * pitch;
  }

  QueryGradientTile(const BackwardParams& params, Acc* scratch)
      : p(params),
        head_dim(static_cast<int>(params.problem.head_dim)),
        pitch(static_cast<int>(round_up(head_dim, kPad))),
        q_t(scratch),
        dout_t(q_t + head_dim * kBackwardRows),
        dq(dout_t + head_dim * kBackwardRows),
        lse_log2(dq + kBackwardRows * pitch),
        delta(lse_log2 + kBackwardRows),
        scores(delta + kBackwardRows),
        dscores(scores + kBackwardKeys * kBackwardRows),
        k(dscores + kBackwardKeys * kBackwardRows),
        v(k + kBackwardKeys * pitch) {}

  void run(int64_t batch, int64_t head, int64_t m0) {
    const Problem& problem = p.problem;
    const QueryBlock<kBackwardRows> block(problem, batch, head, m0);
    const int64_t kv_head = head / (problem.heads / problem.kv_heads);
    const Acc scale_log2 = static_cast<Acc>(problem.scale * M_LOG2E);
    load_transposed<T>(p.q, batch, m0, head, block.rows, head_dim, kBackwardRows, scale_log2, q_t);
    load_transposed<T>(p.dout, batch, m0, head, block.rows, head_dim, kBackwardRows, 1, dout_t);
    std::memset(dq, 0, sizeof(Acc) * kBackwardRows * pitch);
    const int64_t row_stats = (batch * problem.heads + head) * problem.seqlen + m0;
    for (int r = 0; r < kBackwardRows; ++r) {
      const bool valid = r < block.rows;
      lse_log2[r] = valid ? static_cast<Acc>(static_cast<const Acc*>(p.lse)[row_stats + r] * M_LOG2E) : 0;
      delta[r] = valid ? static_cast<const Acc*>(p.delta)[row_stats + r] : 0;
    }
    for (int64_t n0 = block.begin_key(); n0 < block.end_key(); n0 += kBackwardKeys) {
      const int keys = static_cast<int>(lesser<int64_t>(kBackwardKeys, block.end_key() - n0));
      const RowRun<Acc, kBackwardRows> run(block, n0, keys);
      if (run.size() <= 0) continue;
      load_rows<T>(p.k, batch, n0, kv_head, keys, head_dim, pitch, 1, k);
      load_rows<T>(p.v, batch, n0, kv_head, keys, head_dim, pitch, 1, v);
      step(block, run, n0, keys);
    }
    for (int r = 0; r < block.rows; ++r)
      store_row<T>(dq + r * pitch, static_cast<Acc>(problem.scale), head_dim, row_of<T>(p.dq, batch, m0 + r, head));
  }

 private:
  void step(const QueryBlock<kBackwardRows>& block, const RowRun<Acc, kBackwardRows>& run, int64_t n0, int keys) {
    for (int j = 0; j < keys; ++j) {
      std::memset(scores + j * kBackwardRows + run.begin, 0, sizeof(Acc) * run.size());
      std::memset(dscores + j * kBackwardRows + run.begin, 0, sizeof(Acc) * run.size());
    }
    gemm<Operand::kPlain>(keys, run.size(), head_dim, k, pitch, q_t + run.begin, kBackwardRows, scores + run.begin,
                          kBackwardRows);
    gemm<Operand::kPlain>(keys, run.size(), head_dim, v, pitch, dout_t + run.begin, kBackwardRows, dscores + run.begin,
                          kBackwardRows);
    block.mask(scores, n0, keys, run.begin, run.end);
    for (int j = 0; j < keys; ++j) {
      for (int r = run.begin; r < run.end; r += kLanes<Acc>) {
        Vector<Acc>& dscore = as_vector(dscores + j * kBackwardRows + r);
        const Vector<Acc> score = as_vector(scores + j * kBackwardRows + r);
        dscore = exp2(score - as_vector(lse_log2 + r)) * (dscore - as_vector(delta + r));
      }
    }
    gemm<Operand::kTransposed>(run.size(), pitch, keys, dscores + run.begin, kBackwardRows, k, pitch,
                               dq + run.begin * pitch, pitch);
  }

  const BackwardParams& p;
  const int head_dim;
  const int pitch;
  Acc* const q_t;     // [head_dim, rows], times scale * log2(e)
  Acc* const dout_t;  // [head_dim, rows]
  Acc* const dq;      // [rows, pitch], not yet times scale
  Acc* const lse_log2;
  Acc* const delta;
  Acc* const scores;  // [keys, rows]
  Acc* const dscores;
  Acc* const k;  // [keys, pitch]
  Acc* const v;
};

}  // namespace longlora::cpu::LONGLORA_ISA
