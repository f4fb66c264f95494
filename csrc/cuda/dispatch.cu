// Chooses the instantiation for a dtype and a head dimension, where the GPU can run it.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "errors.h"
#include "kernels.h"
#include "shared_memory.h"
#include "tile_config.h"

namespace cutlass {
struct bfloat16_t;
struct half_t;
}  // namespace cutlass

namespace longlora::cuda {

// Each is compiled in a unit of its own (instantiate.cu.in), so that this one needs no kernel.
template <typename Element, int kHeadDim>
void launch_forward(const ForwardParams& params, void* stream);
template <typename Element, int kHeadDim>
void launch_backward(const BackwardParams& params, bool deterministic, void* stream);

namespace {

// By padded head dimension: 64, 128, 256.
template <typename Element>
constexpr void (*kForward[])(const ForwardParams&, void*) = {launch_forward<Element, 64>, launch_forward<Element, 128>,
                                                             launch_forward<Element, 256>};
template <typename Element>
constexpr void (*kBackward[])(const BackwardParams&, bool, void*) = {
    launch_backward<Element, 64>, launch_backward<Element, 128>, launch_backward<Element, 256>};

int index_of(int64_t head_dim) {
  const int padded = padded_head_dim(static_cast<int>(head_dim));
  return padded == 64 ? 0 : padded == 128 ? 1 : 2;
}

// Of the block, of all kernels of a direction, that needs most. An Element is two bytes.
template <int kHeadDim>
constexpr int kForwardBytes = sizeof(ForwardShared<uint16_t, kHeadDim>);
template <int kHeadDim>
constexpr int kBackwardBytes =
    std::max({sizeof(BackwardShared<uint16_t, kHeadDim>), sizeof(BackwardDqShared<uint16_t, kHeadDim>),
              sizeof(PostprocessShared<uint16_t, kHeadDim>), sizeof(PreprocessShared<kHeadDim>),
              sizeof(SinkGradientsShared<kHeadDim>)});
// By padded head dimension, as above.
constexpr int kForwardSharedBytes[] = {kForwardBytes<64>, kForwardBytes<128>, kForwardBytes<256>};
constexpr int kBackwardSharedBytes[] = {kBackwardBytes<64>, kBackwardBytes<128>, kBackwardBytes<256>};

// Of the backward, in all heads and sequences.
int64_t row_tiles(const Problem& problem) {
  const int64_t rows = backward_tile(padded_head_dim(static_cast<int>(problem.head_dim))).rows;
  return problem.batch * problem.heads * ((problem.seqlen + rows - 1) / rows);
}

void check_device(const Problem& problem, bool backward) {
  const std::string why = why_unsupported(-1, problem.head_dim, backward);
  if (!why.empty()) throw std::runtime_error("s2attn: " + why);
}

}  // namespace

// Older GPUs lack the kernels' instructions. An A100, H100 or B200 offers a block 163 KiB of shared memory and more;
// GPUs of compute capability 8.6, 8.9 and 12 offer 99. The attributes are read from memory, so nothing is gained by
// keeping them, and no stream is touched.
std::string why_unsupported(int device, int64_t head_dim, bool backward) {
  if (device < 0) {
    const std::string why = failure(cudaGetDevice(&device), "asking for the current GPU");
    if (!why.empty()) return why;
  }
  int major = 0, minor = 0, offered = 0;
  for (const auto& [value, attribute] :
       {std::pair(&major, cudaDevAttrComputeCapabilityMajor), std::pair(&minor, cudaDevAttrComputeCapabilityMinor),
        std::pair(&offered, cudaDevAttrMaxSharedMemoryPerBlockOptin)}) {
    const std::string why = failure(cudaDeviceGetAttribute(value, attribute, device), "asking what the GPU can do");
    if (!why.empty()) return why;
  }
  const std::string gpu = "GPU " + std::to_string(device);
  if (major < 8)
    return gpu + " has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
           ", but the CUDA kernels need 8.0 or newer; use attn_implementation='sdpa'";
  const int needed = (backward ? kBackwardSharedBytes : kForwardSharedBytes)[index_of(head_dim)];
  if (needed > offered)
    return std::string(backward ? "the backward" : "the forward") + " at head_dim " + std::to_string(head_dim) +
           " needs " + std::to_string(needed) + " bytes of shared memory, but " + gpu + " offers " +
           std::to_string(offered) + " to a block; use attn_implementation='sdpa'";
  return "";
}

// dq is summed up in whole tiles.
int64_t dq_scratch_floats(const Problem& problem, bool deterministic) {
  const int head_dim = padded_head_dim(static_cast<int>(problem.head_dim));
  return deterministic ? 0 : row_tiles(problem) * backward_tile(head_dim).rows * head_dim;
}

// dk and dv of one sink for each tile of rows.
int64_t sink_sums_floats(const Problem& problem) {
  return problem.sink ? row_tiles(problem) * 2 * padded_head_dim(static_cast<int>(problem.head_dim)) : 0;
}

void forward(const ForwardParams& params, Dtype dtype, void* stream) {
  check_device(params.problem, false);
  if (params.problem.batch == 0) return;
  const auto& launch = dtype == Dtype::kBFloat16 ? kForward<cutlass::bfloat16_t> : kForward<cutlass::half_t>;
  launch[index_of(params.problem.head_dim)](params, stream);
}

void backward(const BackwardParams& params, Dtype dtype, bool deterministic, void* stream) {
  check_device(params.problem, true);
  if (params.problem.batch == 0) return;
  const auto& launch = dtype == Dtype::kBFloat16 ? kBackward<cutlass::bfloat16_t> : kBackward<cutlass::half_t>;
  launch[index_of(params.problem.head_dim)](params, deterministic, stream);
}

}  // namespace longlora::cuda
