// The fused MLP, backward: a block walks over tiles of rows and takes each through all layers, from the last to the
// first. With g the gradient of what matrix W gave, and z what the activation made its input h of:
//
//   dW = g^T h,   db = g^T 1,   the next g = (g W) activation'(z)
//
// g and h are in shared memory, where the sums over rows find them; the next g and z are in a second buffer each. A
// block adds up dW and db over all its rows, in shared memory as far as there is room, else in its own part of the
// workspace; each thread reads and writes its own sums only. A second kernel adds the blocks' sums, the first block's
// first.
#pragma once
#include "cuda/mlp_fused_network.h"

namespace bmf::cuda {

template <int kWidth>
struct FusedBackwardShape {
  static constexpr int kWarps = 8, kThreads = kWarps * kWarp;
  static constexpr int kRows = kWarps * kStrip;
  static constexpr int kTilesBytes = 4 * 2 * kWidth * kRows, kSlotBytes = 2 * kWidth * kWidth;
  static constexpr int kFewestSlots = 1;
  // A warp's part of a dW, as four by two warps share it. Behind its columns stands a block that is db in each column.
  static constexpr int kStrips = kWidth / 64, kBlocks = kWidth / 16;
  static constexpr int kChunks = kStrips * (kBlocks + 1);              // of 16 bytes, of a thread
  static constexpr int kSumsBytes = kChunks * kThreads * kChunkBytes;  // of a block, for one matrix
  static_assert(4 * kStrips * kStrip == kWidth && 2 * kBlocks * kColumns == kWidth);
};

// Where in a matrix a thread's sums stand.
template <int kWidth>
struct SumsPlace {
  using Shape = FusedBackwardShape<kWidth>;
  int warp_row, warp_column, row, column;  // of the warp, and of the thread's first sum

  BMF_DEVICE explicit SumsPlace(int thread)
      : warp_row(thread / kWarp / 2 * Shape::kStrips * kStrip),
        warp_column(thread / kWarp % 2 * Shape::kBlocks * kColumns),
        row(warp_row + thread % kWarp / 4),
        column(warp_column + thread % 4 * 2) {}
};

BMF_DEVICE float* block_sums(const MlpFusedArgs& a, int bytes, int matrix, int block) {
  return a.sums + (int64_t{matrix} * a.blocks + block) * (bytes / static_cast<int>(sizeof(float)));
}

// This block's dW and db of matrix m += g^T h, of tiles in shared memory.
template <class T, int kWidth>
BMF_DEVICE void add_weight_gradient(const Network<kWidth>& network, int m, Tile<kWidth> g, Tile<kWidth> h,
                                    uint32_t kept, bool begun, bool last) {
  using Shape = FusedBackwardShape<kWidth>;
  constexpr int kStrips = Shape::kStrips, kBlocks = Shape::kBlocks;
  const SumsPlace<kWidth> place(thread_index());
  if (place.warp_row >= network.rows(m) || place.warp_column >= network.columns(m)) return;

  const bool near = m < network.a.kept;
  const auto offset = [](int chunk) { return (chunk * Shape::kThreads + thread_index()) * kChunkBytes; };
  const uint32_t own = kept + static_cast<uint32_t>(m * Shape::kSumsBytes);
  auto* far = reinterpret_cast<unsigned char*>(block_sums(network.a, Shape::kSumsBytes, m, block_x()));
  float sums[kStrips][kBlocks + 1][kPerLane] = {};
  if (begun)
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
#pragma unroll
      for (int n = 0; n <= kBlocks; ++n) {
        const int at = offset(s * (kBlocks + 1) + n);
        const Words v = near ? load_shared(own + static_cast<uint32_t>(at)) : *reinterpret_cast<Words*>(far + at);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) sums[s][n][i] = as_float(v.word[i]);
      }
  converge();

