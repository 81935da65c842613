// What the kernels of attention share: which rows a block has, which keys a query sees, and how scores become weights.
//
// kFull kernels do all that the interface has; the others have no softcap, slopes, bias or dropout, and scale > 0.
#pragma once
#include "cuda/attention.h"
#include "cuda/philox.h"
#include "cuda/tile.h"

namespace bmf::cuda {

constexpr float kLog2e = 1.44269504088896341f;
BMF_DEVICE float infinity() { return __builtin_huge_valf(); }

BMF_DEVICE int64_t integer(const Integers& t, int64_t i) {
  return t.wide ? static_cast<const int64_t*>(t.data)[i] : static_cast<const int32_t*>(t.data)[i];
}

// Whether a call needs a kFull kernel.
inline bool needs_all(const AttentionArgs& a) {
  return a.softcap != 0 || a.alibi != nullptr || a.bias.kind != BiasKind::none || a.dropout > 0 || !(a.scale > 0);
}

// Rows [first, first + kRows) of a sequence, queries or keys, and the others, keys or queries, that they meet.
struct Place {
  int64_t batch;
  int sequence, first, own, others;
  int64_t own_first, other_first;  // where the sequence begins in its batch
};

// That of block `block`. Packed sequence i has blocks from starts[i] / kRows + i on: as many as it needs at least, so
// that a grid follows from numbers that the host knows. A block without rows has first >= own.
template <int kRows>
BMF_DEVICE Place place_of(int block, const Integers& own_starts, const Integers& other_starts, int sequences, int own,
                          int others, bool last_first) {
  if (own_starts.data == nullptr) {
    const int tiles = (own + kRows - 1) / kRows, tile = block % tiles;
    return {block / tiles, block / tiles, (last_first ? tiles - 1 - tile : tile) * kRows, own, others, 0, 0};
  }
  int low = 0, high = sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (integer(own_starts, middle) / kRows + middle <= block ? low : high) = middle;
  }
  Place place{0, low, 0, 0, 0, integer(own_starts, low), integer(other_starts, low)};
  place.first = static_cast<int>(block - place.own_first / kRows - low) * kRows;
  place.own = static_cast<int>(integer(own_starts, low + 1) - place.own_first);
  place.others = static_cast<int>(integer(other_starts, low + 1) - place.other_first);
  return place;
}

template <int kRows>
BMF_DEVICE Place queries_of(const AttentionArgs& a, int block) {
  return place_of<kRows>(block, a.query_starts, a.key_starts, a.sequences, a.queries, a.keys, a.right < a.keys);
}
template <int kRows>
BMF_DEVICE Place keys_of(const AttentionArgs& a, int block) {
  return place_of<kRows>(block, a.key_starts, a.query_starts, a.sequences, a.keys, a.queries, false);
}
// How many blocks the rows of all sequences take.
inline int64_t blocks_of(const AttentionArgs& a, int64_t rows, int64_t block) {
  return a.query_starts.data != nullptr ? rows / block + a.sequences : a.batches * ((rows + block - 1) / block);
}

// How many keys of a sequence there are: never more than memory holds.
BMF_DEVICE int present_keys(const AttentionArgs& a, int sequence, int keys) {
  if (a.key_lengths.data == nullptr) return keys;
  const int64_t present = integer(a.key_lengths, sequence);
  return present < 0 ? 0 : present < keys ? static_cast<int>(present) : keys;
}

BMF_DEVICE Rows16 rows_of(const Operand& t, int64_t batch, int64_t head, int64_t first, int count, int width) {
  uint16_t* data = static_cast<uint16_t*>(t.data) + batch * t.batch_stride + head * t.head_stride;
  return {data + first * t.row_stride, t.row_stride, count, width, t.vectors};
}

// Which keys a query sees, but for a mask that is given as a tensor.
struct Sight {
  int left, right, queries, present, shift;  // query i stands at position i + shift

  BMF_DEVICE bool sees(int query, int key) const {
    const int position = query + shift;
    return query < queries && key < present && key <= position + right && key >= position - left;
  }
  // Whether each of queries [query, query + rows) sees each of keys [key, key + columns).
  BMF_DEVICE bool all(int query, int rows, int key, int columns) const {
    return query + rows <= queries && key + columns <= present && key + columns - 1 <= query + shift + right &&
           key >= query + rows - 1 + shift - left;
  }
  // The keys that any of queries [query, query + rows) sees lie in [begin, end).
  BMF_DEVICE int first_key(int query) const { return larger(0, query + shift - left); }
  BMF_DEVICE int last_key(int query, int rows) const {
    return smaller(present, smaller(query + rows, queries) + shift + right);
  }
  // The queries that see any of keys [key, key + columns) lie in [begin, end).
  BMF_DEVICE int first_query(int key) const { return larger(0, key - right - shift); }
  BMF_DEVICE int last_query(int key, int columns) const {
    return key < present ? smaller(queries, key + columns + left - shift) : 0;
  }
};

