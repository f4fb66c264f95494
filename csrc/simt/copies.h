// One thread's cp.async in flight, in the order of their groups.
#pragma once

#include <cstring>
#include <deque>
#include <vector>

namespace longlora::simt {

struct AsyncCopy {
  int offset;  // in shared memory
  int bytes;
  unsigned char value[16];
};

class CopyQueue {
 public:
  void add(int offset, const void* value, int bytes) {
    AsyncCopy copy{offset, bytes, {}};
    std::memcpy(copy.value, value, bytes);
    open_.push_back(copy);
  }

  // An empty group is a group too.
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }

  // Hands all copies to `land` but those of the last `in_flight` groups and those in no group yet.
  template <typename Land>
  void wait(int in_flight, Land land) {
    while (static_cast<int>(groups_.size()) > in_flight) {
      for (const AsyncCopy& copy : groups_.front()) land(copy);
      groups_.pop_front();
    }
  }

  void clear() {
    open_.clear();
    groups_.clear();
  }

 private:
  std::vector<AsyncCopy> open_;
  std::deque<std::vector<AsyncCopy>> groups_;
};

}  // namespace longlora::simt
