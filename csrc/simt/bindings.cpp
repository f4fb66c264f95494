// The module `simt_kernels`: kernels.h for Python, with pointers as integers. Whoever calls it keeps to what kernels.h
// says; nothing is checked here.
#include <cuda_runtime_api.h>

#include <tuple>
#include <vector>

#include "../cuda/kernels.h"
#include "../cuda/scheduler.h"
#include "../groups.h"
#include "python.h"

namespace longlora::simt {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

int compute_capability_major = 8;
int l2_bytes = 40 << 20;
int error_of_the_runtime = cudaSuccess;

Dtype dtype_of(bool bfloat16) { return bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat16; }

PYBIND11_MODULE(simt_kernels, module) {
  using namespace pybind11::literals;
  bind_control(module);

  // Local: a process may load modules with different kernels.
  pybind11::class_<TensorView>(module, "TensorView", pybind11::module_local())
      .def(pybind11::init([](uintptr_t data, int64_t batch_stride, int64_t row_stride, int64_t head_stride) {
             return TensorView{pointer<void>(data), batch_stride, row_stride, head_stride};
           }),
           "data"_a, "batch_stride"_a, "row_stride"_a, "head_stride"_a);

  pybind11::class_<Problem>(module, "Problem", pybind11::module_local())
      .def(pybind11::init([](int64_t batch, int64_t seqlen, int64_t seqlen_k, int64_t heads, int64_t kv_heads,
                             int64_t head_dim, int64_t group_size, int64_t first_shifted_head, int64_t window,
                             bool sink, double scale, uintptr_t doc_start) {
             return Problem{batch,    seqlen,   seqlen_k,   heads,
                            kv_heads, head_dim, group_size, first_shifted_head,
                            window,   sink,     scale,      pointer<int32_t>(doc_start)};
           }),
           "batch"_a, "seqlen"_a, "seqlen_k"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "group_size"_a,
           "first_shifted_head"_a, "window"_a, "sink"_a, "scale"_a, "doc_start"_a = 0);

  module.def(
      "forward",
      [](const Problem& problem, bool bfloat16, TensorView q, TensorView k, TensorView v, TensorView out,
         uintptr_t lse) { cuda::forward({problem, q, k, v, out, pointer<void>(lse)}, dtype_of(bfloat16), nullptr); },
      "problem"_a, "bfloat16"_a, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a);

  module.def(
      "backward",
      [](const Problem& problem, bool bfloat16, bool deterministic, TensorView dout, TensorView q, TensorView k,
         TensorView v, TensorView out, TensorView dq, TensorView dk, TensorView dv, uintptr_t lse, uintptr_t dlse,
         uintptr_t delta, uintptr_t sink_weight, uintptr_t sink_ds, uintptr_t dq_scratch, uintptr_t sink_sums) {
        cuda::backward(
            {problem, dout, q, k, v, out, dq, dk, dv, pointer<void>(lse), pointer<void>(dlse), pointer<void>(delta),
             pointer<void>(sink_weight), pointer<void>(sink_ds), pointer<float>(dq_scratch), pointer<float>(sink_sums)},
            dtype_of(bfloat16), deterministic, nullptr);
      },
      "problem"_a, "bfloat16"_a, "deterministic"_a, "dout"_a, "q"_a, "k"_a, "v"_a, "out"_a, "dq"_a, "dk"_a, "dv"_a,
      "lse"_a, "dlse"_a, "delta"_a, "sink_weight"_a, "sink_ds"_a, "dq_scratch"_a, "sink_sums"_a);

  module.def("dq_scratch_floats", &cuda::dq_scratch_floats, "problem"_a, "deterministic"_a, "device"_a = -1);
  module.def("sink_sums_floats", &cuda::sink_sums_floats, "problem"_a, "device"_a = -1);
  module.def("first_key", &first_key<int>, "i"_a, "doc_start"_a, "group_size"_a, "shifted"_a, "window"_a);
  module.def("last_row_end", &last_row_end<int>, "j"_a, "doc_start"_a, "group_size"_a, "shifted"_a, "window"_a);
  module.def("sees_sink", &sees_sink<int>, "first_key"_a, "doc_start"_a);
  module.def(
      "pretend",
      [](int major, int error, int shared_bytes, int l2) {
        compute_capability_major = major;
        error_of_the_runtime = error;
        offer_shared_memory(shared_bytes);
        l2_bytes = l2;
      },
      "compute_capability_major"_a = 8, "error"_a = 0, "shared_memory_bytes"_a = 163 << 10, "l2_bytes"_a = 40 << 20,
      "What the host code finds from here on; at first all is well, and the GPU an A100.");
  module.def("why_unsupported", &cuda::why_unsupported, "device"_a, "head_dim"_a, "backward"_a);
  module.def(
      "blocks",
      [](const Problem& problem, int rows) {
        return cuda::Schedule(problem, l2_bytes, problem.seqlen, rows, problem.heads, problem.first_shifted_head, 1)
            .grid()
            .x;
      },
      "problem"_a, "rows"_a, "Blocks of a grid.");
  module.def(
      "turns",
      [](const Problem& problem, int rows, int64_t bytes_per_row) {
        const cuda::Schedule schedule(problem, l2_bytes, problem.seqlen, rows, problem.heads,
                                      problem.first_shifted_head, bytes_per_row);
        std::vector<std::tuple<int, int, int>> turns;
        for (unsigned block = 0; block < schedule.grid().x; ++block) {
          const cuda::Turn turn = cuda::turn_of<true>(schedule, block);
          turns.emplace_back(turn.batch, turn.head, turn.idle ? -1 : turn.tile);
        }
        return turns;
      },
      "problem"_a, "rows"_a, "bytes_per_row"_a, "Batch, head and tile of each block, of an idle one -1.");
}

}  // namespace
}  // namespace longlora::simt

// What the host code asks the CUDA runtime.
extern "C" {
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return static_cast<cudaError_t>(longlora::simt::error_of_the_runtime);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor         ? longlora::simt::compute_capability_major
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? longlora::simt::offered_shared_memory()
           : attribute == cudaDevAttrL2CacheSize                  ? longlora::simt::l2_bytes
                                                                  : 0;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  return longlora::simt::allow_shared_memory(kernel, bytes) ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 12040;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t) { return "CUDA's own words"; }
}
