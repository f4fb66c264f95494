// A small kernel in the manner of the real ones, for the emulator's own tests: C = A B, and the row sums of C added up
// over the blocks. Tiles of 64 x 64, two cp.async stages, everything through the atoms.
#pragma once

#include "../../csrc/cuda/atoms.h"
#include "../../csrc/cuda/device.h"

namespace longlora::toy {

using namespace cute;
using namespace longlora::cuda;

struct Params {
  const void* a;  // [rows, depth]
  const void* b;  // [depth, columns]
  void* c;        // [rows, columns]
  float* row_sums;
  int rows, columns, depth;  // the latter two multiples of 64
};

constexpr int kSide = 64;
constexpr int kThreads = 128;
constexpr int kTile = kSide * kSide;
constexpr int kSharedBytes = 4 * kTile * 2;  // A and B, two stages

template <bool swizzled>
using SharedAtom =
    conditional_t<swizzled, decltype(composition(Swizzle<3, 3, 3>{}, Layout<Shape<_8, _64>, Stride<_64, _1>>{})),
                  Layout<Shape<_8, _64>, Stride<_64, _1>>>;

template <typename Element, bool swizzled>
__global__ void __launch_bounds__(kThreads) gemm(const Params params) {
  const int thread = threadIdx.x;
  const int first_row = blockIdx.y * kSide, first_column = blockIdx.x * kSide;
  const auto tile_layout = tile_to_shape(SharedAtom<swizzled>{}, Shape<Int<kSide>, Int<kSide>>{});
  Element* memory = shared_memory<Element>();
  const auto shared_tile = [&](int index) { return make_tensor(make_smem_ptr(memory + index * kTile), tile_layout); };

  // Rows past the end are read as zeros.
  TiledCopy copy_in = make_tiled_copy(Copy_Atom<CpAsync16, Element>{}, Layout<Shape<_16, _8>, Stride<_8, _1>>{},
                                      Layout<Shape<_1, _8>>{});
  const auto my_copy_in = copy_in.get_slice(thread);
  const auto coordinates = my_copy_in.partition_S(make_identity_tensor(Shape<Int<kSide>, Int<kSide>>{}));
  const auto load = [&](const void* from, int row_stride, int row, int column, int rows, int index) {
    const Element* first = static_cast<const Element*>(from) + int64_t(row) * row_stride + column;
    const auto source = my_copy_in.partition_S(
        make_tensor(make_gmem_ptr(first), Shape<Int<kSide>, Int<kSide>>{}, make_stride(row_stride, _1{})));
    auto target = my_copy_in.partition_D(shared_tile(index));
    CUTE_UNROLL
    for (int i = 0; i < size<1>(source); ++i)
      copy(copy_in.with(row + get<0>(coordinates(0, i, 0)) < rows), source(_, i, _), target(_, i, _));
  };
  const auto load_stage = [&](int step) {
    const int stage = step % 2;
    load(params.a, params.depth, first_row, step * kSide, params.rows, 2 * stage);
    load(params.b, params.columns, step * kSide, first_column, params.depth, 2 * stage + 1);
  };

  TiledMMA mma = make_tiled_mma(MMA_Atom<Mma16816<Element>>{}, Layout<Shape<_4, _1, _1>>{}, Tile<_64, _16, _16>{});
  const auto my_mma = mma.get_slice(thread);
  auto c = partition_fragment_C(mma, Shape<Int<kSide>, Int<kSide>>{});
  clear(c);
  TiledCopy copy_a = make_tiled_copy_A(Copy_Atom<Ldmatrix4, Element>{}, mma);
  TiledCopy copy_b = make_tiled_copy_B(Copy_Atom<Ldmatrix4T, Element>{}, mma);

  const int steps = params.depth / kSide;
  load_stage(0);
  commit_copies();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) load_stage(step + 1);
    commit_copies();
    wait_copies<1>();
    sync_block();
    const auto a_tile = shared_tile(2 * (step % 2));
    const auto b_tile =
        make_tensor(shared_tile(2 * (step % 2) + 1).data(),
                    composition(tile_layout, Layout<Shape<Int<kSide>, Int<kSide>>, Stride<Int<kSide>, _1>>{}));
    auto a = my_mma.partition_fragment_A(a_tile);
    auto b = my_mma.partition_fragment_B(b_tile);
    copy(copy_a, copy_a.get_slice(thread).partition_S(a_tile), copy_a.get_slice(thread).retile_D(a));
    copy(copy_b, copy_b.get_slice(thread).partition_S(b_tile), copy_b.get_slice(thread).retile_D(b));
    gemm(mma, a, b, c);
    sync_block();
  }

  // The row sums: four lanes hold a row between them.
  const auto c_coordinates = my_mma.partition_C(make_identity_tensor(Shape<Int<kSide>, Int<kSide>>{}));
  CUTE_UNROLL
  for (int half = 0; half < 2; ++half) {
    float sum = 0;
    CUTE_UNROLL
    for (int n = 0; n < size<2>(c); ++n) sum += c(make_coord(0, half), 0, n) + c(make_coord(1, half), 0, n);
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const int row = first_row + get<0>(c_coordinates(make_coord(0, half), 0, 0));
    if (thread % 4 == 0 && row < params.rows) atomic_add(params.row_sums + row, sum);
  }

  // C goes out through shared memory, 16 bytes at a time.
  auto packed = make_tensor<uint32_t>(Shape<Int<size(c) / 2>>{});
  CUTE_UNROLL
  for (int i = 0; i < size(packed); ++i) packed(i) = pack2<Element>(c(2 * i), c(2 * i + 1));
  auto c_elements = make_tensor(recast_ptr<Element>(packed.data()), c.layout());
  auto c_tile = shared_tile(0);
  TiledCopy copy_c = make_tiled_copy_C(Copy_Atom<Move<uint32_t>, Element>{}, mma);
  copy(copy_c, copy_c.get_slice(thread).retile_S(c_elements), copy_c.get_slice(thread).partition_D(c_tile));
  sync_block();
  TiledCopy copy_out = make_tiled_copy(Copy_Atom<Move<uint128_t>, Element>{}, Layout<Shape<_16, _8>, Stride<_8, _1>>{},
                                       Layout<Shape<_1, _8>>{});
  const auto my_copy_out = copy_out.get_slice(thread);
  Element* first = static_cast<Element*>(params.c) + int64_t(first_row) * params.columns + first_column;
  auto out = my_copy_out.partition_D(
      make_tensor(make_gmem_ptr(first), Shape<Int<kSide>, Int<kSide>>{}, make_stride(params.columns, _1{})));
  auto staged = make_fragment_like(out);
  copy(copy_out, my_copy_out.partition_S(c_tile), staged);
  CUTE_UNROLL
  for (int i = 0; i < size<1>(out); ++i)
    if (first_row + get<0>(coordinates(0, i, 0)) < params.rows) copy(copy_out, staged(_, i, _), out(_, i, _));
}

template <typename Element, bool swizzled>
void launch_gemm(const Params& params) {
  const dim3 grid(params.columns / kSide, (params.rows + kSide - 1) / kSide);
  launch<&gemm<Element, swizzled>>(grid, kThreads, kSharedBytes, nullptr, params);
}

}  // namespace longlora::toy
