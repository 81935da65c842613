// mlp: y = dropout(activation(x W1^T + b1) W2^T + b2) + residual.
//
// x [m, k], W1 [f, k], W2 [n, f] with contiguous rows; y, dy [m, n], pre [m, f] and dx [m, k] contiguous, in x's dtype;
// biases and their gradients float; weight gradients in the weights' dtype. float32 x needs float32 weights.
#pragma once
#include "core/isa.h"
#include "core/threads.h"
#include "core/types.h"

namespace bmf {

struct MlpFwdArgs {
  Dtype x_dtype, weight_dtype;
  int64_t m, n, f, k, x_stride, w1_stride, w2_stride;  // strides between rows, in elements
  const void *x, *w1, *w2;
  const float *b1, *b2;  // or null
  Activation activation;
  void *y, *pre;  // pre (x W1^T + b1): null where backward will not need it
  Dtype y_dtype;  // x's, or float32 with a residual
  Finish finish;
};

struct MlpBwdArgs {
  Dtype x_dtype, weight_dtype;
  int64_t m, n, f, k, x_stride, w1_stride, w2_stride;
  const void *dy, *x, *w1, *w2, *pre;
  Activation activation;
  InputGradient dx;
  void *dw1, *dw2;  // null where not wanted
  float *db1, *db2;
};

}  // namespace bmf

BMF_DECLARE_KERNEL(mlp_forward, MlpFwdArgs)
BMF_DECLARE_KERNEL(mlp_backward, MlpBwdArgs)
