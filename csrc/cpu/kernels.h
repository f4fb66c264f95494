// The CPU kernels as the op sees them.
#pragma once

#include "../params.h"

namespace longlora::cpu {

// One entry per Dtype, in its order.
struct Kernels {
  void (*forward[4])(const ForwardParams&);
  void (*backward[4])(const BackwardParams&);
};

// The kernels for the widest instruction set that this processor has, chosen once. The environment variable
// LONGLORA_CPU_ISA (amx, avx512bf16, avx512, avx2 or baseline) chooses another; one that this processor or build lacks
// throws.
const Kernels& best_kernels();

}  // namespace longlora::cpu
