// What an operator demands of its arguments: each wrong one is named, with what it was and what it may be.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "groups.h"
#include "params.h"

namespace longlora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  message << "s2attn: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Why an operator cannot take something, or nothing: what longlora::why_unsupported answers is what the operators
// throw.
inline void check_supported(const std::string& why) { check(why.empty(), why); }

inline std::string why_unsupported_head_dim(int64_t head_dim) {
  if (head_dim >= 8 && head_dim <= 256 && head_dim % 8 == 0) return "";
  return "head_dim must be a multiple of 8 from 8 to 256, but is " + std::to_string(head_dim);
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

inline Dtype dtype_of(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      return Dtype::kFloat32;
  }
}

inline ScalarType lse_dtype(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

inline void check_like(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  check(tensor.scalar_type() == other.scalar_type(), name, " must have ", other_name, "'s dtype ",
        torch::headeronly::toString(other.scalar_type()), ", but is ",
        torch::headeronly::toString(tensor.scalar_type()));
  check(tensor.device() == other.device(), name, " must be on ", other_name, "'s device");
}

inline void check_heads_tensor(const char* name, const Tensor& tensor) {
  check(tensor.dim() == 4, name, " must have 4 dimensions [batch, seqlen, heads, head_dim], but is ", shape_of(tensor));
  check(tensor.stride(3) == 1, name, "'s last dimension must be contiguous (stride 1), but has stride ",
        tensor.stride(3));
}

inline void check_doc_start(const Tensor& doc_start, const Tensor& q) {
  check(doc_start.scalar_type() == ScalarType::Int, "doc_start must be int32, but is ",
        torch::headeronly::toString(doc_start.scalar_type()));
  check(doc_start.device() == q.device(), "doc_start must be on q's device");
  check(doc_start.dim() == 2 && doc_start.size(0) == q.size(0) && doc_start.size(1) == q.size(1),
        "doc_start must have shape [batch, seqlen] = [", q.size(0), ", ", q.size(1), "], but is ", shape_of(doc_start));
}

// A document begins at its first token, and each of its tokens names it: never decreasing, and none names a token after
// itself. The first row's may have begun before it, among the keys or before them.
inline void check_doc_start_values(const Problem& problem) {
  if (!problem.doc_start) return;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int32_t* row = problem.doc_start + b * problem.seqlen;
    const int64_t offset = problem.query_offset();
    check(row[0] <= offset, "doc_start[", b, ", 0] is ", row[0], ", but must be at most ", offset,
          ", the key of the first query");
    check(!problem.sink || row[0] >= 0,
          "sink=True needs the first token of every document among the keys, but "
          "doc_start[",
          b, ", 0] is ", row[0], ": pass sink=False and merge that key by its lse");
    for (int64_t n = 1; n < problem.seqlen; ++n)
      check(row[n] == n + offset || row[n] == row[n - 1], "doc_start[", b, ", ", n, "] is ", row[n], ", but must be ",
            n + offset, " (a document begins here) or ", row[n - 1], ", the value before it (its document goes on)");
  }
}

// Checks what forward and backward share and describes it. `doc_start` must be contiguous by now.
inline Problem make_problem(const Tensor& q, const Tensor& k, const Tensor& v, int64_t group_size,
                            int64_t first_shifted_head, const std::optional<Tensor>& doc_start, double scale, bool sink,
                            std::optional<int64_t> window) {
  check_heads_tensor("q", q);
  check_heads_tensor("k", k);
  check_heads_tensor("v", v);
  check_like("k", k, "q", q);
  check_like("v", v, "q", q);
  check(same_shape(k, v), "k and v must have the same shape, but are ", shape_of(k), " and ", shape_of(v));
  check(k.size(0) == q.size(0) && k.size(3) == q.size(3), "k and v must have q's batch and head_dim, but q is ",
        shape_of(q), " and k ", shape_of(k));
  check(k.size(1) >= q.size(1),
        "k and v must have at least q's seqlen, the queries being the last of their tokens, "
        "but q is ",
        shape_of(q), " and k ", shape_of(k));
  check(q.size(1) >= 1, "seqlen must be at least 1, but q is ", shape_of(q));
  check(q.size(2) >= 1 && k.size(2) >= 1 && q.size(2) % k.size(2) == 0,
        "the heads of q must be a positive multiple of those of k and v, but are ", q.size(2), " and ", k.size(2));
  check_supported(why_unsupported_head_dim(q.size(3)));
  check(group_size > 0 && group_size % 2 == 0, "group_size must be a positive even number, but is ", group_size);
  check(first_shifted_head >= 0 && first_shifted_head <= q.size(2),
        "first_shifted_head must be from 0 to the number of query heads ", q.size(2), ", but is ", first_shifted_head);
  check(!window || *window >= 1, "window must be at least 1 token, but is ", window.value_or(1));
  // s2attn brings a negative one here as positive, with q negated.
  check(std::isfinite(scale) && scale >= 0, "scale must be finite and not negative, but is ", scale);
  check(scale <= 1e30, "scale must be at most 1e30, but is ", scale);  // kernels count in float
  if (doc_start) check_doc_start(*doc_start, q);

  Problem problem;
  problem.batch = q.size(0);
  problem.seqlen = q.size(1);
  problem.seqlen_k = k.size(1);
  problem.heads = q.size(2);
  problem.kv_heads = k.size(2);
  problem.head_dim = q.size(3);
  problem.group_size = bound_group_size(group_size, problem.seqlen_k);
  problem.first_shifted_head = first_shifted_head;
  problem.window = window && *window < problem.seqlen_k ? *window : problem.seqlen_k;
  problem.sink = sink;
  problem.scale = scale;
  problem.doc_start = doc_start ? static_cast<const int32_t*>(doc_start->data_ptr()) : nullptr;
  return problem;
}

}  // namespace longlora
