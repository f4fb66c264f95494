// Matrix products in AMX tiles: 16 rows of C, 16 columns, 32 bfloat16 along the sum in one instruction.
#pragma once

#include "simd.h"

namespace longlora::cpu::LONGLORA_ISA {

#ifdef __AMX_BF16__

constexpr int kTile = 16;  // rows of a tile and its columns, of 32 bits each: floats or pairs of bfloat16

// The tile registers of this thread, all eight of full size, for as long as this lives.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
    } shapes;
    static_assert(sizeof(shapes) == 64, "the layout that the instruction reads");
    _tile_loadconfig(&shapes);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// C[16 or 32, 16 or 32] = or += A[., k] * B[k, .], k a multiple of kTile. Four tiles of C and two of A and B: a load
// for each product, half of what the products take.
template <bool kTwoRows, bool kTwoColumns>
inline void tile_block(bool add, int k, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
                       int64_t ldc) {
  const int64_t a_bytes = lda * 4, b_bytes = ldb * 4, c_bytes = ldc * 4;
  float* const c_below = c + kTile * ldc;
  // The intrinsics want the number of a register as it is written.
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if (kTwoColumns) _tile_loadd(1, c + kTile, c_bytes);
    if (kTwoRows) _tile_loadd(2, c_below, c_bytes);
    if (kTwoRows && kTwoColumns) _tile_loadd(3, c_below + kTile, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int kk = 0; kk < k; kk += kTile) {
    const uint32_t* const b_row = b + kk * ldb;
    _tile_loadd(4, a + kk, a_bytes);
    _tile_loadd(6, b_row, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoColumns) {
      _tile_loadd(7, b_row + kTile, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kTwoRows) {
      _tile_loadd(5, a + kTile * lda + kk, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (kTwoColumns) _tile_stored(1, c + kTile, c_bytes);
  if (kTwoRows) _tile_stored(2, c_below, c_bytes);
  if (kTwoRows && kTwoColumns) _tile_stored(3, c_below + kTile, c_bytes);
}

template <bool kTwoRows>
inline void tile_columns(bool add, int n, int k, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                         float* c, int64_t ldc) {
  int col = 0;
  for (; col + 2 * kTile <= n; col += 2 * kTile) tile_block<kTwoRows, true>(add, k, a, lda, b + col, ldb, c + col, ldc);
  if (col < n) tile_block<kTwoRows, false>(add, k, a, lda, b + col, ldb, c + col, ldc);
}

// C[m, n] = or += A[m, k] * B[k, n], k in pairs of bfloat16; m, n and k are multiples of kTile. The instruction sums
// each 32 products by themselves and adds that to C, so long sums round like sums of partial sums.
inline void gemm_tiles(bool add, int m, int n, int k, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                       float* c, int64_t ldc) {
  int r = 0;
  for (; r + 2 * kTile <= m; r += 2 * kTile) tile_columns<true>(add, n, k, a + r * lda, lda, b, ldb, c + r * ldc, ldc);
  if (r < m) tile_columns<false>(add, n, k, a + r * lda, lda, b, ldb, c + r * ldc, ldc);
}

#else

struct TileRegisters {
  ~TileRegisters() {}  // so that it may be declared and not used
};

#endif

}  // namespace longlora::cpu::LONGLORA_ISA
