// csrc/cuda/device.h for the host: runs a CUDA kernel's source block by block, each thread of a block as a fiber, and
// watches what a GPU would let pass.
//
// A thread runs until it needs others: a barrier, or an instruction of its whole warp, which all of its lanes must
// reach as the same instruction. Which warp goes on then is drawn anew at every step, or always the first or the last
// that can. Errors, each with the block and thread it happened in:
//
// - threads that wait for each other for ever, or leave while others wait at a barrier;
// - shared memory: out of bounds, misaligned, read before it was written, or touched by two threads, one of them
//   writing, when nothing makes one come before the other, whatever the order in which they ran (vector clocks: Lamport
//   1978, Mattern 1989);
// - asynchronous copies: data arrive when they are waited for, not earlier; until then the memory is no one's;
// - the eight rows of a matrix that load_matrices reads from shared memory lie in different banks.
//
// Global memory is the host's, so AddressSanitizer sees what lies beyond. Fragments follow the tables of the PTX ISA
// (9.7.14.5.8, "Matrix Fragments for mma.m16n8k16"; 9.7.14.5.15, ldmatrix), written down here a second time.
#pragma once
#define BMF_CUDA_EMULATED
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_fiber.h"

#define BMF_DEVICE inline
#define BMF_EVERYWHERE inline
#define BMF_KERNEL(threads) void
#define BMF_CONSTANT

#include "cuda/device.h"

