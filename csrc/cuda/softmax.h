// The online softmax, in base 2: exp(scale * (s - max)) = exp2(s * scale_log2 - max * scale_log2), one multiply-add
// and one exp2 for each score.
#pragma once

#include <limits>

#include "../params.h"
#include "layouts.h"

namespace longlora::cuda {

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.69314718f;

// What scores are multiplied by, with the change of base. Never 0: times a masked -inf that would be NaN, and the least
// number gives the same weights.
DEVICE float scale_log2_of(const Problem& problem) {
  return fmaxf(static_cast<float>(problem.scale) * kLog2e, std::numeric_limits<float>::min());
}

// The four neighbours in a warp that share a row.
DEVICE float row_max_of_four(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
DEVICE float row_sum_of_four(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// The eight neighbours that do.
DEVICE float row_sum_of_eight(float x) {
  x = row_sum_of_four(x);
  return x + shuffle_xor(x, 4);
}

// kRows are those of one thread. `scale_log2` is positive.
template <int kRows>
struct OnlineSoftmax {
  float scale_log2;
  float maximum[kRows];
  float sum[kRows];  // over this thread's columns, until `finish`

  DEVICE explicit OnlineSoftmax(float scale_log2) : scale_log2(scale_log2) {
    CUTE_UNROLL
    for (int m = 0; m < kRows; ++m) {
      maximum[m] = -INFINITY;
      sum[m] = 0;
    }
  }

  // Turns a tile of scores into weights and takes it into the sums; `out`, what earlier tiles have brought, is
  // rescaled to the new maximum.
  template <class Scores, class Out>
  DEVICE void add(Scores&& scores, Out&& out) {
    CUTE_UNROLL
    for (int m = 0; m < kRows; ++m) {
      float highest = maximum[m];
      CUTE_UNROLL
      for (int n = 0; n < size<1>(scores); ++n) highest = fmaxf(highest, scores(m, n));
      highest = row_max_of_four(highest);
      // A row that has seen nothing yet: any finite number gives the weights 0.
      const float finite = highest == -INFINITY ? 0.0f : highest;
      const float origin = finite * scale_log2;
      // The difference first: exactly 1 while the maximum stays. As a multiply-add with the rounded origin it would be
      // off by that rounding, anew in each of a long row's tiles.
      const float shrink = exp2_fast((maximum[m] - finite) * scale_log2);
      sum[m] *= shrink;
      CUTE_UNROLL
      for (int n = 0; n < size<1>(out); ++n) out(m, n) *= shrink;
      maximum[m] = highest;
      CUTE_UNROLL
      for (int n = 0; n < size<1>(scores); ++n) {
        scores(m, n) = exp2_fast(scores(m, n) * scale_log2 - origin);
        sum[m] += scores(m, n);
      }
    }
  }

  // Takes one more score of row m into the sums, and returns its weight; `out` is rescaled as by `add`. All threads of
  // the row have the score; one of them counts it.
  template <class Out>
  DEVICE float add_one(int m, float score, bool counts, Out&& out) {
    const float highest = fmaxf(maximum[m], score);
    const float shrink = exp2_fast((maximum[m] - highest) * scale_log2);
    const float weight = exp2_fast((score - highest) * scale_log2);
    sum[m] = sum[m] * shrink + (counts ? weight : 0.0f);
    CUTE_UNROLL
    for (int n = 0; n < size<1>(out); ++n) out(m, n) *= shrink;
    maximum[m] = highest;
    return weight;
  }

  // Divides by the sums and returns the log-sum-exp of row m in lse[m], natural logarithm.
  template <class Out, class Lse>
  DEVICE void finish(Out&& out, Lse&& lse) {
    CUTE_UNROLL
    for (int m = 0; m < kRows; ++m) {
      const float total = row_sum_of_four(sum[m]);
      const float inverse = 1.0f / total;
      CUTE_UNROLL
      for (int n = 0; n < size<1>(out); ++n) out(m, n) *= inverse;
      lse[m] = maximum[m] * scale_log2 * kLn2 + logf(total);
    }
  }
};

}  // namespace longlora::cuda
