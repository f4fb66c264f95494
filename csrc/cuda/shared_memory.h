// What lies in a block's shared memory, kernel by kernel. Its sizeof is what a launch asks for, and what is compared
// with what a GPU offers: dispatch.cu does so without CuTe, so nothing here knows of layouts or of Element.
#pragma once

#include "tile_config.h"

namespace longlora::cuda {

template <typename Element, int kHeadDim>
struct alignas(128) ForwardShared {
  static constexpr ForwardTile kTile = forward_tile(kHeadDim);

  Element q[kTile.rows * kHeadDim];  // in the end the output
  Element k[kTile.keys * kHeadDim];
  Element v[kTile.keys * kHeadDim];
  int first_keys[kTile.rows];
};

template <typename Element, int kHeadDim>
struct alignas(128) BackwardShared {
  static constexpr BackwardTile kTile = backward_tile(kHeadDim);

  // Flat, not arrays of stages: nvcc works out where a stage begins in 32 bits.
  Element q[kTile.stages * kTile.rows * kHeadDim];
  Element dout[kTile.stages * kTile.rows * kHeadDim];
  Element k[kTile.keys * kHeadDim];  // in the end dk
  Element v[kTile.keys * kHeadDim];  // in the end dv
  Element weights[kTile.rows * kTile.keys];
  Element ds[kTile.rows * kTile.keys];
  float statistics[kTile.stages * 2 * kTile.rows];  // of a stage: lse of the rows, then delta
};

template <typename Element, int kHeadDim>
struct alignas(128) BackwardDqShared {
  static constexpr BackwardTile kTile = backward_tile(kHeadDim);

  Element q[kTile.rows * kHeadDim];  // in the end dq
  Element dout[kTile.rows * kHeadDim];
  Element k[kTile.keys * kHeadDim];
  Element v[kTile.keys * kHeadDim];
  Element ds[kTile.rows * kTile.keys];
  float statistics[2 * kTile.rows];  // lse, then delta
};

template <typename Element, int kHeadDim>
struct alignas(128) PostprocessShared {
  Element dq[backward_tile(kHeadDim).rows * kHeadDim];
};

template <int kHeadDim>
struct alignas(128) SinkShared {
  static constexpr int kKeys = backward_tile(kHeadDim).keys, kThreads = 256;
  static constexpr int kPieces = 2;  // of eight columns: 32 bytes of a row, what memory is read by

  struct alignas(16) Four {
    float values[4];
  };
  // Of dk, then dv, the first and the last four columns of each thread's eight. Two more a line: the threads that add
  // them up read all lines at once, and these must begin in other banks.
  Four sums[4][kThreads + 2];
  int row_ends[kKeys];
};

struct NothingShared {};

}  // namespace longlora::cuda
