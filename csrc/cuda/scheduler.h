// Which tile a block gets: the longest first, so that the last blocks to end are short ones, with the heads of one
// sequence beside each other, so that K and V of the heads at work stay in L2.
#pragma once

#include <cstdint>

#include "../params.h"
#include "device.h"

namespace longlora::cuda {

// The work of a tile grows with its position in its group. Blocks are numbered by position from the last one down, then
// by group, then by head. Shifted heads' groups begin half a group earlier.
struct Schedule {
  int tiles;            // of a head
  int tiles_per_group;  // rounded: a group that is no multiple of a tile gets a good order, not the best
  int groups;
  int heads;
  int64_t batch;

  Schedule(const Problem& problem, int rows, int64_t heads_in_turn)
      : tiles(static_cast<int>((problem.seqlen + rows - 1) / rows)),
        tiles_per_group(static_cast<int>((problem.group_size + rows - 1) / rows)),
        heads(static_cast<int>(heads_in_turn)),
        batch(problem.batch) {
    if (tiles_per_group > tiles) tiles_per_group = tiles;
    groups = (tiles + tiles_per_group / 2 + tiles_per_group - 1) / tiles_per_group;
  }

  dim3 grid() const { return dim3(static_cast<unsigned>(batch * heads * groups * tiles_per_group)); }
};

template <typename Params>
struct Scheduled {
  Params params;
  Schedule schedule;
};

struct Turn {
  int tile;  // negative or beyond the last: nothing to do
  int head;
  int batch;
};

template <bool kLastFirst>
DEVICE Turn turn_of(const Schedule& schedule, int64_t block, int64_t first_shifted_head) {
  Turn turn;
  turn.head = static_cast<int>(block % schedule.heads);
  block /= schedule.heads;
  const int group = static_cast<int>(block % schedule.groups);
  block /= schedule.groups;
  const int rank = static_cast<int>(block % schedule.tiles_per_group);
  const int position = kLastFirst ? schedule.tiles_per_group - 1 - rank : rank;
  turn.batch = static_cast<int>(block / schedule.tiles_per_group);
  const int half = turn.head >= first_shifted_head ? schedule.tiles_per_group / 2 : 0;
  turn.tile = group * schedule.tiles_per_group + position - half;
  return turn;
}

}  // namespace longlora::cuda
