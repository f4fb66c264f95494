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
  switch (head_dim) {
    case 64:
      return {128, 128, 4};
    case 128:
      return {128, 64, 4};
    default:
      return {128, 64, 8};
  }
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
  switch (head_dim) {
    case 64:
      return {128, 128, 8, 4, 4, 4, 2};
    case 128:
      return {64, 128, 8, 2, 4, 2, 2};
    default:
      return {64, 64, 8, 4, 2, 2, 1};
  }
}

}  // namespace longlora::cuda
