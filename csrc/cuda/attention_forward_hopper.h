// attention forward for Hopper (FlashAttention-3, Shah et al. 2024): of a tile of 128 queries each of two warpgroups
// has
// 64. Two things hide the exponentials behind products: one group's products run while the other makes weights (they
// take turns at two barriers), and a group's next scores are begun before its last weights meet their values. Scores,
// weights and the output stay in registers.
#pragma once
#include "cuda/attention_hopper.h"

namespace bmf::cuda {

struct HopperForwardArgs {
  AttentionArgs attention;
  Schedule schedule;
  TensorMap query, key, value;
};

template <int kDim>
struct HopperForwardShape {
  static constexpr int kKeys = kDim > 128 ? 64 : 128, kStages = 2;
  using Queries = Stream<kDim, kHopperRows, 1>;
  using Keys = Stream<kDim, kKeys, kStages>;
  static constexpr uint32_t kTilesBytes = Queries::kBytes + 2 * Keys::kBytes;
  static constexpr uint32_t kQueriesRing = Ring<1, kReaders>::kBytes, kKeysRing = Ring<kStages, kReaders>::kBytes;
  static constexpr int kSharedBytes = kTilesBytes + kQueriesRing + 2 * kKeysRing + 8;
};

// What producer and consumers agree on, and do.
template <class T, int kDim>
struct HopperForward {
  using Shape = HopperForwardShape<kDim>;

  const HopperForwardArgs& args;
  typename Shape::Queries queries;
  typename Shape::Keys keys, values;
  uint32_t landed;

  BMF_DEVICE explicit HopperForward(const HopperForwardArgs& a) : args(a) {
    const uint32_t tiles = shared_begin(), barriers = tiles + Shape::kTilesBytes;
    queries = {tiles, {barriers}};
    keys = {queries.begin + Shape::Queries::kBytes, {barriers + Shape::kQueriesRing}};
    values = {keys.begin + Shape::Keys::kBytes, {keys.ring.barriers + Shape::kKeysRing}};
    landed = values.ring.barriers + Shape::kKeysRing;
  }

  BMF_DEVICE void init() const {
    queries.ring.init();
    keys.ring.init();
    values.ring.init();
    init_barrier(landed, 1);
  }

  // An item's queries, the keys they see, and where they are.
  struct Work {
    int first, head, batch, begin, end, present;
    Sight sight;
  };
  BMF_DEVICE Work work(int index) const {
    const AttentionArgs& a = args.attention;
    const Item item = item_of(args.schedule, index);
    const int first = item.tile * kHopperRows, batch = item.slice / a.heads, present = present_keys(a, batch, a.keys);
    const Sight sight{a.left, a.right, a.queries, present, a.keys - a.queries};
    const int begin = sight.first_key(first) / Shape::kKeys * Shape::kKeys, end = sight.last_key(first, kHopperRows);
    return {first, item.slice % a.heads, batch, begin, end, present, sight};
  }

  BMF_DEVICE void produce() const {
    const AttentionArgs& a = args.attention;
    Turn<1> query_turn;
    Turn<Shape::kStages> turn;
    uint32_t landed_parity = 0;
    for (int i = block_x(); i < args.schedule.items; i += args.schedule.blocks) {
      const Work w = work(i);
      if (w.begin >= w.end) continue;
      queries.fill(query_turn, args.query, w.first, w.head, w.batch);
      ++query_turn;
      for (int start = w.begin; start < w.end; start += Shape::kKeys, ++turn) {
        keys.fill(turn, args.key, start, w.head / a.group, w.batch);
        if (w.present < a.keys && w.present - start < Shape::kKeys)
          values.fill_present(turn, args.value, start, w.head / a.group, w.batch, w.present - start, landed,
                              landed_parity);
        else
          values.fill(turn, args.value, start, w.head / a.group, w.batch);
      }
    }
  }

  BMF_DEVICE void consume(int group) const {
    constexpr int kKeys = Shape::kKeys, kBoth = kConsumers * kGroupThreads;
    const AttentionArgs& a = args.attention;
    const float factor = a.scale * kLog2e;
    const int warp_row = group * kGroupRows + warp_index() % kGroupWarps * kStrip;
    const int own = 1 + group, other = 1 + (group ^ 1);  // barriers of whose turn it is to multiply
    if (group == 1) announce(other, kBoth);
    Turn<1> query_turn;
    Turn<Shape::kStages> turn;
    for (int i = block_x(); i < args.schedule.items; i += args.schedule.blocks) {
      const Work w = work(i);
      const int row = w.first + warp_row;
      const auto mask = [&](auto& scores, int start) {
        if (w.sight.all(row, kStrip, start, kKeys)) return;
        for_sums(scores, [&](float& x, const Spot& at) {
          if (!w.sight.sees(row + at.row, start + at.column)) x = -infinity();
        });
      };
      OnlineSoftmax<1> softmax;
      float out[1][kDim / kColumns][kPerLane] = {}, shrink[1][2];
      if (w.begin < w.end) {
        float scores[1][kKeys / kColumns][kPerLane];
        uint32_t weights[1][kKeys / kDepth][4];
        queries.ring.wait_filled(query_turn);
        keys.ring.wait_filled(turn);
        begin_products(scores);
        multiply_transposed<T>(scores, queries.tile(query_turn), group * kGroupRows, keys.tile(turn));
        commit_products();
        wait_products<0>(scores);
        keys.ring.release(turn);
        mask(scores, w.begin);
        softmax.add(scores, factor, shrink);
        as_operand<T>(weights, scores);
        for (int start = w.begin + kKeys; start < w.end; start += kKeys) {
          const auto values_turn = turn;
          ++turn;
          keys.ring.wait_filled(turn);
          meet(own, kBoth);
          begin_products(scores, out, weights);
          multiply_transposed<T>(scores, queries.tile(query_turn), group * kGroupRows, keys.tile(turn));
          commit_products();
          values.ring.wait_filled(values_turn);
          begin_products();
          multiply<T>(out, weights, values.tile(values_turn));
          commit_products();
          announce(other, kBoth);
          wait_products<1>(scores);
          keys.ring.release(turn);
          mask(scores, start);
          softmax.add(scores, factor, shrink);
          wait_products<0>(out, weights);
          values.ring.release(values_turn);
          scale_rows(out, shrink);
          as_operand<T>(weights, scores);
        }
        queries.ring.release(query_turn);
        values.ring.wait_filled(turn);
        begin_products(out, weights);
        multiply<T>(out, weights, values.tile(turn));
        commit_products();
        wait_products<0>(out, weights);
        values.ring.release(turn);
        ++turn;
        ++query_turn;
      }
      float inverse[1][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const RowStats stats = softmax.finish(0, half, 1.0f, inverse[0][half]);
        const int r = row + 8 * half + lane_index() / 4;
        if (lane_index() % 4 == 0 && r < a.queries)
          a.stats[(int64_t{w.batch} * a.heads + w.head) * a.queries + r] = stats;
      }
      scale_rows(out, inverse);
      store_sums<T>(rows_of(a.out, w.batch, w.head, 0, a.queries, a.head_dim), row, out);
    }
    if (group == 0) meet(own, kBoth);  // the last announcement
  }
};

template <class T, int kDim>
BMF_KERNEL((kHopperThreads, 1))
attention_forward_hopper_kernel(BMF_CONSTANT const HopperForwardArgs args) {
  if constexpr (kOnHopper) run_block(HopperForward<T, kDim>(args));
}

}  // namespace bmf::cuda
