// Which tile a block gets. Blocks start in order, so the order decides two things: the tiles at work at one time should
// share what they read (their group's keys, say), or it comes from memory again and again instead of from L2; and the
// longest should come first, so that the last blocks to end are short ones.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../params.h"
#include "device.h"

namespace longlora::cuda {

// The groups of all heads are cut into sections that fit into half of L2, one section after the other; of an L2 larger
// than an A100's, for which no other size was measured, into half of an A100's. Inside
// of one the tiles go by their position in their group, from the longest down, across its groups. The last section has
// some blocks for each multiprocessor, whatever fits: with one group in it, its longest blocks would begin when most
// multiprocessors are about to end (a tenth of an H200's time went by so, with few KV heads).
struct Schedule {
  static constexpr int64_t kSectionBytes = 20 << 20;
  static constexpr int kLastBlocks = 8 * 128;
  static constexpr int64_t kMostBlocks = INT32_MAX;  // of a grid, and what kernels count in 32 bits

  int tiles;            // of a head
  int tiles_per_group;  // rounded: a group that is no multiple of a tile gets a good order, not the best
  int groups;           // of a head: where heads are shifted, half a group comes before the first
  int heads;
  int first_shifted_head;  // from here on groups begin half a group earlier
  int64_t pairs;           // of a head and a group; heads are neighbours, for those of one KV head read the same keys
  int64_t section;         // pairs
  int64_t in_sections;     // pairs; the others are the last section

  // Of `seqlen` rows, of queries or of keys, in tiles of `rows`. `bytes_per_row`: what the tiles of a group share of
  // each of its rows.
  Schedule(const Problem& problem, int64_t l2_bytes, int64_t seqlen, int rows, int64_t heads,
           int64_t first_shifted_head, int64_t bytes_per_row)
      : tiles(static_cast<int>((seqlen + rows - 1) / rows)),
        tiles_per_group(std::min(tiles, static_cast<int>((problem.group_size + rows - 1) / rows))),
        groups((tiles + (first_shifted_head < heads ? tiles_per_group / 2 : 0) + tiles_per_group - 1) /
               tiles_per_group),
        heads(static_cast<int>(heads)),
        first_shifted_head(static_cast<int>(first_shifted_head)),
        pairs(problem.batch * heads * groups),
        section(std::max<int64_t>(1, std::min(kSectionBytes, l2_bytes / 2) / (bytes_per_row * rows * tiles_per_group))),
        in_sections(std::max<int64_t>(0, pairs - kLastBlocks / tiles_per_group) / section * section) {
    if (blocks() > kMostBlocks)
      throw std::runtime_error("s2attn: batch * heads * seqlen is too much for one launch: a kernel needs " +
                               std::to_string(blocks()) + " blocks, and may have " + std::to_string(kMostBlocks));
  }

  int64_t blocks() const { return pairs * tiles_per_group; }
  dim3 grid() const { return dim3(static_cast<unsigned>(blocks())); }
};

template <typename Params>
struct Scheduled {
  Params params;
  Schedule schedule;
};

struct Turn {
  int tile;
  int head;
  int batch;
  bool idle;  // there is no such tile
};

// Query rows at the end of a group see most keys (kLastFirst); keys at its start are seen by most rows.
template <bool kLastFirst>
DEVICE Turn turn_of(const Schedule& schedule, int64_t block) {
  const bool last = block >= schedule.in_sections * schedule.tiles_per_group;
  const int64_t section = last ? schedule.pairs - schedule.in_sections : schedule.section;
  const int64_t first_pair = last ? schedule.in_sections : block / (section * schedule.tiles_per_group) * section;
  block -= first_pair * schedule.tiles_per_group;
  const int rank = static_cast<int>(block / section);
  const int position = kLastFirst ? schedule.tiles_per_group - 1 - rank : rank;
  int64_t pair = first_pair + block % section;

  Turn turn;
  turn.head = static_cast<int>(pair % schedule.heads);
  pair /= schedule.heads;
  const int group = static_cast<int>(pair % schedule.groups);
  turn.batch = static_cast<int>(pair / schedule.groups);
  const int half = turn.head >= schedule.first_shifted_head ? schedule.tiles_per_group / 2 : 0;
  turn.tile = group * schedule.tiles_per_group + position - half;
  turn.idle = turn.tile < 0 || turn.tile >= schedule.tiles;
  return turn;
}

}  // namespace longlora::cuda
