// attention backward, the gradient of a bias: dlogits summed over whatever the bias is broadcast to. A block has a tile
// of the bias, of one of its batches and heads, and walks over everything that tile stands for, in a fixed order.
#pragma once
#include "cuda/attention_backward.h"

namespace bmf::cuda {

template <int kDim>
struct BiasGradientShape {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kQueries = kWarps * kStrip, kKeys = 32;
  static constexpr int kSharedBytes = 2 * kDim * (2 * kQueries + 2 * kKeys);
};

// How a bias is cut into tiles: of queries, keys, heads and batches. Grid: their product.
template <int kDim>
struct BiasTiles {
  int queries, keys, heads, batches;                  // of the scores
  int own_queries, own_keys, own_heads, own_batches;  // of the bias

  BMF_EVERYWHERE explicit BiasTiles(const AttentionArgs& a)
      : queries((a.queries + BiasGradientShape<kDim>::kQueries - 1) / BiasGradientShape<kDim>::kQueries),
        keys((a.keys + BiasGradientShape<kDim>::kKeys - 1) / BiasGradientShape<kDim>::kKeys),
        heads(a.heads),
        batches(a.batches),
        own_queries(a.bias.same_row ? 1 : queries),
        own_keys(a.bias.same_key ? 1 : keys),
        own_heads(a.bias.same_head ? 1 : heads),
        own_batches(a.bias.same_batch ? 1 : batches) {}
};

template <class T, int kDim>
BMF_KERNEL((BiasGradientShape<kDim>::kThreads))
attention_bias_gradient_kernel(BMF_CONSTANT const AttentionArgs a) {
  using Shape = BiasGradientShape<kDim>;
  constexpr int kThreads = Shape::kThreads, kQueries = Shape::kQueries, kKeys = Shape::kKeys;
  const BiasTiles<kDim> tiles(a);
  const int own_key = block_x() % tiles.own_keys, own_query = block_x() / tiles.own_keys % tiles.own_queries;
  const int slice = block_x() / tiles.own_keys / tiles.own_queries;
  const int own_head = slice % tiles.own_heads, own_batch = slice / tiles.own_heads;
  const int over_keys = tiles.keys / tiles.own_keys, over_queries = tiles.queries / tiles.own_queries;
  const int over_heads = tiles.heads / tiles.own_heads, over_batches = tiles.batches / tiles.own_batches;

  const Tile<kDim> queries{shared_begin()}, grad_rows{queries.begin + Tile<kDim>::bytes(kQueries)};
  const Tile<kDim> keys{grad_rows.begin + Tile<kDim>::bytes(kQueries)}, values{keys.begin + Tile<kDim>::bytes(kKeys)};
  const int warp_row = warp_index() * kStrip;
  const float keep_scale = 1.0f / (1.0f - a.dropout);
  float sums[1][kKeys / kColumns][kPerLane] = {};
  for (int64_t item = 0; item < int64_t{over_keys} * over_queries * over_heads * over_batches; ++item) {
    const int64_t outer = item / over_keys / over_queries;
    const int start = (own_key + static_cast<int>(item % over_keys)) * kKeys;
    const int first = (own_query + static_cast<int>(item / over_keys % over_queries)) * kQueries;
    const int head = own_head + static_cast<int>(outer % over_heads), key_head = head / a.group;
    const int batch = own_batch + static_cast<int>(outer / over_heads);
    const int present = present_keys(a, batch, a.keys);
    const Place place{batch, batch, first, a.queries, a.keys, 0, 0};
    const Sight sight{a.left, a.right, a.queries, present, a.keys - a.queries};
    const Scores<true> scores(a, place, head, sight);
    barrier();  // nobody reads the last tiles any more
    load_tile<kQueries, kDim, kThreads>(queries, rows_of(a.query, batch, head, 0, a.queries, a.head_dim), first);
    load_tile<kQueries, kDim, kThreads>(grad_rows, rows_of(a.grad_out, batch, head, 0, a.queries, a.head_dim), first);
    load_tile<kKeys, kDim, kThreads>(keys, rows_of(a.key, batch, key_head, 0, present, a.head_dim), start);
    load_tile<kKeys, kDim, kThreads>(values, rows_of(a.value, batch, key_head, 0, present, a.head_dim), start);
    commit_copies();
    wait_copies<0>();
    barrier();

    const int row = first + warp_row;
    const LaneTerms<1> terms(a.terms + (place.batch * a.heads + head) * a.term_rows, row, a.queries);
    float weights[1][kKeys / kColumns][kPerLane] = {}, grads[1][kKeys / kColumns][kPerLane] = {};
    multiply_transposed<T, kDim>(weights, queries, warp_row, keys);
    for_sums(weights, [&](float& x, const Spot& at) {
      float derivative;  // the bias is added behind the softcap
      x = weight_of(scores, x, row + at.row, start + at.column, true, terms.at(at).lse, derivative);
    });
    converge();  // a bias is read where it is seen
    multiply_transposed<T, kDim>(grads, grad_rows, warp_row, values);
    if (a.dropout > 0) {
      Dropout<1> dropout;
      dropout.draw(scores, row, start);
      for_sums(grads, [&](float& x, const Spot& at) { x = dropout.kept(at, start) ? x * keep_scale : 0.0f; });
    }
    for_sums(grads, [&](float& x, const Spot& at) {
      sums[0][at.block][at.item] += weights[0][at.block][at.item] * (x - terms.at(at).delta);
    });
  }

  barrier();
  const auto place_in_shared = [&](int row, int column) {
    return queries.begin + static_cast<uint32_t>((row * kKeys + column) * sizeof(float));
  };
  for_sums(sums,
           [&](float& x, const Spot& at) { store_shared(place_in_shared(warp_row + at.row, at.column), as_bits(x)); });
  barrier();
  const int rows = a.bias.same_row ? 1 : a.queries, columns = a.bias.same_key ? 1 : a.keys;
  for (int i = thread_index(); i < kQueries * kKeys; i += kThreads) {
    const int row = own_query * kQueries + i / kKeys, column = own_key * kKeys + i % kKeys;
    if (row >= rows || column >= columns) continue;
    float sum = 0;
    for (int r = i / kKeys; r < (a.bias.same_row ? kQueries : i / kKeys + 1); ++r)
      for (int c = i % kKeys; c < (a.bias.same_key ? kKeys : i % kKeys + 1); ++c)
        sum += load_shared_float(place_in_shared(r, c));
    a.bias.grad[(int64_t{slice} * rows + row) * columns + column] = sum;
  }
}

}  // namespace bmf::cuda
