// The emulator as kernels see it: what one CUDA thread can ask of its warp, its block and its shared memory.
// README.md says what is modelled and what is not.
#pragma once

#include <cstdint>

namespace longlora::simt {

struct Index {
  unsigned x, y, z;
};

// Where a barrier, commit or wait stands in the source.
struct Site {
  const char* file;
  int line;
};

// One lane's registers for mma.m16n8k16.
struct MmaOperands {
  uint32_t a[4];
  uint32_t b[2];
  float c[4];
};

void sync_block(Site site);

// All 32 lanes of a warp must come to the same one of these.
float shuffle_xor(float value, int lane_mask);
void mma_16816(const MmaOperands& operands, float* const d[4], bool bfloat16);
void ldmatrix(const void* row, uint32_t* const out[4], bool transposed);

// cp.async of 4 or 16 bytes. They are in flight, and NaN, until this thread waits for their group.
void copy_async(void* target, const void* value, int bytes);
void commit_copies(Site site);
void wait_copies(int groups_in_flight, Site site);

void* shared_memory();
bool is_shared(const void* address);  // also just outside the block's own bytes, which is an error when it is touched
void load_shared(void* value, const void* source, int bytes);
void store_shared(void* target, const void* value, int bytes);

// Lets a kernel have more than the 48 KiB of shared memory that each has; false where a block has not so much.
bool allow_shared_memory(const void* kernel, int bytes);

// Runs `body(params)` as every thread of the grid. Throws Error (error.h) when a thread does what it must not. `kernel`
// tells kernels apart.
void launch(Index grid, int threads, int shared_bytes, void (*body)(const void* params), const void* params,
            const void* kernel);

}  // namespace longlora::simt

extern longlora::simt::Index threadIdx, blockIdx;
