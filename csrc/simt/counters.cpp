#include "counters.h"

#include <algorithm>

namespace longlora::simt {
namespace {

constexpr int kBanks = 32;  // of 4 bytes

// Passes beyond the first for accesses that the hardware takes at once. Lanes at the same word share a pass.
int phase_conflicts(const int* offsets, int lanes, int bytes) {
  int words[kBanks][kBanks];
  int count[kBanks] = {};
  int passes = 1;
  for (int lane = 0; lane < lanes; ++lane) {
    if (offsets[lane] < 0) continue;
    for (int word = offsets[lane] / 4; word < (offsets[lane] + bytes) / 4; ++word) {
      int* const seen = words[word % kBanks];
      int& n = count[word % kBanks];
      if (std::find(seen, seen + n, word) == seen + n) seen[n++] = word;
      passes = std::max(passes, n);
    }
  }
  return passes - 1;
}

}  // namespace

int bank_conflicts(const int* offsets, int lanes, int bytes) {
  const int at_once = kBanks * 4 / bytes;
  int conflicts = 0;
  for (int lane = 0; lane < lanes; lane += at_once) conflicts += phase_conflicts(offsets + lane, at_once, bytes);
  return conflicts;
}

void AccessLog::record(Kind kind, int lane, int offset, int bytes) {
  Stream& stream = streams_[kind][bytes / 8];
  const size_t n = stream.count[lane]++;
  if (n == stream.accesses.size()) {
    stream.accesses.emplace_back();
    stream.accesses.back().fill(-1);
  }
  stream.accesses[n][lane] = offset;
  empty_ = false;
}

void AccessLog::settle(Counters& counters) {
  if (empty_) return;
  int64_t* const issued[] = {&counters.shared_loads, &counters.shared_stores, &counters.cp_async};
  int64_t* const conflicts[] = {&counters.load_conflicts, &counters.store_conflicts, &counters.cp_async_conflicts};
  for (int kind = 0; kind < 3; ++kind) {
    for (int width = 0; width < 3; ++width) {
      Stream& stream = streams_[kind][width];
      *issued[kind] += stream.accesses.size();
      for (const Lanes& lanes : stream.accesses) *conflicts[kind] += bank_conflicts(lanes.data(), 32, 4 << width);
      stream.accesses.clear();
      stream.count = {};
    }
  }
  empty_ = true;
}

std::map<std::string, int64_t> Counters::named() const {
  return {{"blocks", blocks},
          {"warps", warps},
          {"barriers", barriers},
          {"mma", mma},
          {"ldmatrix", ldmatrix},
          {"shuffle", shuffle},
          {"cp_async", cp_async},
          {"shared_loads", shared_loads},
          {"shared_stores", shared_stores},
          {"ldmatrix_conflicts", ldmatrix_conflicts},
          {"cp_async_conflicts", cp_async_conflicts},
          {"load_conflicts", load_conflicts},
          {"store_conflicts", store_conflicts}};
}

}  // namespace longlora::simt
