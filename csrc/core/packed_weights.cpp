#include "core/packed_weights.h"

#include <atomic>
#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "core/scratch.h"

namespace bmf {
namespace {

struct Hold {
  const char *begin, *end;
  int count;
};

struct Entry {
  PackedForm form;
  Scratch::Held memory;
  bool filled = false;
};

struct Store {
  std::mutex mutex;
  std::vector<Hold> holds;
  std::unordered_map<const void*, std::list<Entry>> entries;  // by the first source
  std::atomic<bool> empty = true;                             // no holds: read without the lock by every product
};

Store& store() {
  static Store& only = *new Store;  // never destroyed, as the pool its memory comes from
  return only;
}

bool held(const Store& s, const void* data) {
  const char* at = static_cast<const char*>(data);
  for (const Hold& hold : s.holds)
    if (hold.begin <= at && at < hold.end) return true;
  return false;
}

bool sources_held(const Store& s, const PackedForm& form) {
  return held(s, form.first.data) && (form.second.data == nullptr || held(s, form.second.data));
}

}  // namespace

void hold_weights(const void* data, size_t bytes) {
  Store& s = store();
  const std::lock_guard lock(s.mutex);
  const char* begin = static_cast<const char*>(data);
  for (Hold& hold : s.holds)
    if (hold.begin == begin) {
      hold.end = hold.end > begin + bytes ? hold.end : begin + bytes;
      ++hold.count;
      return;
    }
  s.holds.push_back({begin, begin + bytes, 1});
  s.empty = false;
}

void release_weights(const void* data) {
  Store& s = store();
  const std::lock_guard lock(s.mutex);
  std::erase_if(s.holds, [&](Hold& hold) { return hold.begin == data && --hold.count == 0; });
  s.empty = s.holds.empty();
  for (auto& [first, entries] : s.entries)
    entries.remove_if([&](const Entry& entry) {
      if (sources_held(s, entry.form)) return false;
      Scratch::give_back(entry.memory);
      return true;
    });
  std::erase_if(s.entries, [](const auto& item) { return item.second.empty(); });
}

size_t packed_weights_bytes() {
  Store& s = store();
  const std::lock_guard lock(s.mutex);
  size_t bytes = 0;
  for (const auto& [data, entries] : s.entries)
    for (const Entry& entry : entries) bytes += entry.memory.capacity;
  return bytes;
}

bool weights_held(const void* data) {
  Store& s = store();
  if (s.empty) return false;
  const std::lock_guard lock(s.mutex);
  return held(s, data);
}

PackedWeights::PackedWeights(const PackedForm& form, size_t bytes) {
  Store& s = store();
  if (s.empty) return;
  const std::lock_guard lock(s.mutex);
  if (!sources_held(s, form)) return;
  std::list<Entry>& entries = s.entries[form.first.data];
  for (Entry& entry : entries)
    if (entry.form == form) {
      if (!entry.filled) return;
      data_ = entry.memory.data;
      filled_ = true;
      return;
    }
  entries.push_back({form, Scratch(bytes).release()});
  data_ = entries.back().memory.data;
  entry_ = &entries.back();
}

void PackedWeights::set_filled() {
  if (entry_ == nullptr) return;
  const std::lock_guard lock(store().mutex);
  static_cast<Entry*>(entry_)->filled = true;
}

}  // namespace bmf