namespace emulator {

enum class Order { random, first, last };
struct Dim {
  int x, y = 1, z = 1;
};

using bmf::cuda::kWarp;
constexpr int kGranule = 4;  // bytes of shared memory that are watched together; no two threads write into one
constexpr unsigned char kPoison = 0xff;  // NaN in every dtype

// How much of what each agent did is known to come before. Agents: threads; warps, whose time is how many groups of
// products they have begun (cuda_emulated_async.h); transaction barriers, whose time is their phase.
using Clock = std::vector<int>;

inline void join(Clock& clock, const Clock& other) {
  for (size_t i = 0; i < clock.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

struct Access {
  int agent, time;

  bool before(const Clock& clock) const { return time <= clock[static_cast<size_t>(agent)]; }
};

// What has happened to a granule: its last write, and the reads since that are not known to come before each other.
struct Granule {
  bool written = false, copying = false, barrier = false;
  bool unpublished = false;  // stored, and asynchronous copies and products may not see it yet
  Access writer{0, 0};
  std::vector<Access> readers;
};
constexpr int kMostBarriers = 32;  // transaction barriers of a block

struct Copy {
  uint32_t to;
  const void* from;
  int bytes, present;
};

struct Thread {
  int index = 0;
  Fiber fiber;
  enum class State { ready, at_barrier, in_warp, elsewhere, done } state = State::ready;
  Clock clock;
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
};

// An instruction of a warp, or of a warpgroup: what each thread brought.
constexpr int kMostTogether = 128;
struct Gathering {
  const char* name = nullptr;
  int arrived = 0;
  void* lane[kMostTogether] = {};
};

struct Async;  // what runs beside the threads: cuda_emulated_async.h

class Block {
 public:
  Block(Dim index, int threads, int shared_bytes, Order order, uint64_t seed)
      : index_(index),
        order_(order),
        random_(seed),
        threads_(static_cast<size_t>(threads)),
        warps_(static_cast<size_t>(threads / kWarp)),
        groups_(static_cast<size_t>(threads + kMostTogether - 1) / kMostTogether),
        shared_(new unsigned char[static_cast<size_t>(shared_bytes)]),
        shared_bytes_(shared_bytes),
        granules_(static_cast<size_t>(shared_bytes / kGranule)) {
    std::memset(shared_.get(), kPoison, static_cast<size_t>(shared_bytes));
    const size_t agents = threads_.size() + warps_.size() + kMostBarriers;
    for (size_t i = 0; i < threads_.size(); ++i) {
      threads_[i].clock.resize(agents);
      threads_[i].clock[i] = 1;
    }
    start_async();
  }
  ~Block();

  void run(const std::function<void()>& kernel);

  Dim index() const { return index_; }
  Thread& thread() { return *current_; }
  void fail(const char* what) const {
    std::fprintf(stderr, "emulator: block (%d, %d, %d), thread %d: %s\n", index_.x, index_.y, index_.z,
                 current_ ? current_->index : -1, what);
    std::abort();
  }

  void barrier() {
    current_->state = Thread::State::at_barrier;
    current_->fiber.pause();
  }
  // f(lanes) once for the warp (or the warpgroup), when every lane has brought its `own`.
  template <int kThreads = kWarp, class F>
  void together(const char* name, void* own, const F& f) {
    static_assert(kThreads == kWarp || kThreads == kMostTogether);
    Gathering& here = (kThreads == kWarp ? warps_ : groups_)[static_cast<size_t>(current_->index / kThreads)];
    if (here.arrived > 0 && here.name != name) fail("lanes of a warp are at different instructions");
    here.name = name;
    here.lane[current_->index % kThreads] = own;
    if (++here.arrived < kThreads) {
      current_->state = Thread::State::in_warp;
      current_->fiber.pause();
      return;
    }
    f(here.lane);
    here.arrived = 0;
    const size_t first = static_cast<size_t>(current_->index / kThreads * kThreads);
    for (size_t i = first; i < first + kThreads; ++i) threads_[i].state = Thread::State::ready;
  }
  // What threads [first, last) did comes before what they do from now on.
  void synchronize(size_t first, size_t last) {
    Clock all = threads_[first].clock;
    for (size_t i = first + 1; i < last; ++i) join(all, threads_[i].clock);
    for (size_t i = first; i < last; ++i) {
      threads_[i].clock = all;
      ++threads_[i].clock[i];
    }
  }
  // Now comes before what others do who have joined `clock`.
  void release(Clock& clock) {
    clock.resize(current_->clock.size());
    join(clock, current_->clock);
    ++current_->clock[static_cast<size_t>(current_->index)];
  }

  // Shared memory, as `thread` (or the current one) uses it.
  unsigned char* reading(uint32_t at, int bytes, Thread* thread = nullptr) {
    const Thread& t = thread ? *thread : *current_;
    return reading(at, bytes, t.clock, {t.index, t.clock[static_cast<size_t>(t.index)]});
  }
  unsigned char* writing(uint32_t at, int bytes) {
    return writing(at, bytes, current_->clock,
                   {current_->index, current_->clock[static_cast<size_t>(current_->index)]});
  }
  // As someone uses it who knows `clock`, and is known by `by`.
  unsigned char* reading(uint32_t at, int bytes, const Clock& clock, Access by);
  unsigned char* writing(uint32_t at, int bytes, const Clock& clock, Access by);
  template <class F>
  void for_granules(uint32_t at, int bytes, const F& f) {
    for (uint32_t b = at; b < at + static_cast<uint32_t>(bytes); b += kGranule) f(granules_[b / kGranule]);
  }
  Thread& thread(size_t i) { return threads_[i]; }
  size_t thread_count() const { return threads_.size(); }
  int shared_bytes() const { return shared_bytes_; }
  Async& async() { return *async_; }
  void pause_elsewhere() {
    current_->state = Thread::State::elsewhere;
    current_->fiber.pause();
  }

  void begin_copy(const Copy& copy) {
    std::memset(writing(copy.to, copy.bytes), kPoison, static_cast<size_t>(copy.bytes));
    mark_copying(copy, true);
    current_->uncommitted.push_back(copy);
  }
  void commit() {
    current_->groups.push_back(std::move(current_->uncommitted));
    current_->uncommitted.clear();
  }
  void wait(size_t pending) {
    for (; current_->groups.size() > pending; current_->groups.pop_front())
      for (const Copy& copy : current_->groups.front()) {
        mark_copying(copy, false);
        unsigned char* to = writing(copy.to, copy.bytes);
        std::memset(to, 0, static_cast<size_t>(copy.bytes));
        if (copy.present > 0) std::memcpy(to, copy.from, static_cast<size_t>(copy.present));
      }
  }

 private:
  void mark_copying(const Copy& copy, bool copying) {
    for_granules(copy.to, copy.bytes, [&](Granule& g) { g.copying = copying; });
  }
  void start_async();
  bool advance_async(bool idle);  // whether something was under way, and chosen to go on
  void end_async();
  void check_range(uint32_t at, int bytes) const {
    if (at % static_cast<uint32_t>(bytes) != 0) fail("misaligned address of shared memory");
    if (int64_t{at} + bytes > shared_bytes_) fail("beyond the block's shared memory");
  }
  Thread* choose();

  Dim index_;
  Order order_;
  std::mt19937_64 random_;
  std::vector<Thread> threads_;
  std::vector<Gathering> warps_, groups_;
  std::unique_ptr<unsigned char[]> shared_;
  int shared_bytes_;
  std::vector<Granule> granules_;
  Thread* current_ = nullptr;
  std::unique_ptr<Async> async_;
};

inline Block* block = nullptr;  // the one that runs

inline unsigned char* Block::reading(uint32_t at, int bytes, const Clock& clock, Access by) {
  check_range(at, bytes);
  for_granules(at, bytes, [&](Granule& g) {
    if (g.copying) fail("shared memory is read while a copy to it is under way");
    if (g.barrier) fail("a barrier is read as data");
    if (!g.written) fail("shared memory is read that nobody has written");
    if (!g.writer.before(clock)) fail("race: read in the interval in which another thread wrote");
    std::erase_if(g.readers, [&](const Access& reader) { return reader.before(clock); });
    g.readers.push_back(by);
  });
  return shared_.get() + at;
}

inline unsigned char* Block::writing(uint32_t at, int bytes, const Clock& clock, Access by) {
  check_range(at, bytes);
  for_granules(at, bytes, [&](Granule& g) {
    if (g.copying) fail("shared memory is written while a copy to it is under way");
    if (g.barrier) fail("a barrier is written as data");
    if (g.written && !g.writer.before(clock)) fail("race: two threads write in one interval");
    for (const Access& reader : g.readers)
      if (!reader.before(clock)) fail("race: written in the interval in which another thread read");
    g.readers.clear();
    g.written = g.unpublished = true;
    g.writer = by;
  });
  return shared_.get() + at;
}

// The next thread to run: the first ready one of the warp whose turn it is.
inline Thread* Block::choose() {
  const size_t warps = warps_.size();
  const size_t from = order_ == Order::random ? random_() % warps : order_ == Order::first ? 0 : warps - 1;
  for (size_t i = 0; i < warps; ++i) {
    const size_t warp = order_ == Order::last ? from - i : (from + i) % warps;
    for (size_t lane = 0; lane < kWarp; ++lane)
      if (threads_[warp * kWarp + lane].state == Thread::State::ready) return &threads_[warp * kWarp + lane];
  }
  return nullptr;
}

inline void Block::run(const std::function<void()>& kernel) {
  block = this;
  for (size_t i = 0; i < threads_.size(); ++i) {
    threads_[i].index = static_cast<int>(i);
    threads_[i].fiber.start([this, &kernel] {
      kernel();
      if (!current_->groups.empty() || !current_->uncommitted.empty()) {
        wait(0);  // what is empty needs no waiting for
        if (!current_->uncommitted.empty()) fail("a thread ends with copies that were never committed");
      }
      end_async();
      current_->state = Thread::State::done;
    });
  }
  for (;;) {
    if (advance_async(false)) continue;
    if ((current_ = choose()) != nullptr) {
      current_->fiber.resume();
      continue;
    }
    if (advance_async(true)) continue;
    size_t done = 0, waiting = 0;
    for (const Thread& t : threads_) {
      done += t.state == Thread::State::done;
      waiting += t.state == Thread::State::at_barrier;
    }
    if (done == threads_.size()) break;
    if (waiting != threads_.size()) fail("some threads wait at a barrier or for their warp, others never come");
    synchronize(0, threads_.size());
    for (Thread& t : threads_) t.state = Thread::State::ready;
  }
  block = nullptr;
}

// kernel() for each block of the grid, one after the other, in an order of the same kind as that of a block's warps.
inline void launch(Dim grid, int threads, int shared_bytes, Order order, const std::function<void()>& kernel) {
  std::vector<int> blocks(static_cast<size_t>(grid.x * grid.y * grid.z));
  std::iota(blocks.begin(), blocks.end(), 0);
  if (order == Order::last) std::reverse(blocks.begin(), blocks.end());
  if (order == Order::random) std::shuffle(blocks.begin(), blocks.end(), std::mt19937(1));
  for (const int i : blocks) {
    const Dim index{i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    Block(index, threads, shared_bytes, order, static_cast<uint64_t>(i)).run(kernel);
  }
}

}  // namespace emulator

#include "cuda_emulated_device.h"
// Uses the device's.
#include "cuda_emulated_hopper.h"
