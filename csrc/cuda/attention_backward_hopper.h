// attention backward for Hopper: the equations and the order of attention_backward.h, so that gradients are the same
// bits from run to run, on warpgroups. Each block keeps two tiles of 128 rows, queries and their gradients or keys and
// values, and walks over two streams of tiles of the others: kept one times walked one gives scores, kept other times
// walked other gives the weights' gradients, and both go from registers into products with the walked tiles.
#pragma once
#include "cuda/attention_backward.h"
#include "cuda/attention_hopper.h"

namespace bmf::cuda {

struct HopperBackwardArgs {
  AttentionArgs attention;
  Schedule schedule;
  TensorMap kept, kept_other, walked, walked_other;
};

// Of heads wider than 128, one tile of each stream fits beside what is kept.
template <int kDim>
struct HopperBackward {
  static constexpr int kRows = 64, kStages = kDim > 128 ? 1 : 2;
  using Kept = Stream<kDim, kHopperRows, 1>;
  using Walked = Stream<kDim, kRows, kStages>;
  static constexpr uint32_t kTilesBytes = 2 * (Kept::kBytes + Walked::kBytes);
  static constexpr uint32_t kTermBytes = sizeof(RowTerms), kTermsBytes = kRows * kTermBytes;
  static constexpr uint32_t kKeptRing = Ring<1, kReaders>::kBytes;
  static constexpr uint32_t kWalkedRing = Ring<kStages, kReaders>::kBytes;
  static constexpr int kSharedBytes = kTilesBytes + kStages * kTermsBytes + 2 * (kKeptRing + kWalkedRing) + 8;

  const HopperBackwardArgs& args;
  Kept kept, kept_other;
  Walked walked, walked_other;
  uint32_t terms, landed;

  BMF_DEVICE explicit HopperBackward(const HopperBackwardArgs& a) : args(a) {
    const uint32_t tiles = shared_begin();
    terms = tiles + kTilesBytes;
    kept = {tiles, {terms + kStages * kTermsBytes}};
    kept_other = {kept.begin + Kept::kBytes, {kept.ring.barriers + kKeptRing}};
    walked = {kept_other.begin + Kept::kBytes, {kept_other.ring.barriers + kKeptRing}};
    walked_other = {walked.begin + Walked::kBytes, {walked.ring.barriers + kWalkedRing}};
    landed = walked_other.ring.barriers + kWalkedRing;
  }
  BMF_DEVICE void init() const {
    kept.ring.init();
    kept_other.ring.init();
    walked.ring.init();
    walked_other.ring.init();
    init_barrier(landed, 1);
  }
  BMF_DEVICE uint32_t terms_at(const Turn<kStages>& turn) const { return terms + turn.stage * kTermsBytes; }

  // The rows an item keeps, those it walks over, and where they are.
  struct Work {
    int first, head, batch, begin, end, present;
    Sight sight;
  };
};

// Keeps queries and their gradients, walks over keys and values.
template <class T, int kDim>
struct HopperQueryGradient : HopperBackward<kDim> {
  using Base = HopperBackward<kDim>;
  using Base::args, Base::kept, Base::kept_other, Base::walked, Base::walked_other, Base::landed, Base::kRows;
  using typename Base::Work;
  BMF_DEVICE explicit HopperQueryGradient(const HopperBackwardArgs& a) : Base(a) {}

  BMF_DEVICE Work work(int index) const {
    const AttentionArgs& a = args.attention;
    const Item item = item_of(args.schedule, index);
    const int first = item.tile * kHopperRows, batch = item.slice / a.heads, present = present_keys(a, batch, a.keys);
    const Sight sight{a.left, a.right, a.queries, present, a.keys - a.queries};
    return {first,
            item.slice % a.heads,
            batch,
            sight.first_key(first) / kRows * kRows,
            sight.last_key(first, kHopperRows),
            present,
            sight};
  }

  BMF_DEVICE void produce() const {
    const AttentionArgs& a = args.attention;
    Turn<1> kept_turn;
    Turn<Base::kStages> turn;
    uint32_t landed_parity = 0;
    for (int i = block_x(); i < args.schedule.items; i += args.schedule.blocks) {
      const Work w = work(i);
      if (w.begin >= w.end) continue;
      kept.fill(kept_turn, args.kept, w.first, w.head, w.batch);
      kept_other.fill(kept_turn, args.kept_other, w.first, w.head, w.batch);
      ++kept_turn;
      for (int start = w.begin; start < w.end; start += kRows, ++turn) {
        if (w.present < a.keys && w.present - start < kRows)
          walked.fill_present(turn, args.walked, start, w.head / a.group, w.batch, w.present - start, landed,
                              landed_parity);
        else
          walked.fill(turn, args.walked, start, w.head / a.group, w.batch);
        walked_other.fill(turn, args.walked_other, start, w.head / a.group, w.batch);
      }
    }
  }

