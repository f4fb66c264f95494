// The operators as torch sees them: schemas, allocation, dispatch. This file and checks.h alone know torch, through its
// stable ABI, so that one library loads under every torch from TORCH_TARGET_VERSION on.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "checks.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace longlora {
namespace {

// The stride of a dimension of size 1 may be anything, but addresses are made of it.
TensorView view_of(const Tensor& tensor) {
  const auto stride = [&](int64_t i) { return tensor.size(i) == 1 ? 0 : tensor.stride(i); };
  return {tensor.data_ptr(), stride(0), stride(1), stride(2)};
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return torch::stable::contiguous(*tensor);
}

Tensor empty_contiguous_like(const Tensor& tensor) { return torch::stable::new_empty(tensor, tensor.sizes()); }

// One number for each query row of each head; none, and so a null pointer, where they are not `needed`.
Tensor empty_row_stats(const Tensor& q, bool needed = true) {
  const int64_t sizes[] = {q.size(0), q.size(2), needed ? q.size(1) : 0};
  return torch::stable::new_empty(q, {sizes, 3}, lse_dtype(q));
}

// A tensor of none has a null pointer.
Tensor empty_floats(const Tensor& q, int64_t count) {
  return torch::stable::new_empty(q, {&count, 1}, ScalarType::Float);
}

// The tensor, or a copy of it where a kernel of the device could not read it: where its last stride is not 1 (autograd
// may hand over an expanded dout, as the gradient of sum() is), a row does not begin at a multiple of kAlignment bytes,
// or rows are too far apart.
template <typename Device>
Tensor readable(const Tensor& tensor) {
  bool as_it_is = tensor.stride(3) == 1 && (tensor.size(1) == 1 || tensor.stride(1) < Device::kRowStrides) &&
                  reinterpret_cast<uintptr_t>(tensor.data_ptr()) % Device::kAlignment == 0;
  for (int64_t i = 0; i < 3; ++i)
    as_it_is = as_it_is && (tensor.size(i) == 1 || tensor.stride(i) * tensor.element_size() % Device::kAlignment == 0);
  if (as_it_is) return tensor;
  // Not contiguous(), which leaves a contiguous tensor where it is, aligned or not.
  Tensor copy = empty_contiguous_like(tensor);
  return torch::stable::copy_(copy, tensor);
}

// What differs between the devices:
//   kAlignment, kRowStrides        what a row must begin at, in bytes; the bound of how many elements it is to the next
//   why_unsupported_dtype          why there are no kernels for a dtype, or nothing
//   why_unsupported                why they do not run on that one of the devices, or nothing: a launch asks by itself
//   check_problem                  what else a kernel relies on
//   dq_scratch_floats              fp32 scratch for backward
//   sink_sums_floats               more of it
//   forward, backward              the launch
struct Cpu {
  static constexpr size_t kAlignment = 1;
  static constexpr int64_t kRowStrides = INT64_MAX;

  static std::string why_unsupported_dtype(ScalarType dtype) {
    if (dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
        dtype == ScalarType::Half)
      return "";
    return std::string("q must be float32, float64, bfloat16 or float16, but is ") + torch::headeronly::toString(dtype);
  }

  static std::string why_unsupported(int /*device*/, int64_t /*head_dim*/, bool /*backward*/) { return ""; }

  static void check_problem(const Problem& problem) { check_doc_start_values(problem); }

  static int64_t dq_scratch_floats(const Problem&, const Tensor&, bool /*deterministic*/) { return 0; }

  static int64_t sink_sums_floats(const Problem&, const Tensor&) { return 0; }

  static void forward(const ForwardParams& params, const Tensor& q) {
    cpu::best_kernels().forward[static_cast<int>(dtype_of(q))](params);
  }

  static void backward(const BackwardParams& params, const Tensor& q, bool /*deterministic: always is*/) {
    cpu::best_kernels().backward[static_cast<int>(dtype_of(q))](params);
  }
};

#ifdef LONGLORA_CUDA

// Weak: null under a CPU build of torch, where this library must load as well.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

struct Cuda {
  static constexpr size_t kAlignment = 16;              // one cp.async, one vector store
  static constexpr int64_t kRowStrides = 1 << 23;       // inside of a tile of 128 rows, 32 bits count
  static constexpr int64_t kSequenceLengths = 1 << 29;  // as they do inside of a sequence, up to four times its length

