// Tiles of 16-bit elements in shared memory: how they get there and back, and the products of a warp with them.
//
// Rows lie one after the other, kDim elements each (a power of two, 64 or more). Of each row's chunks of 16 bytes,
// chunk c is kept at c ^ (row % 8): eight rows' chunks c then lie in different banks, which is what load_matrices reads
// at a time. An address is steered to another pair of chunks by an exclusive or of bits that the rest of it leaves
// alone.
//
// Everything that is read beyond the rows and columns that there are is zero.
#pragma once
#include "cuda/device.h"

namespace bmf::cuda {

constexpr int kChunk = 8, kChunkBytes = 16;  // elements and bytes that are moved together
constexpr int kStrip = 16;                   // rows of a product of a warp
constexpr int kColumns = 8, kDepth = 16;     // its columns, and the elements each is the sum of
constexpr int kPerLane = kStrip * kColumns / kWarp;

BMF_DEVICE int lane_index() { return thread_index() % kWarp; }
BMF_DEVICE int warp_index() { return thread_index() / kWarp; }
BMF_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
BMF_DEVICE int larger(int a, int b) { return a > b ? a : b; }

// Rows in global memory. vectors: each begins at a multiple of 16 bytes.
struct Rows16 {
  uint16_t* data;
  int64_t stride;  // in elements
  int count, width;
  bool vectors;
};

template <int kDim>
struct Tile {
  static constexpr int kRowBytes = 2 * kDim;
  static constexpr int kChunks = kDim / kChunk;
  static_assert((kDim & (kDim - 1)) == 0 && kChunks >= 8);

  uint32_t begin;  // a multiple of kRowBytes

  BMF_EVERYWHERE static constexpr uint32_t bytes(int rows) { return static_cast<uint32_t>(rows * kRowBytes); }
  BMF_DEVICE uint32_t at(int row, int chunk) const {
    return begin + static_cast<uint32_t>(row * kRowBytes + ((chunk ^ (row % 8)) * kChunkBytes));
  }
};

// The address of what a lane loads, `rows` further down and `pairs` pairs of chunks to the right.
template <int kDim>
BMF_DEVICE uint32_t moved(uint32_t address, int rows, int pairs) {
  return (address + Tile<kDim>::bytes(rows)) ^ static_cast<uint32_t>(2 * kChunkBytes * pairs);
}

// How many elements of the chunk at `column` there are.
BMF_DEVICE int present_in(const Rows16& t, int row, int column) {
  return row < t.count ? smaller(kChunk, larger(0, t.width - column)) : 0;
}
BMF_DEVICE Words load_chunk(const Rows16& from, int row, int column) {
  const int present = present_in(from, row, column);
  const uint16_t* source = from.data + row * from.stride + column;
  if (from.vectors && present == kChunk) return *reinterpret_cast<const Words*>(source);
  Words chunk{};
#pragma unroll
  for (int j = 0; j < kChunk; ++j)
    if (j < present) chunk.word[j / 2] |= static_cast<uint32_t>(source[j]) << (16 * (j % 2));
  return chunk;
}

// Which chunks of a tile of kRows rows a thread moves: the same of every kStep-th row, from `row` on.
template <int kRows, int kDim, int kThreads>
struct Share {
  static constexpr int kChunks = Tile<kDim>::kChunks, kStep = kThreads / kChunks, kCount = kRows / kStep;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0);

  int row = thread_index() / kChunks, chunk = thread_index() % kChunks;
};

// Rows [first, first + kRows) into a tile, by all threads of the block; part of the current group of copies.
template <int kRows, int kDim, int kThreads>
BMF_DEVICE void load_tile(Tile<kDim> tile, const Rows16& from, int first) {
  using Mine = Share<kRows, kDim, kThreads>;
  const Mine mine;
  const int column = mine.chunk * kChunk;
  if (from.vectors) {
    const int bytes = 2 * present_in(from, -1, column);
    const uint16_t* source = from.data + (first + mine.row) * from.stride + column;
#pragma unroll
    for (int i = 0; i < Mine::kCount; ++i, source += Mine::kStep * from.stride) {
      const int row = mine.row + i * Mine::kStep;
      const bool present = bytes > 0 && first + row < from.count;
      copy_async<kChunkBytes>(tile.at(row, mine.chunk), present ? source : from.data, present ? bytes : 0);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < Mine::kCount; ++i) {
      const int row = mine.row + i * Mine::kStep;
      store_shared(tile.at(row, mine.chunk), load_chunk(from, first + row, column));
    }
    converge();
  }
}

