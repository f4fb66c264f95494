// What lies in a block's shared memory, kernel by kernel. Its sizeof is what a launch asks for, and what is compared
// with what a GPU offers: dispatch.cu does so without CuTe, so nothing here knows of layouts or of Element.
#pragma once

#include "tile_config.h"

namespace longlora::cuda {

template <typename Element, int kHeadDim, int kKib>
struct alignas(128) ForwardShared {
  static constexpr ForwardTile kTile = forward_tile(kHeadDim, kKib);

  Element q[kTile.rows * kHeadDim];  // in the end the output
  Element k[kTile.key_buffers * kTile.keys * kHeadDim];
  Element v[kTile.keys * kHeadDim];
  int first_keys[kTile.rows];
};

template <typename Element, int kHeadDim, int kKib>
struct alignas(128) BackwardShared {
  static constexpr BackwardTile kTile = backward_tile(kHeadDim, kKib);

  // Flat, not arrays of stages: nvcc works out where a stage begins in 32 bits.
  Element q[kTile.stages * kTile.rows * kHeadDim];
  Element dout[kTile.stages * kTile.rows * kHeadDim];
  Element k[kTile.keys * kHeadDim];  // in the end dk
  Element v[kTile.keys * kHeadDim];  // in the end dv
  Element weights[kTile.rows * kTile.keys];
  Element ds[kTile.rows * kTile.keys];
  float statistics[kTile.stages * 2 * kTile.rows];  // of a stage: lse of the rows, then delta
  int first_keys[kTile.rows];                       // where a tile has a left border
};

template <typename Element, int kHeadDim, int kKib>
struct alignas(128) BackwardDqShared {
  static constexpr BackwardTile kTile = backward_tile(kHeadDim, kKib);

  Element q[kTile.rows * kHeadDim];  // in the end dq
  Element dout[kTile.rows * kHeadDim];
  Element k[kTile.keys * kHeadDim];
  Element v[kTile.keys * kHeadDim];
  Element ds[kTile.rows * kTile.keys];
  float statistics[2 * kTile.rows];  // lse, then delta
  int first_keys[kTile.rows];
};

template <typename Element, int kHeadDim, int kKib>
struct alignas(128) PostprocessShared {
  Element dq[backward_tile(kHeadDim, kKib).rows * kHeadDim];
};

// Four numbers that are read and written at once.
struct alignas(16) Four {
  float values[4];
};

// Sums of dk and dv of a sink, to be added up. SinkLines says how each lies there.
template <int kHeadDim, int kKib>
struct alignas(128) PreprocessShared {
  static constexpr int kWarps = backward_tile(kHeadDim, kKib).warps;
  static_assert(kHeadDim / 2 <= kWarps * 32, "a thread adds up one four of the parts");

  Four parts[kWarps][kHeadDim / 2];  // of each warp
};

template <int kHeadDim, int kKib>
struct alignas(128) SinkGradientsShared {
  static constexpr int kThreads = 256, kKeys = backward_tile(kHeadDim, kKib).keys;
  static_assert(kThreads % (kHeadDim / 8) == 0, "every thread is in a group");
  static_assert(kHeadDim / 2 <= kThreads && kKeys <= kThreads, "a thread has one four of the parts, and one key");

  Four parts[kThreads / (kHeadDim / 8)][kHeadDim / 2];  // of each group of threads
  int row_ends[kKeys];
};

struct NothingShared {};

}  // namespace longlora::cuda
