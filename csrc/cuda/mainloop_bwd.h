// Backward: one tile of keys against all query rows that see it, of all query heads that share its KV head. dk and dv
// stay in registers throughout; dq is added up in global memory, or left to bwd_dq.h.
//
// In the paper's letters (FlashAttention-2, algorithm 2): `scores` are S and then, as `weights`, P; `dweights` are dP
// and then, as `ds`, dS; `delta` is D.
#pragma once

#include "bwd_tiles.h"

namespace longlora::cuda {

// Goes through the tiles of query rows that see a tile of keys, head by head. Where its groups end is worked out once a
// head, so that a step divides nothing.
template <int kRows>
struct QueryWalk {
  const Problem& problem;
  int batch, key, last_key, last_head;
  int head, tile;
  int first_end, last_end;  // rows from there on do not see the first key; see no key

  DEVICE QueryWalk(const Problem& problem, int batch, int kv_head, int key, int keys)
      : problem(problem), batch(batch), key(key), last_key(key + keys - 1) {
    // Of keys before the first row's own, a head has no rows where their groups end too early: those of one kind of
    // heads may, shifted or not, so the first heads or the last ones, or all.
    const int heads_per_kv = static_cast<int>(problem.heads / problem.kv_heads);
    const int first = kv_head * heads_per_kv, end = first + heads_per_kv;
    const int first_shifted = cute::max(first, cute::min(static_cast<int>(problem.first_shifted_head), end));
    begin(end - 1);
    last_head = sees() ? end - 1 : first_shifted - 1;
    begin(first);
    if (!sees()) begin(first_shifted);
  }
  DEVICE Visibility visible() const { return Visibility(problem, batch, head); }
  DEVICE void begin(int next_head) {
    head = next_head;
    tile = cute::max(key - visible().offset, 0) / kRows;
    first_end = visible().last_row_end(key);
    last_end = visible().last_row_end(last_key);
  }
  DEVICE bool ended() const { return head > last_head; }
  // Rows see ever later keys, so the first tile that begins past all of these ends a head's turn.
  DEVICE void next() {
    ++tile;
    if (!sees()) begin(head + 1);
  }
  DEVICE bool sees() const {
    const int row = tile * kRows;
    return row < last_end && visible().document(row) <= last_key;
  }
  // Whether some row of the tile does not see the first of the keys.
  DEVICE bool masks_first() const {
    const int last_row = cute::min((tile + 1) * kRows, visible().seqlen) - 1;
    return last_row >= first_end || visible().document(last_row) > key;
  }
};

template <typename Element, int kHeadDim, int kKib, bool kWithDq>
struct Backward : BackwardTiles<Element, kHeadDim, kKib> {
  using Tiles = BackwardTiles<Element, kHeadDim, kKib>;
  using Tiles::kRows, Tiles::kKeys, Tiles::kThreads, Tiles::kRowsSize;
  using Shared = BackwardShared<Element, kHeadDim, kKib>;
  using Statistics = RowStatistics<kRows>;
  static constexpr int kStages = Tiles::kTile.stages;
  static constexpr bool kLastFirst = false;

  // What tiles of keys share are q, dout and the sums of dq.
  static Schedule schedule(const Problem& problem, int64_t l2_bytes) {
    const int64_t heads_per_kv = problem.heads / problem.kv_heads;
    return Schedule(problem, l2_bytes, problem.seqlen_k, kKeys, problem.kv_heads,
                    (problem.first_shifted_head + heads_per_kv - 1) / heads_per_kv,
                    4 * Tiles::kRowBytes * heads_per_kv);
  }

  // Which buffers of q, dout and their statistics are at work. Where the statistics are says it: an index besides would
  // take a register.
  struct Stage {
    const Shared& shared;
    Statistics statistics;

    DEVICE explicit Stage(Shared& shared) : shared(shared), statistics{shared.statistics} {}
    DEVICE int index() const { return statistics.shared != shared.statistics; }
    DEVICE int other() const { return index() ^ 1; }
    // To the other buffers, with the operands that read them.
    template <class... Operands>
    DEVICE void flip(Operands&... operands) {
      const bool forwards = index() == 0;
      (operands.move(forwards ? kRowsSize : -kRowsSize), ...);
      statistics.shared += forwards ? Statistics::kSize : -Statistics::kSize;
    }
  };

