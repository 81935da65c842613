// Working memory for one kernel call, taken from a process-wide pool and given back at the end of the scope.
//
// Fresh memory costs a page fault for every 4 KiB it touches; pooled memory costs them once, and asks for huge pages.
// What the pool keeps between calls is bounded (kScratchKeptLimit), so a single large call does not hold its memory
// forever.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bmf {

class Scratch {
 public:
  explicit Scratch(size_t bytes);  // contents undefined, aligned to 4096; throws std::bad_alloc
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The memory outlives this object; give_back(data, capacity) returns it to the pool.
  struct Held {
    void* data;
    size_t capacity;
  };
  Held release();
  static void give_back(Held held);

  template <class T>
  T* at(size_t byte_offset) const {
    return reinterpret_cast<T*>(data_ + byte_offset);
  }

 private:
  char* data_;
  size_t capacity_;
};

// Bytes the pool holds for later calls, and the most it ever keeps.
__attribute__((visibility("default"))) size_t scratch_kept_bytes();
constexpr size_t kScratchKeptLimit = size_t{1} << 30;

}  // namespace bmf
