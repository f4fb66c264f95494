#include "sites.h"

#include "error.h"

namespace longlora::simt {

std::string name_of(Site site) {
  const std::string path = site.file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line);
}

std::string name_of(SiteKind kind, Site site) {
  static const char* const kNames[] = {"sync_block", "commit_copies", "wait_copies"};
  return name_of(site) + " " + kNames[static_cast<int>(kind)];
}

void Sites::reset(const std::string& drop) {
  drop_ = drop;
  dropped_.clear();
}

bool Sites::dropped(SiteKind kind, Site site) {
  const auto [entry, is_new] = dropped_.try_emplace(Key(site.file, site.line, kind), false);
  if (is_new) entry->second = !drop_.empty() && (drop_ == name_of(kind, site) || drop_ == name_of(site));
  return entry->second;
}

std::set<std::string> Sites::met() const {
  std::set<std::string> names;
  for (const auto& [key, dropped] : dropped_)
    names.insert(name_of(std::get<SiteKind>(key), {std::get<const char*>(key), std::get<int>(key)}));
  return names;
}

}  // namespace longlora::simt
