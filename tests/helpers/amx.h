// What csrc/cpu takes of AMX, in software: with it and -D__AMX_BF16__ g++ makes kernels that differ from the real ones
// in these functions alone. Sums are in the order that Intel's manual gives; subnormal numbers, which the instruction
// takes for 0, are kept. A register that was not configured, and one left configured, end the process.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "avx512_bf16.h"

struct TileFile {
  bool configured = false;
  uint32_t tiles[8][16][16];

  ~TileFile() {
    if (configured) fail("a thread ended with its tile registers configured");
  }
  static void fail(const char* what) {
    std::fprintf(stderr, "amx.h: %s\n", what);
    std::abort();
  }
  uint32_t (&at(int number))[16][16] {
    if (!configured) fail("a tile register is used before they are configured");
    return tiles[number];
  }
};
inline thread_local TileFile tile_file;

inline void _tile_loadconfig(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  bool whole = bytes[0] == 1 && bytes[1] == 0;
  for (int tile = 0; tile < 8; ++tile)
    whole &= bytes[16 + 2 * tile] == 64 && bytes[17 + 2 * tile] == 0 && bytes[48 + tile] == 16;
  if (!whole) TileFile::fail("tiles of 16 rows of 64 bytes are all that this knows");
  tile_file.configured = true;
}
inline void _tile_release() { tile_file.configured = false; }

inline void _tile_zero(int number) { std::memset(tile_file.at(number), 0, 1024); }
inline void _tile_loadd(int number, const void* memory, int64_t row_bytes) {
  auto& tile = tile_file.at(number);
  for (int r = 0; r < 16; ++r) std::memcpy(tile[r], static_cast<const char*>(memory) + r * row_bytes, 64);
}
inline void _tile_stored(int number, void* memory, int64_t row_bytes) {
  auto& tile = tile_file.at(number);
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(memory) + r * row_bytes, tile[r], 64);
}
inline void _tile_dpbf16ps(int c, int a, int b) {
  auto &sums = tile_file.at(c), &rows = tile_file.at(a), &columns = tile_file.at(b);
  for (int m = 0; m < 16; ++m) {
    float first[16] = {}, second[16] = {};
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 16; ++n) {
        first[n] += widened(rows[m][k] & 0xffffu) * widened(columns[k][n] & 0xffffu);
        second[n] += widened(rows[m][k] >> 16) * widened(columns[k][n] >> 16);
      }
    }
    for (int n = 0; n < 16; ++n) {
      float sum;
      std::memcpy(&sum, &sums[m][n], 4);
      sum += first[n] + second[n];
      std::memcpy(&sums[m][n], &sum, 4);
    }
  }
}