  static std::string why_unsupported_dtype(ScalarType dtype) {
    if (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) return "";
    return std::string("q must be bfloat16 or float16 on CUDA, but is ") + torch::headeronly::toString(dtype) +
           "; cast it, or use attn_implementation='sdpa'";
  }

  static std::string why_unsupported(int device, int64_t head_dim, bool backward) {
    return aoti_torch_get_current_cuda_stream ? cuda::why_unsupported(device, head_dim, backward) : kNoCuda;
  }

  // Not what doc_start says: to look would be to wait for the stream. Kernels clamp it: a wrong value gives a wrong
  // number or NaN, never a wild access.
  static void check_problem(const Problem& problem) {
    check(problem.seqlen_k < kSequenceLengths, "seqlen must be below ", kSequenceLengths, " on CUDA, but is ",
          problem.seqlen_k);
    check(problem.heads * problem.head_dim < kRowStrides, "heads * head_dim must be below ", kRowStrides,
          " on CUDA, but is ", problem.heads * problem.head_dim);
  }

  static int64_t dq_scratch_floats(const Problem& problem, const Tensor& q, bool deterministic) {
    return cuda::dq_scratch_floats(problem, deterministic, q.get_device_index());
  }

  static int64_t sink_sums_floats(const Problem& problem, const Tensor& q) {
    return cuda::sink_sums_floats(problem, q.get_device_index());
  }

  static void forward(const ForwardParams& params, const Tensor& q) {
    on_current_stream(q, [&](void* stream) { cuda::forward(params, dtype_of(q), stream); });
  }

  static void backward(const BackwardParams& params, const Tensor& q, bool deterministic) {
    on_current_stream(q, [&](void* stream) { cuda::backward(params, dtype_of(q), deterministic, stream); });
  }

 private:
  static constexpr char kNoCuda[] = "this torch was built without CUDA";

