// The emulator as tests see it: the seed, the mutation, and what the launches since the last `configure` did.
#pragma once

#include <cstdint>
#include <set>
#include <string>

#include "counters.h"
#include "simt.h"

namespace longlora::simt {

// The seed orders blocks, warps and lanes. `drop` names one of `sites`, which is then ignored: its barrier does not
// hold, its commit makes no group, its wait waits for nothing. Empty: none is. Clears counters and sites.
void configure(uint64_t seed, const std::string& drop);

// Bytes of shared memory that a GPU offers a block; at first 163 KiB, as an A100 does.
void offer_shared_memory(int bytes);
int offered_shared_memory();

const Counters& counters();

// "mainloop_fwd.h:96 sync_block", for each barrier, commit and wait that a thread came to, dropped or not.
std::set<std::string> sites();

}  // namespace longlora::simt
