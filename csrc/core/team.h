// A team of threads for work that comes in many short phases, such as the layers of a small network: one launch for all
// phases, where a launch each would cost more than the work.
//
// The leader hands out the tasks of a phase, takes part, and goes on when all are done. It waits for tasks that another
// thread has begun, never for a thread to come: Threads may run its bodies one after the other, and then the leader
// does everything. Each thread prefers a share of its own, the same from phase to phase, so that what it wrote is still
// in its caches; when that is empty it helps the others.
#pragma once
#include <sched.h>

#include "core/threads.h"

#ifdef BMF_ISA
namespace bmf::BMF_ISA {

class Team {
 public:
  static constexpr int kMost = 64;

  explicit Team(int count) : count_(count < kMost ? count : kMost) {}
  int count() const { return count_; }

  // f(task, thread) for each task in [0, n). Called by the leader only, which is thread 0.
  template <class F>
  void run(int64_t n, const F& f) {
    if (count_ == 1 || n == 1) {
      for (int64_t task = 0; task < n; ++task) f(task, 0);
      return;
    }
    put(call_, +[](const void* of, int64_t task, int thread) { (*static_cast<const F*>(of))(task, thread); });
    put(of_, static_cast<const void*>(&f));
    put(tasks_, n);
    put(done_, int64_t{0});
    const uint64_t phase = phase_ + 1;
    for (int t = 0; t < count_; ++t) put(queue_[t].next, phase << 32 | static_cast<uint64_t>(n * t / count_));
    __atomic_store_n(&phase_, phase, __ATOMIC_RELEASE);
    const int64_t others = n - work(phase, 0);
    for (int spins = 0; __atomic_load_n(&done_, __ATOMIC_ACQUIRE) != others; ++spins) rest(spins);
  }

  // What every thread but the leader does until finish().
  void help(int thread) {
    uint64_t seen = 0;
    for (int spins = 0;; ++spins) {
      const uint64_t phase = __atomic_load_n(&phase_, __ATOMIC_ACQUIRE);
      if (phase == kFinished) return;
      if (phase == seen) {
        rest(spins);
        continue;
      }
      seen = phase;
      spins = 0;
      if (const int64_t mine = work(phase, thread)) __atomic_fetch_add(&done_, mine, __ATOMIC_RELEASE);
    }
  }
  void finish() { __atomic_store_n(&phase_, kFinished, __ATOMIC_RELEASE); }

 private:
  static constexpr uint64_t kFinished = ~uint64_t{0};
  using Call = void (*)(const void*, int64_t, int);

  struct alignas(128) Queue {
    uint64_t next = 0;  // the phase, and its next task
  };

  template <class T>
  static void put(T& at, T value) {
    __atomic_store_n(&at, value, __ATOMIC_RELEASE);
  }

  // Takes tasks until there are none; returns how many. A thread that comes late may read the next phase's call, but
  // then finds the queues' phase changed and takes nothing.
  int64_t work(uint64_t phase, int thread) {
    const Call call = __atomic_load_n(&call_, __ATOMIC_ACQUIRE);
    const void* of = __atomic_load_n(&of_, __ATOMIC_ACQUIRE);
    const int64_t n = __atomic_load_n(&tasks_, __ATOMIC_ACQUIRE);
    int64_t taken = 0;
    for (int i = 0; i < count_; ++i) {
      const int owner = thread + i < count_ ? thread + i : thread + i - count_;
      const uint64_t end = phase << 32 | static_cast<uint64_t>(n * (owner + 1) / count_);
      uint64_t next = __atomic_load_n(&queue_[owner].next, __ATOMIC_ACQUIRE);
      while (next >> 32 == phase && next < end)
        if (__atomic_compare_exchange_n(&queue_[owner].next, &next, next + 1, false, __ATOMIC_ACQ_REL,
                                        __ATOMIC_ACQUIRE)) {
          call(of, static_cast<int64_t>(next & 0xffffffffu), thread);
          ++taken;
          ++next;
        }
    }
    return taken;
  }

  static void rest(int spins) {
    if (spins > 4096) {
      sched_yield();  // there may be fewer processors than threads
      return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  alignas(128) uint64_t phase_ = 0;
  Call call_ = nullptr;
  const void* of_ = nullptr;
  int64_t tasks_ = 0;
  const int count_;
  alignas(128) int64_t done_ = 0;
  Queue queue_[kMost];
};

// f(team) on the leader, with `count` of `threads` in the team.
template <class F>
inline void with_team(const Threads& threads, int count, const F& f) {
  Team team(count < threads.count ? count : threads.count);
  parallel(threads, team.count(), [&](int thread) {
    if (thread > 0) return team.help(thread);
    f(team);
    team.finish();
  });
}

}  // namespace bmf::BMF_ISA
#endif
