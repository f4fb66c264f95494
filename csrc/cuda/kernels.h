// The CUDA kernels as the rest of the library sees them: no torch and no CUDA header.
#pragma once

#include <cstdint>

#include "../params.h"

namespace longlora::cuda {

// How many floats BackwardParams::dq_scratch must hold; 0 where backward needs none. It is null then, and must be:
// where there is scratch, backward begins by setting it to zero (prepare_rows).
int64_t dq_scratch_floats(const Problem& problem, bool deterministic);

// Queue the kernels on `stream`, a cudaStream_t of the current device, and return. Nothing is allocated and nothing
// waited for, so both can be captured in a CUDA graph. `dtype` is kBFloat16 or kFloat16. Rows of all tensors begin at
// multiples of 16 bytes.
void forward(const ForwardParams& params, Dtype dtype, void* stream);
void backward(const BackwardParams& params, Dtype dtype, bool deterministic, void* stream);

}  // namespace longlora::cuda
