// What a kernel needs from the language: barriers, waits, shared memory, launch. Here and in atoms.h, and nowhere else,
// nvcc (a GPU) and g++ (the emulator of ../simt) part ways.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "errors.h"

#if defined(__CUDACC__)
#define DEVICE __device__ __forceinline__
#define ALWAYS_INLINE __attribute__((always_inline))  // for lambdas: what they capture goes to registers
#else
#include "../simt/simt.h"
#define DEVICE inline
#define ALWAYS_INLINE
#define __launch_bounds__(...)
#endif

namespace longlora::cuda {

#if defined(__CUDACC__)

// A barrier over the block.
DEVICE void sync_block() { __syncthreads(); }

// The cp.async of this thread since the last call are one group from here on.
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Returns when all but the last N groups of this thread have landed.
template <int N>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// threadIdx.x, read anew at each call: what follows from one call is not kept in registers for the next.
DEVICE int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(index));
  return index;
}

// The same value, which the compiler takes for another: what follows from it is not kept in registers from where it
// followed before.
DEVICE int anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Keeps what follows behind the branch that it is in: a few dozen selects ptxas would rather do in any case. It is an
// event that profilers can count, one instruction that nothing waits for.
DEVICE void keep_branch() { asm volatile("pmevent 0;\n"); }

DEVICE float shuffle_xor(float x, int lane_mask) { return __shfl_xor_sync(0xffffffffu, x, lane_mask); }

// In global memory. The old value is not asked for: this is a `red`, not an `atom`.
DEVICE void atomic_add(float* address, float value) { atomicAdd(address, value); }

// The block's dynamic shared memory.
template <typename T>
DEVICE T* shared_memory() {
  extern __shared__ __align__(128) unsigned char block_memory[];
  return reinterpret_cast<T*>(block_memory);
}

// Runs `kernel(params)` over the grid. `stream` is a cudaStream_t.
template <auto kernel, typename Params>
void launch(dim3 grid, int threads, int shared_bytes, void* stream, const Params& params) {
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  check(cudaGetLastError(), "launching a kernel");
}

#else

// The emulator is told where in the source a barrier, commit or wait stands, so that a test can leave it out.
DEVICE void sync_block(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::sync_block({file, line});
}

DEVICE void commit_copies(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::commit_copies({file, line});
}

template <int N>
DEVICE void wait_copies(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::wait_copies(N, {file, line});
}

DEVICE float exp2_fast(float x) { return __builtin_exp2f(x); }

DEVICE int thread_index() { return threadIdx.x; }

DEVICE int anew(int value) { return value; }

DEVICE void keep_branch() {}

DEVICE float shuffle_xor(float x, int lane_mask) { return simt::shuffle_xor(x, lane_mask); }

DEVICE void atomic_add(float* address, float value) {
  float old, sum;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do sum = old + value;
  while (!__atomic_compare_exchange(address, &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

template <typename T>
DEVICE T* shared_memory() {
  return static_cast<T*>(simt::shared_memory());
}

template <auto kernel, typename Params>
void launch(dim3 grid, int threads, int shared_bytes, void* /*stream*/, const Params& params) {
  const auto thread_body = [](const void* params) { kernel(*static_cast<const Params*>(params)); };
  simt::launch({grid.x, grid.y, grid.z}, threads, shared_bytes, thread_body, &params,
               reinterpret_cast<const void*>(kernel));
}

#endif

// Lets `kernel` have that much shared memory, which must come before its launch. That the GPU has it, dispatch.cu
// knows.
template <auto kernel>
void allow_shared_memory(int bytes) {
  constexpr int kAlwaysAllowed = 48 * 1024;
  if (bytes <= kAlwaysAllowed) return;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "asking for shared memory");
}

}  // namespace longlora::cuda
