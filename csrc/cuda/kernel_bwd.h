// Backward: the launch of its kernels.
#pragma once

#include "bwd_dq.h"
#include "bwd_pre_post.h"
#include "kernel.h"
#include "mainloop_bwd.h"
#include "sink_gradients.h"

namespace longlora::cuda {

template <typename Element, int kHeadDim, bool kSink, class... Last>
void launch_backward_with(const BackwardParams& params, bool deterministic, void* stream) {
  using First = Preprocess<Element, kHeadDim, kSink>;
  if (deterministic)
    launch_works<First, Backward<Element, kHeadDim, false>, BackwardDq<Element, kHeadDim>, Last...>(params, stream);
  else
    launch_works<First, Backward<Element, kHeadDim, true>, Postprocess<Element, kHeadDim>, Last...>(params, stream);
}

template <typename Element, int kHeadDim>
void launch_backward(const BackwardParams& params, bool deterministic, void* stream) {
  if (params.problem.sink)
    launch_backward_with<Element, kHeadDim, true, SinkGradients<Element, kHeadDim>>(params, deterministic, stream);
  else
    launch_backward_with<Element, kHeadDim, false>(params, deterministic, stream);
}

}  // namespace longlora::cuda
