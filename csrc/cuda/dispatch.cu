// Chooses the instantiation for a dtype, a head dimension and a GPU, where that can run it.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "gpu.h"
#include "kernels.h"
#include "shared_memory.h"
#include "tile_config.h"

namespace cutlass {
struct bfloat16_t;
struct half_t;
}  // namespace cutlass

namespace longlora::cuda {

// Each is compiled in a unit of its own (instantiate.cu.in), so that this one needs no kernel.
template <typename Element, int kHeadDim, int kKib>
void launch_forward(const ForwardParams& params, int64_t l2_bytes, void* stream);
template <typename Element, int kHeadDim, int kKib>
void launch_backward(const BackwardParams& params, bool deterministic, int64_t l2_bytes, void* stream);

namespace {

// Of the block, of all kernels of a direction, that needs most. An Element is two bytes.
template <int kHeadDim, int kKib>
constexpr int kForwardBytes = sizeof(ForwardShared<uint16_t, kHeadDim, kKib>);
template <int kHeadDim, int kKib>
constexpr int kBackwardBytes =
    std::max({sizeof(BackwardShared<uint16_t, kHeadDim, kKib>), sizeof(BackwardDqShared<uint16_t, kHeadDim, kKib>),
              sizeof(PostprocessShared<uint16_t, kHeadDim, kKib>), sizeof(PreprocessShared<kHeadDim, kKib>),
              sizeof(SinkGradientsShared<kHeadDim, kKib>)});

// The kernels of one padded head dimension for one class of GPU.
struct Kernels {
  int forward_bytes, backward_bytes;
  void (*forward[2])(const ForwardParams&, int64_t, void*);  // bfloat16, float16
  void (*backward[2])(const BackwardParams&, bool, int64_t, void*);
};

template <int kHeadDim, int kKib>
constexpr Kernels kernels_of() {
  using cutlass::bfloat16_t, cutlass::half_t;
  constexpr int kForwardKib = forward_kib(kHeadDim, kKib);
  static_assert(kForwardBytes<kHeadDim, kForwardKib> <= kKib * 1024 && kBackwardBytes<kHeadDim, kKib> <= kKib * 1024,
                "a tile fits what its class of GPU offers");
  return {kForwardBytes<kHeadDim, kForwardKib>,
          kBackwardBytes<kHeadDim, kKib>,
          {launch_forward<bfloat16_t, kHeadDim, kForwardKib>, launch_forward<half_t, kHeadDim, kForwardKib>},
          {launch_backward<bfloat16_t, kHeadDim, kKib>, launch_backward<half_t, kHeadDim, kKib>}};
}

template <int kKib>
constexpr Kernels kKernels[] = {kernels_of<64, kKib>(), kernels_of<128, kKib>(), kernels_of<256, kKib>()};

int padded_head_dim_of(const Problem& problem) { return padded_head_dim(static_cast<int>(problem.head_dim)); }

const Kernels& kernels_for(const Gpu& gpu, int64_t head_dim) {
  const int padded = padded_head_dim(static_cast<int>(head_dim)), index = padded == 64 ? 0 : padded == 128 ? 1 : 2;
  return (gpu.kib() == kLargeKib ? kKernels<kLargeKib> : kKernels<kSmallKib>)[index];
}

// Older GPUs lack the kernels' instructions.
std::string why_unsupported(const Gpu& gpu, int64_t head_dim, bool backward) {
  const std::string name = "GPU " + std::to_string(gpu.device);
  if (gpu.major < 8)
    return name + " has compute capability " + std::to_string(gpu.major) + "." + std::to_string(gpu.minor) +
           ", but the CUDA kernels need 8.0 or newer; use attn_implementation='sdpa'";
  const Kernels& kernels = kernels_for(gpu, head_dim);
  const int needed = backward ? kernels.backward_bytes : kernels.forward_bytes;
  if (needed > gpu.shared_bytes)
    return std::string(backward ? "the backward" : "the forward") + " at head_dim " + std::to_string(head_dim) +
           " needs " + std::to_string(needed) + " bytes of shared memory, but " + name + " offers " +
           std::to_string(gpu.shared_bytes) + " to a block; use attn_implementation='sdpa'";
  return "";
}

void throw_if(const std::string& why) {
  if (!why.empty()) throw std::runtime_error("s2attn: " + why);
}

Gpu gpu_of(int device) {
  Gpu gpu;
  throw_if(find_gpu(device, gpu));
  return gpu;
}

// The current one, which must be able to run the kernels.
Gpu gpu_for(const Problem& problem, bool backward) {
  const Gpu gpu = gpu_of(-1);
  throw_if(why_unsupported(gpu, problem.head_dim, backward));
  return gpu;
}

// Rows of a tile of the backward, and such tiles in all heads and sequences.
int rows_of_tile(const Problem& problem, int device) {
  return backward_tile(padded_head_dim_of(problem), gpu_of(device).kib()).rows;
}
int64_t row_tiles(const Problem& problem, int64_t rows) {
  return problem.batch * problem.heads * ((problem.seqlen + rows - 1) / rows);
}

int index_of(Dtype dtype) { return dtype == Dtype::kBFloat16 ? 0 : 1; }

}  // namespace

std::string why_unsupported(int device, int64_t head_dim, bool backward) {
  Gpu gpu;
  const std::string why = find_gpu(device, gpu);
  return why.empty() ? why_unsupported(gpu, head_dim, backward) : why;
}

// dq is summed up in whole tiles.
int64_t dq_scratch_floats(const Problem& problem, bool deterministic, int device) {
  if (deterministic) return 0;
  const int rows = rows_of_tile(problem, device);
  return row_tiles(problem, rows) * rows * padded_head_dim_of(problem);
}

// dk and dv of one sink for each tile of rows.
int64_t sink_sums_floats(const Problem& problem, int device) {
  if (!problem.sink) return 0;
  return row_tiles(problem, rows_of_tile(problem, device)) * 2 * padded_head_dim_of(problem);
}

void forward(const ForwardParams& params, Dtype dtype, void* stream) {
  const Gpu gpu = gpu_for(params.problem, false);
  if (params.problem.batch == 0) return;
  kernels_for(gpu, params.problem.head_dim).forward[index_of(dtype)](params, gpu.l2_bytes, stream);
}

void backward(const BackwardParams& params, Dtype dtype, bool deterministic, void* stream) {
  const Gpu gpu = gpu_for(params.problem, true);
  if (params.problem.batch == 0) return;
  kernels_for(gpu, params.problem.head_dim).backward[index_of(dtype)](params, deterministic, gpu.l2_bytes, stream);
}

}  // namespace longlora::cuda
