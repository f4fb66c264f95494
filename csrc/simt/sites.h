// The barriers, commits and waits that were met, and the one that is left out.
#pragma once

#include <map>
#include <set>
#include <string>
#include <tuple>

#include "simt.h"

namespace longlora::simt {

enum class SiteKind { kSync, kCommit, kWait };

std::string name_of(SiteKind kind, Site site);  // "mainloop_fwd.h:96 sync_block"

class Sites {
 public:
  void reset(const std::string& drop);

  // Notes that a thread has come here, and says whether it is to ignore it.
  bool dropped(SiteKind kind, Site site);

  std::set<std::string> met() const;

 private:
  using Key = std::tuple<const char*, int, SiteKind>;  // the same file may have several addresses; names are unique
  std::map<Key, bool> dropped_;
  std::string drop_;
};

}  // namespace longlora::simt
