// The functions of csrc/cuda/hopper.h over an emulated block; the third part of cuda_emulator.h. Errors, beside its
// own:
//
// - barriers: used before others may know of them, or by a store; more arrivals than a phase has; threads that wait for
//   a phase that never ends; a thread that has waited for another phase than that of its data is not known to come
//   after them;
// - copies: the bytes come at some time before the phase ends, soon, late or in between; until then the memory is no
//   one's, and they must come after whatever used it;
// - products: what they read from shared memory is read until they are waited for; their registers are poisoned until
//   then, and must not be touched; begin_products comes before them; stores that they or copies may not see yet;
// - tensors that TMA does not take, boxes that begin elsewhere than at multiples of 1024.
//
// Layouts: PTX ISA, "Shared Memory Matrix Layout", "Matrix-Descriptor Format" and "Register Fragments for
// wgmma.mma_async.m64nNk16"; "Swizzling Modes" of tensor copies.
#pragma once
#include <list>
#include <map>

#include "cuda/hopper.h"

namespace emulator {

using bmf::cuda::TensorMap;

// What a TensorMap holds here.
struct Tensor4 {
  const unsigned char* data;
  int64_t sizes[4], strides[4];  // elements, bytes; from the column on
  int box_rows;
};
static_assert(sizeof(Tensor4) <= sizeof(TensorMap));

struct TransactionBarrier {
  int agent, count, pending;
  Access made;
  Clock arriving;
  int phase = 0;
  int64_t bytes = 0;
  bool published = false;
  Clock ended = {};
};

// A copy that is under way.
struct Transfer {
  struct Piece {
    uint32_t to;
    unsigned char data[16];
  };
  std::vector<Piece> pieces;
  TransactionBarrier* barrier;
};

// Products with the same sums. Each thread's sums are in `registers` until they are waited for.
struct Products {
  int group;  // counted from 1
  float* sums[kMostTogether];
  int count;
  std::vector<float> registers;
  std::vector<std::pair<const uint32_t*, std::vector<uint32_t>>> operands;
};
struct Warpgroup {
  int begun = 1, waited = 0;  // the group that products belong to now; all up to this are waited for
  bool ready = false;         // no register was touched since begin_products
  std::list<Products> under_way;
};

struct NamedBarrier {
  int arrived = 0, expected = 0;
  Clock clock;
  std::vector<Thread*> waiting;
};

struct Async {
  std::map<uint32_t, TransactionBarrier> barriers;
  std::multimap<const TransactionBarrier*, Thread*> waiting;
  std::vector<Transfer> transfers;
  std::map<int, Warpgroup> groups;
  NamedBarrier named[16];
};

inline void Block::start_async() { async_ = std::make_unique<Async>(); }
inline Block::~Block() = default;

inline TransactionBarrier& barrier_at(uint32_t at) {
  const auto found = block->async().barriers.find(at);
  if (found == block->async().barriers.end()) block->fail("no barrier was made here");
  if (!found->second.made.before(block->thread().clock) || !found->second.published)
    block->fail("a barrier is used that may not be there yet");
  return found->second;
}

inline void end_phase_if_complete(TransactionBarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.arriving[static_cast<size_t>(barrier.agent)] = barrier.phase;
  barrier.ended = barrier.arriving;
  const auto [first, last] = block->async().waiting.equal_range(&barrier);
  for (auto i = first; i != last; ++i) i->second->state = Thread::State::ready;
  block->async().waiting.erase(first, last);
}

inline void arrive_at(uint32_t at, int64_t bytes) {
  TransactionBarrier& barrier = barrier_at(at);
  if (barrier.pending == 0) block->fail("more arrivals at a barrier than a phase has");
  --barrier.pending;
  barrier.bytes += bytes;
  block->release(barrier.arriving);
  end_phase_if_complete(barrier);
}

// Copies come soon, in a drawn order; or at once; or when nobody can go on without them, the last first.
inline bool Block::advance_async(bool idle) {
  auto& transfers = async_->transfers;
  if (transfers.empty() || (!idle && (order_ == Order::first || (order_ == Order::random && random_() % 8 != 0))))
    return false;
  const size_t i = order_ == Order::random ? random_() % transfers.size()
                   : order_ == Order::last ? 0
                                           : transfers.size() - 1;
  const Transfer transfer = std::move(transfers[i]);
  transfers.erase(transfers.begin() + static_cast<std::ptrdiff_t>(i));
  for (const Transfer::Piece& piece : transfer.pieces) {
    for_granules(piece.to, 16, [&](Granule& g) { g.copying = false; });
    std::memcpy(shared_.get() + piece.to, piece.data, 16);
  }
  transfer.barrier->bytes -= 16 * static_cast<int64_t>(transfer.pieces.size());
  end_phase_if_complete(*transfer.barrier);
  return true;
}

// 16 bytes that are on their way to shared memory, for what will be the end of the barrier's phase.
inline void add_piece(Transfer& transfer, uint32_t to, const void* data, size_t bytes) {
  Transfer::Piece piece{to, {}};
  std::memcpy(piece.data, data, bytes);
  block->for_granules(to, 16, [](Granule& g) {
    if (g.written && g.unpublished) block->fail("a copy overwrites a store that it may not see yet");
  });
  const TransactionBarrier& barrier = *transfer.barrier;
  std::memset(block->writing(to, 16, block->thread().clock, {barrier.agent, barrier.phase + 1}), kPoison, 16);
  block->for_granules(to, 16, [](Granule& g) {
    g.copying = true;
    g.unpublished = false;
  });
  transfer.pieces.push_back(piece);
}

// As a thread ends; the last one leaves no announcement behind.
inline void Block::end_async() {
  if (std::count_if(threads_.begin(), threads_.end(), [](const Thread& t) { return t.state == Thread::State::done; }) +
          1 ==
      static_cast<std::ptrdiff_t>(threads_.size()))
    for (const NamedBarrier& barrier : async_->named)
      if (barrier.arrived > 0) fail("a block ends with threads that were announced and not met");
  if (current_->index % kMostTogether != 0) return;
  const auto group = async_->groups.find(current_->index / kMostTogether);
  if (group != async_->groups.end() && !group->second.under_way.empty())
    fail("a thread ends with products that were never waited for");
}

inline Warpgroup& warpgroup() { return block->async().groups[block->thread().index / kMostTogether]; }

// An operand of a product in shared memory, [count][16] with count rows or columns, as warps [first, last) read it.
inline std::vector<float> operand_at(uint64_t descriptor, int count, bool along_rows, int first_warp, int last_warp,
                                     const std::function<float(uint16_t)>& to_float) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t begin = field(0), leading = field(16), stride = field(32);
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) block->fail("another layout of an operand");
  const int group = block->thread().index / kMostTogether, warps = kMostTogether / kWarp;
  std::vector<float> out(static_cast<size_t>(count) * 16);
  std::map<uint32_t, const unsigned char*> words;
  for (int i = 0; i < count; ++i)
    for (int k = 0; k < 16; ++k) {
      const int row = along_rows ? i : k, column = along_rows ? k : i;
      uint32_t at = begin + static_cast<uint32_t>(row % 8 * 128 + column % 64 * 2) +
                    static_cast<uint32_t>(row / 8) * stride + static_cast<uint32_t>(column / 64) * leading;
      at ^= (at >> 7 & 7) << 4;
      const unsigned char*& word = words[at & ~3u];
      if (word == nullptr) {
        for (int w = first_warp; w < last_warp; ++w) {
          const auto agent = static_cast<int>(block->thread_count()) + group * warps + w;
          const Clock& clock = block->thread(static_cast<size_t>(group * kMostTogether + w * kWarp)).clock;
          word = block->reading(at & ~3u, kGranule, clock, {agent, warpgroup().begun});
        }
        block->for_granules(at & ~3u, kGranule, [](Granule& g) {
          if (g.unpublished) block->fail("a product reads a store that it may not see yet");
        });
      }
      uint16_t bits;
      std::memcpy(&bits, word + at % 4, 2);
      out[static_cast<size_t>(i * 16 + k)] = to_float(bits);
    }
  return out;
}