  const int lane = lane_index();
  const uint32_t from_g = g.at(lane % 8 + lane / 16 * 8, lane / 8 % 2), from_h = h.at(lane % 16, lane / 16);
  const int strip = place.warp_row / kStrip, pair = place.warp_column / (2 * kColumns);
  const uint32_t ones = pack<T>(1.0f, 1.0f);
#pragma unroll 2
  for (int k = 0; k < Shape::kRows / kDepth; ++k) {
    uint32_t left[kStrips][4];
#pragma unroll
    for (int s = 0; s < kStrips; ++s) load_matrices_transposed(left[s], moved<kWidth>(from_g, kDepth * k, strip + s));
    if (place.warp_column == 0)
#pragma unroll
      for (int s = 0; s < kStrips; ++s) multiply_add<T>(sums[s][kBlocks], left[s], ones, ones);
#pragma unroll
    for (int n = 0; n < kBlocks; n += 2) {
      uint32_t right[4];
      load_matrices_transposed(right, moved<kWidth>(from_h, kDepth * k, pair + n / 2));
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        multiply_add<T>(sums[s][n], left[s], right[0], right[1]);
        multiply_add<T>(sums[s][n + 1], left[s], right[2], right[3]);
      }
    }
  }

#pragma unroll
  for (int s = 0; s < kStrips; ++s)
#pragma unroll
    for (int n = 0; n <= kBlocks; ++n) {
      const int at = offset(s * (kBlocks + 1) + n);
      Words v;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) v.word[i] = as_bits(sums[s][n][i]);
      if (near && !last)
        store_shared(own + static_cast<uint32_t>(at), v);
      else
        *reinterpret_cast<Words*>(far + at) = v;
    }
}

// sums, gradients of h, become those of z, which the tile holds in rows from `row` on; h takes its place there.
template <class T, int kWidth>
BMF_DEVICE void activate_backward(Activation activation, float (&sums)[1][kWidth / kColumns][kPerLane], Tile<kWidth> z,
                                  int row) {
  with_activation(activation, [&]<Activation kKind>() {
#pragma unroll
    for (int n = 0; n < kWidth / kColumns; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t at = z.at(row + 8 * half + lane_index() / 4, n) + lane_index() % 4 * 4;
        const uint32_t both = as_bits(load_shared_float(at));
        float value[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const auto [h, slope] = activate<kKind>(to_float(T{static_cast<uint16_t>(both >> (16 * i))}));
          value[i] = h;
          sums[0][n][2 * half + i] *= slope;
        }
        store_shared(at, pack<T>(value[0], value[1]));
      }
  });
  converge();
}

template <class T, int kWidth>
BMF_KERNEL((FusedBackwardShape<kWidth>::kThreads))
mlp_fused_backward_kernel(BMF_CONSTANT const MlpFusedArgs a) {
  using Shape = FusedBackwardShape<kWidth>;
  constexpr int kThreads = Shape::kThreads, kRows = Shape::kRows;
  const Network<kWidth> network(a);
  const int64_t step = int64_t{kRows} * a.blocks;
  const auto tile = [](int i) { return Tile<kWidth>{shared_begin() + Tile<kWidth>::bytes(kRows * i)}; };
  const auto grads_at = [&](int stage) { return tile(stage); };
  const auto inputs_at = [&](int stage) { return tile(2 + stage); };
  const int output = network.count - 1, used = a.grad_x != nullptr ? network.count : a.hidden;
  WeightRing<kWidth, kThreads> weights{network, tile(4).begin, a.slots, used, output, -1};
  const uint32_t kept = weights.at(smaller(a.slots, used)).begin;
  const auto load_grads = [&](int stage, int64_t first) {
    load_tile<kRows, kWidth, kThreads>(grads_at(stage),
                                       network.template part<kRows>(a.grad_y, a.outputs, first, 0, a.outputs), 0);
  };
  const auto load_inputs = [&](int stage, int m, int64_t first) {
    load_tile<kRows, kWidth, kThreads>(inputs_at(stage), network.template input<kRows>(m, first), 0);
  };

  int64_t first = int64_t{kRows} * block_x();
  load_grads(0, first);
  load_inputs(0, output, first);
  weights.start();
  commit_copies();

  const int warp_row = warp_index() * kStrip;
  int stage = 0, grads = 0;
  bool begun = false;
  for (; first < a.rows; first += step, begun = true) {
    const bool last = first + step >= a.rows;
#pragma unroll 1
    for (int m = output; m >= 0; --m, stage ^= 1) {
      const bool hidden = !network.is_input(m), by_weights = output - m < used;
      wait_copies<0>();
      barrier();  // what this step needs has come, and nobody needs what the one before it did
      if (m > 0) {
        load_inputs(stage ^ 1, m - 1, first);
      } else if (!last) {
        load_grads(grads ^ 1, first + step);
        load_inputs(stage ^ 1, output, first + step);
      }
      commit_copies();
      if (by_weights) {
        float sums[1][kWidth / kColumns][kPerLane] = {};
        multiply_tiles<T, true, kWidth>(sums, grads_at(grads), warp_row, weights.current(),
                                        depth_steps(network.rows(m)));
        if (hidden) {
          activate_backward<T, kWidth>(a.activation, sums, inputs_at(stage), warp_row);
          put_sums<T>(grads_at(grads ^ 1), warp_row, sums);
        } else {
          Rows16 to = network.template part<kRows>(a.grad_x, a.inputs, first, kWidth * m, network.columns(m));
          store_sums<T>(to, warp_row, sums);
        }
        barrier();  // the matrix is used, and h is there
        weights.replace(output - m, weights.slot, last);
        weights.next();
        commit_copies();
      }
      if (a.grad_weights != nullptr)
        add_weight_gradient<T, kWidth>(network, m, grads_at(grads), inputs_at(stage), kept, begun, last);
      if (hidden || m == 0) grads ^= 1;
    }
  }
}

