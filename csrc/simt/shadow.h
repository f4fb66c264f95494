// A block's shared memory and its shadow: who touched each 4 bytes since which barrier, and what is still in flight.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace longlora::simt {

// Who accesses: a thread, between the block's barriers number `epoch` - 1 and `epoch`.
struct Accessor {
  int thread;
  uint32_t epoch;
};

class SharedMemory {
 public:
  SharedMemory();
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void reset(int bytes);  // a new block: all NaN, touched by nobody
  unsigned char* data() const { return begin_; }

  // Whether the address is here or so near that it was meant to be.
  bool contains(const void* address) const { return size_t(static_cast<const char*>(address) - arena_) < kArenaBytes; }

  // These check the access, fail if it is out of bounds, misaligned or a race, and return the offset of the bytes.
  int read(const void* source, int bytes, Accessor who);
  int write(const void* target, int bytes, Accessor who);

  // cp.async: the bytes are NaN from the start of the copy until it lands, and nobody may touch them.
  int start_copy(const void* target, int bytes, Accessor who);
  void land_copy(int offset, const void* value, int bytes, Accessor who);

 private:
  static constexpr size_t kArenaBytes = 1024 * 1024;  // mostly out of bounds, and not even mapped to memory

  struct Word {
    int16_t writer = kNobody, reader = kNobody, copier = kNobody;
    uint32_t write_epoch = 0, read_epoch = 0;
  };
  static constexpr int16_t kNobody = -1, kSeveral = -2;

  int offset_of(const void* address, int bytes) const;
  [[noreturn]] void fail_at(ptrdiff_t offset, int bytes) const;
  void check_write(int word, Accessor who) const;

  char* arena_;
  unsigned char* begin_;
  int bytes_ = 0;
  std::vector<Word> words_;
};

}  // namespace longlora::simt
