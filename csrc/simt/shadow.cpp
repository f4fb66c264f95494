#include "shadow.h"

#include <sys/mman.h>

#include <cstring>
#include <new>
#include <string>

#include "error.h"

namespace longlora::simt {
namespace {

constexpr int kNaNByte = 0xff;  // bytes of ones are a NaN in every floating-point format

std::string describe(int word) {
  return "shared bytes " + std::to_string(4 * word) + " to " + std::to_string(4 * word + 3);
}

}  // namespace

SharedMemory::SharedMemory() {
  void* memory = mmap(nullptr, kArenaBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  arena_ = static_cast<char*>(memory);
  begin_ = static_cast<unsigned char*>(memory) + kArenaBytes / 2;
  mprotect(begin_, kArenaBytes / 4, PROT_READ | PROT_WRITE);
}

SharedMemory::~SharedMemory() { munmap(arena_, kArenaBytes); }

void SharedMemory::reset(int bytes) {
  bytes_ = bytes;
  std::memset(begin_, kNaNByte, bytes);
  words_.assign((bytes + 3) / 4, Word());
}

int SharedMemory::offset_of(const void* address, int bytes) const {
  const ptrdiff_t offset = static_cast<const unsigned char*>(address) - begin_;
  if (offset < 0 || offset + bytes > bytes_ || offset % bytes) fail_at(offset, bytes);
  return static_cast<int>(offset);
}

// Apart from the check, which each access makes: the words of an error that is none took a fifteenth of the time.
void SharedMemory::fail_at(ptrdiff_t offset, int bytes) const {
  const std::string access = std::to_string(bytes) + " bytes at " + std::to_string(offset);
  if (offset < 0 || offset + bytes > bytes_)
    fail("out of bounds: " + access + " of " + std::to_string(bytes_) + " bytes of shared memory");
  fail("misaligned access to shared memory: " + access);
}

int SharedMemory::read(const void* source, int bytes, Accessor who) {
  const int offset = offset_of(source, bytes);
  for (int i = offset / 4; i < (offset + bytes) / 4; ++i) {
    Word& word = words_[i];
    if (word.copier != kNobody)
      fail("reads " + describe(i) + ", which a cp.async of thread " + std::to_string(word.copier) +
           " still has in flight");
    if (word.writer != kNobody && word.writer != who.thread && word.write_epoch == who.epoch)
      fail("race: reads " + describe(i) + ", which thread " + std::to_string(word.writer) +
           " wrote since the last barrier");
    const bool others = word.read_epoch == who.epoch && word.reader != kNobody && word.reader != who.thread;
    word.reader = others ? kSeveral : static_cast<int16_t>(who.thread);
    word.read_epoch = who.epoch;
  }
  return offset;
}

void SharedMemory::check_write(int i, Accessor who) const {
  const Word& word = words_[i];
  if (word.copier != kNobody)
    fail("writes " + describe(i) + ", which a cp.async of thread " + std::to_string(word.copier) +
         " still has in flight");
  if (word.writer != kNobody && word.writer != who.thread && word.write_epoch == who.epoch)
    fail("race: writes " + describe(i) + ", which thread " + std::to_string(word.writer) +
         " wrote since the last barrier");
  if (word.reader != kNobody && word.reader != who.thread && word.read_epoch == who.epoch)
    fail("race: writes " + describe(i) + ", which " +
         (word.reader == kSeveral ? "several threads" : "thread " + std::to_string(word.reader)) +
         " read since the last barrier");
}

int SharedMemory::write(const void* target, int bytes, Accessor who) {
  const int offset = offset_of(target, bytes);
  for (int i = offset / 4; i < (offset + bytes) / 4; ++i) {
    check_write(i, who);
    words_[i].writer = static_cast<int16_t>(who.thread);
    words_[i].write_epoch = who.epoch;
  }
  return offset;
}

int SharedMemory::start_copy(const void* target, int bytes, Accessor who) {
  const int offset = offset_of(target, bytes);
  for (int i = offset / 4; i < (offset + bytes) / 4; ++i) {
    check_write(i, who);
    words_[i].copier = static_cast<int16_t>(who.thread);
  }
  std::memset(begin_ + offset, kNaNByte, bytes);
  return offset;
}

void SharedMemory::land_copy(int offset, const void* value, int bytes, Accessor who) {
  std::memcpy(begin_ + offset, value, bytes);
  for (int i = offset / 4; i < (offset + bytes) / 4; ++i) {
    words_[i].copier = kNobody;
    words_[i].writer = static_cast<int16_t>(who.thread);
    words_[i].write_epoch = who.epoch;
  }
}

}  // namespace longlora::simt