// Adds the blocks' sums: a block of kWarps warps has 32 chunks of four sums of matrix block_y, each warp the sums of
// every kWarps-th block.
template <int kWidth>
struct FusedSumShape {
  static constexpr int kWarps = 8, kThreads = kWarps * kWarp;
  static constexpr int kBlocks = FusedBackwardShape<kWidth>::kSumsBytes / kChunkBytes / kWarp;
  static constexpr int kSharedBytes = kThreads * kChunkBytes;
};

template <int kWidth>
BMF_KERNEL((FusedSumShape<kWidth>::kThreads))
mlp_fused_sum_kernel(BMF_CONSTANT const MlpFusedArgs a) {
  using Shape = FusedBackwardShape<kWidth>;
  constexpr int kWarps = FusedSumShape<kWidth>::kWarps;
  const Network<kWidth> network(a);
  const int m = block_y(), chunk = block_x() * kWarp + lane_index();
  float sums[kPerLane] = {};
#pragma unroll 4
  for (int b = warp_index(); b < a.blocks; b += kWarps) {
    const float* from = block_sums(a, Shape::kSumsBytes, m, b) + kPerLane * chunk;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sums[i] += from[i];
  }
  const auto place_of = [](int thread) { return shared_begin() + static_cast<uint32_t>(thread * kChunkBytes); };
  store_shared(place_of(thread_index()),
               Words{{as_bits(sums[0]), as_bits(sums[1]), as_bits(sums[2]), as_bits(sums[3])}});
  barrier();
  if (warp_index() > 0) return;
  for (int w = 1; w < kWarps; ++w) {
    const Words more = load_shared(place_of(w * kWarp + lane_index()));
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sums[i] += as_float(more.word[i]);
  }

  const int part = chunk / Shape::kThreads, strip = part / (Shape::kBlocks + 1), block = part % (Shape::kBlocks + 1);
  const SumsPlace<kWidth> place(chunk % Shape::kThreads);
  float* weights = a.grad_weights + network.first_weight(m);
  const bool is_bias = block == Shape::kBlocks;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int row = place.row + kStrip * strip + 8 * (i / 2), column = place.column + kColumns * block + i % 2;
    if (row >= network.rows(m)) continue;
    if (!is_bias && column < network.columns(m)) weights[int64_t{row} * network.stride(m) + column] = sums[i];
    if (is_bias && place.column == 0 && i % 2 == 0 && a.grad_biases != nullptr && (m == 0 || !network.is_input(m)))
      a.grad_biases[network.first_bias(m) + row] = sums[i];
  }
}

}  // namespace bmf::cuda
