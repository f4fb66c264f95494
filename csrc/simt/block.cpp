#include "block.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "error.h"

namespace longlora::simt {

Block* block = nullptr;
Counters statistics;

namespace {

std::string describe(const Thread& thread) {
  const std::string who = "thread " + std::to_string(thread.index);
  switch (thread.state) {
    case Thread::kAtCollective:
      return who + " is at " + thread.collective->name;
    case Thread::kAtBarrier:
      return who + " waits at " + name_of(thread.last_site);
    default:
      return who + " has returned";
  }
}

}  // namespace

void fail(const std::string& what) {
  const Index at = block->index();
  const Thread& thread = block->running();
  const std::string where = thread.last_site.file ? ", after " + name_of(thread.last_kind, thread.last_site) : "";
  throw Error("thread " + std::to_string(thread.index) + " of block (" + std::to_string(at.x) + ", " +
              std::to_string(at.y) + ", " + std::to_string(at.z) + ")" + where + ": " + what);
}

Block::Block(int threads, uint64_t seed, Body body, const void* params)
    : threads_(threads), warps_(threads / kLanes), body_(body), params_(params), random_(seed) {
  // From one extreme, a warp that runs ahead as far as it can, to the other, warps that take turns at random.
  constexpr double kPersistence[] = {1, 0.9, 0.5, 0};
  persistence_ = kPersistence[seed % 4];
  for (int i = 0; i < threads; ++i) threads_[i].index = i;
  for (size_t i = 0; i < warps_.size(); ++i) warps_[i].lanes = &threads_[i * kLanes];
}

void Block::run(Index index, int shared_bytes) {
  index_ = blockIdx = index;
  epoch_ = 1;
  last_ = nullptr;
  barrier_ = std::make_unique<char>();
  shared_.reset(shared_bytes);
  for (Thread& thread : threads_) {
    thread.state = Thread::kReady;
    thread.last_site = {};
    thread.copies.clear();
    thread.fiber.start(&Block::thread_main, &thread);
  }
  for (;;) {
    while (Warp* warp = pick()) step(*warp);
    const auto returned = [](const Thread& thread) { return thread.state == Thread::kReturned; };
    if (std::all_of(threads_.begin(), threads_.end(), returned)) break;
    pass_barrier();
  }
  statistics.blocks += 1;
  statistics.warps += static_cast<int64_t>(warps_.size());
}

void Block::thread_main(void* argument) {
  Thread& thread = *static_cast<Thread*>(argument);
  acquire(&block->began_);
  block->body_(block->params_);
  release(&block->ended_);
  thread.state = Thread::kReturned;
}

Warp* Block::pick() {
  if (last_ && last_->ready() && std::uniform_real_distribution<>()(random_) < persistence_) return last_;
  const auto ready = [](const Warp& warp) { return warp.ready(); };
  const auto count = static_cast<uint64_t>(std::count_if(warps_.begin(), warps_.end(), ready));
  if (count == 0) return last_ = nullptr;
  auto chosen = std::find_if(warps_.begin(), warps_.end(), ready);
  for (uint64_t skip = random_() % count; skip > 0; --skip) chosen = std::find_if(chosen + 1, warps_.end(), ready);
  return last_ = &*chosen;
}

// Runs each lane, in some order, to the next point where it waits for others.
void Block::step(Warp& warp) {
  const unsigned random = static_cast<unsigned>(random_());
  const unsigned first = random >> 8, stride = random | 1;  // odd: every lane has its turn
  for (unsigned i = 0; i < kLanes; ++i) {
    Thread& thread = warp.lanes[(first + i * stride) % kLanes];
    running_ = &thread;
    threadIdx = {static_cast<unsigned>(thread.index), 0, 0};
    thread.fiber.resume();
  }
  come_together(warp);
}

void Block::come_together(Warp& warp) {
  warp.accesses.settle(statistics);
  const Thread& first = warp.lanes[0];
  const bool collective = first.state == Thread::kAtCollective;
  void* operands[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    Thread& thread = warp.lanes[lane];
    const bool together = collective ? thread.state == Thread::kAtCollective && thread.collective == first.collective
                                     : thread.state != Thread::kAtCollective;
    run_as(thread);
    if (!together) fail("the lanes of a warp part ways: " + describe(first) + ", but " + describe(thread));
    operands[lane] = thread.operand;
  }
  if (!collective) return;
  first.collective->execute(operands);
  for (int lane = 0; lane < kLanes; ++lane) warp.lanes[lane].state = Thread::kReady;
}

// All threads have stopped, and not all have returned.
void Block::pass_barrier() {
  const auto waits = [](const Thread& thread) { return thread.state == Thread::kAtBarrier; };
  const Thread& one = *std::find_if(threads_.begin(), threads_.end(), waits);
  for (Thread& thread : threads_) {
    const bool together = waits(thread) && thread.last_site.line == one.last_site.line &&
                          std::strcmp(thread.last_site.file, one.last_site.file) == 0;
    run_as(thread);
    if (!together) fail("divergent barrier: " + describe(one) + ", but " + describe(thread));
  }
  ++epoch_;
  statistics.barriers += 1;
  for (Thread& thread : threads_) thread.state = Thread::kReady;
}

void Block::join(const Collective& collective, void* operand) {
  Thread& thread = *running_;
  thread.collective = &collective;
  thread.operand = operand;
  thread.state = Thread::kAtCollective;
  Fiber::suspend();
}

void Block::wait_at_barrier() {
  Thread& thread = *running_;
  thread.state = Thread::kAtBarrier;
  release(barrier_.get());
  Fiber::suspend();
  acquire(barrier_.get());
}

}  // namespace longlora::simt