// What each thread of a warpgroup brings to a product.
struct ProductLane {
  float (*sums)[4];
  const uint32_t* left;  // in registers, or null
  uint64_t left_at, right_at;
  bool add;
};

// The sums of these registers as products under way leave them; their registers themselves are poisoned.
inline Products& sums_of(void** lanes, int count) {
  Warpgroup& group = warpgroup();
  float* first = static_cast<ProductLane*>(lanes[0])->sums[0];
  for (auto p = group.under_way.begin(); p != group.under_way.end(); ++p)
    if (p->sums[0] == first) {
      p->group = group.begun;
      group.under_way.splice(group.under_way.end(), group.under_way, p);
      return group.under_way.back();
    }
  Products products{group.begun, {}, count, {}, {}};
  for (int t = 0; t < kMostTogether; ++t) {
    float* sums = static_cast<ProductLane*>(lanes[t])->sums[0];
    products.sums[t] = sums;
    products.registers.insert(products.registers.end(), sums, sums + count);
    std::memset(sums, kPoison, static_cast<size_t>(count) * sizeof(float));
  }
  group.under_way.push_back(std::move(products));
  return group.under_way.back();
}

template <class T, int kBlocks>
void product_of_group(const char* name, ProductLane own, bool right_along_rows) {
  block->together<kMostTogether>(name, &own, [&](void** lanes) {
    const auto number = [](uint16_t bits) { return bmf::cuda::to_float(T{bits}); };
    if (!warpgroup().ready) block->fail("a product begins without begin_products");
    std::vector<float> left(64 * 16);
    Products& products = sums_of(lanes, kBlocks * 4);
    for (int w = 0; w < 4 && own.left == nullptr; ++w) {
      const auto& lane = *static_cast<ProductLane*>(lanes[w * kWarp]);
      // Sixteen rows of a warp are two groups of eight.
      const uint64_t at = lane.left_at + (2 * w * (lane.left_at >> 32 & 0x3fff));
      const auto rows = operand_at(at, 16, true, w, w + 1, number);
      std::copy(rows.begin(), rows.end(), left.begin() + w * 16 * 16);
    }
    for (int t = 0; t < kMostTogether; ++t) {
      const auto& lane = *static_cast<ProductLane*>(lanes[t]);
      if (lane.left_at != own.left_at || lane.right_at != own.right_at || lane.add != own.add)
        block->fail("threads of a warpgroup differ about a product");
      if (own.left == nullptr) continue;
      const int row = t / kWarp * 16 + t % kWarp / 4, column = t % 4 * 2;
      for (int i = 0; i < 8; ++i)
        left[static_cast<size_t>((row + i / 2 % 2 * 8) * 16 + column + i % 2 + i / 4 * 8)] =
            number(static_cast<uint16_t>(lane.left[i / 2] >> (16 * (i % 2))));
      products.operands.push_back({lane.left, {lane.left, lane.left + 4}});
    }
    const std::vector<float> right = operand_at(own.right_at, 8 * kBlocks, right_along_rows, 0, 4, number);
    for (int t = 0; t < kMostTogether; ++t)
      for (int i = 0; i < 4 * kBlocks; ++i) {
        const int row = t / kWarp * 16 + t % kWarp / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
        float& sum = products.registers[static_cast<size_t>(t * 4 * kBlocks + i)];
        const float *a = &left[static_cast<size_t>(row * 16)], *b = &right[static_cast<size_t>(column * 16)];
        float total = own.add ? sum : 0.0f;
        for (int k = 0; k < 16; ++k) total += a[k] * b[k];
        sum = total;
      }
  });
}

