// Single rows of tensors in global memory, read straight to registers: what is done row by row, outside of products of
// tiles.
#pragma once

#include "../params.h"
#include "layouts.h"

namespace longlora::cuda {

// Of a tensor of Elements, row `row` of a head.
template <typename Element>
DEVICE const Element* row_of(const TensorView& view, int batch, int head, int64_t row) {
  return static_cast<const Element*>(view.data) + batch * view.batch_stride + head * view.head_stride +
         row * view.row_stride;
}

// Two neighbours in a row; zeros past its end.
template <typename Element>
DEVICE float2 pair_of(const Element* row, int column, int columns) {
  if (column >= columns) return {0, 0};
  uint32_t pair;
  Move<uint32_t>::copy(reinterpret_cast<const uint32_t&>(row[column]), pair);
  return unpack2<Element>(pair);
}

// Eight elements of a row, in 16 bytes; zeros where they are not `inside`.
struct Piece {
  alignas(16) uint32_t pairs[4] = {};

  Piece() = default;
  template <typename Element>
  DEVICE explicit Piece(const Element& first, bool inside = true) {
    if (inside) Move<uint128_t>::copy(reinterpret_cast<const uint128_t&>(first), reinterpret_cast<uint128_t&>(pairs));
  }
};

// Adds the product of eight elements each.
template <typename Element>
DEVICE void add_product(float& sum, const Piece& a, const Piece& b) {
  CUTE_UNROLL
  for (int pair = 0; pair < 4; ++pair) {
    const float2 x = unpack2<Element>(a.pairs[pair]), y = unpack2<Element>(b.pairs[pair]);
    sum += x.x * y.x + x.y * y.y;
  }
}

// Adds eight elements times a factor.
template <typename Element>
DEVICE void add_times(float (&sums)[8], float factor, const Piece& piece) {
  CUTE_UNROLL
  for (int pair = 0; pair < 4; ++pair) {
    const float2 x = unpack2<Element>(piece.pairs[pair]);
    sums[2 * pair] += factor * x.x, sums[2 * pair + 1] += factor * x.y;
  }
}

}  // namespace longlora::cuda
