// The softmax of attention, one query and one block of keys at a time, with the running maximum and sum.
#pragma once
#include "cpu/attention_scores.h"

namespace bmf::BMF_ISA {

constexpr int64_t kKeyBlock = 256;  // keys of a block; their scores and weights lie kKeyBlock apart from query to query

template <class Element>
constexpr int kExpTerms = sizeof(Element) == 2 ? 3 : 6;

struct Softmax {
  const AttentionArgs& args;
  int64_t sequence, head;
  float factor;  // makes a score a logit to base 2

  // weights = 2^(logit - maximum so far), dropped or not, for the keys `own` of the block that starts at `key`, and 0
  // for the rest of `written`; both count from the block's first key. Returns what the output so far must be multiplied
  // by.
  template <bool kDropout, class Element>
  float row(int64_t row, int64_t key, KeyRange own, KeyRange written, const float* score, Element* weights, float& top,
            float& total) const {
    const int64_t first = written.begin / kLanes * kLanes, last = ceil_div(written.end, kLanes) * kLanes;
    if (own.empty()) {
      for (int64_t c = first; c < last; c += kLanes) store(weights + c, Vec{});
      return 1.0f;
    }
    const int64_t begin = own.begin / kLanes * kLanes, end = ceil_div(own.end, kLanes) * kLanes;
    // Registers that are not wholly the query's own can only be the first and the last.
    const bool cut = own.begin > begin || own.end < end;
    Vec most = broadcast(-kInfinity);
    if (cut)
      for (int64_t c = begin; c < end; c += kLanes) most = max(within(load(score + c), c, own, -kInfinity), most);
    else
      for (int64_t c = begin; c < end; c += kLanes) most = max(load(score + c), most);
    const float here = max_lane(most), risen = here > top ? here : top;
    const float base = risen == -kInfinity ? 0.0f : risen * factor;

    uint16_t keep[kKeyBlock / kDropoutGroup][8];
    if constexpr (kDropout)
      for (int64_t g = 0; g < kKeyBlock / kDropoutGroup; ++g)
        if (own.begin < (g + 1) * kDropoutGroup && own.end > g * kDropoutGroup)
          dropout_row(args, sequence, head, row, key / kDropoutGroup + g, keep[g]);

    Vec sums{};
    auto weigh = [&](int64_t c, bool whole) {
      Vec e = exp2<kExpTerms<Element>>(fma(load(score + c), broadcast(factor), broadcast(-base)));
      if (!whole) e = within(e, c, own, 0);
      sums += e;
      if constexpr (kDropout) e = keep_at(e, keep[0], c);
      store(weights + c, e);
    };
    if (cut)
      for (int64_t c = begin; c < end; c += kLanes) weigh(c, false);
    else
#pragma GCC unroll 4
      for (int64_t c = begin; c < end; c += kLanes) weigh(c, true);
    for (int64_t c = first; c < begin; c += kLanes) store(weights + c, Vec{});
    for (int64_t c = end; c < last; c += kLanes) store(weights + c, Vec{});

    // Before its first keys there is nothing to be scaled: output and total are zero.
    const float scale = risen == top || top == -kInfinity ? 1.0f : exp2<6>(broadcast((top - risen) * factor))[0];
    total = total * scale + sum(sums);
    top = risen;
    return scale;
  }
};

// out [rows][out_stride], divided by the sums, to `to`; and what backward needs of them.
template <class T>
void finish_rows(const AttentionArgs& args, int64_t rows, const float* out, int64_t out_stride, const float* top,
                 const float* total, T* to, int64_t to_stride, RowStats* stats) {
  const float factor = logit_factor(args);
  for (int64_t r = 0; r < rows; ++r) {
    stats[r] = total[r] == 0 ? RowStats{kInfinity, 0} : RowStats{top[r] * factor, 1.0f / total[r]};
    const float inverse = stats[r].inverse_sum / (1.0f - args.dropout);
    for_lanes(args.head_dim, [&](int64_t c, int lanes) {
      store_lanes(to + r * to_stride + c, load_lanes(out + r * out_stride + c, lanes) * inverse, lanes);
    });
  }
}

}  // namespace bmf::BMF_ISA