// Ends groups until at most `pending` are under way.
inline void wait_for_products(int pending) {
  block->together<kMostTogether>("wait_products", nullptr, [&](void**) {
    Warpgroup& group = warpgroup();
    group.ready = false;
    group.waited = std::max(group.waited, group.begun - 1 - pending);
    const auto first = static_cast<size_t>(block->thread().index / kMostTogether * kMostTogether);
    for (size_t t = first; t < first + kMostTogether; ++t)
      block->thread(t).clock[block->thread_count() + t / kWarp] = group.waited;
    std::erase_if(group.under_way, [&](const Products& p) {
      if (p.group > group.waited) return false;
      for (const auto& [registers, before] : p.operands)
        if (!std::equal(before.begin(), before.end(), registers)) block->fail("an operand changes under a product");
      for (int t = 0; t < kMostTogether; ++t) {
        const auto* bytes = reinterpret_cast<const unsigned char*>(p.sums[t]);
        if (std::any_of(bytes, bytes + 4 * p.count, [](unsigned char b) { return b != kPoison; }))
          block->fail("sums change under a product");
        std::copy_n(p.registers.begin() + t * p.count, p.count, p.sums[t]);
      }
      return true;
    });
  });
}

// Whether none of these registers belongs to a product that is under way.
template <int kStrips, int kBlocks>
void check_waited(const float (&sums)[kStrips][kBlocks][4]) {
  for (const Products& p : warpgroup().under_way) {
    const float* own = p.sums[block->thread().index % kMostTogether];
    if (own >= &sums[0][0][0] && own < &sums[0][0][0] + sizeof sums / sizeof(float))
      block->fail("sums are used whose products are under way");
  }
}
template <int kStrips, int kSteps>
void check_waited(const uint32_t (&)[kStrips][kSteps][4]) {}

// A launch's `encode`: what cuTensorMapEncodeTiled demands.
template <class Boxes>
bool encode(TensorMap& map, const Boxes& boxes) {
  const Tensor4 tensor{static_cast<const unsigned char*>(boxes.data),
                       {boxes.columns, boxes.rows, boxes.heads, boxes.batches},
                       {2, boxes.row_bytes, boxes.head_bytes, boxes.batch_bytes},
                       boxes.box_rows};
  if (reinterpret_cast<uintptr_t>(tensor.data) % 16 != 0 || boxes.box_rows > 256) return false;
  for (int d = 0; d < 4; ++d) {
    if (tensor.sizes[d] < 1 || tensor.sizes[d] > int64_t{1} << 32) return false;
    if (d > 0 && (tensor.strides[d] % 16 != 0 || tensor.strides[d] >= int64_t{1} << 40 || tensor.strides[d] < 0))
      return false;
  }
  std::memcpy(&map, &tensor, sizeof tensor);
  return true;
}

}  // namespace emulator

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
