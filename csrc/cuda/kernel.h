// The one kernel: each block does a tile of some Work, the one whose turn the schedule says it is. And its launch.
//
// A Work is a type with
//   Params                     what it is told: plain data, with the Problem in `problem`
//   Shared                     what lies in its block's shared memory (shared_memory.h)
//   kThreads                   of a block
//   kLastFirst                 whether a group's last tiles are its longest (scheduler.h)
//   schedule(problem, l2)      its tiles, in the order in which blocks take them
//   run(params, turn, shared)  what a block does, in all its threads
#pragma once

#include <type_traits>

#include "device.h"
#include "scheduler.h"

namespace longlora::cuda {

// Bytes of dynamic shared memory that a block of the Work takes.
template <class Work>
constexpr int kSharedBytes = std::is_empty_v<typename Work::Shared> ? 0 : sizeof(typename Work::Shared);

template <class Work>
__global__ void __launch_bounds__(Work::kThreads) run_work(const Scheduled<typename Work::Params> scheduled) {
  const Turn turn = turn_of<Work::kLastFirst>(scheduled.schedule, blockIdx.x);
  if (turn.idle) return;
  Work::run(scheduled.params, turn, *shared_memory<typename Work::Shared>());
}

// Queues one Work after the other on `stream`: all, or where one cannot be, none.
template <class... Works, typename Params>
void launch_works(const Params& params, int64_t l2_bytes, void* stream) {
  const Scheduled<Params> scheduled[] = {{params, Works::schedule(params.problem, l2_bytes)}...};
  (allow_shared_memory<run_work<Works>>(kSharedBytes<Works>), ...);
  const Scheduled<Params>* next = scheduled;
  ((launch<run_work<Works>>(next->schedule.grid(), Works::kThreads, kSharedBytes<Works>, stream, *next), ++next), ...);
}

}  // namespace longlora::cuda
