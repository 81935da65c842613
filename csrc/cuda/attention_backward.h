// attention backward. With p = softmax(logits), m the choices of dropout over (1 - rate), delta = sum(dout out) of a
// query:
//
//   dV = (p m)^T dout,   dlogits = p (m dout V^T - delta),   dbias = dlogits summed to its shape
//   dQ = scale (cap' dlogits) K,   dK = scale (cap' dlogits)^T Q
//
// p is made again from forward's statistics, m from its counters. Four kernels, none of which adds to what another
// block writes, so that gradients are the same bits from run to run: the first leaves lse and delta of each query side
// by side; the others go by queries, by keys, and by elements of the bias. The two in the middle together make the
// scores and dout V^T twice, seven products where a pass with atomic additions would need five.
#pragma once
#include "cuda/attention_scores.h"

namespace bmf::cuda {

// A warp to a row. Grid: kRows of the term_rows of each batch, by heads.
struct TermsShape {
  static constexpr int kRows = 4, kThreads = kRows * kWarp;
  static_assert(kTermRows % kRows == 0);
};

template <class T>
BMF_KERNEL((TermsShape::kThreads))
attention_terms_kernel(BMF_CONSTANT const AttentionArgs a) {
  const int blocks = a.term_rows / TermsShape::kRows, head = block_y();
  const int64_t batch = block_x() / blocks;
  const int row = block_x() % blocks * TermsShape::kRows + warp_index();
  const Words out = load_chunk(rows_of(a.out, batch, head, 0, a.queries, a.head_dim), row, lane_index() * kChunk);
  const Words grad = load_chunk(rows_of(a.grad_out, batch, head, 0, a.queries, a.head_dim), row, lane_index() * kChunk);
  float delta = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const auto element = [i](const Words& w) {
      return to_float(T{static_cast<uint16_t>(w.word[i / 2] >> (16 * (i % 2)))});
    };
    delta += element(out) * element(grad);
  }
#pragma unroll
  for (int mask = 1; mask < kWarp; mask *= 2) delta += shuffle_xor(delta, mask);
  const int64_t slice = batch * a.heads + head;
  const bool exists = row < a.queries;  // one that does not has weights of zero
  if (lane_index() == 0)
    a.terms[slice * a.term_rows + row] = {exists ? a.stats[slice * a.queries + row].lse : infinity(), delta};
}

// The weight of a score, and the derivative of the softcap.
template <bool kFull>
BMF_DEVICE float weight_of(const Scores<kFull>& scores, float score, int query, int key, bool masked, float lse,
                           float& derivative) {
  const bool seen = !masked || scores.sight.sees(query, key);
  derivative = 1.0f;
  const float logit = scores.logit(score, query, key, seen, derivative);
  return seen ? exp2(logit * scores.factor - lse) : 0.0f;
}

// lse and delta of a lane's rows, which are queries, from `row` on; rows behind the last have weights of 0.
template <int kStrips>
struct LaneTerms {
  RowTerms of[kStrips][2];

  BMF_DEVICE LaneTerms(const RowTerms* terms, int row, int rows) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + kStrip * s + 8 * half + lane_index() / 4;
        of[s][half] = r < rows ? terms[r] : RowTerms{infinity(), 0.0f};
      }
  }
  BMF_DEVICE const RowTerms& at(const Spot& spot) const { return of[spot.strip][spot.item / 2]; }
};

// A block has queries and their gradients and walks over keys, as in forward.
template <int kDim, bool kFull>
struct QueryGradientShape {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kStrips = kDim > 64 || kFull ? 1 : 2;
  static constexpr int kQueries = kWarps * kStrips * kStrip;
  static constexpr int kKeys = kDim > 128 ? 16 : 32;
  static constexpr int kSharedBytes = 2 * kDim * (2 * kQueries + 4 * kKeys);
};

