// How tiles lie in shared memory, and how the fragments of the tensor cores are read as matrices.
#pragma once

#include <cute/tensor.hpp>

#include "atoms.h"
#include "device.h"

namespace longlora::cuda {

using namespace cute;

// Rows of 64 elements are 128 bytes, all the banks; of 32 elements, two rows are. The swizzle exchanges their 16-byte
// pieces by row, so that eight rows read at one column (ldmatrix) or eight pieces that follow each other (cp.async)
// touch every bank once.
template <int kColumns, int kWidth = kColumns == 32 ? 32 : 64>
using SwizzledRows = decltype(composition(conditional_t<kWidth == 32, Swizzle<2, 3, 3>, Swizzle<3, 3, 3>>{},
                                          Layout<Shape<_8, Int<kWidth>>, Stride<Int<kWidth>, _1>>{}));

template <int kRows, int kColumns>
using SharedTile = decltype(tile_to_shape(SwizzledRows<kColumns>{}, Shape<Int<kRows>, Int<kColumns>>{}));

// The same memory as the transposed matrix, [columns, rows].
template <class Tensor>
DEVICE auto transposed(const Tensor& tile) {
  constexpr int kRows = decltype(size<0>(tile))::value, kColumns = decltype(size<1>(tile))::value;
  using Transposed = Layout<Shape<Int<kColumns>, Int<kRows>>, Stride<Int<kRows>, _1>>;
  return make_tensor(tile.data(), composition(tile.layout(), Transposed{}));
}

// The tensor cores' m16n8k16, with kWarps of `warps` stacked along the rows. A warp takes 16 columns a time, what one
// ldmatrix.x4 brings.
template <typename Element, int kWarps, int kAlongRows>
using WarpMma = TiledMMA<MMA_Atom<Mma16816<Element>>, Layout<Shape<Int<kAlongRows>, Int<kWarps / kAlongRows>, _1>>,
                         cute::Tile<Int<16 * kAlongRows>, Int<16 * (kWarps / kAlongRows)>, _16>>;

// An accumulator is ((2 columns, 2 rows), tiles along rows, tiles along columns); the same as (rows, columns).
template <class Accumulator>
DEVICE auto as_matrix(Accumulator& acc) {
  const auto layout = acc.layout();
  return make_tensor(acc.data(), make_layout(make_layout(get<0, 1>(layout), get<1>(layout)),
                                             make_layout(get<0, 0>(layout), get<2>(layout))));
}

// Where each element of such a matrix lies in the block's tile: (row, column).
template <int kRows, int kColumns, class Mma>
DEVICE auto coordinates(const Mma& mma, int thread) {
  const auto tile = make_identity_tensor(Shape<Int<kRows>, Int<kColumns>>{});
  const auto mine = mma.get_thread_slice(thread).partition_C(tile);
  return make_tensor(mine.data(), make_layout(make_layout(get<0, 1>(mine.layout()), get<1>(mine.layout())),
                                              make_layout(get<0, 0>(mine.layout()), get<2>(mine.layout()))));
}

// An accumulator rounded to Element. Neighbours in a row are neighbours in memory, so they go in pairs.
template <typename Element, class Accumulator>
DEVICE auto rounded(const Accumulator& acc) {
  auto out = make_fragment_like<Element>(acc);
  auto pairs = recast<uint32_t>(out);
  CUTE_UNROLL
  for (int i = 0; i < size(pairs); ++i) pairs(i) = pack2<Element>(acc(2 * i), acc(2 * i + 1));
  return out;
}

}  // namespace longlora::cuda