// From scores to weights, for one head of one sequence.
template <bool kFull>
struct Scores {
  const AttentionArgs& a;
  Sight sight;
  float factor;  // makes a logit one to base 2
  float slope;
  int64_t bias;  // offset of this head's
  uint64_t seed;
  uint32_t stream, threshold;

  BMF_DEVICE Scores(const AttentionArgs& args, const Place& place, int head, const Sight& s)
      : a(args),
        sight(s),
        factor(kFull ? 1.0f : args.scale * kLog2e),
        slope(0),
        bias(0),
        seed(0),
        stream(0),
        threshold(0) {
    if constexpr (kFull) {
      if (a.dropout > 0) {
        seed = static_cast<uint64_t>(*a.seed);
        threshold = static_cast<uint32_t>(a.dropout * 65536.0f + 0.5f);
      }
      set_head(place, head);
    }
  }
  BMF_DEVICE void set_head(const Place& place, int head) {
    if constexpr (kFull) {
      slope = a.alibi != nullptr ? a.alibi[place.batch * a.alibi_batch_stride + head] : 0.0f;
      bias = place.batch * a.bias.batch_stride + head * a.bias.head_stride;
      stream = static_cast<uint32_t>(place.sequence * a.heads + head);
    }
  }

  // Of a score the logit, but for `factor`, and the derivative of the softcap. There is no bias for what is not seen.
  BMF_DEVICE float logit(float score, int query, int key, bool seen, float& derivative) const {
    if constexpr (!kFull) return score;
    float x = score * a.scale;
    if (a.softcap != 0) {
      x = tanh(x / a.softcap);
      derivative = 1.0f - x * x;
      x *= a.softcap;
    }
    if (a.bias.kind != BiasKind::none && seen) {
      const int64_t at = bias + query * a.bias.row_stride + key * a.bias.key_stride;
      if (a.bias.kind == BiasKind::float32)
        x += static_cast<const float*>(a.bias.data)[at];
      else if (a.bias.kind == BiasKind::boolean)
        x = static_cast<const bool*>(a.bias.data)[at] ? x : -infinity();
      else if (a.bias.kind == BiasKind::bfloat16)
        x += to_float(static_cast<const bf16*>(a.bias.data)[at]);
      else
        x += to_float(static_cast<const f16*>(a.bias.data)[at]);
    }
    const int distance = query + sight.shift - key;
    x -= slope * static_cast<float>(distance < 0 ? -distance : distance);
    return x * kLog2e;
  }

  // Which of the keys key % 16 + 16 j of its group of 128 this query keeps.
  BMF_DEVICE uint32_t choices(int query, int key) const {
    return dropout_choices(seed, stream, static_cast<uint32_t>(query), static_cast<uint32_t>(key / kDropoutGroup),
                           static_cast<uint32_t>(key % kDropoutLanes), threshold);
  }
  BMF_DEVICE bool kept(int query, int key) const {
    return choices(query, key) >> (key % kDropoutGroup / kDropoutLanes) & 1;
  }
};

// The choices of dropout for a warp's tiles of queries by keys, drawn once for each group of 128 keys: the keys of a
// lane are neighbours modulo 16, so that each number drawn serves up to eight of its elements.
template <int kStrips>
struct Dropout {
  uint32_t bits[kStrips][2];  // of a row: a byte for each of the lane's four columns modulo 16

  template <bool kFull>
  BMF_DEVICE void draw(const Scores<kFull>& scores, int query, int key) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = query + kStrip * s + 8 * half + lane_index() / 4;
        bits[s][half] = 0;
#pragma unroll
        for (int c = 0; c < 4; ++c)
          bits[s][half] |= scores.choices(row, key / 16 * 16 + c / 2 * 8 + lane_index() % 4 * 2 + c % 2) << (8 * c);
      }
  }
  // Whether an element of the tile that begins at `key` is kept.
  BMF_DEVICE bool kept(const Spot& spot, int key) const {
    const int column = spot.block % 2 * 2 + spot.item % 2;
    const int sixteen = (key % kDropoutGroup + kColumns * spot.block) / kDropoutLanes;
    return bits[spot.strip][spot.item / 2] >> (8 * column + sixteen) & 1;
  }
};

}  // namespace bmf::cuda
