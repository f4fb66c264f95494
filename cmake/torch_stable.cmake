# torch_stable: torch's headers and libtorch.so. Not find_package(Torch), which looks for CUDA where it is not needed
# and overrides the architectures where it is.
if(NOT EXISTS ${TORCH_DIR}/include/torch/csrc/stable/library.h)
  message(FATAL_ERROR "TORCH_DIR must be the folder of a torch package with its stable ABI, but is '${TORCH_DIR}'")
endif()

# Major and minor in the two highest bytes: no symbol is used that a newer torch brought.
string(REPLACE "." ";" floor ${TORCH_FLOOR})
list(GET floor 0 floor_major)
list(GET floor 1 floor_minor)
math(EXPR target_version "(${floor_major} << 56) | (${floor_minor} << 48)" OUTPUT_FORMAT HEXADECIMAL)

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${TORCH_DIR}/include)
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=${target_version})
target_link_directories(torch_stable INTERFACE ${TORCH_DIR}/lib)
# Only libtorch.so brings the CUDA half of a CUDA torch into lookup scope, and no symbol of its own keeps it linked.
target_link_options(torch_stable INTERFACE -Wl,--no-as-needed)
target_link_libraries(torch_stable INTERFACE torch)
