// What a failed call of the CUDA runtime means: what was tried, CUDA's own words and, where the driver or the GPU does
// not suit the library, what to do about it.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace longlora::cuda {

inline std::string release(int version) {
  return "CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

inline std::string advice(cudaError_t error) {
  switch (error) {
    // The runtime is linked in, and PTX is compiled when it is loaded: both want a driver as new as their nvcc.
    case cudaErrorInsufficientDriver:
    case cudaErrorCallRequiresNewerDriver:
    case cudaErrorUnsupportedPtxVersion: {
      int driver = 0;  // remains 0 where there is none
      cudaDriverGetVersion(&driver);
      const std::string has = driver ? "the driver is of " + release(driver) : "there is no driver";
      return " (longlora_ext was built with " + release(CUDART_VERSION) + ", " + has +
             "): update the driver, or build longlora_ext with an nvcc as old as the driver, named by CUDACXX, or use "
             "attn_implementation='sdpa'";
    }
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
      return ": this build of longlora_ext has no code for this GPU; build it with the GPU's compute capability in "
             "CUDAARCHS (80 or 90, say), or use attn_implementation='sdpa'";
    default:
      return "";
  }
}

// Empty where nothing failed.
inline std::string failure(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // or the next launch, which may well succeed, would be told of this
  return std::string(what) + ": " + cudaGetErrorString(error) + advice(error);
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error("s2attn: " + failure(error, what));
}

}  // namespace longlora::cuda