template <class T, int kDim, bool kFull>
BMF_KERNEL((QueryGradientShape<kDim, kFull>::kThreads))
attention_query_gradient_kernel(BMF_CONSTANT const AttentionArgs a) {
  using Shape = QueryGradientShape<kDim, kFull>;
  constexpr int kThreads = Shape::kThreads, kStrips = Shape::kStrips, kQueries = Shape::kQueries, kKeys = Shape::kKeys;
  const Place place = queries_of<kQueries>(a, block_x());
  if (place.first >= place.own) return;
  const int head = block_y(), key_head = head / a.group;
  const int present = present_keys(a, place.sequence, place.others);
  const auto by_query = [&](const Operand& t) {
    return rows_of(t, place.batch, head, place.own_first, place.own, a.head_dim);
  };
  const auto by_key = [&](const Operand& t) {
    return rows_of(t, place.batch, key_head, place.other_first, present, a.head_dim);
  };
  const Rows16 key = by_key(a.key), value = by_key(a.value);
  const Sight sight{a.left, a.right, place.own, present, place.others - place.own};
  const Scores<kFull> scores(a, place, head, sight);

  const Tile<kDim> queries{shared_begin()}, grad_rows{queries.begin + Tile<kDim>::bytes(kQueries)};
  const uint32_t ring = grad_rows.begin + Tile<kDim>::bytes(kQueries);
  const auto keys_at = [&](int stage) { return Tile<kDim>{ring + Tile<kDim>::bytes(2 * kKeys * stage)}; };
  const auto values_at = [&](int stage) { return Tile<kDim>{ring + Tile<kDim>::bytes(2 * kKeys * stage + kKeys)}; };
  const auto load = [&](int stage, int first) {
    load_tile<kKeys, kDim, kThreads>(keys_at(stage), key, first);
    load_tile<kKeys, kDim, kThreads>(values_at(stage), value, first);
    commit_copies();
  };

  const int begin = sight.first_key(place.first) / kKeys * kKeys, end = sight.last_key(place.first, kQueries);
  load_tile<kQueries, kDim, kThreads>(queries, by_query(a.query), place.first);
  load_tile<kQueries, kDim, kThreads>(grad_rows, by_query(a.grad_out), place.first);
  commit_copies();
  if (begin < end) load(0, begin);

  const int warp_row = warp_index() * kStrips * kStrip, row = place.first + warp_row;
  const int64_t terms_first = (place.batch * a.heads + head) * a.term_rows + place.own_first;
  const LaneTerms<kStrips> terms(a.terms + terms_first, row, place.own);
  const float keep_scale = 1.0f / (1.0f - a.dropout);
  float sums[kStrips][kDim / kColumns][kPerLane] = {};
  Dropout<kStrips> dropout;
  int stage = 0;
  for (int start = begin; start < end; start += kKeys, stage ^= 1) {
    wait_copies<0>();
    barrier();  // this stage has come, and nobody reads the other any more
    if (start + kKeys < end) load(stage ^ 1, start + kKeys);

    float weights[kStrips][kKeys / kColumns][kPerLane] = {}, grads[kStrips][kKeys / kColumns][kPerLane] = {};
    multiply_transposed<T, kDim>(weights, queries, warp_row, keys_at(stage));
    const bool masked = !sight.all(row, kStrips * kStrip, start, kKeys);
    for_sums(weights, [&](float& x, const Spot& at) {
      float derivative;
      x = weight_of(scores, x, row + at.row, start + at.column, masked, terms.at(at).lse, derivative) * derivative;
    });
    if (kFull) converge();  // a bias is read where it is seen
    multiply_transposed<T, kDim>(grads, grad_rows, warp_row, values_at(stage));
    if (kFull && a.dropout > 0) {
      if (start % kDropoutGroup == 0 || start == begin) dropout.draw(scores, row, start);
      for_sums(grads, [&](float& x, const Spot& at) { x = dropout.kept(at, start) ? x * keep_scale : 0.0f; });
    }
    for_sums(grads,
             [&](float& x, const Spot& at) { x = weights[at.strip][at.block][at.item] * (x - terms.at(at).delta); });
    uint32_t operand[kStrips][kKeys / kDepth][4];
    as_operand<T>(operand, grads);
    multiply<T, kDim>(sums, operand, keys_at(stage));
  }
  wait_copies<0>();  // of the queries, if there was no key
  barrier();
  for_sums(sums, [&](float& x, const Spot&) { x *= a.scale; });
  put_sums<T>(queries, warp_row, sums);
  barrier();
  store_tile<kQueries, kDim, kThreads>(by_query(a.grad_query), queries, place.first);
}

