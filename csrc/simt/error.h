// A kernel did what it must not.
#pragma once

#include <stdexcept>
#include <string>

#include "simt.h"

namespace longlora::simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws an Error that says which thread of which block this is, and the last barrier, commit or wait that it passed.
[[noreturn]] void fail(const std::string& what);

std::string name_of(Site site);  // "mainloop_fwd.h:96"

}  // namespace longlora::simt
