// What a warp does as one: mma, ldmatrix, shuffle, with the lanes' parts as in the PTX ISA.
#include <cstring>
#include <iterator>

#include "block.h"
#include "error.h"

namespace longlora::simt {
namespace {

float float_from(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

float from_bfloat16(uint32_t bits) { return float_from(bits << 16); }

float from_half(uint32_t bits) {
  // The exponent moved into place is 112 too small, which also makes subnormals right; infinities and NaN are not.
  const uint32_t magnitude = (bits & 0x7fff) << 13;
  const float scaled = float_from(magnitude) * 0x1p112f;
  const float value = (bits & 0x7c00) == 0x7c00 ? float_from(magnitude | 0x7f800000) : scaled;
  return bits & 0x8000 ? -value : value;
}

struct MmaCall {
  const MmaOperands* in;
  float* const* d;
};

// A is 16x16, B is 16x8. A register holds two elements that are neighbours along k: `a` and `b` hold those of even k
// first, those of odd k behind, for the compiler to convert and multiply several at once.
template <float (*convert)(uint32_t)>
void execute_mma(void* const operands[kLanes]) {
  uint32_t packed_a[16][8], packed_b[8][8];
  float a[2][16][8], b[2][8][8], c[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const MmaOperands& in = *static_cast<MmaCall*>(operands[lane])->in;
    const int group = lane / 4, pair = lane % 4;
    for (int r = 0; r < 4; ++r) packed_a[group + r % 2 * 8][pair + r / 2 * 4] = in.a[r];
    for (int r = 0; r < 2; ++r) packed_b[pair + r * 4][group] = in.b[r];
    for (int i = 0; i < 4; ++i) c[group + i / 2 * 8][2 * pair + i % 2] = in.c[i];
  }
  const auto unpack = [](const auto& packed, auto& even, auto& odd) {
    for (size_t row = 0; row < std::size(packed); ++row) {
      for (int i = 0; i < 8; ++i) even[row][i] = convert(packed[row][i] & 0xffff);
      for (int i = 0; i < 8; ++i) odd[row][i] = convert(packed[row][i] >> 16);
    }
  };
  unpack(packed_a, a[0], a[1]);
  unpack(packed_b, b[0], b[1]);
  for (int m = 0; m < 16; ++m) {
    float sums[8];
    std::memcpy(sums, c[m], sizeof(sums));
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) sums[n] += a[k % 2][m][k / 2] * b[k % 2][k / 2][n];
    std::memcpy(c[m], sums, sizeof(sums));
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    float* const* d = static_cast<MmaCall*>(operands[lane])->d;
    for (int i = 0; i < 4; ++i) *d[i] = c[group + i / 2 * 8][pair + i % 2];
  }
  statistics.mma += 1;
}

struct LdmatrixCall {
  const void* row;
  uint32_t* const* out;
};

// Lane 8 j + i names row i of matrix j. Lane l gets row l / 4 of each, columns 2 (l % 4) and the next; transposed, the
// same of its transpose.
template <bool transposed>
void execute_ldmatrix(void* const operands[kLanes]) {
  uint16_t matrix[4][8][8];
  int offsets[kLanes];
  Thread* const lanes = block->warp().lanes;
  for (int lane = 0; lane < kLanes; ++lane) {
    block->run_as(lanes[lane]);
    offsets[lane] = block->shared().read(static_cast<LdmatrixCall*>(operands[lane])->row, 16, block->accessor());
    std::memcpy(matrix[lane / 8][lane % 8], block->shared().data() + offsets[lane], 16);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t* const* out = static_cast<LdmatrixCall*>(operands[lane])->out;
    const int row = lane / 4, column = lane % 4 * 2;
    for (int j = 0; j < 4; ++j) {
      const uint32_t low = transposed ? matrix[j][column][row] : matrix[j][row][column];
      const uint32_t high = transposed ? matrix[j][column + 1][row] : matrix[j][row][column + 1];
      *out[j] = low | high << 16;
    }
  }
  statistics.ldmatrix += 1;
  statistics.ldmatrix_conflicts += bank_conflicts(offsets, kLanes, 16);
}

struct ShuffleCall {
  float value;
  int lane_mask;
};

void execute_shuffle(void* const operands[kLanes]) {
  float values[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) values[lane] = static_cast<ShuffleCall*>(operands[lane])->value;
  for (int lane = 0; lane < kLanes; ++lane) {
    ShuffleCall& call = *static_cast<ShuffleCall*>(operands[lane]);
    call.value = values[(lane ^ call.lane_mask) % kLanes];
  }
  statistics.shuffle += 1;
}

constexpr Collective kMmaBfloat16 = {"mma of bfloat16", execute_mma<from_bfloat16>};
constexpr Collective kMmaHalf = {"mma of float16", execute_mma<from_half>};
constexpr Collective kLdmatrix = {"ldmatrix", execute_ldmatrix<false>};
constexpr Collective kLdmatrixTransposed = {"ldmatrix.trans", execute_ldmatrix<true>};
constexpr Collective kShuffle = {"shuffle", execute_shuffle};

}  // namespace

void mma_16816(const MmaOperands& operands, float* const d[4], bool bfloat16) {
  MmaCall call = {&operands, d};
  block->join(bfloat16 ? kMmaBfloat16 : kMmaHalf, &call);
}

void ldmatrix(const void* row, uint32_t* const out[4], bool transposed) {
  LdmatrixCall call = {row, out};
  block->join(transposed ? kLdmatrixTransposed : kLdmatrix, &call);
}

float shuffle_xor(float value, int lane_mask) {
  ShuffleCall call = {value, lane_mask};
  block->join(kShuffle, &call);
  return call.value;
}

}  // namespace longlora::simt
