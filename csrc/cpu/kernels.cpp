// The CPU kernels of one instruction set: CMake compiles this file once for each, with its flags and its
// LONGLORA_ISA and LONGLORA_VECTOR_BYTES. Work is one (batch, head, block of rows or keys) at a time, over threads.
#include "kernels.h"

#include <omp.h>

#include "backward.h"
#include "forward.h"
#include "preprocess.h"

namespace longlora::cpu::LONGLORA_ISA {
namespace {

// Scratch of every thread, for as many bytes as `needed` counted.
class Scratch {
 public:
  explicit Scratch(const Arena& needed) : bytes_(needed.used()), memory_(bytes_ * omp_get_max_threads()) {}
  Arena of_this_thread() const { return Arena(memory_.data() + bytes_ * omp_get_thread_num()); }

 private:
  const int64_t bytes_;
  const Memory memory_;
};

template <typename Tile, typename Params>
Scratch scratch_for(const Params& params) {
  Arena needed;
  const Tile tile(params, needed);
  return Scratch(needed);
}

// tile(batch, head, first row of the block), for every block of every head, over threads. The last block of a group has
// the most keys: from the end on, the rest that threads share out at last is short.
template <typename Tile, typename Params>
void for_each_block(const Params& params, int64_t block_rows) {
  const Problem& p = params.problem;
  const int64_t blocks = (p.seqlen + block_rows - 1) / block_rows;
  const int64_t heads = p.batch * p.heads;
  const Scratch scratch = scratch_for<Tile>(params);
#pragma omp parallel for schedule(dynamic) if (heads * blocks > 1)
  for (int64_t item = 0; item < heads * blocks; ++item) {
    const TileRegisters tile_registers;
    Arena arena = scratch.of_this_thread();
    Tile tile(params, arena);
    tile.run(item % heads / p.heads, item % p.heads, (blocks - 1 - item / heads) * block_rows);
  }
}

template <typename T>
void forward(const ForwardParams& params) {
  for_each_block<Forward<T>>(params, kForwardRows);
}

// As many KV heads at a time as have this much of dQ in fp32, and at least one.
constexpr int64_t kQueryGradientBytes = 32 << 20;

template <typename T>
void backward(const BackwardParams& params) {
  using Acc = Accumulate<T>;
  const Problem& p = params.problem;
  for_each_block<Preprocess<T>>(params, kBackwardBlock);

  const int64_t blocks = (p.seqlen_k + kBackwardBlock - 1) / kBackwardBlock;
  const int64_t kv_heads = p.batch * p.kv_heads;
  const int64_t heads_per_kv = p.heads / p.kv_heads;
  const auto query_gradients = [&](int64_t kv_heads, Arena& arena) {
    return QueryGradients<Acc>(p, kv_heads * heads_per_kv, kBackwardBlock, round_up(p.head_dim, kPad),
                               omp_get_max_threads(), arena);
  };
  Arena one, all;
  query_gradients(1, one);
  const int64_t at_once = greater<int64_t>(1, lesser(kv_heads, kQueryGradientBytes / one.used()));
  query_gradients(at_once, all);
  const Memory memory(all.used());
  Arena arena(memory.data());
  const QueryGradients<Acc> dq = query_gradients(at_once, arena);

  const Scratch scratch = scratch_for<Backward<T>>(params);
  for (int64_t begin = 0; begin < kv_heads; begin += at_once) {
    const int64_t count = lesser(at_once, kv_heads - begin);
    dq.begin();
    // In this order: see QueryGradients. Neighbours are of different heads, so they seldom wait.
#pragma omp parallel for schedule(monotonic : dynamic) if (count * blocks > 1)
    for (int64_t item = 0; item < count * blocks; ++item) {
      const TileRegisters tile_registers;
      Arena arena = scratch.of_this_thread();
      Backward<T> tile(params, arena);
      const int64_t head = begin + item % count;
      tile.run(dq, item % count * heads_per_kv, head / p.kv_heads, head % p.kv_heads, item / count * kBackwardBlock);
    }
  }
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    {forward<float>, forward<double>, forward<BFloat16>, forward<Float16>},
    {backward<float>, backward<double>, backward<BFloat16>, backward<Float16>},
};

}  // namespace longlora::cpu::LONGLORA_ISA
