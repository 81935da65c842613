// Threads: how a kernel runs in parallel without knowing whose threads they are. The operator layer fills it with
// torch's own pool; a C++ test fills it with a plain loop or std::thread.
#pragma once
#include <cstdint>

namespace bmf {

struct Threads {
  int count;  // upper bound of `thread` below
  // Calls body(thread, arg) once for each thread in [0, count), possibly one after the other: no barrier inside a body.
  void (*launch)(int count, void (*body)(int thread, void* arg), void* arg);
};

}  // namespace bmf

#ifdef BMF_ISA  // the templates below exist per instruction set
namespace bmf::BMF_ISA {

// f(thread) on each of `count` threads.
template <class Body>
inline void parallel(const Threads& threads, int count, const Body& f) {
  if (count <= 1) {
    f(0);
    return;
  }
  threads.launch(
      count, [](int thread, void* arg) { (*static_cast<const Body*>(arg))(thread); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// f(begin, end, thread) over contiguous shares of [0, n), none smaller than `grain`. Returns how many threads had one.
template <class Body>
inline int parallel_ranges(const Threads& threads, int64_t n, int64_t grain, const Body& f) {
  int64_t most = grain > 0 ? (n + grain - 1) / grain : n;
  int count = static_cast<int>(most < threads.count ? most : threads.count);
  if (count < 1) count = 1;  // n is 0: f is not called
  auto body = [&](int thread) {
    int64_t begin = n * thread / count, end = n * (thread + 1) / count;
    if (begin < end) f(begin, end, thread);
  };
  parallel(threads, count, body);
  return n > 0 ? count : 0;
}

// The grain for rows of `width` elements that each take a few operations: as many rows as make a thread worth waking.
inline int64_t row_grain(int64_t width) { return width > 0 ? 16384 / width + 1 : 1; }

// A counter that hands out tasks [0, n) to whichever thread is free; on a cache line of its own.
struct alignas(128) TaskCounter {
  int64_t next = 0;
  int64_t take() { return __atomic_fetch_add(&next, int64_t{1}, __ATOMIC_RELAXED); }
};

// f(task, thread) for each task in [0, n), in ascending order of start: put the longest tasks first.
template <class Body>
inline void parallel_tasks(const Threads& threads, int64_t n, const Body& f) {
  int count = static_cast<int>(n < threads.count ? n : threads.count);
  TaskCounter counter;
  auto body = [&](int thread) {
    for (int64_t task = counter.take(); task < n; task = counter.take()) f(task, thread);
  };
  parallel(threads, count, body);
}

// As parallel_tasks, but each thread begins with a share of its own, a run of neighbouring tasks in the same part of
// [0, n) for every n, and then helps the others: what it wrote in the task of an earlier call is still in its caches,
// where another thread's may be as far away as memory.
template <class Body>
inline void parallel_shares(const Threads& threads, int64_t n, const Body& f) {
  constexpr int kMostShares = 64;
  const int count = static_cast<int>(n < threads.count ? n : threads.count);
  const int shares = count < kMostShares ? count : kMostShares;
  TaskCounter counters[kMostShares];
  auto body = [&](int thread) {
    for (int i = 0; i < shares; ++i) {
      const int share = (thread + i) % shares;
      const int64_t begin = n * share / shares, size = n * (share + 1) / shares - begin;
      for (int64_t task = counters[share].take(); task < size; task = counters[share].take()) f(begin + task, thread);
    }
  };
  parallel(threads, count, body);
}

}  // namespace bmf::BMF_ISA
#endif
