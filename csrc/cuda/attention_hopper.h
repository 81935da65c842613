// What attention's kernels for Hopper share: which calls they take, in which order their blocks work, and the tiles
// that producers leave for consumers.
//
// They have the plain features (attention_scores.h), rows that TMA can read, and no packed sequences. As many blocks
// are launched as there are processors; each takes every so-many-th item. A block is three warpgroups: of the first, a
// warp copies, and the others, which get its registers, multiply.
#pragma once
#include "cuda/attention_scores.h"
#include "cuda/attention_softmax.h"
#include "cuda/panels.h"

namespace bmf::cuda {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kHopperThreads = (1 + kConsumers) * kGroupThreads;
constexpr int kHopperRows = kConsumers * kGroupRows;  // of a tile that a block keeps: queries, or keys
constexpr int kReaders = kConsumers * kGroupWarps;
// What a block is launched with, and how its warpgroups share it; a multiple of 8 each.
constexpr int kLaunchRegisters = (1 << 16) / kHopperThreads / 8 * 8;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * kLaunchRegisters);
constexpr int kHopperSharedBytes = 227 << 10;

// Items are tiles of kHopperRows rows of slices, a slice being a head of a batch. So many slices are worked on together
// as the second-level cache holds what they walk over, longest tiles first: blocks end at about the same time.
struct Schedule {
  int32_t tiles, slices, together, items, blocks;
  bool last_first;  // whether the last tile is the longest
};
struct Item {
  int tile, slice;
};

BMF_DEVICE Item item_of(const Schedule& s, int index) {
  const int section = s.tiles * s.together, first = index / section * s.together;
  const int here = smaller(s.together, s.slices - first), rest = index % section, tile = rest / here;
  return {s.last_first ? s.tiles - 1 - tile : tile, first + rest % here};
}

// What TMA is told of an operand; `launch.encode` makes it a TensorMap, or cannot.
struct Boxes {
  void* data;
  int64_t columns, rows, heads, batches;
  int64_t row_bytes, head_bytes, batch_bytes;  // strides
  int box_rows;
};

// What comes with a tile.
struct Beside {
  uint32_t to;
  const void* from;
  uint32_t bytes;
};

// Tiles that come into a ring's buffers.
template <int kDim, int kRows, int kStages>
struct Stream {
  using Tile = Panels<kDim, kRows>;
  static constexpr uint32_t kBytes = kStages * Tile::kBytes;

  uint32_t begin;
  Ring<kStages, kReaders> ring;

  BMF_DEVICE Tile tile(const Turn<kStages>& turn) const { return {begin + turn.stage * Tile::kBytes}; }
  BMF_DEVICE void fill(const Turn<kStages>& turn, const TensorMap& map, int row, int head, int batch,
                       const Beside& beside = {0, nullptr, 0}) const {
    if (lane_index() == 0) {
      ring.wait_emptied(turn);
      arrive_expecting(ring.filled(turn), Tile::kBytes + beside.bytes);
      tile(turn).load(map, row, head, batch, ring.filled(turn));
      if (beside.bytes > 0) copy_bulk(beside.to, beside.from, beside.bytes, ring.filled(turn));
    }
    converge();
  }
  // The same, but rows from `present` on, which are there but count as absent, become zero: whatever they hold, NaN
  // included, is multiplied by weights of zero. `landed`: a barrier of the producer's own.
  BMF_DEVICE void fill_present(const Turn<kStages>& turn, const TensorMap& map, int row, int head, int batch,
                               int present, uint32_t landed, uint32_t& parity) const {
    if (lane_index() == 0) {
      ring.wait_emptied(turn);
      arrive_expecting(landed, Tile::kBytes);
      tile(turn).load(map, row, head, batch, landed);
    }
    converge();
    wait_barrier(landed, parity);
    parity ^= 1;
    tile(turn).clear(present);
    publish_stores();
    converge();
    if (lane_index() == 0) arrive(ring.filled(turn));
    converge();
  }
};

// Runs a block: one warp produces, two warpgroups consume. Kernel has produce() and consume(group).
template <class Kernel>
BMF_DEVICE void run_block(const Kernel& kernel) {
  if (thread_index() == 0) {
    kernel.init();
    publish_barriers();
  }
  barrier();
  if (group_index() == 0) {
    fewer_registers<kProducerRegisters>();
    if (warp_index() == 0) kernel.produce();
  } else {
    more_registers<kConsumerRegisters>();
    kernel.consume(uniform(group_index()) - 1);
  }
}

}  // namespace bmf::cuda
