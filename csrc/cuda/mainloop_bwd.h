// Backward: one tile of keys against all query rows that see it, of all query heads that share its KV head. dk and dv
// stay in registers throughout; dq is added up in global memory, or left to bwd_dq.h.
#pragma once

#include "bwd_tiles.h"

namespace longlora::cuda {

// Goes through the tiles of query rows that see a tile of keys, head by head.
template <int kRows>
struct QueryWalk {
  const Problem& problem;
  int batch, first_tile, last_key, last_head;
  int head, tile;

  DEVICE QueryWalk(const Problem& problem, int batch, int kv_head, int key, int keys)
      : problem(problem), batch(batch), first_tile(key / kRows), last_key(key + keys - 1) {
    const int heads_per_kv = static_cast<int>(problem.heads / problem.kv_heads);
    head = kv_head * heads_per_kv;
    last_head = head + heads_per_kv - 1;
    tile = first_tile;
  }
  DEVICE bool ended() const { return head > last_head; }
  // first_key never decreases, so the first tile that begins past all keys ends a head's turn.
  DEVICE void next() {
    const int row = ++tile * kRows;
    if (row < problem.seqlen && Visibility(problem, batch, head).first_key(row) <= last_key) return;
    ++head;
    tile = first_tile;
  }
};

template <typename Element, int kHeadDim, bool kWithDq>
struct Backward : BackwardTiles<Element, kHeadDim> {
  using Tiles = BackwardTiles<Element, kHeadDim>;
  using Tiles::kRows, Tiles::kKeys, Tiles::kThreads, Tiles::kRowsSize, Tiles::kKeysSize, Tiles::kScoresSize;
  static constexpr int kStages = Tiles::kTile.stages;
  static constexpr int kSharedBytes = sizeof(Element) * (2 * kStages * kRowsSize + 2 * kKeysSize + 2 * kScoresSize);

