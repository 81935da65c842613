#include "core/scratch.h"

#include <sys/mman.h>

#include <mutex>
#include <new>

namespace bmf {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSmall = size_t{32} << 20;  // a region below this serves any smaller request
constexpr int kSlots = 64;

struct Region {
  char* data;
  size_t capacity;
};

std::mutex mutex;
Region kept[kSlots];
int kept_count = 0;
size_t kept_bytes = 0;

}  // namespace

Scratch::Scratch(size_t bytes) {
  const size_t page = bytes < kHugePage ? 4096 : kHugePage;
  const size_t wanted = bytes == 0 ? page : (bytes + page - 1) / page * page;
  {
    const std::lock_guard lock(mutex);
    int best = -1;  // the smallest region that is large enough, and not so large that another call will miss it
    const size_t most = wanted < kSmall ? kSmall : wanted + wanted / 2;
    for (int i = 0; i < kept_count; ++i)
      if (kept[i].capacity >= wanted && kept[i].capacity <= most &&
          (best < 0 || kept[i].capacity < kept[best].capacity))
        best = i;
    if (best >= 0) {
      data_ = kept[best].data;
      capacity_ = kept[best].capacity;
      kept_bytes -= capacity_;
      kept[best] = kept[--kept_count];
      return;
    }
  }
  void* fresh = mmap(nullptr, wanted + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (fresh == MAP_FAILED) throw std::bad_alloc();
  // Trim to a multiple of the page asked for, so that huge pages fit.
  char* begin = static_cast<char*>(fresh);
  const size_t skip = (page - reinterpret_cast<uintptr_t>(begin) % page) % page;
  if (skip > 0) munmap(begin, skip);
  if (page > skip) munmap(begin + skip + wanted, page - skip);
  data_ = begin + skip;
  capacity_ = wanted;
  if (page == kHugePage) madvise(data_, capacity_, MADV_HUGEPAGE);  // advice: failure changes nothing
}

Scratch::~Scratch() { give_back({data_, capacity_}); }

Scratch::Held Scratch::release() {
  const Held held{data_, capacity_};
  data_ = nullptr;
  return held;
}

void Scratch::give_back(Held held) {
  if (held.data == nullptr) return;
  const size_t capacity = held.capacity;
  {
    const std::lock_guard lock(mutex);
    // Smaller regions make room: calls repeat, and the larger region serves them all.
    for (int i = kept_count - 1; i >= 0; --i)
      if ((kept_bytes + capacity > kScratchKeptLimit || kept_count == kSlots) && kept[i].capacity <= capacity) {
        munmap(kept[i].data, kept[i].capacity);
        kept_bytes -= kept[i].capacity;
        kept[i] = kept[--kept_count];
      }
    if (kept_bytes + capacity <= kScratchKeptLimit && kept_count < kSlots) {
      kept[kept_count++] = {static_cast<char*>(held.data), capacity};
      kept_bytes += capacity;
      return;
    }
  }
  munmap(held.data, capacity);
}

size_t scratch_kept_bytes() {
  const std::lock_guard lock(mutex);
  return kept_bytes;
}

}  // namespace bmf
