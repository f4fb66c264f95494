// The instructions that the kernels are made of, as CuTe atoms. They inherit CuTe's operations and traits, so every
// layout is CuTe's own; under g++ the emulator executes them instead. Kernels touch shared memory through these only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/tensor.hpp>

#include "device.h"

namespace longlora::cuda {

template <typename Element>
constexpr bool is_bfloat16 = cute::is_same_v<Element, cute::bfloat16_t>;

template <typename Element>
using CuteMma16816 =
    cute::conditional_t<is_bfloat16<Element>, cute::SM80_16x8x16_F32BF16BF16F32_TN, cute::SM80_16x8x16_F32F16F16F32_TN>;

#if defined(__CUDACC__)

// cp.async of 16 bytes from global to shared memory, past the L1 cache; zeros where the predicate is false.
struct CpAsync16 : cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t> {};

// The same of one float.
struct CpAsync4 : cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<float> {};

// Four 8x8 matrices of 16-bit elements from shared memory into a warp's registers, as they are or transposed.
struct Ldmatrix4 : cute::SM75_U32x4_LDSM_N {};
struct Ldmatrix4T : cute::SM75_U16x8_LDSM_T {};

// A load or store of one T of 4, 8 or 16 bytes between registers, shared and global memory.
template <typename T>
struct Move : cute::UniversalCopy<T> {};

// D = A B + C of 16x8x16, fp32 accumulators.
template <typename Element>
struct Mma16816 : CuteMma16816<Element> {};

#else

struct CpAsync16 : cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t> {
  // The global side is read here and not in the emulator, for the sanitizers to see it.
  static void copy(const cute::uint128_t& source, cute::uint128_t& target, bool pred) {
    const cute::uint128_t value = pred ? source : cute::uint128_t();
    simt::copy_async(&target, &value, sizeof(value));
  }
};

struct CpAsync4 {
  static void copy(const float& source, float& target, bool pred) {
    const float value = pred ? source : 0.0f;
    simt::copy_async(&target, &value, sizeof(value));
  }
};

struct Ldmatrix4 : cute::SM75_U32x4_LDSM_N {
  static void copy(const cute::uint128_t& row, uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3) {
    uint32_t* const out[4] = {&r0, &r1, &r2, &r3};
    simt::ldmatrix(&row, out, false);
  }
};

struct Ldmatrix4T : cute::SM75_U16x8_LDSM_T {
  static void copy(const cute::uint128_t& row, uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3) {
    uint32_t* const out[4] = {&r0, &r1, &r2, &r3};
    simt::ldmatrix(&row, out, true);
  }
};

template <typename T>
struct Move : cute::UniversalCopy<T> {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  static void copy(const T& source, T& target) {
    T value;
    if (simt::is_shared(&source))
      simt::load_shared(&value, &source, sizeof(T));
    else
      value = source;
    if (simt::is_shared(&target))
      simt::store_shared(&target, &value, sizeof(T));
    else
      target = value;
  }
};

template <typename Element>
struct Mma16816 : CuteMma16816<Element> {
  static void fma(float& d0, float& d1, float& d2, float& d3, const uint32_t& a0, const uint32_t& a1,
                  const uint32_t& a2, const uint32_t& a3, const uint32_t& b0, const uint32_t& b1, const float& c0,
                  const float& c1, const float& c2, const float& c3) {
    float* const d[4] = {&d0, &d1, &d2, &d3};
    simt::mma_16816({{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}}, d, is_bfloat16<Element>);
  }
};

#endif

// Two floats rounded to nearest into one register, `low` in its low half, and back.
template <typename Element>
DEVICE uint32_t pack2(float low, float high) {
  if constexpr (is_bfloat16<Element>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <typename Element>
DEVICE float2 unpack2(uint32_t pair) {
  if constexpr (is_bfloat16<Element>)
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
  else
    return __half22float2(reinterpret_cast<const __half2&>(pair));
}

}  // namespace longlora::cuda

namespace cute {

template <>
struct Copy_Traits<longlora::cuda::Ldmatrix4> : Copy_Traits<SM75_U32x4_LDSM_N> {};

template <>
struct Copy_Traits<longlora::cuda::Ldmatrix4T> : Copy_Traits<SM75_U16x8_LDSM_T> {};

template <typename T>
struct Copy_Traits<longlora::cuda::Move<T>> : Copy_Traits<UniversalCopy<T>> {};

template <typename Element>
struct MMA_Traits<longlora::cuda::Mma16816<Element>> : MMA_Traits<longlora::cuda::CuteMma16816<Element>> {};

// CuTe's traits of a predicated cp.async name its own operation, so these are written out.
template <>
struct Copy_Traits<longlora::cuda::CpAsync16> {
  using ThrID = Layout<_1>;
  using SrcLayout = Layout<Shape<_1, _128>>;  // (thread, value) -> bit
  using DstLayout = SrcLayout;
  using RefLayout = SrcLayout;

  bool pred = true;  // false: zeros

  CUTE_HOST_DEVICE constexpr Copy_Traits with(bool value) const { return {value}; }

  template <class Source, class SourceLayout, class Target, class TargetLayout>
  CUTE_HOST_DEVICE friend constexpr void copy_unpack(const Copy_Traits& traits,
                                                     const Tensor<Source, SourceLayout>& source,
                                                     Tensor<Target, TargetLayout>& target) {
    static_assert(is_gmem<Source>::value && is_smem<Target>::value, "cp.async copies from global to shared memory");
    auto from = recast<const uint128_t>(source);
    auto to = recast<uint128_t>(target);
    CUTE_STATIC_ASSERT_V(size(from) == _1{} && size(to) == _1{}, "one cp.async copies 16 contiguous bytes");
    longlora::cuda::CpAsync16::copy(from[0], to[0], traits.pred);
  }
};

}  // namespace cute
