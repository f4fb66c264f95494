// Backward: the launch of its kernels.
#pragma once

#include "bwd_dq.h"
#include "bwd_pre_post.h"
#include "kernel.h"
#include "mainloop_bwd.h"

namespace longlora::cuda {

template <typename Element, int kHeadDim>
void launch_backward(const BackwardParams& params, bool deterministic, void* stream) {
  if (deterministic)
    launch_works<Preprocess<Element, kHeadDim>, Backward<Element, kHeadDim, false>, BackwardDq<Element, kHeadDim>>(
        params, stream);
  else
    launch_works<Preprocess<Element, kHeadDim>, Backward<Element, kHeadDim, true>, Postprocess<Element, kHeadDim>>(
        params, stream);
  if (params.problem.sink) launch_works<SinkGradients<Element, kHeadDim>>(params, stream);
}

}  // namespace longlora::cuda
