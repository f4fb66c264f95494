// Blocks of 16 x 16 elements of 32 bits, transposed in registers.
#pragma once

#include "simd.h"

namespace longlora::cpu::LONGLORA_ISA {

// Swaps the off-diagonal quarters of every 2 kStep x 2 kStep square.
template <int kStep, typename V>
inline void swap_quarters(V (&x)[16]) {
  V upper, lower;  // where the upper and the lower row take their lanes from; the lower one's are 16 to 31
  for (uint32_t lane = 0; lane < 16; ++lane) {
    upper[lane] = lane & kStep ? 16 + lane - kStep : lane;
    lower[lane] = lane & kStep ? 16 + lane : lane + kStep;
  }
  for (int i = 0; i < 16; ++i) {
    if (i & kStep) continue;
    const V above = x[i], below = x[i + kStep];
    x[i] = __builtin_shuffle(above, below, upper);
    x[i + kStep] = __builtin_shuffle(above, below, lower);
  }
}

// Lane i of x[j] becomes lane j of x[i]: 64 shuffles, where 256 elements would be stored one by one. V has 16 lanes.
template <typename V>
inline void transpose(V (&x)[16]) {
  swap_quarters<1>(x);
  swap_quarters<2>(x);
  swap_quarters<4>(x);
  swap_quarters<8>(x);
}

}  // namespace longlora::cpu::LONGLORA_ISA
