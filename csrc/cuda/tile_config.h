// Tile sizes for each head dimension and class of GPU: the one table from which layouts, threads and shared memory
// follow.
#pragma once

namespace longlora::cuda {

// KiB of shared memory that a GPU offers a block. An A100, H100 or B200 offers 163 or more; GPUs of compute capability
// 8.6, 8.9 and 12 offer 99: RTX 3090 to 5090, A10, A6000, L4, L40S. Each has tiles of its own. Those for 99 KiB would
// run anywhere, but a backward's would be bound by an A100's shared memory.
constexpr int kLargeKib = 163, kSmallKib = 99;

// Kernels exist for these head dimensions; one between goes into the next, its missing columns filled with zeros.
constexpr int padded_head_dim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

struct ForwardTile {
  int rows;         // of queries
  int keys;         // of one step
  int warps;        // each has every warps-th stripe of 16 rows
  int key_buffers;  // with two, a tile of K has a step's time to come
};

// A warp with 32 rows reads each fragment of K and V for two products, one with 16 rows for one: at 16 an A100's shared
// memory is slower than its tensor cores (head_dim 256 has no registers for more). Tensor cores of the GPUs with 99 KiB
// have half the rate or less, and such a multiprocessor has room for one block alone beyond a head_dim of 64: it needs
// eight warps. There are two buffers of K where the blocks of a multiprocessor stay as many.
constexpr ForwardTile forward_tile(int head_dim, int kib) {
  ForwardTile tile{};
  switch (head_dim) {
    case 64:
      tile.rows = 128, tile.keys = 128, tile.warps = 4, tile.key_buffers = 1;
      break;
    case 128:
      tile.rows = 128, tile.keys = 64, tile.warps = kib == kLargeKib ? 4 : 8, tile.key_buffers = 2;
      break;
    default:
      tile.rows = 128, tile.keys = kib == kLargeKib ? 64 : 32, tile.warps = 8;
      tile.key_buffers = kib == kLargeKib ? 2 : 1;
  }
  return tile;
}

// Which forward a GPU runs: where the tile is the same, there is one instantiation.
constexpr int forward_kib(int head_dim, int kib) { return head_dim == 64 ? kLargeKib : kib; }

struct BackwardTile {
  int rows;
  int keys;
  int warps;
  int score_warps;  // of them, stacked along the rows of the scores; the others stand along the keys
  int dkv_warps;    // stacked along the keys of dk and dv
  int dq_warps;     // stacked along the rows of dq
  int stages;       // buffers of q and dout
};

constexpr BackwardTile backward_tile(int head_dim, int kib) {
  const bool large = kib == kLargeKib;
  BackwardTile tile{};
  tile.warps = 8;
  switch (head_dim) {
    case 64:
      tile.rows = large ? 128 : 64, tile.keys = 128, tile.stages = 2;
      tile.score_warps = large ? 4 : 2, tile.dkv_warps = 4, tile.dq_warps = large ? 4 : 2;
      break;
    case 128:
      tile.rows = large ? 64 : 32, tile.keys = 128, tile.stages = large ? 2 : 1;
      tile.score_warps = 2, tile.dkv_warps = 4, tile.dq_warps = 2;
      break;
    default:
      if (large) {
        tile.rows = 64, tile.keys = 64, tile.stages = 1;
        tile.score_warps = 4, tile.dkv_warps = 2, tile.dq_warps = 2;
      } else {
        tile.rows = 32, tile.keys = 32, tile.warps = 4, tile.stages = 1;
        tile.score_warps = 2, tile.dkv_warps = 1, tile.dq_warps = 1;
      }
  }
  return tile;
}

}  // namespace longlora::cuda
