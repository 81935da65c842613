// The functions of csrc/cuda/hopper.h over an emulated block; the last part of cuda_emulator.h.
#pragma once
#include "cuda_emulated_async.h"

namespace bmf::cuda {

constexpr bool kOnHopper = true;

inline void init_barrier(uint32_t at, int count) {
  auto& barriers = block->async().barriers;
  if (at % 8 != 0) block->fail("misaligned address of a barrier");
  if (barriers.size() == emulator::kMostBarriers) block->fail("more barriers than are emulated");
  block->writing(at, 8);
  block->for_granules(at, 8, [](emulator::Granule& g) { g.barrier = true; });
  const emulator::Thread& thread = block->thread();
  const size_t agents = thread.clock.size();
  const emulator::TransactionBarrier barrier{static_cast<int>(agents - 1 - barriers.size()),
                                             count,
                                             count,
                                             {thread.index, thread.clock[static_cast<size_t>(thread.index)]},
                                             emulator::Clock(agents)};
  barriers.emplace(at, barrier);
}
inline void publish_barriers() {
  for (auto& [at, barrier] : block->async().barriers)
    if (barrier.made.agent == block->thread().index) barrier.published = true;
}
inline void arrive(uint32_t barrier) { emulator::arrive_at(barrier, 0); }
inline void arrive_expecting(uint32_t barrier, uint32_t bytes) { emulator::arrive_at(barrier, bytes); }
inline void wait_barrier(uint32_t at, uint32_t parity) {
  emulator::TransactionBarrier& barrier = emulator::barrier_at(at);
  while (static_cast<uint32_t>(barrier.phase % 2) == parity) {
    block->async().waiting.emplace(&barrier, &block->thread());
    block->pause_elsewhere();
  }
  if (!barrier.ended.empty()) emulator::join(block->thread().clock, barrier.ended);
}

inline void copy_box(uint32_t to, const TensorMap& map, int column, int row, int head, int batch, uint32_t barrier) {
  emulator::Tensor4 tensor;
  std::memcpy(&tensor, &map, sizeof tensor);
  if (reinterpret_cast<uintptr_t>(&map) % 64 != 0) block->fail("misaligned tensor map");
  if (to % 1024 != 0) block->fail("a box begins elsewhere than at a multiple of 1024");
  emulator::Transfer transfer{{}, &emulator::barrier_at(barrier)};
  const auto within = [&](int d, int64_t i) { return i >= 0 && i < tensor.sizes[d]; };
  for (int r = 0; r < tensor.box_rows; ++r)
    for (int chunk = 0; chunk < 8; ++chunk) {
      uint16_t elements[8] = {};
      for (int e = 0; e < 8; ++e) {
        const int64_t c = column + chunk * 8 + e;
        if (within(0, c) && within(1, row + r) && within(2, head) && within(3, batch))
          std::memcpy(&elements[e],
                      tensor.data + 2 * c + (row + r) * tensor.strides[1] + head * tensor.strides[2] +
                          batch * tensor.strides[3],
                      2);
      }
      const uint32_t at = to + static_cast<uint32_t>(r * 128 + chunk * 16);
      emulator::add_piece(transfer, at ^ (at >> 7 & 7) << 4, elements, 16);
    }
  block->async().transfers.push_back(std::move(transfer));
}
inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0)
    block->fail("misaligned address of global memory");
  emulator::Transfer transfer{{}, &emulator::barrier_at(barrier)};
  for (uint32_t b = 0; b < bytes; b += 16)
    emulator::add_piece(transfer, to + b, static_cast<const unsigned char*>(from) + b, 16);
  block->async().transfers.push_back(std::move(transfer));
}
inline void publish_stores() {
  const int thread = block->thread().index;
  block->for_granules(0, block->shared_bytes(), [&](emulator::Granule& g) {
    if (g.writer.agent == thread) g.unpublished = false;
  });
}

inline void named_barrier(int id, int threads, bool waits) {
  emulator::NamedBarrier& barrier = block->async().named[id];
  if (id < 1 || id > 15 || threads % kWarp != 0) block->fail("there is no such barrier");
  if (barrier.arrived > 0 && barrier.expected != threads) block->fail("threads differ about a barrier's count");
  barrier.expected = threads;
  block->release(barrier.clock);
  if (waits) barrier.waiting.push_back(&block->thread());
  if (++barrier.arrived < threads) {
    if (waits) block->pause_elsewhere();
    return;
  }
  if (barrier.waiting.empty()) block->fail("nobody waits at a barrier");
  barrier.arrived = 0;
  for (emulator::Thread* t : barrier.waiting) {
    emulator::join(t->clock, barrier.clock);
    t->state = emulator::Thread::State::ready;
  }
  barrier.waiting.clear();
}
inline void meet(int id, int threads) { named_barrier(id, threads, true); }
inline void announce(int id, int threads) { named_barrier(id, threads, false); }

inline int uniform(int v) {
  struct Lane {
    int v;
  } own{v};
  block->together("uniform", &own, [](void** lanes) {
    for (int i = 1; i < kWarp; ++i)
      if (static_cast<Lane*>(lanes[i])->v != static_cast<Lane*>(lanes[0])->v) block->fail("lanes differ");
  });
  return v;
}

template <int kCount>
void fewer_registers() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  block->together<kGroupThreads>("registers", nullptr, [](void**) {});
}
template <int kCount>
void more_registers() {
  fewer_registers<kCount>();
}

template <class... Registers>
void begin_products(Registers&... registers) {
  (emulator::check_waited(registers), ...);
  block->together<kGroupThreads>("begin_products", nullptr, [](void**) { emulator::warpgroup().ready = true; });
}
inline void commit_products() {
  block->together<kGroupThreads>("commit_products", nullptr, [](void**) { ++emulator::warpgroup().begun; });
}
template <int kPending, class... Registers>
void wait_products(Registers&... registers) {
  emulator::wait_for_products(kPending);
  (emulator::check_waited(registers), ...);
}

template <class T, int kBlocks>
void group_product(float (*d)[4], uint64_t left, uint64_t right, bool accumulate) {
  emulator::product_of_group<T, kBlocks>("group_product", {d, nullptr, left, right, accumulate}, true);
}
template <class T, int kBlocks>
void group_product_add(float (*d)[4], const uint32_t (&left)[4], uint64_t right) {
  emulator::product_of_group<T, kBlocks>("group_product_add", {d, left, 0, right, true}, false);
}

}  // namespace bmf::cuda
