// cross_entropy over rows of logits x, with target t, label smoothing e and z = x or, capped, z = c tanh(x / c):
//
//   lse = top + log_sum,    top = max_j z_j,    log_sum = log sum_j exp(z_j - top)
//   loss = (1 - e) (lse - z_t) + e (lse - mean_j z_j);   0 where the target is ignored
//   dx_j = scale (exp(z_j - lse) - (1 - e) [j = t] - e / classes) (1 - (z_j / c)^2 if capped)
//
// Both parts of lse are kept: their sum is rounded to the precision of the largest logit, which a small loss would
// show.
//
// Forward reads the logits once: a block of them is looked at twice, for its maximum and for its sum, while it is in
// the first-level cache. Backward reads them once and writes as much.
#pragma once
#include "core/isa.h"
#include "core/threads.h"
#include "core/types.h"

namespace bmf {

struct CrossEntropyForwardArgs {
  int64_t rows, classes;
  Rows logits;
  const int64_t* target;  // [rows], each in [0, classes) or ignore_index
  int64_t ignore_index;
  float label_smoothing, softcap;  // softcap 0: none
  float* loss;                     // [rows]
  float* lse;                      // [rows, 2]: top, log_sum
};

struct CrossEntropyBackwardArgs {
  int64_t rows, classes;
  Rows logits, grad;
  const int64_t* target;
  int64_t ignore_index;
  float label_smoothing, softcap;
  const float* lse;
  const float* scale;    // gradient of each row's loss: scale[row * scale_stride]
  int64_t scale_stride;  // 0: the same for all
};

}  // namespace bmf

BMF_DECLARE_KERNEL(cross_entropy_forward, CrossEntropyForwardArgs)
BMF_DECLARE_KERNEL(cross_entropy_backward, CrossEntropyBackwardArgs)
