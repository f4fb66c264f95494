// What simt.h and control.h promise, but for the collectives.
#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>

#include "block.h"
#include "control.h"
#include "error.h"
#include "sites.h"

longlora::simt::Index threadIdx, blockIdx;

namespace longlora::simt {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kAlwaysAllowed = 48 * 1024;  // bytes of shared memory

uint64_t seed = 0;
int offered_bytes = 163 * 1024;
std::map<const void*, int> allowed_bytes;  // by kernel
Sites all_sites;

// Notes that the running thread has come to a site; false: it is to ignore it.
bool pass(SiteKind kind, Site site) {
  const Unseen unseen;
  if (all_sites.dropped(kind, site)) return false;
  block->running().last_kind = kind;
  block->running().last_site = site;
  return true;
}

}  // namespace

void configure(uint64_t new_seed, const std::string& drop) {
  seed = new_seed;
  all_sites.reset(drop);
  statistics = Counters();
}

void offer_shared_memory(int bytes) {
  offered_bytes = bytes;
  allowed_bytes.clear();
}

int offered_shared_memory() { return offered_bytes; }

bool allow_shared_memory(const void* kernel, int bytes) {
  if (bytes > offered_bytes) return false;
  allowed_bytes[kernel] = bytes;
  return true;
}

const Counters& counters() { return statistics; }

std::set<std::string> sites() { return all_sites.met(); }

void sync_block(Site site) {
  if (pass(SiteKind::kSync, site)) block->wait_at_barrier();
}

void copy_async(void* target, const void* value, int bytes) {
  const Unseen unseen;
  const int offset = block->shared().start_copy(target, bytes, block->accessor());
  block->running().copies.add(offset, value, bytes);
  block->warp().accesses.record(AccessLog::kCpAsync, block->running().lane(), offset, bytes);
}

void commit_copies(Site site) {
  const Unseen unseen;
  if (pass(SiteKind::kCommit, site)) block->running().copies.commit();
}

void wait_copies(int groups_in_flight, Site site) {
  const Unseen unseen;
  if (!pass(SiteKind::kWait, site)) return;
  const auto land = [](const AsyncCopy& copy) {
    block->shared().land_copy(copy.offset, copy.value, copy.bytes, block->accessor());
  };
  block->running().copies.wait(groups_in_flight, land);
}

void* shared_memory() { return block->shared().data(); }

bool is_shared(const void* address) { return block->shared().contains(address); }

void load_shared(void* value, const void* source, int bytes) {
  const Unseen unseen;
  const int offset = block->shared().read(source, bytes, block->accessor());
  std::memcpy(value, source, bytes);
  block->warp().accesses.record(AccessLog::kLoad, block->running().lane(), offset, bytes);
}

void store_shared(void* target, const void* value, int bytes) {
  const Unseen unseen;
  const int offset = block->shared().write(target, bytes, block->accessor());
  std::memcpy(target, value, bytes);
  block->warp().accesses.record(AccessLog::kStore, block->running().lane(), offset, bytes);
}

void launch(Index grid, int threads, int shared_bytes, Block::Body body, const void* params, const void* kernel) {
  if (threads < kLanes || threads > kMostThreads || threads % kLanes)
    throw Error("a block has whole warps, up to 1024 threads, not " + std::to_string(threads));
  const auto allowed = allowed_bytes.find(kernel);
  const int most_bytes = allowed == allowed_bytes.end() ? std::min(kAlwaysAllowed, offered_bytes) : allowed->second;
  if (shared_bytes < 0 || shared_bytes > most_bytes)
    throw Error("a block of this kernel has up to " + std::to_string(most_bytes) + " bytes of shared memory, not " +
                std::to_string(shared_bytes));
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    throw Error("a grid's sides are 1 to 2^31 - 1, 65535 and 65535");
  const Unseen unseen;
  Block machine(threads, seed, body, params);
  block = &machine;

  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
  machine.begin();
  for (const uint64_t i : order)
    machine.run({unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)}, shared_bytes);
  machine.end();
}

}  // namespace longlora::simt
