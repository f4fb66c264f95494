// Forward: FlashAttention-2's loop with the left bound of groups.h.
//
// Scores are kept transposed, [keys, query rows]: lanes are query rows, so the online softmax needs no
// reduction across lanes, and K and V are read as they lie.
#pragma once

#include "tile.h"

namespace longlora::cpu::LONGLORA_ISA {

constexpr int kForwardRows = 128;
constexpr int kForwardKeys = 64;

template <typename T>
struct ForwardTile {
  using Acc = Accumulate<T>;

  // Scratch of one thread, in elements.
  static int64_t scratch_size(int64_t head_dim) {
    const int64_t pitch = round_up(head_dim, kPad);
    return kForwardRows * (head_dim + pitch + 2 + kForwardKeys) + 2 * kForwardKeys * pitch;
  }

  ForwardTile(const ForwardParams& params, Acc* scratch)
      : p(params),
        head_dim(static_cast<int>(params.problem.head_dim)),
        pitch(static_cast<int>(round_up(head_dim, kPad))),
        q_t(scratch),
        out(q_t + head_dim * kForwardRows),
        row_max(out + kForwardRows * pitch),
        row_sum(row_max + kForwardRows),
        scores(row_sum + kForwardRows),
        k(scores + kForwardKeys * kForwardRows),
        v(k + kForwardKeys * pitch) {}

  void run(int64_t batch, int64_t head, int64_t m0) {
    const Problem& problem = p.problem;
    const QueryBlock<kForwardRows> block(problem, batch, head, m0);
    const int64_t kv_head = head / (problem.heads / problem.kv_heads);

    const Acc scale_log2 = static_cast<Acc>(problem.scale * M_LOG2E);
    load_transposed<T>(p.q, batch, m0, head, block.rows, head_dim, kForwardRows, scale_log2, q_t);
    std::memset(out, 0, sizeof(Acc) * kForwardRows * pitch);
    for (int r = 0; r < kForwardRows; ++r) {
      row_max[r] = -INFINITY;
      row_sum[r] = 0;
    }
    for (int64_t n0 = block.begin_key(); n0 < block.end_key(); n0 += kForwardKeys) {
      const int keys = static_cast<int>(lesser<int64_t>(kForwardKeys, block.end_key() - n0));
      const RowRun<Acc, kForwardRows> run(block, n0, keys);
      if (run.size() <= 0) continue;  // the end of a document that this block does not reach back to
      load_rows<T>(p.k, batch, n0, kv_head, keys, head_dim, pitch, 1, k);
      load_rows<T>(p.v, batch, n0, kv_head, keys, head_dim, pitch, 1, v);
      step(block, run, n0, keys);
    }
    finish(block, batch, head);
  }

 private:
  void step(const QueryBlock<kForwardRows>& block, const RowRun<Acc, kForwardRows>& run, int64_t n0, int keys) {
    for (int j = 0; j < keys; ++j) std::memset(scores + j * kForwardRows + run.begin, 0, sizeof(Acc) * run.size());
    gemm<Operand::kPlain>(keys, run.size(), head_dim, k, pitch, q_t + run.begin, kForwardRows, scores + run.begin,
                          kForwardRows);
    block.mask(scores, n0, keys, run.begin, run.end);
    for (int r = run.begin; r < run.end; r += kLanes<Acc>) softmax(keys, r);
    gemm<Operand::kTransposed>(run.size(), pitch, keys, scores + run.begin, kForwardRows, v, pitch,
                               out + run.begin * pitch, pitch);
  }

  // Online softmax in base 2 over one tile of keys, for kLanes query rows from row r on: scores become
  // probabilities relative to the running maximum, and what was summed before is rescaled to it.
  void softmax(int keys, int r) {
    Vector<Acc> tile_max = as_vector(scores + r);
    for (int j = 1; j < keys; ++j) tile_max = maximum<Acc>(tile_max, as_vector(scores + j * kForwardRows + r));
    const Vector<Acc> old_max = as_vector(row_max + r);
    const Vector<Acc> new_max = maximum<Acc>(old_max, tile_max);
    // A row that has seen no key yet keeps -inf; subtracting 0 instead avoids inf - inf.
    const Vector<Acc> origin = new_max == -INFINITY ? Vector<Acc>{} : new_max;
    Vector<Acc> sum = {};
    for (int j = 0; j < keys; ++j) {
      Vector<Acc>& score = as_vector(scores + j * kForwardRows + r);
      score = exp2(score - origin);
      sum += score;
    }
    const Vector<Acc> rescale = exp2(old_max - origin);
    as_vector(row_max + r) = new_max;
    as_vector(row_sum + r) = as_vector(row_sum + r) * rescale + sum;
    for (int lane = 0; lane < kLanes<Acc>; ++lane) {
      const Acc factor = rescale[lane];
      if (factor == 1) continue;
      Acc* row = out + (r + lane) * pitch;
      for (int d = 0; d < pitch; ++d) row[d] *= factor;
    }
  }

  void finish(const QueryBlock<kForwardRows>& block, int64_t batch, int64_t head) {
    Acc* lse = static_cast<Acc*>(p.lse) + (batch * p.problem.heads + head) * p.problem.seqlen + block.m0;
    for (int r = 0; r < block.rows; ++r) {
      lse[r] = static_cast<Acc>(row_max[r] * M_LN2 + ::log(row_sum[r]));
      store_row<T>(out + r * pitch, 1 / row_sum[r], head_dim, row_of<T>(p.out, batch, block.m0 + r, head));
    }
  }

  const ForwardParams& p;
  const int head_dim;
  const int pitch;
  Acc* const q_t;      // [head_dim, rows], times scale * log2(e)
  Acc* const out;      // [rows, pitch], not yet divided by row_sum
  Acc* const row_max;  // base 2
  Acc* const row_sum;
  Acc* const scores;  // [keys, rows]
  Acc* const k;       // [keys, pitch]
  Acc* const v;
};

}  // namespace longlora::cpu::LONGLORA_ISA
