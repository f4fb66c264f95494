// Backward, deterministic: dq of one tile of query rows, summed over its keys from right to left by one block. It works
// the scores out a second time (seven products for five) and needs no atomics. The letters are those of mainloop_bwd.h.
#pragma once

#include "bwd_tiles.h"

namespace longlora::cuda {

template <typename Element, int kHeadDim, int kKib>
struct BackwardDq : BackwardTiles<Element, kHeadDim, kKib> {
  using Tiles = BackwardTiles<Element, kHeadDim, kKib>;
  using Tiles::kRows, Tiles::kKeys, Tiles::kThreads;
  using Shared = BackwardDqShared<Element, kHeadDim, kKib>;

  DEVICE static void run(const BackwardParams& params, const Turn& turn, Shared& shared) {
    const Problem& problem = params.problem;
    const int batch = turn.batch, head = turn.head, row = turn.tile * kRows, thread = threadIdx.x;
    const int seqlen = static_cast<int>(problem.seqlen), seqlen_k = static_cast<int>(problem.seqlen_k);
    const int head_dim = static_cast<int>(problem.head_dim);
    const int kv_head = static_cast<int>(head / (problem.heads / problem.kv_heads));
    const float scale_log2 = scale_log2_of(problem);

    auto q_tile = make_tensor(make_smem_ptr(shared.q), typename Tiles::RowsTile{});
    auto dout_tile = make_tensor(make_smem_ptr(shared.dout), typename Tiles::RowsTile{});
    auto k_tile = make_tensor(make_smem_ptr(shared.k), typename Tiles::KeysTile{});
    auto v_tile = make_tensor(make_smem_ptr(shared.v), typename Tiles::KeysTile{});
    auto ds_tile = make_tensor(make_smem_ptr(shared.ds), typename Tiles::ScoresTile{});
    const RowStatistics<kRows> statistics{shared.statistics};
    const FirstKeys<kRows> first_keys{shared.first_keys};

    const typename Tiles::ScoresMma scores_mma;
    const typename Tiles::DqMma dq_mma;
    auto q = operand_a<Ldmatrix4>(scores_mma, q_tile, thread);
    auto dout = operand_a<Ldmatrix4>(scores_mma, dout_tile, thread);
    auto k = operand_b<Ldmatrix4>(scores_mma, k_tile, thread);
    auto v = operand_b<Ldmatrix4>(scores_mma, v_tile, thread);
    auto ds = operand_a<Ldmatrix4>(dq_mma, ds_tile, thread);
    auto k_t = operand_b<Ldmatrix4T>(dq_mma, transposed(k_tile), thread);

    const auto load_rows = [&](const TensorView& from, auto& tile) ALWAYS_INLINE {
      load_tile<kThreads>(global_tile<Element, kRows, kHeadDim>(from, batch, head, row), tile, seqlen - row, head_dim,
                          thread);
    };
    const auto load_keys = [&](const TensorView& from, auto& tile, int n) ALWAYS_INLINE {
      load_tile<kThreads>(global_tile<Element, kKeys, kHeadDim>(from, batch, kv_head, n * kKeys), tile,
                          seqlen_k - n * kKeys, head_dim, thread);
      commit_copies();
    };

    const Visibility visible(problem, batch, head);
    const RowTile rows(visible, row, kRows);
    const int first_tile = rows.lowest / kKeys, last_tile = (cute::min(rows.own_key + kRows, seqlen_k) - 1) / kKeys;
    first_keys.template fill<kThreads>(visible, row, thread);
    load_rows(params.q, q_tile);
    load_rows(params.dout, dout_tile);
    statistics.template load<kThreads>(params, batch, head, row, thread);
    load_keys(params.v, v_tile, last_tile);
    load_keys(params.k, k_tile, last_tile);

    auto dq = zeros<kRows, kHeadDim>(dq_mma);
    const auto where = coordinates<kRows, kKeys>(scores_mma, thread);
    CUTE_NO_UNROLL
    for (int n = last_tile; n >= first_tile; --n) {
      wait_copies<0>();
      sync_block();  // K and V have come, and nobody reads ds any more
      auto scores = zeros<kRows, kKeys>(scores_mma);
      multiply(scores, scores_mma, q, k);
      auto score_matrix = as_matrix(scores);
      if (rows.masks_last(n * kKeys, kKeys)) mask_later_keys(score_matrix, where, rows.own_key, n * kKeys);
      if (rows.masks_first(n * kKeys)) mask_earlier_keys(score_matrix, where, first_keys, n * kKeys);
      statistics.normalize(score_matrix, where, scale_log2);
      auto dweights = zeros<kRows, kKeys>(scores_mma);
      multiply(dweights, scores_mma, dout, v);
      statistics.differentiate(as_matrix(dweights), score_matrix, where);
      share(dweights, scores_mma, ds_tile, thread);
      sync_block();  // ds is whole, and nobody reads this V any more
      if (n > first_tile) load_keys(params.v, v_tile, n - 1);
      multiply(dq, dq_mma, ds, k_t);
      sync_block();  // nobody reads this K any more
      if (n > first_tile) load_keys(params.k, k_tile, n - 1);
    }

    if (problem.sink)
      add_sinks_to_dq<Element>(params, batch, head, row, coordinates<kRows, kHeadDim>(dq_mma, thread), as_matrix(dq));
    scale_by(dq, static_cast<float>(problem.scale));
    store_tile<kThreads>(dq, dq_mma, q_tile, global_tile<Element, kRows, kHeadDim>(params.dq, batch, head, row),
                         seqlen - row, head_dim, thread);
  }
};

}  // namespace longlora::cuda
