// Scratch memory of the tiles.
#pragma once

#include <cstdint>
#include <new>

#include "simd.h"

namespace longlora::cpu::LONGLORA_ISA {

// Hands out aligned pieces of one thread's scratch. Without memory it only counts, which tells how much is needed.
class Arena {
 public:
  static constexpr int64_t kAlignment = 64;  // a vector's, and a cache line's: no two threads share one

  explicit Arena(char* memory = nullptr) : memory_(memory) {}

  template <typename E>
  E* take(int64_t count) {
    char* const piece = memory_ ? memory_ + used_ : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(E)), kAlignment);
    return reinterpret_cast<E*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* const memory_;
  int64_t used_ = 0;
};

// Memory that is taken before threads start: an allocation that fails inside a parallel region could not be reported.
class Memory {
 public:
  explicit Memory(int64_t bytes)
      : data_(static_cast<char*>(::operator new(bytes, std::align_val_t(Arena::kAlignment)))) {}
  ~Memory() { ::operator delete(data_, std::align_val_t(Arena::kAlignment)); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* data() const { return data_; }

 private:
  char* const data_;
};

}  // namespace longlora::cpu::LONGLORA_ISA