// lse or delta of a lane's columns, which are queries, from shared memory: read when needed, as registers are few.
template <bool kLse, int kBlocks>
BMF_DEVICE void load_terms(float (&v)[kBlocks][2], uint32_t terms) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    const int query = kColumns * n + lane_index() % 4 * 2;
    const Words two = load_shared(terms + static_cast<uint32_t>(query * static_cast<int>(sizeof(RowTerms))));
    v[n][0] = as_float(two.word[kLse ? 0 : 1]);
    v[n][1] = as_float(two.word[kLse ? 2 : 3]);
  }
}

// A block has keys and values and walks over the queries that see them, of all heads that share them. Its tiles are
// [keys, queries], so that weights are the left operand of dV's product as they are. The sums of heads wider than 128
// do not fit into registers: two blocks share the work, the first makes dV, the second dK.
template <int kDim, bool kFull>
struct KeyGradientsShape {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kKeys = kWarps * kStrip;
  static constexpr int kQueries = kDim > 64 || kFull ? 16 : 32;
  static constexpr int kBlocks = kDim > 128 ? 2 : 1;
  static constexpr int kTilesBytes = 2 * kDim * (2 * kKeys + 4 * kQueries);
  static constexpr int kTermsBytes = kQueries * static_cast<int>(sizeof(RowTerms));
  static constexpr int kSharedBytes = kTilesBytes + 2 * kTermsBytes;
};

