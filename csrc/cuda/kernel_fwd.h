// Forward: the launch.
#pragma once

#include "kernel.h"
#include "mainloop_fwd.h"

namespace longlora::cuda {

template <typename Element, int kHeadDim>
void launch_forward(const ForwardParams& params, void* stream) {
  launch_works<Forward<Element, kHeadDim>>(params, stream);
}

}  // namespace longlora::cuda
