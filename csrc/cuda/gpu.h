// What the kernels ask of a GPU, and the one place that asks it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <utility>

#include "errors.h"
#include "tile_config.h"

namespace longlora::cuda {

struct Gpu {
  int device;
  int major, minor;  // compute capability
  int shared_bytes;  // that a block may have
  int l2_bytes;

  // Which tiles it takes (tile_config.h).
  int kib() const { return shared_bytes >= kLargeKib * 1024 ? kLargeKib : kSmallKib; }
};

// Fills in `gpu` for CUDA's number of a device, -1 the current one, and returns why that failed, or nothing. The
// attributes are read from memory, so nothing is gained by keeping them, and no stream is touched.
inline std::string find_gpu(int device, Gpu& gpu) {
  if (device < 0) {
    const std::string why = failure(cudaGetDevice(&device), "asking for the current GPU");
    if (!why.empty()) return why;
  }
  gpu.device = device;
  for (const auto& [value, attribute] : {std::pair(&gpu.major, cudaDevAttrComputeCapabilityMajor),
                                         std::pair(&gpu.minor, cudaDevAttrComputeCapabilityMinor),
                                         std::pair(&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin),
                                         std::pair(&gpu.l2_bytes, cudaDevAttrL2CacheSize)}) {
    const std::string why = failure(cudaDeviceGetAttribute(value, attribute, device), "asking what the GPU can do");
    if (!why.empty()) return why;
  }
  return "";
}

}  // namespace longlora::cuda
