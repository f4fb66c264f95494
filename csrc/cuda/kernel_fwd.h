// Forward: the launch.
#pragma once

#include "kernel.h"
#include "mainloop_fwd.h"

namespace longlora::cuda {

template <typename Element, int kHeadDim, int kKib>
void launch_forward(const ForwardParams& params, int64_t l2_bytes, void* stream) {
  launch_works<Forward<Element, kHeadDim, kKib>>(params, l2_bytes, stream);
}

}  // namespace longlora::cuda
