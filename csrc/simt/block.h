// A block in execution: its threads as fibers, its warps in lockstep where they must be, its barrier, its memory.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "copies.h"
#include "counters.h"
#include "fiber.h"
#include "shadow.h"
#include "simt.h"
#include "sites.h"

namespace longlora::simt {

constexpr int kLanes = 32;

// What a warp does as one. `execute` gets the operands of all lanes.
struct Collective {
  const char* name;
  void (*execute)(void* const operands[kLanes]);
};

struct Thread {
  enum State { kReady, kAtCollective, kAtBarrier, kReturned };

  int index = 0;
  State state = kReady;
  SiteKind last_kind = {};
  Site last_site = {};  // the last barrier, commit or wait that it passed, or where it waits in kAtBarrier
  const Collective* collective = nullptr;
  void* operand = nullptr;
  CopyQueue copies;
  Fiber fiber;

  int lane() const { return index % kLanes; }
};

struct Warp {
  Thread* lanes = nullptr;
  AccessLog accesses;

  bool ready() const { return lanes[0].state == Thread::kReady; }  // all of its lanes, or none
};

class Block {
 public:
  using Body = void (*)(const void* params);

  Block(int threads, uint64_t seed, Body body, const void* params);

  // All blocks of a grid are run between `begin` and `end`.
  void begin() { release(&began_); }
  void run(Index index, int shared_bytes);
  void end() { acquire(&ended_); }

  Thread& running() { return *running_; }
  Warp& warp() { return warps_[running_->index / kLanes]; }
  Accessor accessor() const { return {running_->index, epoch_}; }
  SharedMemory& shared() { return shared_; }
  Index index() const { return index_; }

  // The running thread stops here until its warp has executed the collective, or its block the barrier.
  void join(const Collective& collective, void* operand);
  void wait_at_barrier();

  // For checks on behalf of one lane of a collective.
  void run_as(Thread& thread) { running_ = &thread; }

 private:
  static void thread_main(void* thread);
  Warp* pick();
  void step(Warp& warp);
  void come_together(Warp& warp);
  void pass_barrier();

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  SharedMemory shared_;
  Body body_;
  const void* params_;
  std::mt19937_64 random_;
  double persistence_;  // the probability that the warp that ran last runs on

  Index index_ = {};
  uint32_t epoch_ = 0;
  Thread* running_ = nullptr;
  // What TSan is shown: the launch comes before all threads, they before its end, and a block's barrier has a new
  // address.
  char began_, ended_;
  std::unique_ptr<char> barrier_;
  Warp* last_ = nullptr;
};

extern Block* block;         // the one in execution
extern Counters statistics;  // of all launches since `configure`

}  // namespace longlora::simt
