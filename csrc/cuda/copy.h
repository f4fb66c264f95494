// Whole tiles between global and shared memory, 16 bytes a thread, eight threads on 64 columns.
#pragma once

#include "../params.h"
#include "layouts.h"

namespace longlora::cuda {

// kRows rows of one head from `first_row` on. Inside of a tile 32 bits count (row strides are below 2^23): with 64 the
// loads of one step keep twice as many registers.
template <typename Element, int kRows, int kHeadDim>
DEVICE auto global_tile(const TensorView& view, int64_t batch, int64_t head, int64_t first_row) {
  Element* data = static_cast<Element*>(view.data) + batch * view.batch_stride + head * view.head_stride +
                  first_row * view.row_stride;
  return make_tensor(make_gmem_ptr(data), make_layout(Shape<Int<kRows>, Int<kHeadDim>>{},
                                                      make_stride(static_cast<int>(view.row_stride), _1{})));
}

template <class Instruction, typename Element, int kThreads>
using TileCopy =
    decltype(make_tiled_copy(Copy_Atom<Instruction, Element>{}, Layout<Shape<Int<kThreads / 8>, _8>, Stride<_8, _1>>{},
                             Layout<Shape<_1, _8>>{}));

// Starts to copy a tile to shared memory. Past the last row and column come zeros.
template <int kThreads, class Global, class Shared>
DEVICE void load_tile(const Global& global, Shared&& shared, int rows, int columns, int thread) {
  using Element = typename std::decay_t<Global>::value_type;
  static_assert(decltype(size<0>(shared))::value % (kThreads / 8) == 0, "every thread has the same share of a tile");
  const TileCopy<CpAsync16, Element, kThreads> copy;
  const auto mine = copy.get_thread_slice(thread);
  const auto from = mine.partition_S(global);
  auto to = mine.partition_D(shared);
  const auto where = mine.partition_S(make_identity_tensor(shape(global)));
  CUTE_UNROLL
  for (int m = 0; m < size<1>(from); ++m) {
    CUTE_UNROLL
    for (int k = 0; k < size<2>(from); ++k) {
      const bool inside = get<0>(where(0, m, k)) < rows && get<1>(where(0, m, k)) < columns;
      cute::copy(copy.with(inside), from(_, m, k), to(_, m, k));
    }
  }
}

// Writes an accumulator, rounded to Element, through shared memory (of the tile's size and free to use) to global
// memory in 16-byte stores. A barrier stands between its two halves; who comes later to the shared tile needs another.
template <int kThreads, class Accumulator, class Mma, class Shared, class Global>
DEVICE void store_tile(const Accumulator& acc, const Mma& mma, Shared&& shared, Global&& global, int rows, int columns,
                       int thread) {
  using Element = typename std::decay_t<Global>::value_type;
  static_assert(decltype(size<0>(shared))::value % (kThreads / 8) == 0, "every thread has the same share of a tile");
  const auto fragment = rounded<Element>(acc);
  const auto to_shared = make_tiled_copy_C(Copy_Atom<Move<uint32_t>, Element>{}, mma);
  const auto writer = to_shared.get_thread_slice(thread);
  auto target = writer.partition_D(shared);
  cute::copy(to_shared, writer.retile_S(fragment), target);
  sync_block();
  const TileCopy<Move<uint128_t>, Element, kThreads> copy;
  const auto mine = copy.get_thread_slice(thread);
  const auto from = mine.partition_S(shared);
  auto to = mine.partition_D(global);
  const auto where = mine.partition_D(make_identity_tensor(shape(global)));
  CUTE_UNROLL
  for (int m = 0; m < size<1>(from); ++m) {
    CUTE_UNROLL
    for (int k = 0; k < size<2>(from); ++k) {
      if (get<0>(where(0, m, k)) < rows && get<1>(where(0, m, k)) < columns)
        cute::copy(copy, from(_, m, k), to(_, m, k));
    }
  }
}

}  // namespace longlora::cuda
