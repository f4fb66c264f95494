#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <utility>

// Bound when a sanitizer's library is loaded, null otherwise: one object of this file serves every build.
extern "C" {
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
[[gnu::weak]] void __asan_unpoison_memory_region(const volatile void* address, size_t size);
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_destroy_fiber(void* fiber);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void* token);
[[gnu::weak]] void __tsan_release(void* token);
[[gnu::weak]] void AnnotateIgnoreReadsBegin(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreReadsEnd(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreWritesBegin(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreWritesEnd(const char* file, int line);
}

#if defined(__x86_64__)
// Callee-saved registers go onto the stack that is left and come from the stack that is entered.
extern "C" void longlora_simt_switch(void** leave, void* enter);
asm(R"(
.text
.type longlora_simt_switch, @function
longlora_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size longlora_simt_switch, .-longlora_simt_switch
)");
#endif

namespace longlora::simt {
namespace {

constexpr size_t kGuardBytes = 64 * 1024;  // a page at least, whatever its size
constexpr int kMostTsanFibers = 8000;      // it has room for 8192 threads
// Frames at the same place in every stack would share the few lines that a cache has for addresses a MiB apart, and a
// warp's lanes drive one another out of it: a launch took a tenth longer.
constexpr int kPlaces = 32, kBytesApart = 2112;
constexpr unsigned kNoSync = 1;  // TSan: a switch orders nothing

Context scheduler;
void* scheduler_tsan_fiber;
const void* scheduler_stack;
size_t scheduler_stack_bytes;
Fiber* running;
int tsan_fibers;
int stacks;

void switch_context(Context& from, Context& to) {
#if defined(__x86_64__)
  longlora_simt_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
}

}  // namespace

void Fiber::start(void (*body)(void*), void* argument) {
  // TSan remembers who touched which byte of a stack, unless the memory is mapped anew.
  if (!stack_ || __tsan_create_fiber) {
    const int fixed = stack_ ? MAP_FIXED : 0;
    void* memory = mmap(stack_, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | fixed, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    if (!stack_) unused_ = stacks++ % kPlaces * kBytesApart;
    stack_ = static_cast<char*>(memory);
    mprotect(stack_, kGuardBytes, PROT_NONE);
  }
  char* const bottom = stack_ + kGuardBytes;
  const size_t bytes = kStackBytes - kGuardBytes;
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(bottom, bytes);
  if (__tsan_create_fiber) {
    if (tsan_fibers == kMostTsanFibers) throw std::runtime_error("ThreadSanitizer cannot follow so many threads");
    ++tsan_fibers;
    tsan_fibers_.push_back(__tsan_create_fiber(0));
  }
  context_.fake_stack = nullptr;
  body_ = body;
  argument_ = argument;
  thrown_ = nullptr;
#if defined(__x86_64__)
  // As if `enter` had been called from a frame with return address 0: rsp % 16 is 8 when it begins.
  auto* top = reinterpret_cast<uintptr_t*>(stack_ + kStackBytes - unused_);
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(&Fiber::enter);
  for (int i = 0; i < 6; ++i) *--top = 0;
  context_.stack_pointer = top;
#else
  getcontext(&context_.registers);
  context_.registers.uc_stack.ss_sp = bottom;
  context_.registers.uc_stack.ss_size = bytes - unused_;
  context_.registers.uc_link = nullptr;
  makecontext(&context_.registers, &Fiber::enter, 0);
#endif
}

Fiber::~Fiber() {
  for (void* fiber : tsan_fibers_) __tsan_destroy_fiber(fiber);
  tsan_fibers -= static_cast<int>(tsan_fibers_.size());
  if (stack_) munmap(stack_, kStackBytes);
}

void Fiber::resume() {
  running = this;
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&scheduler.fake_stack, stack_ + kGuardBytes, kStackBytes - kGuardBytes);
  if (__tsan_switch_to_fiber) {
    scheduler_tsan_fiber = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_fibers_.back(), kNoSync);
  }
  switch_context(scheduler, context_);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
  running = nullptr;
  if (thrown_) std::rethrow_exception(std::exchange(thrown_, nullptr));
}

void Fiber::suspend() {
  Fiber* const fiber = running;
  fiber->switch_to_scheduler(false);
  fiber->arrive_from_scheduler();
}

void Fiber::enter() {
  Fiber* const fiber = running;
  fiber->arrive_from_scheduler();
  // Nothing unwinds past here, and the handler is left before the switch: what is being caught belongs to the OS
  // thread.
  try {
    fiber->body_(fiber->argument_);
  } catch (...) {
    fiber->thrown_ = std::current_exception();
  }
  fiber->switch_to_scheduler(true);
}

void Fiber::switch_to_scheduler(bool for_good) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &context_.fake_stack, scheduler_stack, scheduler_stack_bytes);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(scheduler_tsan_fiber, kNoSync);
  switch_context(context_, scheduler);
}

void Fiber::arrive_from_scheduler() {
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(context_.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void release(void* token) {
  if (__tsan_release) __tsan_release(token);
}

void acquire(void* token) {
  if (__tsan_acquire) __tsan_acquire(token);
}

Unseen::Unseen() {
  if (!AnnotateIgnoreReadsBegin) return;
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}

Unseen::~Unseen() {
  if (!AnnotateIgnoreReadsBegin) return;
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}

}  // namespace longlora::simt
