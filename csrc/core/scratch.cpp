#include "core/scratch.h"

#include <sys/mman.h>

#include <mutex>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else  // a region may be larger than was asked for: the sanitizer is told to guard the rest
#define ASAN_POISON_MEMORY_REGION(data, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(data, bytes)
#endif

namespace bmf {
namespace {

constexpr size_t kPage = 4096, kHugePage = size_t{2} << 20;

struct Region {
  char* data;
  size_t capacity;
};

struct Pool {
  std::mutex mutex;
  std::vector<Region> kept;  // the one given back longest ago first
  size_t kept_bytes = 0;
};

// Never destroyed: tensors may give memory back while the process ends.
Pool& pool() {
  static Pool& only = *new Pool;
  return only;
}

// Sizes are rounded up to one of eight in each power of two, so that a region given back fits requests that differ a
// little, as those of a last, smaller batch do.
size_t capacity_for(size_t bytes) {
  size_t step = kPage;
  while (step * 16 <= bytes) step *= 2;
  return bytes == 0 ? kPage : (bytes + step - 1) / step * step;
}

char* map(size_t capacity) {
  const size_t alignment = capacity < kHugePage ? kPage : kHugePage;
  void* fresh = mmap(nullptr, capacity + alignment, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (fresh == MAP_FAILED) throw std::bad_alloc();
  char* begin = static_cast<char*>(fresh);
  const size_t skip = (alignment - reinterpret_cast<uintptr_t>(begin) % alignment) % alignment;
  if (skip > 0) munmap(begin, skip);
  if (alignment > skip) munmap(begin + skip + capacity, alignment - skip);
  if (alignment == kHugePage) madvise(begin + skip, capacity, MADV_HUGEPAGE);  // advice: failure changes nothing
  return begin + skip;
}

void unmap(const Region& region) {
  ASAN_UNPOISON_MEMORY_REGION(region.data, region.capacity);
  munmap(region.data, region.capacity);
}

}  // namespace

Scratch::Scratch(size_t bytes) : data_(nullptr), capacity_(capacity_for(bytes)) {
  {
    Pool& p = pool();
    const std::lock_guard lock(p.mutex);
    for (size_t i = p.kept.size(); i-- > 0 && data_ == nullptr;)  // the latest first: most of it may still be in cache
      if (p.kept[i].capacity == capacity_) {
        data_ = p.kept[i].data;
        p.kept_bytes -= capacity_;
        p.kept.erase(p.kept.begin() + static_cast<std::ptrdiff_t>(i));
      }
  }
  if (data_ == nullptr) data_ = map(capacity_);
  ASAN_UNPOISON_MEMORY_REGION(data_, capacity_);
  ASAN_POISON_MEMORY_REGION(data_ + bytes, capacity_ - bytes);
}

Scratch::~Scratch() { give_back({data_, capacity_}); }

Scratch::Held Scratch::release() {
  const Held held{data_, capacity_};
  data_ = nullptr;
  return held;
}

void Scratch::give_back(Held held) {
  if (held.data == nullptr) return;
  const Region region{static_cast<char*>(held.data), held.capacity};
  if (region.capacity > kScratchKeptLimit) return unmap(region);
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  p.kept.push_back(region);
  p.kept_bytes += region.capacity;
  size_t oldest = 0;
  for (; p.kept_bytes > kScratchKeptLimit; ++oldest) {
    unmap(p.kept[oldest]);
    p.kept_bytes -= p.kept[oldest].capacity;
  }
  p.kept.erase(p.kept.begin(), p.kept.begin() + static_cast<std::ptrdiff_t>(oldest));
}

size_t scratch_kept_bytes() {
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  return p.kept_bytes;
}

}  // namespace bmf
