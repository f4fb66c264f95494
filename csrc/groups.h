// The one formula of S2-Attn: query row i attends to the keys first_key(i)..i and, where the op is asked for the sink,
// to the first token of its document, if that is not among them (sees_sink).
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

// Rows and documents count in rows of k. The keys may be a window of a longer sequence: a document that began before it
// has a negative doc_start. `group_size` is even; the caller bounds it (bound_group_size) and how negative doc_start
// is, so that nothing here overflows.

// Start of the group that row `i` is in. Positions count from the start of the row's document.
//   unshifted head: groups [0, G), [G, 2G), ...
//   shifted head:   groups [0, G/2), [G/2, 3G/2), ...: the first is half-size, nothing wraps around.
// Never decreases with i, because doc_start does not.
template <typename Int>
LONGLORA_HOST_DEVICE Int group_start(Int i, Int doc_start, Int group_size, bool shifted) {
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

// The first of the keys that end with row `i` itself: the start of its group, but at most `window` keys, and none
// before the first there is. Never decreases with i.
template <typename Int>
LONGLORA_HOST_DEVICE Int first_key(Int i, Int doc_start, Int group_size, bool shifted, Int window) {
  const Int group = group_start(i, doc_start, group_size, shifted);
  const Int first = group > i - window + 1 ? group : i - window + 1;
  return first > 0 ? first : 0;
}

// Rows from here on do not see key `j`; the document of `j` may end before. Never decreases with j.
template <typename Int>
LONGLORA_HOST_DEVICE Int last_row_end(Int j, Int doc_start, Int group_size, bool shifted, Int window) {
  const Int group = group_end(j, doc_start, group_size, shifted);
  return group < j + window ? group : j + window;
}

// Whether a row whose keys begin with first_key sees its document's first token besides. One that began before the
// window of keys has none there.
template <typename Int>
LONGLORA_HOST_DEVICE bool sees_sink(Int first_key, Int doc_start) {
  return doc_start >= 0 && doc_start < first_key;
}

// A group of 2 * seqlen or more tokens is the whole row, shifted or not: clamping changes no result where documents lie
// within the keys.
template <typename Int>
LONGLORA_HOST_DEVICE Int clamp_group_size(Int group_size, Int seqlen) {
  return group_size < 2 * seqlen ? group_size : 2 * seqlen;
}

// The same where documents may have begun before the keys: it changes no result for those shorter than 2^29 tokens.
template <typename Int>
LONGLORA_HOST_DEVICE Int bound_group_size(Int group_size, Int seqlen) {
  const Int largest = static_cast<Int>(1) << 30;
  return clamp_group_size(group_size, seqlen > largest / 2 ? seqlen : largest / 2);
}

}  // namespace longlora
