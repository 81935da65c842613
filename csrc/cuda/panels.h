// Tiles in shared memory as TMA leaves them and wgmma reads them (hopper.h), the products of a warpgroup with them, and
// rings of tiles that a producer fills and consumers empty.
#pragma once
#include "cuda/hopper.h"
#include "cuda/tile.h"

namespace bmf::cuda {

constexpr int kGroupRows = 64;       // of a product of a warpgroup
constexpr int kWidestProduct = 128;  // its columns, at most
constexpr int kGroupWarps = kGroupThreads / kWarp;

BMF_DEVICE int group_index() { return thread_index() / kGroupThreads; }

template <int kDim, int kRows>
struct Panels {
  static constexpr uint32_t kPanelBytes = kRows * kPanelRowBytes, kEightRows = 8 * kPanelRowBytes;
  static constexpr uint32_t kBytes = kPanelBytes * (kDim / kPanel);
  static_assert(kDim % kPanel == 0 && kRows % 8 == 0);

  uint32_t begin;  // a multiple of 1024

  // An operand whose sums run along rows: rows from `row`, 16 columns from `column`. Panels lie elsewhere, and have no
  // distance.
  BMF_DEVICE uint64_t along_rows(int row, int column) const {
    return operand(row, column / kPanel, static_cast<uint32_t>(2 * (column % kPanel)), kChunkBytes);
  }
  // One whose sums run down columns: 16 rows from `row`, columns from `column`, which begins a panel.
  BMF_DEVICE uint64_t down_columns(int row, int column) const { return operand(row, column / kPanel, 0, kPanelBytes); }

  // From row `row` of a tensor on.
  BMF_DEVICE void load(const TensorMap& map, int row, int head, int batch, uint32_t barrier) const {
#pragma unroll
    for (int p = 0; p < kDim / kPanel; ++p)
      copy_box(begin + p * kPanelBytes, map, p * kPanel, row, head, batch, barrier);
  }
  // Rows from `first` on become zero, by all lanes of a warp.
  BMF_DEVICE void clear(int first) const {
    constexpr int kChunks = kPanelRowBytes / kChunkBytes;
    for (int i = first * kChunks + lane_index(); i < kRows * kChunks; i += kWarp)
#pragma unroll
      for (int p = 0; p < kDim / kPanel; ++p)
        store_shared(begin + p * kPanelBytes + static_cast<uint32_t>(i * kChunkBytes), Words{});
  }

 private:
  BMF_DEVICE uint64_t operand(int row, int panel, uint32_t bytes, uint32_t leading) const {
    const uint32_t at = begin + panel * kPanelBytes + static_cast<uint32_t>(row * kPanelRowBytes) + bytes;
    return kSwizzle128 | at >> 4 | uint64_t{leading >> 4} << 16 | uint64_t{kEightRows >> 4} << 32;
  }
};

// sums[64][kRows] = rows of a from `row` on times the transposed tile b.
template <class T, int kDim, int kRows, int kRowsA>
BMF_DEVICE void multiply_transposed(float (&sums)[1][kRows / kColumns][kPerLane], Panels<kDim, kRowsA> a, int row,
                                    Panels<kDim, kRows> b) {
#pragma unroll
  for (int k = 0; k < kDim; k += kDepth)
    group_product<T, kRows / kColumns>(sums[0], a.along_rows(row, k), b.along_rows(0, k), k > 0);
}

// sums[64][kDim] += an operand [64][kRows] in registers times the tile b.
template <class T, int kDim, int kRows>
BMF_DEVICE void multiply(float (&sums)[1][kDim / kColumns][kPerLane], const uint32_t (&a)[1][kRows / kDepth][4],
                         Panels<kDim, kRows> b) {
  constexpr int kWide = kDim < kWidestProduct ? kDim : kWidestProduct;
#pragma unroll
  for (int k = 0; k < kRows / kDepth; ++k)
#pragma unroll
    for (int c = 0; c < kDim; c += kWide)
      group_product_add<T, kWide / kColumns>(sums[0] + c / kColumns, a[0][k], b.down_columns(k * kDepth, c));
}

// A warp's sums, rounded to T, into rows from `row` on in global memory. A row's width is a multiple of 8.
template <class T, int kBlocks>
BMF_DEVICE void store_sums(const Rows16& to, int row, const float (&sums)[1][kBlocks][kPerLane]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + 8 * half + lane_index() / 4;
    uint16_t* target = to.data + r * to.stride + lane_index() % 4 * 2;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
      if (r < to.count && kColumns * n < to.width)
        *reinterpret_cast<uint32_t*>(target + kColumns * n) = pack<T>(sums[0][n][2 * half], sums[0][n][2 * half + 1]);
  }
  converge();
}

// Where in a ring of kStages one stands, and how often it has been round.
template <int kStages>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  BMF_DEVICE void operator++() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// kStages buffers with two barriers each, of 8 bytes from `barriers` on: filled, by one thread and its copies, and
// emptied, by a lane of each of kReaders warps.
template <int kStages, int kReaders>
struct Ring {
  static constexpr uint32_t kBytes = 16 * kStages;

  uint32_t barriers;

  BMF_DEVICE uint32_t filled(const Turn<kStages>& turn) const {
    return barriers + static_cast<uint32_t>(16 * turn.stage);
  }
  BMF_DEVICE uint32_t emptied(const Turn<kStages>& turn) const { return filled(turn) + 8; }
  BMF_DEVICE void init() const {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      init_barrier(filled({i, 0}), 1);
      init_barrier(emptied({i, 0}), kReaders);
    }
  }
  // The producer's side, by one lane: others of its warp might come so late that the phase after has ended, too.
  BMF_DEVICE void wait_emptied(const Turn<kStages>& turn) const { wait_barrier(emptied(turn), turn.parity ^ 1); }
  // The consumers' side.
  BMF_DEVICE void wait_filled(const Turn<kStages>& turn) const { wait_barrier(filled(turn), turn.parity); }
  BMF_DEVICE void release(const Turn<kStages>& turn) const {
    converge();
    if (lane_index() == 0) arrive(emptied(turn));
    converge();
  }
};

}  // namespace bmf::cuda