  BMF_DEVICE void consume(int group) const {
    const AttentionArgs& a = args.attention;
    const float factor = a.scale * kLog2e;
    const int group_row = group * kGroupRows, warp_row = group_row + warp_index() % kGroupWarps * kStrip;
    Turn<1> kept_turn;
    Turn<Base::kStages> turn;
    for (int i = block_x(); i < args.schedule.items; i += args.schedule.blocks) {
      const Work w = work(i);
      const int row = w.first + warp_row;
      float sums[1][kDim / kColumns][kPerLane] = {};
      if (w.begin < w.end) {
        const LaneTerms<1> terms(a.terms + (int64_t{w.batch} * a.heads + w.head) * a.term_rows, row, a.queries);
        float weights[1][kRows / kColumns][kPerLane], grads[1][kRows / kColumns][kPerLane];
        uint32_t operand[1][kRows / kDepth][4];
        kept.ring.wait_filled(kept_turn);
        kept_other.ring.wait_filled(kept_turn);
        for (int start = w.begin; start < w.end; start += kRows, ++turn) {
          walked.ring.wait_filled(turn);
          begin_products(weights);
          multiply_transposed<T>(weights, kept.tile(kept_turn), group_row, walked.tile(turn));
          commit_products();
          walked_other.ring.wait_filled(turn);
          begin_products(grads);
          multiply_transposed<T>(grads, kept_other.tile(kept_turn), group_row, walked_other.tile(turn));
          commit_products();
          wait_products<1>(weights);
          const bool masked = !w.sight.all(row, kStrip, start, kRows);
          const auto unseen_become = [&](float v) {
            return [&, v](float& x, const Spot& at) {
              if (!w.sight.sees(row + at.row, start + at.column)) x = v;
            };
          };
          if (masked) for_sums(weights, unseen_become(-infinity()));
          for_sums(weights, [&](float& x, const Spot& at) { x = exp2(x * factor - terms.at(at).lse); });
          wait_products<0>(grads);
          walked_other.ring.release(turn);
          if (masked) for_sums(grads, unseen_become(0));  // a value that is not there may be NaN
          for_sums(grads,
                   [&](float& x, const Spot& at) { x = weights[0][at.block][at.item] * (x - terms.at(at).delta); });
          as_operand<T>(operand, grads);
          begin_products(sums, operand);
          multiply<T>(sums, operand, walked.tile(turn));
          commit_products();
          wait_products<0>(sums, operand);
          walked.ring.release(turn);
        }
        kept.ring.release(kept_turn);
        kept_other.ring.release(kept_turn);
        ++kept_turn;
      }
      for_sums(sums, [&](float& x, const Spot&) { x *= a.scale; });
      store_sums<T>(rows_of(a.grad_query, w.batch, w.head, 0, a.queries, a.head_dim), row, sums);
    }
  }
};

// Keeps keys and values, walks over the queries that see them and their gradients, of all heads that share them. The
// sums of heads wider than 128 do not fit into registers: one launch makes dV, another dK.
template <class T, int kDim, bool kValue, bool kKey>
struct HopperKeyGradients : HopperBackward<kDim> {
  using Base = HopperBackward<kDim>;
  using Base::args, Base::kept, Base::kept_other, Base::walked, Base::walked_other, Base::kRows, Base::kTermBytes;
  using typename Base::Work;
  BMF_DEVICE explicit HopperKeyGradients(const HopperBackwardArgs& a) : Base(a) {}

  BMF_DEVICE Work work(int index) const {
    const AttentionArgs& a = args.attention;
    const Item item = item_of(args.schedule, index);
    const int first = item.tile * kHopperRows, key_heads = a.heads / a.group, batch = item.slice / key_heads;
    const int present = present_keys(a, batch, a.keys);
    const Sight sight{a.left, a.right, a.queries, present, a.keys - a.queries};
    return {first,
            item.slice % key_heads,
            batch,
            sight.first_query(first) / kRows * kRows,
            sight.last_query(first, kHopperRows),
            present,
            sight};
  }

  BMF_DEVICE void produce() const {
    const AttentionArgs& a = args.attention;
    Turn<1> kept_turn;
    Turn<Base::kStages> turn;
    for (int i = block_x(); i < args.schedule.items; i += args.schedule.blocks) {
      const Work w = work(i);
      if (w.begin >= w.end) continue;
      kept.fill(kept_turn, args.kept, w.first, w.head, w.batch);
      if (kKey) kept_other.fill(kept_turn, args.kept_other, w.first, w.head, w.batch);
      ++kept_turn;
      for (int head = w.head * a.group; head < (w.head + 1) * a.group; ++head)
        for (int first = w.begin; first < w.end; first += kRows, ++turn) {
          const RowTerms* terms = a.terms + (int64_t{w.batch} * a.heads + head) * a.term_rows + first;
          walked.fill(turn, args.walked, first, head, w.batch, {this->terms_at(turn), terms, Base::kTermsBytes});
          walked_other.fill(turn, args.walked_other, first, head, w.batch);
        }
    }
  }

