// Stackful fibers: each CUDA thread is one, on a stack of its own, and the scheduler resumes them one at a time.
#pragma once

#include <cstddef>
#include <exception>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace longlora::simt {

// Where a fiber, or the scheduler, stands while another runs.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
};

class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Prepares to run `body(argument)`. What ran on this fiber before is forgotten, finished or not.
  void start(void (*body)(void*), void* argument);

  // Scheduler: runs the fiber until it suspends or ends, and throws what it threw.
  void resume();

  // The running fiber: back to the scheduler.
  static void suspend();

 private:
  static constexpr size_t kStackBytes = 1024 * 1024;  // AddressSanitizer makes frames large

  static void enter();
  void switch_to_scheduler(bool for_good);
  void arrive_from_scheduler();

  char* stack_ = nullptr;
  size_t unused_ = 0;  // bytes at the stack's top
  Context context_;
  std::vector<void*>
      tsan_fibers_;  // one for each start; TSan mixes up who did what when it gives their numbers out again
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  std::exception_ptr thrown_;
};

// For TSan: what happened before `release` happens before what follows `acquire`. Switches order nothing.
void release(void* token);
void acquire(void* token);

// For TSan, which sees calls of memcpy or delete even here: while one lives, what is done is no thread's access. Not to
// be held by a fiber that suspends.
struct Unseen {
  Unseen();
  ~Unseen();
};

}  // namespace longlora::simt
