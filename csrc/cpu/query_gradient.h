// dQ while it is summed: each block of keys adds its part to the rows that see it, many blocks at a time.
#pragma once

#include <sched.h>

#include <cstring>

#include "../params.h"
#include "scratch.h"

namespace longlora::cpu::LONGLORA_ISA {

// fp32 (fp64) sums of a few heads and, for each block of their rows, whose turn it is: blocks of keys add in ascending
// order, so no two write at once and the result is the same from run to run for any number of threads. Blocks of keys
// are begun in ascending order too, so the one that is waited for is always at work.
//
// Blocks of rows count like those of keys, by position. One is whole after the keys of its own diagonal, and sees no
// key further back than its group and window (the sink comes with the first of these): as many blocks as they span, and
// some, take turns in the memory.
template <typename Acc>
class QueryGradients {
 public:
  // `threads` blocks more than needed: that many are begun before one is whole.
  QueryGradients(const Problem& p, int64_t heads, int64_t block_rows, int64_t pitch, int threads, Arena& arena)
      : heads_(heads),
        begin_(p.query_offset() / block_rows),
        blocks_((p.seqlen_k + block_rows - 1) / block_rows),
        live_(lesser(blocks_ - begin_, (lesser(p.group_size, p.window) + block_rows - 1) / block_rows + 2 + threads)),
        block_size_(block_rows * pitch),
        sums_(arena.take<Acc>(heads_ * live_ * block_size_)),
        turns_(arena.take<Turn>(heads_ * blocks_)) {}

  // Before other heads use it: nothing has been added.
  void begin() const { std::memset(turns_, 0, sizeof(Turn) * heads_ * blocks_); }

  // The sums of a block of rows, for the key block whose turn has come; `first` is the first one that adds anything.
  Acc* wait_for_turn(int64_t head, int64_t block, int64_t key_block, int64_t first) const {
    Acc* const sums = sums_ + (head * live_ + block % live_) * block_size_;
    if (key_block > first) {
      wait(head, block, key_block);
    } else {
      if (block - live_ >= begin_)
        wait(head, block - live_, block - live_ + 1);  // until the one whose memory it was is whole
      std::memset(sums, 0, sizeof(Acc) * block_size_);
    }
    return sums;
  }
  void pass_turn(int64_t head, int64_t block, int64_t key_block) const {
    __atomic_store_n(&turns_[head * blocks_ + block].key_block, key_block + 1, __ATOMIC_RELEASE);
  }

 private:
  struct alignas(Arena::kAlignment) Turn {  // a cache line each: others poll their own while this one is passed on
    int64_t key_block;                      // the one that is next
  };

  void wait(int64_t head, int64_t block, int64_t turn) const {
    const Turn& current = turns_[head * blocks_ + block];
    while (__atomic_load_n(&current.key_block, __ATOMIC_ACQUIRE) != turn) sched_yield();
  }

  const int64_t heads_, begin_, blocks_, live_, block_size_;  // rows begin in the block begin_
  Acc* const sums_;                                           // [heads, live blocks, block_rows, pitch]
  Turn* const turns_;                                         // [heads, blocks]
};

}  // namespace longlora::cpu::LONGLORA_ISA