  DEVICE static void run(const BackwardParams& params, const Turn& turn, Shared& shared) {
    const Problem& problem = params.problem;
    const int batch = turn.batch, kv_head = turn.head, key = turn.tile * kKeys, thread = threadIdx.x;
    const int seqlen = static_cast<int>(problem.seqlen), seqlen_k = static_cast<int>(problem.seqlen_k);
    const int head_dim = static_cast<int>(problem.head_dim);
    const float scale_log2 = scale_log2_of(problem);

    const auto q_tile = make_tensor(make_smem_ptr(shared.q), typename Tiles::RowsTile{});
    const auto dout_tile = make_tensor(make_smem_ptr(shared.dout), typename Tiles::RowsTile{});
    auto k_tile = make_tensor(make_smem_ptr(shared.k), typename Tiles::KeysTile{});
    auto v_tile = make_tensor(make_smem_ptr(shared.v), typename Tiles::KeysTile{});
    auto weights_tile = make_tensor(make_smem_ptr(shared.weights), typename Tiles::ScoresTile{});
    auto ds_tile = make_tensor(make_smem_ptr(shared.ds), typename Tiles::ScoresTile{});

    const typename Tiles::ScoresMma scores_mma;
    const typename Tiles::DkvMma dkv_mma;
    const typename Tiles::DqMma dq_mma;
    auto k = operand_b<Ldmatrix4>(scores_mma, k_tile, thread);
    auto v = operand_b<Ldmatrix4>(scores_mma, v_tile, thread);
    auto weights_t = operand_a<Ldmatrix4T>(dkv_mma, transposed(weights_tile), thread);
    auto ds_t = operand_a<Ldmatrix4T>(dkv_mma, transposed(ds_tile), thread);
    auto ds = operand_a<Ldmatrix4>(dq_mma, ds_tile, thread);
    auto k_t = operand_b<Ldmatrix4T>(dq_mma, transposed(k_tile), thread);
    // These move with the stage, dout at a fixed distance behind q: registers are scarce.
    auto q = operand_a<Ldmatrix4>(scores_mma, q_tile, thread);
    auto dout = operand_a<Ldmatrix4>(scores_mma, dout_tile, thread);
    auto q_t = operand_b<Ldmatrix4T>(dkv_mma, transposed(q_tile), thread);
    auto dout_t = operand_b<Ldmatrix4T>(dkv_mma, transposed(dout_tile), thread);

    const auto load_rows = [&](const TensorView& from, Element* to, int head, int row) ALWAYS_INLINE {
      load_tile<kThreads>(global_tile<Element, kRows, kHeadDim>(from, batch, head, row),
                          make_tensor(make_smem_ptr(to), typename Tiles::RowsTile{}), seqlen - row, head_dim, thread);
    };
    const auto load_stage = [&](const QueryWalk<kRows>& walk, int i) ALWAYS_INLINE {
      load_rows(params.q, shared.q + i * kRowsSize, walk.head, walk.tile * kRows);
      load_rows(params.dout, shared.dout + i * kRowsSize, walk.head, walk.tile * kRows);
      Statistics{shared.statistics + i * Statistics::kSize}.template load<kThreads>(params, batch, walk.head,
                                                                                    walk.tile * kRows, thread);
      commit_copies();
    };

    QueryWalk<kRows> walk(problem, batch, kv_head, key, kKeys);
    if (!walk.ended()) {
      load_tile<kThreads>(global_tile<Element, kKeys, kHeadDim>(params.k, batch, kv_head, key), k_tile, seqlen_k - key,
                          head_dim, thread);
      load_tile<kThreads>(global_tile<Element, kKeys, kHeadDim>(params.v, batch, kv_head, key), v_tile, seqlen_k - key,
                          head_dim, thread);
      load_stage(walk, 0);
    }

    auto dk = zeros<kKeys, kHeadDim>(dkv_mma);
    auto dv = zeros<kKeys, kHeadDim>(dkv_mma);
    const auto where = coordinates<kRows, kKeys>(scores_mma, thread);
    const FirstKeys<kRows> first_keys{shared.first_keys};
    Stage stage(shared);
    while (!walk.ended()) {
      const bool masks_first = walk.masks_first();
      if (masks_first) first_keys.template fill<kThreads>(walk.visible(), walk.tile * kRows, thread);
      const int own_key = walk.tile * kRows + seqlen_k - seqlen;
      const int row_tile = Tiles::row_tile(problem, batch, walk.head, walk.tile);
      walk.next();
      wait_copies<0>();
      sync_block();  // q and dout have come, and nobody reads the other stage, the weights or ds any more
      if (kStages == 2 && !walk.ended()) load_stage(walk, stage.other());

      auto scores = zeros<kRows, kKeys>(scores_mma);
      multiply(scores, scores_mma, q, k);
      auto score_matrix = as_matrix(scores);
      if (key + kKeys - 1 > own_key) mask_later_keys(score_matrix, where, own_key, key);
      if (masks_first) mask_earlier_keys(score_matrix, where, first_keys, key);
      stage.statistics.normalize(score_matrix, where, scale_log2);
      share(scores, scores_mma, weights_tile, thread);

      auto dweights = zeros<kRows, kKeys>(scores_mma);
      dout.follow(q, kStages * kRowsSize);
      multiply(dweights, scores_mma, dout, v);
      stage.statistics.differentiate(as_matrix(dweights), score_matrix, where);
      share(dweights, scores_mma, ds_tile, thread);
      sync_block();  // the weights and ds are whole

      dout_t.follow(q_t, kStages * kRowsSize);
      multiply(dv, dkv_mma, weights_t, dout_t);
      if constexpr (kWithDq) {
        auto dq = zeros<kRows, kHeadDim>(dq_mma);
        multiply(dq, dq_mma, ds, k_t);
        float* sums = Tiles::dq_sums(params, row_tile) + thread;
        CUTE_UNROLL
        for (int i = 0; i < size(dq); ++i) atomic_add(sums + i * kThreads, dq(i));
      }
      multiply(dk, dkv_mma, ds_t, q_t);

      if constexpr (kStages == 2) {
        stage.flip(q, q_t);
      } else if (!walk.ended()) {
        sync_block();  // nobody reads q and dout any more
        load_stage(walk, 0);
      }
    }

    scale_by(dk, static_cast<float>(problem.scale));
    // dk and dv take the places of k and v, which were last read before the loop's last barrier, but for dq.
    if constexpr (kWithDq) sync_block();
    store_tile<kThreads>(dk, dkv_mma, k_tile, global_tile<Element, kKeys, kHeadDim>(params.dk, batch, kv_head, key),
                         seqlen_k - key, head_dim, thread);
    store_tile<kThreads>(dv, dkv_mma, v_tile, global_tile<Element, kKeys, kHeadDim>(params.dv, batch, kv_head, key),
                         seqlen_k - key, head_dim, thread);
  }
};

}  // namespace longlora::cuda