// The other way round.
template <int kRows, int kDim, int kThreads>
BMF_DEVICE void store_tile(const Rows16& to, Tile<kDim> tile, int first) {
  using Mine = Share<kRows, kDim, kThreads>;
  const Mine mine;
#pragma unroll 1
  for (int i = 0; i < Mine::kCount; ++i) {
    const int row = mine.row + i * Mine::kStep, present = present_in(to, first + row, mine.chunk * kChunk);
    if (present == 0) return;  // nor are there any behind it
    const Words v = load_shared(tile.at(row, mine.chunk));
    uint16_t* target = to.data + (first + row) * to.stride + mine.chunk * kChunk;
    if (to.vectors && present == kChunk) {
      *reinterpret_cast<Words*>(target) = v;
      continue;
    }
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      if (j < present) target[j] = static_cast<uint16_t>(v.word[j / 2] >> (16 * (j % 2)));
  }
}

// Where one of a lane's sums stands: item `item` of block `block` of strip `strip`, known when compiling, and its row
// and column.
struct Spot {
  int strip, block, item, row, column;
};

// f(sum, spot) for a lane's part of sums [16 kStrips][8 kBlocks] of a warp.
template <int kStrips, int kBlocks, class F>
BMF_DEVICE void for_sums(float (&sums)[kStrips][kBlocks][kPerLane], const F& f) {
  const int row = lane_index() / 4, column = lane_index() % 4 * 2;
#pragma unroll
  for (int s = 0; s < kStrips; ++s)
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        f(sums[s][n][i], Spot{s, n, i, kStrip * s + row + 8 * (i / 2), kColumns * n + column + i % 2});
}

// The sums of a warp as the left operand of another product, rounded to T.
template <class T, int kStrips, int kBlocks>
BMF_DEVICE void as_operand(uint32_t (&operand)[kStrips][kBlocks / 2][4],
                           const float (&sums)[kStrips][kBlocks][kPerLane]) {
#pragma unroll
  for (int s = 0; s < kStrips; ++s)
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      operand[s][n / 2][n % 2 * 2] = pack<T>(sums[s][n][0], sums[s][n][1]);
      operand[s][n / 2][n % 2 * 2 + 1] = pack<T>(sums[s][n][2], sums[s][n][3]);
    }
}

// A warp's sums, rounded to T, into rows from `row` on of a tile.
template <class T, int kStrips, int kDim>
BMF_DEVICE void put_sums(Tile<kDim> tile, int row, const float (&sums)[kStrips][kDim / kColumns][kPerLane]) {
#pragma unroll
  for (int s = 0; s < kStrips; ++s)
#pragma unroll
    for (int n = 0; n < kDim / kColumns; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_shared(tile.at(row + kStrip * s + 8 * half + lane_index() / 4, n) + lane_index() % 4 * 4,
                     pack<T>(sums[s][n][2 * half], sums[s][n][2 * half + 1]));
}

// sums[16 kStrips][kRows] += rows of a from `row` on times the transposed tile b of kRows rows.
template <class T, int kDim, int kStrips, int kBlocks>
BMF_DEVICE void multiply_transposed(float (&sums)[kStrips][kBlocks][kPerLane], Tile<kDim> a, int row, Tile<kDim> b) {
  const int lane = lane_index();
  const uint32_t from_a = a.at(row + lane % 16, lane / 16), from_b = b.at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < kDim / kDepth; ++k) {
    uint32_t left[kStrips][4];
#pragma unroll
    for (int s = 0; s < kStrips; ++s) load_matrices(left[s], moved<kDim>(from_a, kStrip * s, k));
#pragma unroll
    for (int n = 0; n < kBlocks; n += 2) {
      uint32_t right[4];
      load_matrices(right, moved<kDim>(from_b, kColumns * n, k));
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        multiply_add<T>(sums[s][n], left[s], right[0], right[1]);
        multiply_add<T>(sums[s][n + 1], left[s], right[2], right[3]);
      }
    }
  }
}

// sums[16 kStrips][kDim] += an operand [16 kStrips][16 kSteps] in registers times the tile b of 16 kSteps rows.
template <class T, int kDim, int kStrips, int kSteps>
BMF_DEVICE void multiply(float (&sums)[kStrips][kDim / kColumns][kPerLane], const uint32_t (&a)[kStrips][kSteps][4],
                         Tile<kDim> b) {
  const int lane = lane_index();
  const uint32_t from_b = b.at(lane % 16, lane / 16);
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int n = 0; n < kDim / kColumns; n += 2) {
      uint32_t right[4];
      load_matrices_transposed(right, moved<kDim>(from_b, kDepth * k, n / 2));
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        multiply_add<T>(sums[s][n], a[s][k], right[0], right[1]);
        multiply_add<T>(sums[s][n + 1], a[s][k], right[2], right[3]);
      }
    }
}

}  // namespace bmf::cuda
