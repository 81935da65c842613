// attention forward (FlashAttention-2, Dao 2023): a block has kQueries queries of one head, each warp 16 kStrips of
// them, and walks over the keys they see, kKeys at a time. Scores and weights stay in registers; keys and values come
// into two buffers in turn, the next while the current are worked on.
//
// Grid: blocks of queries of all sequences, by heads. Each block reads its queries once, and keys and values once.
#pragma once
#include "cuda/attention_scores.h"
#include "cuda/attention_softmax.h"

namespace bmf::cuda {

// Chosen so that two blocks share a processor of sm_80 (one of heads wider than 128), and nothing is spilled.
template <int kDim, bool kFull>
struct ForwardShape {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kStrips = kDim > 128 || kFull ? 1 : 2;
  static constexpr int kQueries = kWarps * kStrips * kStrip;
  static constexpr int kKeys = kDim == 128 && !kFull ? 16 : kDim > 64 ? 32 : 64;
  static constexpr int kSharedBytes = 2 * kDim * (kQueries + 4 * kKeys);
};

template <class T, int kDim, bool kFull>
BMF_KERNEL((ForwardShape<kDim, kFull>::kThreads))
attention_forward_kernel(BMF_CONSTANT const AttentionArgs a) {
  using Shape = ForwardShape<kDim, kFull>;
  constexpr int kThreads = Shape::kThreads, kStrips = Shape::kStrips, kQueries = Shape::kQueries, kKeys = Shape::kKeys;
  const Place place = queries_of<kQueries>(a, block_x());
  if (place.first >= place.own) return;
  const int head = block_y(), key_head = head / a.group;
  const Rows16 query = rows_of(a.query, place.batch, head, place.own_first, place.own, a.head_dim);
  const int present = present_keys(a, place.sequence, place.others);
  const Rows16 key = rows_of(a.key, place.batch, key_head, place.other_first, present, a.head_dim);
  const Rows16 value = rows_of(a.value, place.batch, key_head, place.other_first, present, a.head_dim);
  const Sight sight{a.left, a.right, place.own, present, place.others - place.own};
  const Scores<kFull> scores(a, place, head, sight);

  const Tile<kDim> queries{shared_begin()};
  const uint32_t ring = queries.begin + Tile<kDim>::bytes(kQueries);
  const auto keys_at = [&](int stage) { return Tile<kDim>{ring + Tile<kDim>::bytes(2 * kKeys * stage)}; };
  const auto values_at = [&](int stage) { return Tile<kDim>{ring + Tile<kDim>::bytes(2 * kKeys * stage + kKeys)}; };
  const auto load = [&](int stage, int first) {
    load_tile<kKeys, kDim, kThreads>(keys_at(stage), key, first);
    load_tile<kKeys, kDim, kThreads>(values_at(stage), value, first);
    commit_copies();
  };

  const int begin = sight.first_key(place.first) / kKeys * kKeys, end = sight.last_key(place.first, kQueries);
  load_tile<kQueries, kDim, kThreads>(queries, query, place.first);
  commit_copies();
  if (begin < end) load(0, begin);

  const int warp_row = warp_index() * kStrips * kStrip, row = place.first + warp_row;
  float out[kStrips][kDim / kColumns][kPerLane] = {};
  OnlineSoftmax<kStrips> softmax;
  Dropout<kStrips> dropout;
  int stage = 0;
  for (int start = begin; start < end; start += kKeys, stage ^= 1) {
    wait_copies<0>();
    barrier();  // this stage has come, and nobody reads the other any more
    if (start + kKeys < end) load(stage ^ 1, start + kKeys);

    float weights[kStrips][kKeys / kColumns][kPerLane] = {};
    multiply_transposed<T, kDim>(weights, queries, warp_row, keys_at(stage));
    const bool masked = !sight.all(row, kStrips * kStrip, start, kKeys);
    if (kFull || masked)
      for_sums(weights, [&](float& x, const Spot& at) {
        const bool seen = !masked || sight.sees(row + at.row, start + at.column);
        float derivative;
        x = scores.logit(x, row + at.row, start + at.column, seen, derivative);
        if (!seen) x = -infinity();
      });
    if (kFull) converge();  // a bias is read where it is seen
    float shrink[kStrips][2];
    softmax.add(weights, scores.factor, shrink);
    scale_rows(out, shrink);
    if (kFull && a.dropout > 0) {
      if (start % kDropoutGroup == 0 || start == begin) dropout.draw(scores, row, start);
      for_sums(weights, [&](float& x, const Spot& at) { x = dropout.kept(at, start) ? x : 0.0f; });
    }
    uint32_t operand[kStrips][kKeys / kDepth][4];
    as_operand<T>(operand, weights);
    multiply<T, kDim>(out, operand, values_at(stage));
  }
  wait_copies<0>();  // of the queries, if there was no key
  barrier();

  float inverse[kStrips][2];
#pragma unroll
  for (int s = 0; s < kStrips; ++s)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowStats stats = softmax.finish(s, half, 1.0f - a.dropout, inverse[s][half]);
      const int r = row + kStrip * s + 8 * half + lane_index() / 4;
      if (lane_index() % 4 == 0 && r < place.own)
        a.stats[(place.batch * a.heads + head) * a.queries + place.own_first + r] = stats;
    }
  scale_rows(out, inverse);
  put_sums<T>(queries, warp_row, out);
  barrier();
  const Rows16 result = rows_of(a.out, place.batch, head, place.own_first, place.own, a.head_dim);
  store_tile<kQueries, kDim, kThreads>(result, queries, place.first);
}

}  // namespace bmf::cuda
