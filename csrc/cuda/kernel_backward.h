// Backward: the kernels and their launch.
#pragma once

#include <algorithm>

#include "bwd_around.h"
#include "bwd_dq.h"
#include "mainloop_bwd.h"
#include "scheduler.h"

namespace longlora::cuda {

template <typename Element, int kHeadDim>
constexpr int kBackwardThreads = BackwardTiles<Element, kHeadDim>::kThreads;

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kBackwardThreads<Element, kHeadDim>)
    prepare_kernel(const Scheduled<BackwardParams> scheduled) {
  const Turn turn = turn_of<true>(scheduled.schedule, blockIdx.x);
  if (turn.idle) return;
  prepare_rows<Element, kHeadDim>(scheduled.params, turn.batch, turn.head, turn.tile, threadIdx.x);
}

template <typename Element, int kHeadDim, bool kWithDq>
__global__ void __launch_bounds__(kBackwardThreads<Element, kHeadDim>)
    backward_kernel(const Scheduled<BackwardParams> scheduled) {
  using Tile = Backward<Element, kHeadDim, kWithDq>;
  const Turn turn = turn_of<false>(scheduled.schedule, blockIdx.x);
  if (turn.idle) return;
  Tile::run(scheduled.params, turn.batch, turn.head, turn.tile * Tile::kKeys, shared_memory<Element>(), threadIdx.x);
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kBackwardThreads<Element, kHeadDim>)
    dq_kernel(const Scheduled<BackwardParams> scheduled) {
  using Tile = BackwardDq<Element, kHeadDim>;
  const Turn turn = turn_of<true>(scheduled.schedule, blockIdx.x);
  if (turn.idle) return;
  Tile::run(scheduled.params, turn.batch, turn.head, turn.tile * Tile::kRows, shared_memory<Element>(), threadIdx.x);
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kBackwardThreads<Element, kHeadDim>)
    finish_kernel(const Scheduled<BackwardParams> scheduled) {
  const Turn turn = turn_of<true>(scheduled.schedule, blockIdx.x);
  if (turn.idle) return;
  finish_dq<Element, kHeadDim>(scheduled.params, turn.batch, turn.head, turn.tile, shared_memory<Element>(),
                               threadIdx.x);
}

template <typename Element, int kHeadDim>
void launch_backward(const BackwardParams& params, bool deterministic, void* stream) {
  using Tiles = BackwardTiles<Element, kHeadDim>;
  constexpr int kThreads = Tiles::kThreads;
  const Problem& problem = params.problem;
  const int64_t heads_per_kv = problem.heads / problem.kv_heads, row_bytes = sizeof(Element) * kHeadDim;
  // What tiles of query rows share are keys; what tiles of keys share are q, dout and the sums of dq.
  const int64_t shared_by_rows = std::max<int64_t>(1, 2 * row_bytes / heads_per_kv);
  const int64_t shared_by_keys = 4 * row_bytes * heads_per_kv;
  const Scheduled<BackwardParams> by_rows{
      params, Schedule(problem, Tiles::kRows, problem.heads, problem.first_shifted_head, shared_by_rows)};
  const Scheduled<BackwardParams> by_keys{
      params, Schedule(problem, Tiles::kKeys, problem.kv_heads,
                       (problem.first_shifted_head + heads_per_kv - 1) / heads_per_kv, shared_by_keys)};

  // Before the first kernel is queued: all or none.
  constexpr int kSharedBytes = Backward<Element, kHeadDim, true>::kSharedBytes;
  constexpr int kDqSharedBytes = BackwardDq<Element, kHeadDim>::kSharedBytes;
  if (deterministic) {
    allow_shared_memory<backward_kernel<Element, kHeadDim, false>>(kSharedBytes);
    allow_shared_memory<dq_kernel<Element, kHeadDim>>(kDqSharedBytes);
  } else {
    allow_shared_memory<backward_kernel<Element, kHeadDim, true>>(kSharedBytes);
  }

  launch<prepare_kernel<Element, kHeadDim>>(by_rows.schedule.grid(), kThreads, 0, stream, by_rows);
  if (deterministic) {
    launch<backward_kernel<Element, kHeadDim, false>>(by_keys.schedule.grid(), kThreads, kSharedBytes, stream, by_keys);
    launch<dq_kernel<Element, kHeadDim>>(by_rows.schedule.grid(), kThreads, kDqSharedBytes, stream, by_rows);
  } else {
    launch<backward_kernel<Element, kHeadDim, true>>(by_keys.schedule.grid(), kThreads, kSharedBytes, stream, by_keys);
    constexpr int kTileBytes = sizeof(Element) * Tiles::kRowsSize;
    launch<finish_kernel<Element, kHeadDim>>(by_rows.schedule.grid(), kThreads, kTileBytes, stream, by_rows);
  }
}

}  // namespace longlora::cuda
