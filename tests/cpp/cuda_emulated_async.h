// What runs beside the threads of an emulated block: Hopper's barriers that count bytes, copies and products; the third
// part of cuda_emulator.h. Errors, beside its own:
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
template <class T>
std::vector<float> operand_at(uint64_t descriptor, int count, bool along_rows, int first_warp, int last_warp) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t begin = field(0), leading = field(16), stride = field(32);
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) block->fail("another layout of an operand");
  const int group = block->thread().index / kMostTogether, warps = kMostTogether / kWarp;
  std::vector<float> out(static_cast<size_t>(count) * 16);
  for (int row = 0; row < (along_rows ? count : 16); ++row)
    for (int column = 0; column < (along_rows ? 16 : count); column += 2) {
      uint32_t at = begin + static_cast<uint32_t>(row % 8 * 128 + column % 64 * 2) +
                    static_cast<uint32_t>(row / 8) * stride + static_cast<uint32_t>(column / 64) * leading;
      at ^= (at >> 7 & 7) << 4;
      uint16_t two[2];
      for (int w = first_warp; w < last_warp; ++w) {
        const auto agent = static_cast<int>(block->thread_count()) + group * warps + w;
        const Clock& clock = block->thread(static_cast<size_t>(group * kMostTogether + w * kWarp)).clock;
        std::memcpy(two, block->reading(at, kGranule, clock, {agent, warpgroup().begun}), sizeof two);
      }
      block->for_granules(at, kGranule, [](Granule& g) {
        if (g.unpublished) block->fail("a product reads a store that it may not see yet");
      });
      for (int i = 0; i < 2; ++i)
        out[static_cast<size_t>(along_rows ? row * 16 + column + i : (column + i) * 16 + row)] =
            bmf::cuda::to_float(T{two[i]});
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
    if (!warpgroup().ready) block->fail("a product begins without begin_products");
    std::vector<float> left(64 * 16);
    Products& products = sums_of(lanes, kBlocks * 4);
    for (int w = 0; w < 4 && own.left == nullptr; ++w) {
      const auto& lane = *static_cast<ProductLane*>(lanes[w * kWarp]);
      // Sixteen rows of a warp are two groups of eight.
      const uint64_t at = lane.left_at + (2 * w * (lane.left_at >> 32 & 0x3fff));
      const auto rows = operand_at<T>(at, 16, true, w, w + 1);
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
            bmf::cuda::to_float(T{static_cast<uint16_t>(lane.left[i / 2] >> (16 * (i % 2)))});
      products.operands.push_back({lane.left, {lane.left, lane.left + 4}});
    }
    const std::vector<float> right = operand_at<T>(own.right_at, 8 * kBlocks, right_along_rows, 0, 4);
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
