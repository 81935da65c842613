// The fused MLP, forward: a block walks over tiles of rows and takes each through all layers; a warp's rows stay in its
// registers from the first product to the last. The parts of x come into two buffers in turn, the next while the
// current is worked on; weights are loaded once, as far as shared memory has room for them.
#pragma once
#include "cuda/mlp_fused_network.h"

namespace bmf::cuda {

template <int kWidth>
struct FusedForwardShape {
  static constexpr int kStrips = 128 / kWidth, kWarps = kWidth / 16, kThreads = kWarps * kWarp;  // what registers hold
  static constexpr int kRows = kWarps * kStrips * kStrip;
  static constexpr int kTilesBytes = 2 * 2 * kWidth * kRows, kSlotBytes = 2 * kWidth * kWidth;
  static constexpr int kFewestSlots = 2;
};

template <class T, int kWidth>
BMF_KERNEL((FusedForwardShape<kWidth>::kThreads))
mlp_fused_forward_kernel(BMF_CONSTANT const MlpFusedArgs a) {
  using Shape = FusedForwardShape<kWidth>;
  constexpr int kThreads = Shape::kThreads, kStrips = Shape::kStrips, kRows = Shape::kRows;
  const Network<kWidth> network(a);
  const int64_t step = int64_t{kRows} * a.blocks;
  const auto inputs_at = [&](int stage) { return Tile<kWidth>{shared_begin() + Tile<kWidth>::bytes(kRows * stage)}; };
  WeightRing<kWidth, kThreads> weights{network, inputs_at(2).begin, a.slots, network.count, 0, 1};

  int64_t first = int64_t{kRows} * block_x();
  load_tile<kRows, kWidth, kThreads>(inputs_at(0), network.template input<kRows>(0, first), 0);
  weights.start();
  commit_copies();

  const int warp_row = warp_index() * kStrips * kStrip;
  float sums[kStrips][kWidth / kColumns][kPerLane];
  uint32_t operand[kStrips][kWidth / kDepth][4];
  int stage = 0;
  bool begun = false;
  for (; first < a.rows; first += step) {
    const bool last = first + step >= a.rows;
#pragma unroll 1
    for (int m = 0; m < network.count; ++m, weights.next(), begun = true) {
      if (network.is_input(m) || !weights.holds_all()) {
        wait_copies<0>();
        barrier();  // what this step needs has come, and nobody needs what the one before it did
        if (begun) weights.replace(m == 0 ? network.count - 1 : m - 1, weights.before(weights.slot), m > 0 && last);
        if (network.is_input(m)) {
          const bool more = network.is_input(m + 1);
          if (more || !last)
            load_tile<kRows, kWidth, kThreads>(
                inputs_at(stage ^ 1), network.template input<kRows>(more ? m + 1 : 0, more ? first : first + step), 0);
        }
        commit_copies();
      }
      if (m == 0 || !network.is_input(m)) for_sums(sums, [](float& x, const Spot&) { x = 0; });
      if (network.is_input(m)) {
        multiply_tiles<T, false, kWidth>(sums, inputs_at(stage), warp_row, weights.current(),
                                         depth_steps(network.columns(m)));
        stage ^= 1;
        if (network.is_input(m + 1)) continue;
      } else {
        multiply_transposed<T, kWidth>(sums, operand, weights.current(), network.rows(m));
      }
      if (a.biases != nullptr) {
        const float* bias = a.biases + network.first_bias(m);
        const int width = network.rows(m);
        for_sums(sums, [&](float& x, const Spot& at) {
          if (at.column < width) x += bias[at.column];
        });
      }
      if (network.is_output(m)) {
        store_sums<T>(network.template part<kRows>(a.y, a.outputs, first, 0, a.outputs), warp_row, sums);
        continue;
      }
      const int layer = m - network.input_tiles + 1;
      if (a.pre != nullptr) store_sums<T>(network.template pre<kRows>(layer, first), warp_row, sums);
      with_activation(a.activation, [&]<Activation kKind>() {
        for_sums(sums, [](float& x, const Spot&) { x = activate<kKind>(x).value; });
      });
      converge();
      as_operand<T>(operand, sums);
    }
  }
}

}  // namespace bmf::cuda
