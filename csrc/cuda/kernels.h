// The CUDA kernels as the rest of the library sees them: no torch and no CUDA header.
#pragma once

#include <cstdint>
#include <string>

#include "../params.h"

namespace longlora::cuda {

// Why the kernels of a head dimension, forward or backward, do not run on that GPU, in one sentence without a capital
// and a full stop; empty where they do. `device` is CUDA's number of it, -1 the current one.
std::string why_unsupported(int device, int64_t head_dim, bool backward);

// How many floats BackwardParams::dq_scratch must hold on that GPU, whose tiles they are for; 0 where backward needs
// none. It is null then, and must be: where there is scratch, backward begins by setting it to zero (Preprocess).
int64_t dq_scratch_floats(const Problem& problem, bool deterministic, int device);

// The same of BackwardParams::sink_sums.
int64_t sink_sums_floats(const Problem& problem, int device);

// Queue the kernels on `stream`, a cudaStream_t of the current device, and return. Nothing is allocated and nothing
// waited for, so both can be captured in a CUDA graph. `dtype` is kBFloat16 or kFloat16. Rows of all tensors begin at
// multiples of 16 bytes. Both throw what why_unsupported says, before anything is queued.
void forward(const ForwardParams& params, Dtype dtype, void* stream);
void backward(const BackwardParams& params, Dtype dtype, bool deterministic, void* stream);

}  // namespace longlora::cuda
