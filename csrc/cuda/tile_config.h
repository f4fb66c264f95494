// Tile sizes for each head dimension: the one table from which layouts, threads and shared memory follow.
#pragma once

namespace longlora::cuda {

// Kernels exist for these head dimensions; one between goes into the next, its missing columns filled with zeros.
constexpr int padded_head_dim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

struct ForwardTile {
  int rows;   // of queries
  int keys;   // of one step
  int warps;  // each has every warps-th stripe of 16 rows
};

// A warp with 32 rows reads each fragment of K and V for two products, one with 16 rows for one: at 16 shared memory
// is slower than the tensor cores (head_dim 256 has no registers for more).
constexpr ForwardTile forward_tile(int head_dim) {
  ForwardTile tile{};
  switch (head_dim) {
    case 64:
      tile.rows = 128, tile.keys = 128, tile.warps = 4;
      break;
    case 128:
      tile.rows = 128, tile.keys = 64, tile.warps = 4;
      break;
    default:
      tile.rows = 128, tile.keys = 64, tile.warps = 8;
  }
  return tile;
}

struct BackwardTile {
  int rows;
  int keys;
  int warps;
  int score_warps;  // of them, stacked along the rows of the scores; the others stand along the keys
  int dkv_warps;    // stacked along the keys of dk and dv
  int dq_warps;     // stacked along the rows of dq
  int stages;       // buffers of q and dout
};

constexpr BackwardTile backward_tile(int head_dim) {
  BackwardTile tile{};
  tile.warps = 8;
  switch (head_dim) {
    case 64:
      tile.rows = 128, tile.keys = 128, tile.stages = 2;
      tile.score_warps = 4, tile.dkv_warps = 4, tile.dq_warps = 4;
      break;
    case 128:
      tile.rows = 64, tile.keys = 128, tile.stages = 2;
      tile.score_warps = 2, tile.dkv_warps = 4, tile.dq_warps = 2;
      break;
    default:
      tile.rows = 64, tile.keys = 64, tile.stages = 1;
      tile.score_warps = 4, tile.dkv_warps = 2, tile.dq_warps = 2;
  }
  return tile;
}

}  // namespace longlora::cuda
