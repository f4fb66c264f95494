# cpu_kernels: csrc/cpu/kernels.cpp once per instruction set, and the choice among them at run time.
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 11)
  message(FATAL_ERROR "g++ ${CMAKE_CXX_COMPILER_VERSION} found, 11 or newer needed (-march=x86-64-v4)")
endif()
find_package(OpenMP REQUIRED COMPONENTS CXX)

add_library(cpu_kernels STATIC csrc/cpu/dispatch.cpp)

function(add_cpu_kernels isa vector_bytes)
  add_library(cpu_kernels_${isa} OBJECT csrc/cpu/kernels.cpp)
  # g++ 12 takes what AVX-512 intrinsics leave undefined for a mistake (its bug 105593).
  # -ffp-contract: fused multiply-adds where the instruction set has them.
  # -fno-trapping-math: widening float16 may compute what it then does not choose, so g++ makes vectors of it.
  target_compile_options(cpu_kernels_${isa} PRIVATE -O3 -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -ffp-contract=fast
                                                    -fno-math-errno -fno-trapping-math ${ARGN})
  target_compile_definitions(cpu_kernels_${isa} PRIVATE LONGLORA_ISA=${isa} LONGLORA_VECTOR_BYTES=${vector_bytes})
  target_link_libraries(cpu_kernels_${isa} PRIVATE OpenMP::OpenMP_CXX)
  target_sources(cpu_kernels PRIVATE $<TARGET_OBJECTS:cpu_kernels_${isa}>)
endfunction()

add_cpu_kernels(baseline 16)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  add_cpu_kernels(avx2 32 -march=x86-64-v3)
  add_cpu_kernels(avx512 64 -march=x86-64-v4)
  add_cpu_kernels(avx512bf16 64 -march=x86-64-v4 -mavx512bf16)
  add_cpu_kernels(amx 64 -march=x86-64-v4 -mavx512bf16 -mamx-tile -mamx-bf16)
  target_compile_definitions(cpu_kernels PRIVATE LONGLORA_X86)
endif()
target_link_libraries(cpu_kernels PUBLIC OpenMP::OpenMP_CXX)