  template <typename Launch>
  static void on_current_stream(const Tensor& q, Launch launch) {
    check(aoti_torch_get_current_cuda_stream != nullptr, kNoCuda);
    const int32_t device = q.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    launch(stream);
  }
};

#endif  // LONGLORA_CUDA

template <typename Device>
std::string why_unsupported_on(int device, ScalarType dtype, int64_t head_dim, bool backward) {
  std::string why = Device::why_unsupported_dtype(dtype);
  if (why.empty()) why = why_unsupported_head_dim(head_dim);
  return why.empty() ? Device::why_unsupported(device, head_dim, backward) : why;
}

// Why s2attn_fwd, or s2attn_bwd, would throw there, whatever the shapes; empty where it would not.
std::string why_unsupported(torch::stable::Device device, ScalarType dtype, int64_t head_dim, bool backward) {
  if (device.is_cpu()) return why_unsupported_on<Cpu>(device.index(), dtype, head_dim, backward);
  if (!device.is_cuda()) return "there are kernels for the CPU and CUDA alone; use attn_implementation='sdpa'";
#ifdef LONGLORA_CUDA
  return why_unsupported_on<Cuda>(device.index(), dtype, head_dim, backward);
#else
  return "this build of longlora_ext has no CUDA kernels; use attn_implementation='sdpa' or the CPU";
#endif
}

template <typename Device>
std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, int64_t group_size, int64_t first_shifted_head,
                                   std::optional<Tensor> doc_start, double scale, bool /*deterministic: always is*/,
                                   bool sink, std::optional<int64_t> window) {
  check_supported(Device::why_unsupported_dtype(q.scalar_type()));
  doc_start = contiguous(doc_start);
  const Problem problem = make_problem(q, k, v, group_size, first_shifted_head, doc_start, scale, sink, window);
  Device::check_problem(problem);
  q = readable<Device>(q);
  k = readable<Device>(k);
  v = readable<Device>(v);

  Tensor out = empty_contiguous_like(q);
  Tensor lse = empty_row_stats(q);
  Device::forward({problem, view_of(q), view_of(k), view_of(v), view_of(out), lse.data_ptr()}, q);
  return {out, lse};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                            int64_t group_size, int64_t first_shifted_head,
                                            std::optional<Tensor> doc_start, double scale, bool deterministic,
                                            std::optional<Tensor> dlse, bool sink, std::optional<int64_t> window) {
  check_supported(Device::why_unsupported_dtype(q.scalar_type()));
  doc_start = contiguous(doc_start);
  dlse = contiguous(dlse);
  const Problem problem = make_problem(q, k, v, group_size, first_shifted_head, doc_start, scale, sink, window);
  Device::check_problem(problem);
  check(same_shape(dout, q), "dout must have q's shape ", shape_of(q), ", but is ", shape_of(dout));
  check(same_shape(out, q), "out must have q's shape ", shape_of(q), ", but is ", shape_of(out));
  check_like("dout", dout, "q", q);
  check_like("out", out, "q", q);
  check(lse.scalar_type() == lse_dtype(q) && lse.device() == q.device(),
        "lse must be the forward's: on q's device, float32 (float64 for float64 inputs), but is ",
        torch::headeronly::toString(lse.scalar_type()));
  check(lse.dim() == 3 && lse.size(0) == q.size(0) && lse.size(1) == q.size(2) && lse.size(2) == q.size(1),
        "lse must be the forward's, of shape [batch, heads, seqlen], but is ", shape_of(lse));
  check(!dlse || (same_shape(*dlse, lse) && dlse->scalar_type() == lse.scalar_type() && dlse->device() == lse.device()),
        "dlse must be like lse: on q's device, of lse's dtype and shape ", shape_of(lse));
  dout = readable<Device>(dout);
  q = readable<Device>(q);
  k = readable<Device>(k);
  v = readable<Device>(v);
  out = readable<Device>(out);
  lse = torch::stable::contiguous(lse);

  Tensor dq = empty_contiguous_like(q);
  Tensor dk = empty_contiguous_like(k);
  Tensor dv = empty_contiguous_like(v);
  Tensor delta = empty_row_stats(q);
  Tensor sink_weight = empty_row_stats(q, sink);
  Tensor sink_ds = empty_row_stats(q, sink);
  Tensor dq_scratch = empty_floats(q, Device::dq_scratch_floats(problem, q, deterministic));
  Tensor sink_sums = empty_floats(q, Device::sink_sums_floats(problem, q));
  Device::backward(
      {problem, view_of(dout), view_of(q), view_of(k), view_of(v), view_of(out), view_of(dq), view_of(dk), view_of(dv),
       lse.data_ptr(), dlse ? dlse->data_ptr() : nullptr, delta.data_ptr(), sink_weight.data_ptr(), sink_ds.data_ptr(),
       static_cast<float*>(dq_scratch.data_ptr()), static_cast<float*>(sink_sums.data_ptr())},
      q, deterministic);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace longlora

STABLE_TORCH_LIBRARY(longlora, m) {
  m.def(
      "s2attn(Tensor q, Tensor k, Tensor v, SymInt group_size, Tensor? doc_start=None, *, "
      "SymInt? first_shifted_head=None, bool wrap=False, float? scale=None, bool deterministic=False, "
      "bool sink=False, SymInt? window=None) -> Tensor");
  m.def(
      "s2attn_with_lse(Tensor q, Tensor k, Tensor v, SymInt group_size, Tensor? doc_start=None, *, "
      "SymInt? first_shifted_head=None, bool wrap=False, float? scale=None, bool deterministic=False, "
      "bool sink=False, SymInt? window=None) -> (Tensor out, Tensor lse)");
  m.def(
      "s2attn_fwd(Tensor q, Tensor k, Tensor v, SymInt group_size, SymInt first_shifted_head, "
      "Tensor? doc_start, float scale, bool deterministic, *, bool sink=False, SymInt? window=None) -> "
      "(Tensor out, Tensor lse)");
  m.def(
      "s2attn_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, SymInt group_size, "
      "SymInt first_shifted_head, Tensor? doc_start, float scale, bool deterministic, Tensor? dlse=None, *, "
      "bool sink=False, SymInt? window=None) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def("why_unsupported(Device device, ScalarType dtype, int head_dim, *, bool backward=True) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(longlora, CompositeExplicitAutograd, m) {
  m.impl("why_unsupported", TORCH_BOX(&longlora::why_unsupported));
}

STABLE_TORCH_LIBRARY_IMPL(longlora, CPU, m) {
  m.impl("s2attn_fwd", TORCH_BOX(&longlora::forward<longlora::Cpu>));
  m.impl("s2attn_bwd", TORCH_BOX(&longlora::backward<longlora::Cpu>));
}

#ifdef LONGLORA_CUDA
STABLE_TORCH_LIBRARY_IMPL(longlora, CUDA, m) {
  m.impl("s2attn_fwd", TORCH_BOX(&longlora::forward<longlora::Cuda>));
  m.impl("s2attn_bwd", TORCH_BOX(&longlora::backward<longlora::Cuda>));
}
#endif
