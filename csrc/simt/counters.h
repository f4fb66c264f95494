// What the warps issued, and how often shared memory's banks made them wait.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace longlora::simt {

// Instructions are counted once a warp. A conflict is a pass over the banks beyond the one that each phase of an access
// needs.
struct Counters {
  int64_t blocks = 0, warps = 0, barriers = 0;
  int64_t mma = 0, ldmatrix = 0, shuffle = 0;
  int64_t cp_async = 0, shared_loads = 0, shared_stores = 0;
  int64_t ldmatrix_conflicts = 0, cp_async_conflicts = 0, load_conflicts = 0, store_conflicts = 0;

  std::map<std::string, int64_t> named() const;
};

// Passes beyond the first for lanes that access `bytes` each at these offsets. The hardware takes 32 lanes of 4 bytes,
// 16 of 8 or 8 of 16 at once. A lane with a negative offset sits out.
int bank_conflicts(const int* offsets, int lanes, int bytes);

// Shared accesses of a warp's lanes, which run one after another: the n-th access of a kind and width is taken for the
// same instruction in every lane. `settle` counts and forgets them, wherever the warp comes together.
class AccessLog {
 public:
  enum Kind { kLoad, kStore, kCpAsync };

  void record(Kind kind, int lane, int offset, int bytes);
  void settle(Counters& counters);

 private:
  using Lanes = std::array<int, 32>;
  struct Stream {
    std::vector<Lanes> accesses;
    Lanes count = {};
  };
  Stream streams_[3][3];  // kind, log2(bytes / 4)
  bool empty_ = true;
};

}  // namespace longlora::simt
