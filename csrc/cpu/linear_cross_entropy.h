// linear_cross_entropy: the cross entropy of rows of logits z = x W^T + b (capped: c tanh(z / c)) that are never all
// held, and its gradients in the same call. With top = max_j z_j, log_sum = log sum_j exp(z_j - top) and label
// smoothing e:
//
//   loss = log_sum + (top - z_t) + e (z_t - mean_j z_j);   0 where the target is ignored
//   g_j = scale (exp(z_j - top - log_sum) - (1 - e) [j = t] - e / classes) (1 - (z_j / c)^2 if capped)
//   dx = g W,  dW = sum over tokens g^T x,  db = sum over tokens g
//
// x [tokens, width] and W [classes, width] with contiguous rows. Gradients are contiguous: dx in x's dtype, dW and db
// float. The gradients need `scale`, the gradient of each token's loss, which a mean or a sum knows in advance: forward
// and backward of both are one call.
#pragma once
#include "core/isa.h"
#include "core/threads.h"
#include "core/types.h"

namespace bmf {

struct LinearCrossEntropyArgs {
  Dtype x_dtype, weight_dtype;
  int64_t tokens, width, classes, x_stride, weight_stride;
  const void *x, *weight;
  const float* bias;      // [classes] or null
  const int64_t* target;  // [tokens], each in [0, classes) or ignore_index
  int64_t ignore_index;
  float label_smoothing, softcap;  // softcap 0: none
  const float* scale;              // scale[token * scale_stride]; null where no gradient is wanted
  int64_t scale_stride;            // 0: the same for all
  float* loss;                     // [tokens], or null
  bool* correct;  // [tokens], or null: whether no class has a higher logit than the target; not set where ignored
  void* dx;       // gradients: null where not wanted
  float *dweight, *dbias;
};

}  // namespace bmf

BMF_DECLARE_KERNEL(linear_cross_entropy, LinearCrossEntropyArgs)
