// Forward: the kernel and its launch.
#pragma once

#include <algorithm>

#include "mainloop_fwd.h"
#include "scheduler.h"

namespace longlora::cuda {

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(Forward<Element, kHeadDim>::kThreads)
    forward_kernel(const Scheduled<ForwardParams> scheduled) {
  using Tile = Forward<Element, kHeadDim>;
  const auto& [params, schedule] = scheduled;
  const Problem& problem = params.problem;
  const Turn turn = turn_of<true>(schedule, blockIdx.x);
  if (turn.idle) return;
  const int row = turn.tile * Tile::kRows, rows = static_cast<int>(problem.seqlen) - row;
  const Visibility visible(problem, turn.batch, turn.head);
  const typename Tile::Mma mma;
  Element* shared = shared_memory<Element>();

  auto out = zeros<Tile::kRows, kHeadDim>(mma);
  auto out_matrix = as_matrix(out);
  OnlineSoftmax<decltype(size<0>(out_matrix))::value> softmax(scale_log2_of(problem));
  Tile::run(params, visible, turn.batch, turn.head, row, shared, thread_index(), out, softmax);

  float lse[decltype(size<0>(out_matrix))::value];
  softmax.finish(out_matrix, lse);
  const int thread = thread_index();
  const auto where = coordinates<Tile::kRows, kHeadDim>(mma, thread);
  float* lse_out = static_cast<float*>(params.lse) + (int64_t{turn.batch} * problem.heads + turn.head) * problem.seqlen;
  CUTE_UNROLL
  for (int m = 0; m < size<0>(where); ++m) {
    const int i = get<0>(where(m, 0));
    if (get<1>(where(m, 0)) == 0 && i < rows) lse_out[row + i] = lse[m];
  }
  // The loop's last barrier came after the last read of the queries, whose place the output takes.
  store_tile<Tile::kThreads>(out, mma, make_tensor(make_smem_ptr(shared), typename Tile::QueryTile{}),
                             global_tile<Element, Tile::kRows, kHeadDim>(params.out, turn.batch, turn.head, row), rows,
                             static_cast<int>(problem.head_dim), thread);
}

template <typename Element, int kHeadDim>
void launch_forward(const ForwardParams& params, void* stream) {
  using Tile = Forward<Element, kHeadDim>;
  const Problem& problem = params.problem;
  const int64_t bytes_of_keys = std::max<int64_t>(1, 2 * sizeof(Element) * kHeadDim * problem.kv_heads / problem.heads);
  const Schedule schedule(problem, Tile::kRows, problem.heads, problem.first_shifted_head, bytes_of_keys);
  allow_shared_memory<forward_kernel<Element, kHeadDim>>(Tile::kSharedBytes);
  launch<forward_kernel<Element, kHeadDim>>(schedule.grid(), Tile::kThreads, Tile::kSharedBytes, stream,
                                            Scheduled<ForwardParams>{params, schedule});
}

}  // namespace longlora::cuda
