// Products of tiles on the tensor cores, with the operands in shared memory or in registers.
#pragma once

#include "layouts.h"

namespace longlora::cuda {

// An operand in shared memory: `load(k)` brings the k-th slice of 16 to this thread's registers.
template <class TiledCopy, class Source, class Fragment>
struct SharedOperand {
  TiledCopy copy;
  Source source;
  Fragment fragment;
  int thread;

  DEVICE void load(int k) {
    auto target = copy.get_thread_slice(thread).retile_D(fragment);
    cute::copy(copy, source(_, _, k), target(_, _, k));
  }
  // To the same tile in another buffer; to where `other` is, and further.
  DEVICE void move(int elements) { source.data() = source.data() + elements; }
  DEVICE void follow(const SharedOperand& other, int elements) { source.data() = other.source.data() + elements; }
};

template <class Fragment>
struct RegisterOperand {
  Fragment fragment;
  DEVICE void load(int) {}
};

template <class TiledCopy, class Tensor, class Fragment>
DEVICE auto shared_operand(TiledCopy copy, const Tensor& tile, const Fragment& fragment, int thread) {
  const auto source = copy.get_thread_slice(thread).partition_S(tile);
  return SharedOperand<TiledCopy, std::decay_t<decltype(source)>, Fragment>{copy, source, fragment, thread};
}

// Fragments follow from shapes alone, and CuTe finds their registers in a plain layout.
template <class Tensor>
DEVICE auto unswizzled(const Tensor& tile) {
  return make_tensor(tile.data(), get_nonswizzle_portion(tile.layout()));
}

// `tile` is [m, k] for A and [n, k] for B. Instruction is Ldmatrix4 where k is contiguous and Ldmatrix4T for a
// transposed view.
template <class Instruction, class Mma, class Tensor>
DEVICE auto operand_a(const Mma& mma, const Tensor& tile, int thread) {
  return shared_operand(make_tiled_copy_A(Copy_Atom<Instruction, typename Tensor::value_type>{}, mma), tile,
                        mma.get_thread_slice(thread).partition_fragment_A(unswizzled(tile)), thread);
}
template <class Instruction, class Mma, class Tensor>
DEVICE auto operand_b(const Mma& mma, const Tensor& tile, int thread) {
  return shared_operand(make_tiled_copy_B(Copy_Atom<Instruction, typename Tensor::value_type>{}, mma), tile,
                        mma.get_thread_slice(thread).partition_fragment_B(unswizzled(tile)), thread);
}

// A product's result as the left operand of the next: two neighbouring 16 x 8 results are one 16 x 16 operand.
template <typename Element, class Accumulator>
DEVICE auto operand_from(const Accumulator& acc) {
  const auto fragment = rounded<Element>(acc);
  const auto pairs = logical_divide(fragment.layout(), Shape<Underscore, Underscore, _2>{});  // ((2,2),M,(2,N/2))
  const auto layout =
      make_layout(make_layout(get<0, 0>(pairs), get<0, 1>(pairs), get<2, 0>(pairs)), get<1>(pairs), get<2, 1>(pairs));
  auto operand = make_tensor<Element>(layout);
  cute::copy(make_tensor(fragment.data(), layout), operand);
  return RegisterOperand<decltype(operand)>{operand};
}

// acc += a b^T. All is unrolled: how far ahead of the tensor cores the slices are loaded, the compiler decides by the
// registers it has left.
template <class Accumulator, class Mma, class A, class B>
DEVICE void multiply(Accumulator& acc, const Mma& mma, A& a, B& b) {
  CUTE_UNROLL
  for (int k = 0; k < size<2>(b.fragment); ++k) {
    a.load(k);
    b.load(k);
    cute::gemm(mma, a.fragment(_, _, k), b.fragment(_, _, k), acc);
  }
}

// The accumulator of an [kRows, kColumns] product, empty.
template <int kRows, int kColumns, class Mma>
DEVICE auto zeros(const Mma& mma) {
  static_assert(kRows % decltype(tile_size<0>(mma))::value == 0 && kColumns % decltype(tile_size<1>(mma))::value == 0,
                "every warp has the same share of a product");
  auto acc = partition_fragment_C(mma, Shape<Int<kRows>, Int<kColumns>>{});
  clear(acc);
  return acc;
}

}  // namespace longlora::cuda
