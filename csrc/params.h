// What a kernel is told: plain data and raw pointers, no torch.
#pragma once

#include <cstdint>

namespace longlora {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

// One [batch, seqlen, heads, head_dim] tensor; strides in elements, the last one is 1.
struct TensorView {
  void* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
};

struct Problem {
  int64_t batch;
  int64_t seqlen;    // of the queries: the last of the keys' positions
  int64_t seqlen_k;  // of the keys, at least seqlen
  int64_t heads;
  int64_t kv_heads;  // divides heads
  int64_t head_dim;
  int64_t group_size;          // even, bounded by bound_group_size
  int64_t first_shifted_head;  // query heads from here on are shifted
  int64_t window;              // the most keys that a row sees, itself the last of them; seqlen_k where all may be
  bool sink;                   // each row sees the first token of its document besides
  double scale;
  const int32_t* doc_start;  // [batch, seqlen] contiguous, in rows of k, or null: one document per row

  // The key that is query row 0's own. Inlined always: the code of one instruction set must not be another's.
  __attribute__((always_inline)) int64_t query_offset() const { return seqlen_k - seqlen; }
};

struct ForwardParams {
  Problem problem;
  TensorView q, k, v, out;
  void* lse;  // [batch, heads, seqlen] contiguous, float (double for kFloat64), natural logarithm
};

struct BackwardParams {
  Problem problem;
  TensorView dout, q, k, v, out, dq, dk, dv;
  const void* lse;
  const void* dlse;   // the gradient of lse, like lse; null: none
  void* delta;        // scratch like lse: rowsum(dout * out) - dlse
  void* sink_weight;  // scratch like lse, where there is a sink: its weight, and the gradient of its score
  void* sink_ds;
  float* dq_scratch;  // CUDA: as many as cuda::dq_scratch_floats says
  float* sink_sums;   // CUDA: as many as cuda::sink_sums_floats says
};

}  // namespace longlora