  BMF_DEVICE void consume(int group) const {
    const AttentionArgs& a = args.attention;
    const float factor = a.scale * kLog2e;
    const int group_row = group * kGroupRows, warp_row = group_row + warp_index() % kGroupWarps * kStrip;
    Turn<1> kept_turn;
    Turn<Base::kStages> turn;
    for (int i = block_x(); i < args.schedule.items; i += args.schedule.blocks) {
      const Work w = work(i);
      const int key = w.first + warp_row;
      float grad_value[1][kValue ? kDim / kColumns : 1][kPerLane] = {};
      float grad_key[1][kKey ? kDim / kColumns : 1][kPerLane] = {};
      if (w.begin < w.end) {
        kept.ring.wait_filled(kept_turn);
        if (kKey) kept_other.ring.wait_filled(kept_turn);
        for (int head = 0; head < a.group; ++head)
          for (int first = w.begin; first < w.end; first += kRows, ++turn)
            step(w.sight, group_row, key, first, kept_turn, turn, factor, grad_value, grad_key);
        kept.ring.release(kept_turn);
        if (kKey) kept_other.ring.release(kept_turn);
        ++kept_turn;
      }
      const auto by_key = [&](const Operand& t) { return rows_of(t, w.batch, w.head, 0, a.keys, a.head_dim); };
      if constexpr (kValue) store_sums<T>(by_key(a.grad_value), key, grad_value);
      for_sums(grad_key, [&](float& x, const Spot&) { x *= a.scale; });
      if constexpr (kKey) store_sums<T>(by_key(a.grad_key), key, grad_key);
    }
  }

  // Adds what queries [first, first + kRows) of a head bring.
  template <class Value, class Key>
  BMF_DEVICE void step(const Sight& sight, int group_row, int key, int first, const Turn<1>& kept_turn,
                       const Turn<Base::kStages>& turn, float factor, Value& grad_value, Key& grad_key) const {
    float weights[1][kRows / kColumns][kPerLane], grads[1][kRows / kColumns][kPerLane];
    uint32_t applied[1][kRows / kDepth][4], operand[1][kRows / kDepth][4];
    walked.ring.wait_filled(turn);
    begin_products(weights);
    multiply_transposed<T>(weights, kept.tile(kept_turn), group_row, walked.tile(turn));
    commit_products();
    walked_other.ring.wait_filled(turn);
    if constexpr (kKey) {
      begin_products(grads);
      multiply_transposed<T>(grads, kept_other.tile(kept_turn), group_row, walked_other.tile(turn));
      commit_products();
    }
    wait_products<kKey ? 1 : 0>(weights);
    const bool masked = !sight.all(first, kRows, key, kStrip);
    const auto unseen_become = [&](float v) {
      return [&, v](float& x, const Spot& at) {
        if (!sight.sees(first + at.column, key + at.row)) x = v;
      };
    };
    if (masked) for_sums(weights, unseen_become(-infinity()));
    Words terms;
    for_sums(weights, [&](float& x, const Spot& at) {
      if (at.item == 0) terms = load_shared(this->terms_at(turn) + kTermBytes * static_cast<uint32_t>(at.column));
      x = exp2(x * factor - as_float(terms.word[at.item % 2 * 2]));
    });
    if constexpr (kValue) {
      as_operand<T>(applied, weights);
      begin_products(grad_value, applied);
      multiply<T>(grad_value, applied, walked_other.tile(turn));
      commit_products();
    }
    if constexpr (kKey) {
      wait_products<kValue ? 1 : 0>(grads);
      if (masked) for_sums(grads, unseen_become(0));  // a value that is not there may be NaN
      for_sums(grads, [&](float& x, const Spot& at) {
        if (at.item == 0) terms = load_shared(this->terms_at(turn) + kTermBytes * static_cast<uint32_t>(at.column));
        x = weights[0][at.block][at.item] * (x - as_float(terms.word[at.item % 2 * 2 + 1]));
      });
      as_operand<T>(operand, grads);
      begin_products(grad_key, operand);
      multiply<T>(grad_key, operand, walked.tile(turn));
      commit_products();
    }
    if constexpr (kValue && kKey) {
      wait_products<1>(grad_value, applied);
      walked_other.ring.release(turn);
      wait_products<0>(grad_key, operand);
      walked.ring.release(turn);
    } else {
      if constexpr (kValue) wait_products<0>(grad_value, applied);
      if constexpr (kKey) wait_products<0>(grad_key, operand);
      walked.ring.release(turn);
      walked_other.ring.release(turn);
    }
  }
};

template <class T, int kDim>
BMF_KERNEL((kHopperThreads, 1))
attention_query_gradient_hopper_kernel(BMF_CONSTANT const HopperBackwardArgs args) {
  if constexpr (kOnHopper) run_block(HopperQueryGradient<T, kDim>(args));
}

template <class T, int kDim, bool kValue, bool kKey>
BMF_KERNEL((kHopperThreads, 1))
attention_key_gradients_hopper_kernel(BMF_CONSTANT const HopperBackwardArgs args) {
  if constexpr (kOnHopper) run_block(HopperKeyGradients<T, kDim, kValue, kKey>(args));
}

}  // namespace bmf::cuda
