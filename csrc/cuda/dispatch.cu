// Chooses the instantiation for a dtype and a head dimension.
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "errors.h"
#include "kernels.h"
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

int index_of(const Problem& problem) {
  const int head_dim = padded_head_dim(static_cast<int>(problem.head_dim));
  return head_dim == 64 ? 0 : head_dim == 128 ? 1 : 2;
}

// Older GPUs lack the kernels' instructions. The two attributes are read from memory, so nothing is gained by keeping
// them, and no stream is touched.
void check_device() {
  constexpr char kAsking[] = "asking for the GPU's compute capability";
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "asking for the current GPU");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kAsking);
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), kAsking);
  if (major < 8)
    throw std::runtime_error("s2attn: GPU " + std::to_string(device) + " has compute capability " +
                             std::to_string(major) + "." + std::to_string(minor) +
                             ", but the CUDA kernels need 8.0 or newer; use attn_implementation='sdpa'");
}

}  // namespace

// dq is summed up in whole tiles.
int64_t dq_scratch_floats(const Problem& problem, bool deterministic) {
  if (deterministic) return 0;
  const int head_dim = padded_head_dim(static_cast<int>(problem.head_dim));
  const int64_t rows = backward_tile(head_dim).rows;
  return problem.batch * problem.heads * ((problem.seqlen + rows - 1) / rows * rows) * head_dim;
}

void forward(const ForwardParams& params, Dtype dtype, void* stream) {
  check_device();
  if (params.problem.batch == 0) return;
  const auto& launch = dtype == Dtype::kBFloat16 ? kForward<cutlass::bfloat16_t> : kForward<cutlass::half_t>;
  launch[index_of(params.problem)](params, stream);
}

void backward(const BackwardParams& params, Dtype dtype, bool deterministic, void* stream) {
  check_device();
  if (params.problem.batch == 0) return;
  const auto& launch = dtype == Dtype::kBFloat16 ? kBackward<cutlass::bfloat16_t> : kBackward<cutlass::half_t>;
  launch[index_of(params.problem)](params, deterministic, stream);
}

}  // namespace longlora::cuda
