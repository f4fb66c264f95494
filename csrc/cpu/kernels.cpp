// The CPU kernels of one instruction set: CMake compiles this file once for each, with its flags and its
// LONGLORA_ISA and LONGLORA_VECTOR_BYTES. Work is one (batch, head, block of rows) at a time, over threads.
#include "kernels.h"

#include <omp.h>

#include <new>

#include "backward.h"
#include "forward.h"

namespace longlora::cpu::LONGLORA_ISA {
namespace {

// Scratch of all threads, taken before they start: an allocation that fails inside a parallel region could
// not be reported.
template <typename Acc>
class Scratch {
 public:
  explicit Scratch(int64_t elements_per_thread)
      : pitch_(round_up(elements_per_thread, kPad)),
        data_(static_cast<Acc*>(
            ::operator new(sizeof(Acc) * pitch_ * omp_get_max_threads(), std::align_val_t(kAlignment)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(kAlignment)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  Acc* of_this_thread() const { return data_ + pitch_ * omp_get_thread_num(); }

 private:
  static constexpr size_t kAlignment = 64;
  int64_t pitch_;
  Acc* data_;
};

// tile(batch, head, first row of the block), for every block of every head, over threads.
template <typename Tile, typename Params>
void for_each_block(const Params& params, int64_t heads, int64_t block_rows) {
  const int64_t blocks = (params.problem.seqlen + block_rows - 1) / block_rows;
  const int64_t items = params.problem.batch * heads * blocks;
  const Scratch<typename Tile::Acc> scratch(Tile::scratch_size(params.problem.head_dim));
#pragma omp parallel for schedule(dynamic) if (items > 1)
  for (int64_t item = 0; item < items; ++item) {
    Tile tile(params, scratch.of_this_thread());
    tile.run(item / (blocks * heads), item / blocks % heads, item % blocks * block_rows);
  }
}

template <typename T>
void forward(const ForwardParams& params) {
  for_each_block<ForwardTile<T>>(params, params.problem.heads, kForwardRows);
}

template <typename T>
void backward(const BackwardParams& params) {
  const Problem& p = params.problem;
  for_each_block<DeltaTile<T>>(params, p.heads, kBackwardRows);
  for_each_block<KeyGradientTile<T>>(params, p.kv_heads, kBackwardKeys);
  for_each_block<QueryGradientTile<T>>(params, p.heads, kBackwardRows);
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    {forward<float>, forward<double>, forward<BFloat16>, forward<Float16>},
    {backward<float>, backward<double>, backward<BFloat16>, backward<Float16>},
};

}  // namespace longlora::cpu::LONGLORA_ISA
