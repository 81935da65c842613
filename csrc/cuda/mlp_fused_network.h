// What both directions of the fused MLP share: its matrices, in tiles of [width, width], their way through shared
// memory, and the products and stores that tile.h does not have.
#pragma once
#include "cuda/activation.h"
#include "cuda/mlp_fused.h"
#include "cuda/tile.h"

namespace bmf::cuda {

// Matrix m has the tile [width, width] that takes the m-th part of x to z_0, as long as m < input_tiles; then come the
// matrices between hidden layers, then the output's. What a tile has beyond its matrix is zero.
template <int kWidth>
struct Network {
  const MlpFusedArgs& a;
  int input_tiles, count;

  BMF_EVERYWHERE explicit Network(const MlpFusedArgs& args)
      : a(args), input_tiles((args.inputs + kWidth - 1) / kWidth), count(input_tiles + args.hidden) {}

  BMF_DEVICE bool is_input(int m) const { return m < input_tiles; }
  BMF_DEVICE bool is_output(int m) const { return m == count - 1; }
  BMF_DEVICE int rows(int m) const { return is_output(m) ? a.outputs : kWidth; }
  BMF_DEVICE int columns(int m) const { return is_input(m) ? smaller(kWidth, a.inputs - kWidth * m) : kWidth; }
  BMF_DEVICE int stride(int m) const { return is_input(m) ? a.inputs : kWidth; }
  BMF_DEVICE int64_t first_weight(int m) const {
    return is_input(m) ? int64_t{kWidth} * m
                       : int64_t{kWidth} * a.inputs + int64_t{kWidth} * kWidth * (m - input_tiles);
  }
  BMF_DEVICE int first_bias(int m) const { return is_input(m) ? 0 : kWidth * (m - input_tiles + 1); }

  BMF_DEVICE Rows16 matrix(int m) const {
    const bool vectors = reinterpret_cast<uintptr_t>(a.weights) % kChunkBytes == 0 && stride(m) % kChunk == 0;
    auto* data = static_cast<uint16_t*>(const_cast<void*>(a.weights));
    return {data + first_weight(m), stride(m), rows(m), columns(m), vectors};
  }
  // What matrix m is applied to, of kRows rows from `first` on: a part of x, or a z.
  template <int kRows>
  BMF_DEVICE Rows16 input(int m, int64_t first) const {
    if (!is_input(m)) return pre<kRows>(m - input_tiles, first);
    return part<kRows>(a.x, a.x_stride, first, kWidth * m, columns(m));
  }
  template <int kRows>
  BMF_DEVICE Rows16 pre(int layer, int64_t first) const {
    Rows16 z = part<kRows>(a.pre, kWidth, first, 0, kWidth);
    z.data += layer * a.rows * kWidth;
    return z;
  }
  template <int kRows>
  BMF_DEVICE Rows16 part(const void* data, int64_t row_stride, int64_t first, int column, int width) const {
    const int64_t left = a.rows - first;
    const bool vectors = reinterpret_cast<uintptr_t>(data) % kChunkBytes == 0 && row_stride % kChunk == 0;
    return {static_cast<uint16_t*>(const_cast<void*>(data)) + first * row_stride + column, row_stride,
            left < kRows ? static_cast<int>(left) : kRows, width, vectors};
  }
};

// The matrices in shared memory, in the order of their use, which begins anew with each tile of rows: step i uses
// matrix first + i * by. Where there is no room for all `count` of them, each is loaded again in time.
template <int kWidth, int kThreads>
struct WeightRing {
  const Network<kWidth>& network;
  uint32_t begin;
  int slots, count, first, by;
  int slot = 0;  // of the current step

  BMF_DEVICE bool holds_all() const { return count <= slots; }
  BMF_DEVICE Tile<kWidth> at(int s) const { return {begin + Tile<kWidth>::bytes(kWidth * s)}; }
  BMF_DEVICE Tile<kWidth> current() const { return at(slot); }
  BMF_DEVICE void load(int step, int s) const {
    load_tile<kWidth, kWidth, kThreads>(at(s), network.matrix(first + step * by), 0);
  }
  BMF_DEVICE void start() const {
    for (int i = 0; i < smaller(slots, count); ++i) load(i, i);
  }
  // When nobody needs the matrix of `step`, in `s`, any more: the one that comes there next. last: no rows follow.
  BMF_DEVICE void replace(int step, int s, bool last) const {
    if (!holds_all() && !(last && step + slots >= count)) load((step + slots) % count, s);
  }
  BMF_DEVICE int before(int s) const { return s == 0 ? smaller(slots, count) - 1 : s - 1; }
  BMF_DEVICE void next() { slot = slot + 1 == smaller(slots, count) ? 0 : slot + 1; }
};

// f(k) for the first `steps` of kSteps; unrolled where that is all.
template <int kSteps, class F>
BMF_DEVICE void for_steps(int steps, const F& f) {
  if (steps == kSteps) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) f(k);
  } else {
#pragma unroll 1
    for (int k = 0; k < steps; ++k) f(k);
  }
}
BMF_DEVICE int depth_steps(int elements) { return (elements + kDepth - 1) / kDepth; }