  DEVICE static void run(const BackwardParams& params, int batch, int kv_head, int key, Element* shared, int thread) {
    const Problem& problem = params.problem;
    const int seqlen = static_cast<int>(problem.seqlen), head_dim = static_cast<int>(problem.head_dim);
    const float scale_log2 = scale_log2_of(problem);

    Element* const q_at = shared;
    Element* const dout_at = q_at + kStages * kRowsSize;
    Element* const k_at = dout_at + kStages * kRowsSize;
    Element* const weights_at = k_at + 2 * kKeysSize;
    const auto q_tile = make_tensor(make_smem_ptr(q_at), typename Tiles::RowsTile{});
    const auto dout_tile = make_tensor(make_smem_ptr(dout_at), typename Tiles::RowsTile{});
    auto k_tile = make_tensor(make_smem_ptr(k_at), typename Tiles::KeysTile{});
    auto v_tile = make_tensor(make_smem_ptr(k_at + kKeysSize), typename Tiles::KeysTile{});
    auto weights_tile = make_tensor(make_smem_ptr(weights_at), typename Tiles::ScoresTile{});
    auto ds_tile = make_tensor(make_smem_ptr(weights_at + kScoresSize), typename Tiles::ScoresTile{});

    const typename Tiles::ScoresMma scores_mma;
    const typename Tiles::DkvMma dkv_mma;
    const typename Tiles::DqMma dq_mma;
    auto k = operand_b<Ldmatrix4>(scores_mma, k_tile, thread);
    auto v = operand_b<Ldmatrix4>(scores_mma, v_tile, thread);
    auto weights_t = operand_a<Ldmatrix4T>(dkv_mma, transposed(weights_tile), thread);
    auto ds_t = operand_a<Ldmatrix4T>(dkv_mma, transposed(ds_tile), thread);
    auto ds = operand_a<Ldmatrix4>(dq_mma, ds_tile, thread);
    auto k_t = operand_b<Ldmatrix4T>(dq_mma, transposed(k_tile), thread);
    // These move with the stage.
    auto q = operand_a<Ldmatrix4>(scores_mma, q_tile, thread);
    auto dout = operand_a<Ldmatrix4>(scores_mma, dout_tile, thread);
    auto q_t = operand_b<Ldmatrix4T>(dkv_mma, transposed(q_tile), thread);
    auto dout_t = operand_b<Ldmatrix4T>(dkv_mma, transposed(dout_tile), thread);

    const auto load_rows = [&](const TensorView& from, Element* at, int head, int row) ALWAYS_INLINE {
      load_tile<kThreads>(global_tile<Element, kRows, kHeadDim>(from, batch, head, row),
                          make_tensor(make_smem_ptr(at), typename Tiles::RowsTile{}), seqlen - row, head_dim, thread);
    };
    const auto load_stage = [&](const QueryWalk<kRows>& walk, int stage) ALWAYS_INLINE {
      load_rows(params.q, q_at + stage * kRowsSize, walk.head, walk.tile * kRows);
      load_rows(params.dout, dout_at + stage * kRowsSize, walk.head, walk.tile * kRows);
      commit_copies();
    };

    QueryWalk<kRows> walk(problem, batch, kv_head, key, kKeys);
    load_tile<kThreads>(global_tile<Element, kKeys, kHeadDim>(params.k, batch, kv_head, key), k_tile, seqlen - key,
                        head_dim, thread);
    load_tile<kThreads>(global_tile<Element, kKeys, kHeadDim>(params.v, batch, kv_head, key), v_tile, seqlen - key,
                        head_dim, thread);
    load_stage(walk, 0);

    auto dk = zeros<kKeys, kHeadDim>(dkv_mma);
    auto dv = zeros<kKeys, kHeadDim>(dkv_mma);
    const auto where = coordinates<kRows, kKeys>(scores_mma, thread);
    int stage = 0;
    while (!walk.ended()) {
      const int head = walk.head, tile = walk.tile, row = tile * kRows;
      walk.next();
      wait_copies<0>();
      sync_block();  // q and dout have come, and nobody reads the other stage, the weights or ds any more
      if (kStages == 2 && !walk.ended()) load_stage(walk, stage ^ 1);

      const RowStatistics<std::decay_t<decltype(where)>> statistics(params, where, batch, head, row);
      auto scores = zeros<kRows, kKeys>(scores_mma);
      multiply(scores, scores_mma, q, k);
      auto score_matrix = as_matrix(scores);
      const Visibility visible(problem, batch, head);
      if (RowTile(visible, row, kRows).masks(key, kKeys))
        apply_mask(score_matrix, where, [&](int i) { return visible.first_key(row + i); }, row, key);
      statistics.normalize(score_matrix, scale_log2);
      share(scores, scores_mma, weights_tile, thread);

      auto gradient = zeros<kRows, kKeys>(scores_mma);
      multiply(gradient, scores_mma, dout, v);
      statistics.differentiate(as_matrix(gradient), score_matrix);
      share(gradient, scores_mma, ds_tile, thread);
      sync_block();  // the weights and ds are whole

      multiply(dv, dkv_mma, weights_t, dout_t);
      if constexpr (kWithDq) {
        auto dq = zeros<kRows, kHeadDim>(dq_mma);
        multiply(dq, dq_mma, ds, k_t);
        float* sums = Tiles::dq_sums(params, batch, head, tile) + thread;
        CUTE_UNROLL
        for (int i = 0; i < size(dq); ++i) atomic_add(sums + i * kThreads, dq(i));
      }
      multiply(dk, dkv_mma, ds_t, q_t);

      if constexpr (kStages == 2) {
        const int move = stage == 0 ? kRowsSize : -kRowsSize;
        q.move(move), dout.move(move), q_t.move(move), dout_t.move(move);
        stage ^= 1;
      } else if (!walk.ended()) {
        sync_block();  // nobody reads q and dout any more
        load_stage(walk, 0);
      }
    }

    scale_by(dk, static_cast<float>(problem.scale));
    // dk and dv take the places of k and v, which were last read before the loop's last barrier, but for dq.
    if constexpr (kWithDq) sync_block();
    store_tile<kThreads>(dk, dkv_mma, k_tile, global_tile<Element, kKeys, kHeadDim>(params.dk, batch, kv_head, key),
                         seqlen - key, head_dim, thread);
    store_tile<kThreads>(dv, dkv_mma, v_tile, global_tile<Element, kKeys, kHeadDim>(params.dv, batch, kv_head, key),
                         seqlen - key, head_dim, thread);
  }
};

}  // namespace longlora::cuda