template <class T, int kDim, bool kFull>
BMF_KERNEL((KeyGradientsShape<kDim, kFull>::kThreads))
attention_key_gradients_kernel(BMF_CONSTANT const AttentionArgs a) {
  using Shape = KeyGradientsShape<kDim, kFull>;
  constexpr int kThreads = Shape::kThreads, kKeys = Shape::kKeys, kQueries = Shape::kQueries;
  constexpr bool kShared = Shape::kBlocks > 1;
  const bool makes_value = !kShared || block_z() == 0, makes_key = !kShared || block_z() == 1;
  const Place place = keys_of<kKeys>(a, block_x());
  if (place.first >= place.own) return;
  const int key_head = block_y();
  const int present = present_keys(a, place.sequence, place.own);
  const auto by_key = [&](const Operand& t, int count) {
    return rows_of(t, place.batch, key_head, place.own_first, count, a.head_dim);
  };
  const auto by_query = [&](const Operand& t, int head) {
    return rows_of(t, place.batch, head, place.other_first, place.others, a.head_dim);
  };
  const Sight sight{a.left, a.right, place.others, present, place.own - place.others};
  Scores<kFull> scores(a, place, key_head * a.group, sight);

  const Tile<kDim> keys{shared_begin()}, values{keys.begin + Tile<kDim>::bytes(kKeys)};
  const uint32_t ring = values.begin + Tile<kDim>::bytes(kKeys), terms_ring = keys.begin + Shape::kTilesBytes;
  const auto queries_at = [&](int stage) { return Tile<kDim>{ring + Tile<kDim>::bytes(2 * kQueries * stage)}; };
  const auto grads_at = [&](int stage) {
    return Tile<kDim>{ring + Tile<kDim>::bytes(2 * kQueries * stage + kQueries)};
  };
  const auto terms_at = [&](int stage) { return terms_ring + static_cast<uint32_t>(Shape::kTermsBytes * stage); };
  const auto load = [&](int stage, int head, int first) {
    load_tile<kQueries, kDim, kThreads>(queries_at(stage), by_query(a.query, head), first);
    load_tile<kQueries, kDim, kThreads>(grads_at(stage), by_query(a.grad_out, head), first);
    if (const int i = thread_index(); i < kQueries) {
      const int row = smaller(first + i, place.others - 1);  // one that does not exist is seen by no key
      const int64_t at = (place.batch * a.heads + head) * a.term_rows + place.other_first + row;
      copy_async<sizeof(RowTerms)>(terms_at(stage) + i * static_cast<uint32_t>(sizeof(RowTerms)), a.terms + at,
                                   sizeof(RowTerms));
    }
    commit_copies();
  };

  const int begin = sight.first_query(place.first) / kQueries * kQueries, end = sight.last_query(place.first, kKeys);
  const int last_head = (key_head + 1) * a.group;
  load_tile<kKeys, kDim, kThreads>(keys, by_key(a.key, present), place.first);
  load_tile<kKeys, kDim, kThreads>(values, by_key(a.value, present), place.first);
  commit_copies();
  if (begin < end) load(0, key_head * a.group, begin);

  const int warp_key = warp_index() * kStrip, key = place.first + warp_key;
  const float keep_scale = 1.0f / (1.0f - a.dropout);
  float sums[kShared ? 1 : 2][1][kDim / kColumns][kPerLane] = {};
  auto& grad_value = sums[0];
  auto& grad_key = sums[kShared ? 0 : 1];
  int stage = 0;
  for (int head = key_head * a.group; head < last_head && begin < end; ++head) {
    scores.set_head(place, head);
    for (int first = begin; first < end; first += kQueries, stage ^= 1) {
      wait_copies<0>();
      barrier();  // this stage has come, and nobody reads the other any more
      if (first + kQueries < end)
        load(stage ^ 1, head, first + kQueries);
      else if (head + 1 < last_head)
        load(stage ^ 1, head + 1, begin);

      float lse[kQueries / kColumns][2], delta[kQueries / kColumns][2];
      float weights[1][kQueries / kColumns][kPerLane] = {};
      multiply_transposed<T, kDim>(weights, keys, warp_key, queries_at(stage));
      const bool masked = !sight.all(first, kQueries, key, kStrip);
      load_terms<true>(lse, terms_at(stage));
      uint32_t kept = ~0u;  // a bit for each element
      float applied[1][kQueries / kColumns][kPerLane];
      for_sums(weights, [&](float& x, const Spot& at) {
        const int query = first + at.column;
        float derivative;
        x = weight_of(scores, x, query, key + at.row, masked, lse[at.block][at.item % 2], derivative);
        float& y = applied[0][at.block][at.item];
        y = x;
        if (kFull && a.dropout > 0 && !scores.kept(query, key + at.row)) {
          y = 0;
          kept &= ~(1u << (kPerLane * at.block + at.item));
        }
        x *= derivative;
      });
      uint32_t operand[1][kQueries / kDepth][4];
      if (makes_value) {
        as_operand<T>(operand, applied);
        if (kFull) converge();  // a bias is read where it is seen
        multiply<T, kDim>(grad_value, operand, grads_at(stage));
      }
      if (makes_key) {
        float grads[1][kQueries / kColumns][kPerLane] = {};
        if (kFull) converge();
        multiply_transposed<T, kDim>(grads, values, warp_key, grads_at(stage));
        load_terms<false>(delta, terms_at(stage));
        for_sums(grads, [&](float& x, const Spot& at) {
          if (kFull && a.dropout > 0) x = kept >> (kPerLane * at.block + at.item) & 1 ? x * keep_scale : 0.0f;
          x = weights[0][at.block][at.item] * (x - delta[at.block][at.item % 2]);
        });
        as_operand<T>(operand, grads);
        multiply<T, kDim>(grad_key, operand, queries_at(stage));
      }
    }
  }
  wait_copies<0>();
  barrier();
  if (makes_value) {
    if (kFull) for_sums(grad_value, [&](float& x, const Spot&) { x *= keep_scale; });
    put_sums<T>(values, warp_key, grad_value);
  }
  if (makes_key) {
    for_sums(grad_key, [&](float& x, const Spot&) { x *= a.scale; });
    put_sums<T>(keys, warp_key, grad_key);
  }
  barrier();
  if (makes_value) store_tile<kKeys, kDim, kThreads>(by_key(a.grad_value, place.own), values, place.first);
  if (makes_key) store_tile<kKeys, kDim, kThreads>(by_key(a.grad_key, place.own), keys, place.first);
}

}  // namespace bmf::cuda
