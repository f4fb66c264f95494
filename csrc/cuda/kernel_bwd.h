// Backward: the launch of its kernels.
#pragma once

#include "bwd_dq.h"
#include "bwd_pre_post.h"
#include "kernel.h"
#include "mainloop_bwd.h"
#include "sink_gradients.h"

namespace longlora::cuda {

template <typename Element, int kHeadDim, int kKib, bool kSink, class... Last>
void launch_backward_with(const BackwardParams& params, bool deterministic, int64_t l2_bytes, void* stream) {
  using First = Preprocess<Element, kHeadDim, kKib, kSink>;
  if (deterministic)
    launch_works<First, Backward<Element, kHeadDim, kKib, false>, BackwardDq<Element, kHeadDim, kKib>, Last...>(
        params, l2_bytes, stream);
  else
    launch_works<First, Backward<Element, kHeadDim, kKib, true>, Postprocess<Element, kHeadDim, kKib>, Last...>(
        params, l2_bytes, stream);
}

template <typename Element, int kHeadDim, int kKib>
void launch_backward(const BackwardParams& params, bool deterministic, int64_t l2_bytes, void* stream) {
  if (params.problem.sink)
    launch_backward_with<Element, kHeadDim, kKib, true, SinkGradients<Element, kHeadDim, kKib>>(params, deterministic,
                                                                                                l2_bytes, stream);
  else
    launch_backward_with<Element, kHeadDim, kKib, false>(params, deterministic, l2_bytes, stream);
}

}  // namespace longlora::cuda
