# cuda_kernels: the CUDA kernels, where NVCC names a compiler. It and CUTLASS_INCLUDE are what cmake/backend.py found.
if(NOT NVCC)
  message(STATUS "nvcc not found: building the CPU kernels only")
  return()
endif()
if(NOT EXISTS ${CUTLASS_INCLUDE}/cute/tensor.hpp)
  message(FATAL_ERROR "CUTLASS_INCLUDE must be the folder of CUTLASS' headers, but is '${CUTLASS_INCLUDE}'")
endif()
message(STATUS "${NVCC}: building the CUDA kernels as well")

# 80: sm_80 code, and compute_80 PTX that newer GPUs compile when it is loaded, if their driver is no older than nvcc.
# Code from the same PTX spares them that, and takes ptxas some seconds a unit: sm_90 for an H100, and for GPUs of 99 KiB
# sm_120, which the driver would compile at -O3, with spills. sm_86 and sm_89 run the sm_80 code as it is. CUDAARCHS is
# CMake's own.
set(CMAKE_CUDA_ARCHITECTURES 80)
if(DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES $ENV{CUDAARCHS})
endif()
set(CMAKE_CUDA_COMPILER ${NVCC})
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
if(NOT NVCC STREQUAL CONFIGURED_NVCC) # of an earlier build in this folder, which CMake would go on using
  file(REMOVE ${CMAKE_BINARY_DIR}/CMakeFiles/${CMAKE_VERSION}/CMakeCUDACompiler.cmake)
  set(CONFIGURED_NVCC ${NVCC} CACHE INTERNAL "")
endif()
enable_language(CUDA)

add_library(cuda_kernels STATIC csrc/cuda/dispatch.cu)
set(header_of_forward kernel_fwd.h)
set(header_of_backward kernel_bwd.h)

# One unit. More arguments are the GPUs that get code besides: 90, 120.
function(add_unit DIRECTION HEAD_DIM KIB)
  set(HEADER ${header_of_${DIRECTION}})
  set(unit ${CMAKE_BINARY_DIR}/cuda/${DIRECTION}_${HEAD_DIM}_${KIB}.cu)
  configure_file(csrc/cuda/instantiate.cu.in ${unit} @ONLY)
  target_sources(cuda_kernels PRIVATE ${unit})
  if(DIRECTION STREQUAL forward) # at -O3 ptxas moves loads so far ahead that sm_80 code spills 16 to 132 bytes
    set(options -Xptxas=-O2)
  endif()
  foreach(gpu ${ARGN})
    if(DEFINED ENV{CUDAARCHS} OR (gpu EQUAL 120 AND CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8))
      continue() # what was asked for, and no more; an older nvcc does not know sm_120
    endif()
    list(APPEND options --generate-code=arch=compute_80,code=sm_${gpu})
  endforeach()
  set_source_files_properties(${unit} PROPERTIES COMPILE_OPTIONS "${options}")
endfunction()

foreach(DIRECTION backward forward) # the longest to compile first
  foreach(HEAD_DIM 256 128 64)
    if(DIRECTION STREQUAL forward AND HEAD_DIM EQUAL 64) # forward_kib of tile_config.h: one for both
      add_unit(${DIRECTION} ${HEAD_DIM} 163 90 120)
    else()
      add_unit(${DIRECTION} ${HEAD_DIM} 163 90)
      add_unit(${DIRECTION} ${HEAD_DIM} 99 120)
    endif()
  endforeach()
endforeach()

target_include_directories(cuda_kernels PRIVATE csrc/cuda)
target_include_directories(cuda_kernels SYSTEM PRIVATE ${CUTLASS_INCLUDE})
target_compile_definitions(cuda_kernels INTERFACE LONGLORA_CUDA)
target_compile_options(cuda_kernels PRIVATE --expt-relaxed-constexpr -Xptxas=-v)
# The library's own CUDA runtime must neither be seen by torch's nor see it.
target_link_options(cuda_kernels INTERFACE -Wl,--exclude-libs,ALL)

# What ptxas says of registers and spills is kept beside each object, for benchmarks/resources.py. No more units at once
# than there are cores: one takes its core, and gigabytes.
include(ProcessorCount)
ProcessorCount(cores)
set_property(GLOBAL APPEND PROPERTY JOB_POOLS nvcc=${cores})
set_target_properties(cuda_kernels PROPERTIES CUDA_COMPILER_LAUNCHER "sh;${CMAKE_SOURCE_DIR}/cmake/keep_log.sh"
                                              JOB_POOL_COMPILE nvcc)