// sums[16 kStrips][kDim] += the first 16 `steps` columns of a, rows from `row` on, times those of b, transposed; or,
// kRows, times the first 16 `steps` rows of b.
template <class T, bool kRows, int kDim, int kStrips>
BMF_DEVICE void multiply_tiles(float (&sums)[kStrips][kDim / kColumns][kPerLane], Tile<kDim> a, int row, Tile<kDim> b,
                               int steps) {
  const int lane = lane_index();
  const uint32_t from_a = a.at(row + lane % 16, lane / 16);
  const uint32_t from_b = kRows ? b.at(lane % 16, lane / 16) : b.at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  for_steps<kDim / kDepth>(steps, [&](int k) {
    uint32_t left[kStrips][4];
#pragma unroll
    for (int s = 0; s < kStrips; ++s) load_matrices(left[s], moved<kDim>(from_a, kStrip * s, k));
#pragma unroll
    for (int n = 0; n < kDim / kColumns; n += 2) {
      uint32_t right[4];
      if constexpr (kRows)
        load_matrices_transposed(right, moved<kDim>(from_b, kDepth * k, n / 2));
      else
        load_matrices(right, moved<kDim>(from_b, kColumns * n, k));
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        multiply_add<T>(sums[s][n], left[s], right[0], right[1]);
        multiply_add<T>(sums[s][n + 1], left[s], right[2], right[3]);
      }
    }
  });
}

// sums[16 kStrips][kDim] += an operand in registers times the transposed tile b, of which `rows` rows count.
template <class T, int kDim, int kStrips>
BMF_DEVICE void multiply_transposed(float (&sums)[kStrips][kDim / kColumns][kPerLane],
                                    const uint32_t (&a)[kStrips][kDim / kDepth][4], Tile<kDim> b, int rows) {
  const int lane = lane_index();
  const uint32_t from_b = b.at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int n = 0; n < kDim / kColumns; n += 2) {
    if (kColumns * n >= rows) return;
#pragma unroll
    for (int k = 0; k < kDim / kDepth; ++k) {
      uint32_t right[4];
      load_matrices(right, moved<kDim>(from_b, kColumns * n, k));
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        multiply_add<T>(sums[s][n], a[s][k], right[0], right[1]);
        multiply_add<T>(sums[s][n + 1], a[s][k], right[2], right[3]);
      }
    }
  }
}

struct alignas(8) TwoWords {
  uint32_t word[2];
};

// A warp's sums, rounded to T, into rows from `row` on. Neighbouring lanes trade halves of two blocks, so that four of
// them write 32 bytes side by side.
template <class T, int kStrips, int kBlocks>
BMF_DEVICE void store_sums(const Rows16& to, int row, const float (&sums)[kStrips][kBlocks][kPerLane]) {
  const int lane = lane_index(), odd = lane % 2;
#pragma unroll
  for (int s = 0; s < kStrips; ++s)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + kStrip * s + 8 * half + lane / 4;
      uint16_t* line = to.data + r * to.stride;
#pragma unroll
      for (int n = 0; n < kBlocks; n += 2) {
        const uint32_t first = pack<T>(sums[s][n][2 * half], sums[s][n][2 * half + 1]);
        const uint32_t second = pack<T>(sums[s][n + 1][2 * half], sums[s][n + 1][2 * half + 1]);
        const uint32_t other = as_bits(shuffle_xor(as_float(odd ? first : second), 1));
        const TwoWords four = odd ? TwoWords{{other, second}} : TwoWords{{first, other}};
        const int column = kColumns * (n + odd) + lane % 4 / 2 * 4;
        if (r >= to.count || column >= to.width) continue;
        if (to.vectors && column + 4 <= to.width) {
          *reinterpret_cast<TwoWords*>(line + column) = four;
          continue;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (column + i < to.width) line[column + i] = static_cast<uint16_t>(four.word[i / 2] >> (16 * (i % 2)));
      }
    }
  converge();
}

}  // namespace bmf::cuda
