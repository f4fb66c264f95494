// The one formula of S2-Attn: query row i attends to the keys first_key(i)..i.
//
// Shared by all kernels, CPU and CUDA, so it includes nothing.
#pragma once

#if defined(__CUDACC__)
#define LONGLORA_HOST_DEVICE __host__ __device__ __forceinline__
#else
// always_inline: this header is compiled for several instruction sets, and the linker must never
// pick one set's copy for another.
#define LONGLORA_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace longlora {

// Start of the group that row `i` is in. Positions count from the start of the row's document.
//   unshifted head: groups [0, G), [G, 2G), ...
//   shifted head:   groups [0, G/2), [G/2, 3G/2), ...: the first is half-size, nothing wraps around.
// Never decreases with i, because doc_start does not. `group_size` is even; the caller bounds it
// (clamp_group_size), so that nothing here overflows.
template <typename Int>
LONGLORA_HOST_DEVICE Int first_key(Int i, Int doc_start, Int group_size, bool shifted) {
  const Int offset = shifted ? group_size / 2 : 0;
  const Int group = (i - doc_start + offset) / group_size * group_size - offset;
  return doc_start + (group > 0 ? group : 0);
}

// The first row past the group that row `i` is in; the document may end before.
template <typename Int>
LONGLORA_HOST_DEVICE Int group_end(Int i, Int doc_start, Int group_size, bool shifted) {
  const Int offset = shifted ? group_size / 2 : 0;
  return doc_start + ((i - doc_start + offset) / group_size + 1) * group_size - offset;
}

// A group of 2 * seqlen or more tokens is the whole row, shifted or not: clamping changes no result.
template <typename Int>
LONGLORA_HOST_DEVICE Int clamp_group_size(Int group_size, Int seqlen) {
  return group_size < 2 * seqlen ? group_size : 2 * seqlen;
}

}  // namespace longlora
