// Forward: one tile of query rows against the keys they see, from right to left.
//
// In the paper's letters (FlashAttention-2, algorithm 1): `scores` are S, and `weights` P, not yet divided by their
// sums; `out` is O, `lse` L.
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

template <typename Element, int kHeadDim, int kKib>
struct Forward {
  using Params = ForwardParams;
  using Shared = ForwardShared<Element, kHeadDim, kKib>;
  static constexpr ForwardTile kTile = forward_tile(kHeadDim, kKib);
  static constexpr int kRows = kTile.rows, kKeys = kTile.keys, kThreads = kTile.warps * 32;
  static constexpr int kKeyBuffers = kTile.key_buffers;
  static constexpr bool kLastFirst = true;
  using QueryTile = SharedTile<kRows, kHeadDim>;
  using KeyTile = SharedTile<kKeys, kHeadDim>;
  using Mma = WarpMma<Element, kTile.warps, kTile.warps>;

  static Schedule schedule(const Problem& problem, int64_t l2_bytes) {
    const int64_t bytes_of_keys = 2 * sizeof(Element) * kHeadDim * problem.kv_heads / problem.heads;
    return Schedule(problem, l2_bytes, problem.seqlen, kRows, problem.heads, problem.first_shifted_head,
                    std::max<int64_t>(1, bytes_of_keys));
  }

  DEVICE static void run(const ForwardParams& params, const Turn& turn, Shared& shared) {
    const Problem& problem = params.problem;
    const int row = turn.tile * kRows, rows = static_cast<int>(problem.seqlen) - row;
    const Visibility visible(problem, turn.batch, turn.head);
    const Mma mma;

    auto out = zeros<kRows, kHeadDim>(mma);
    auto out_matrix = as_matrix(out);
    OnlineSoftmax<decltype(size<0>(out_matrix))::value> softmax(scale_log2_of(problem));
    sum_over_keys(params, visible, turn.batch, turn.head, row, shared, thread_index(), out, softmax);

    const int thread = thread_index();
    const auto where = coordinates<kRows, kHeadDim>(mma, thread);
    const auto q_tile = make_tensor(make_smem_ptr(shared.q), QueryTile{});
    if (problem.sink) {
      add_sinks<Element>(params, anew(turn.batch), anew(turn.head), row, q_tile, FirstKeys<kRows>{shared.first_keys},
                         where, thread, out_matrix, softmax);
      sync_block();  // nobody reads the queries any more
    }
    float lse[decltype(size<0>(out_matrix))::value];
    softmax.finish(out_matrix, lse);
    float* lse_out =
        static_cast<float*>(params.lse) + (int64_t{turn.batch} * problem.heads + turn.head) * problem.seqlen;
    CUTE_UNROLL
    for (int m = 0; m < size<0>(where); ++m) {
      const int i = get<0>(where(m, 0));
      if (get<1>(where(m, 0)) == 0 && i < rows) lse_out[row + i] = lse[m];
    }
    // The last barrier came after the last read of the queries, whose place the output takes.
    store_tile<kThreads>(out, mma, q_tile,
                         global_tile<Element, kRows, kHeadDim>(params.out, turn.batch, turn.head, row), rows,
                         static_cast<int>(problem.head_dim), thread);
  }

 private:
  // `out` and `softmax` come back with the sums over all keys, not yet divided. The tile of queries and the first keys
  // stay in shared memory.
  template <class Out, class Softmax>
  DEVICE static void sum_over_keys(const ForwardParams& params, const Visibility& visible, int batch, int head, int row,
                                   Shared& shared, int thread, Out& out, Softmax& softmax) {
    const Problem& problem = params.problem;
    const int seqlen_k = visible.seqlen + visible.offset, head_dim = static_cast<int>(problem.head_dim);
    const int kv_head = static_cast<int>(head / (problem.heads / problem.kv_heads));

    const Mma mma;
    auto q_tile = make_tensor(make_smem_ptr(shared.q), QueryTile{});
    auto v_tile = make_tensor(make_smem_ptr(shared.v), KeyTile{});
    FirstKeys<kRows> first_keys{shared.first_keys};
    auto q = operand_a<Ldmatrix4>(mma, q_tile, thread);
    auto v = operand_b<Ldmatrix4T>(mma, transposed(v_tile), thread);

    const auto k_tile = [&](int n) ALWAYS_INLINE {
      return make_tensor(make_smem_ptr(shared.k + n % kKeyBuffers * kKeys * kHeadDim), KeyTile{});
    };
    const auto load_keys = [&](const TensorView& from, auto&& tile, int n) ALWAYS_INLINE {
      load_tile<kThreads>(global_tile<Element, kKeys, kHeadDim>(from, batch, kv_head, n * kKeys), tile,
                          seqlen_k - n * kKeys, head_dim, thread);
      commit_copies();
    };

    const auto where = coordinates<kRows, kKeys>(mma, thread);
    const RowTile rows(visible, row, kRows);
    const int first_tile = rows.lowest / kKeys, last_tile = (cute::min(rows.own_key + kRows, seqlen_k) - 1) / kKeys;

    // K and V of a step are never needed at once: each is on its way while the other is multiplied. With two buffers, K
    // comes a step earlier. V is waited for after the softmax: its fragments, fetched among the exponentials, would be
    // too much for the registers, and so would K's loads at the start of a step.
    const auto step = [&](int n, auto masked) ALWAYS_INLINE {
      wait_copies<kKeyBuffers - 1>();
      sync_block();  // K has come, and nobody reads the last V any more
      load_keys(params.v, v_tile, n);
      auto scores = zeros<kRows, kKeys>(mma);
      auto k = operand_b<Ldmatrix4>(mma, k_tile(n), thread);
      multiply(scores, mma, q, k);
      auto score_matrix = as_matrix(scores);
      if (masked && rows.masks_last(n * kKeys, kKeys)) mask_later_keys(score_matrix, where, rows.own_key, n * kKeys);
      if (masked && rows.masks_first(n * kKeys)) mask_earlier_keys(score_matrix, where, first_keys, n * kKeys);
      softmax.add(score_matrix, as_matrix(out));
      auto weights = operand_from<Element>(scores);
      wait_copies<0>();
      sync_block();  // V has come, and nobody reads this K any more
      if (n - kKeyBuffers >= first_tile) load_keys(params.k, k_tile(n), n - kKeyBuffers);
      multiply(out, mma, weights, v);
    };

    first_keys.template fill<kThreads>(visible, row, thread);
    load_tile<kThreads>(global_tile<Element, kRows, kHeadDim>(params.q, batch, head, row), q_tile, visible.seqlen - row,
                        head_dim, thread);
    load_keys(params.k, k_tile(last_tile), last_tile);
    if (kKeyBuffers == 2 && last_tile > first_tile)
      load_keys(params.k, k_tile(last_tile - 1), last_tile - 1);
    else if (kKeyBuffers == 2)
      commit_copies();  // of nothing: the first step waits for all groups but the last
    for (int n = last_tile; n >= first_tile;) {
      for (; n >= first_tile && rows.masks(n * kKeys, kKeys); --n) step(n, std::true_type{});
      for (; n >= first_tile && !rows.masks(n * kKeys, kKeys); --n) step(n, std::false_type{});
    }
  }
};

}  // namespace longlora::cuda
