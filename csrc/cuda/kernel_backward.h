// Backward: the kernels and their launch.
#pragma once

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
  const Turn turn = turn_of<true>(scheduled.schedule, blockIdx.x, scheduled.params.problem.heads);
  if (turn.tile >= scheduled.schedule.tiles) return;
  prepare_rows<Element, kHeadDim>(scheduled.params, turn.batch, turn.head, turn.tile, threadIdx.x);
}

template <typename Element, int kHeadDim, bool kWithDq>
__global__ void __launch_bounds__(kBackwardThreads<Element, kHeadDim>)
    backward_kernel(const Scheduled<BackwardParams> scheduled) {
  using Tile = Backward<Element, kHeadDim, kWithDq>;
  const Turn turn = turn_of<false>(scheduled.schedule, blockIdx.x, scheduled.params.problem.heads);
  if (turn.tile >= scheduled.schedule.tiles) return;
  Tile::run(scheduled.params, turn.batch, turn.head, turn.tile * Tile::kKeys, shared_memory<Element>(), threadIdx.x);
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kBackwardThreads<Element, kHeadDim>)
    dq_kernel(const Scheduled<BackwardParams> scheduled) {
  using Tile = BackwardDq<Element, kHeadDim>;
  const Turn turn = turn_of<true>(scheduled.schedule, blockIdx.x, scheduled.params.problem.first_shifted_head);
  if (turn.tile < 0 || turn.tile >= scheduled.schedule.tiles) return;
  Tile::run(scheduled.params, turn.batch, turn.head, turn.tile * Tile::kRows, shared_memory<Element>(), threadIdx.x);
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kBackwardThreads<Element, kHeadDim>)
    finish_kernel(const Scheduled<BackwardParams> scheduled) {
  const Turn turn = turn_of<true>(scheduled.schedule, blockIdx.x, scheduled.params.problem.heads);
  if (turn.tile >= scheduled.schedule.tiles) return;
  finish_dq<Element, kHeadDim>(scheduled.params, turn.batch, turn.head, turn.tile, shared_memory<Element>(),
                               threadIdx.x);
}

template <typename Element, int kHeadDim>
void launch_backward(const BackwardParams& params, bool deterministic, void* stream) {
  using Tiles = BackwardTiles<Element, kHeadDim>;
  constexpr int kThreads = Tiles::kThreads;
  const Scheduled<BackwardParams> by_rows{params, Schedule(params.problem, Tiles::kRows, params.problem.heads)};
  const Scheduled<BackwardParams> by_keys{params, Schedule(params.problem, Tiles::kKeys, params.problem.kv_heads)};

  launch<prepare_kernel<Element, kHeadDim>>(by_rows.schedule.grid(), kThreads, 0, stream, by_rows);
  if (deterministic) {
    launch<backward_kernel<Element, kHeadDim, false>>(
        by_keys.schedule.grid(), kThreads, Backward<Element, kHeadDim, false>::kSharedBytes, stream, by_keys);
    launch<dq_kernel<Element, kHeadDim>>(by_rows.schedule.grid(), kThreads, BackwardDq<Element, kHeadDim>::kSharedBytes,
                                         stream, by_rows);
  } else {
    launch<backward_kernel<Element, kHeadDim, true>>(by_keys.schedule.grid(), kThreads,
                                                     Backward<Element, kHeadDim, true>::kSharedBytes, stream, by_keys);
    constexpr int kTileBytes = sizeof(Element) * Tiles::kRowsSize;
    launch<finish_kernel<Element, kHeadDim>>(by_rows.schedule.grid(), kThreads, kTileBytes, stream, by_rows);
  }
}

}  // namespace longlora::cuda
