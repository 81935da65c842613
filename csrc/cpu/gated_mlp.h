// gated_mlp: y = dropout((activation(x Wg^T) * (x Wu^T)) Wd^T) + residual.
//
// x [m, k], Wg and Wu [f, k], Wd [n, f] with contiguous rows; y, dy [m, n], gate and up (x Wg^T, x Wu^T) [m, f] and dx
// [m, k] contiguous, in x's dtype; weight gradients in the weights' dtype. float32 x needs float32 weights.
#pragma once
#include "core/isa.h"
#include "core/threads.h"
#include "core/types.h"

namespace bmf {

struct GatedMlpFwdArgs {
  Dtype x_dtype, weight_dtype;
  int64_t m, n, f, k, x_stride, gate_stride, up_stride, down_stride;  // strides between rows, in elements
  const void *x, *w_gate, *w_up, *w_down;
  Activation activation;
  void *y, *gate, *up;  // gate and up: null where backward will not need them
  Dtype y_dtype;        // x's, or float32 with a residual
  Finish finish;
};

struct GatedMlpBwdArgs {
  Dtype x_dtype, weight_dtype;
  int64_t m, n, f, k, x_stride, gate_stride, up_stride, down_stride;
  const void *dy, *x, *w_gate, *w_up, *w_down, *gate, *up;
  Activation activation;
  void *dx, *dw_gate, *dw_up, *dw_down;  // null where not wanted
};

}  // namespace bmf

BMF_DECLARE_KERNEL(gated_mlp_forward, GatedMlpFwdArgs)
BMF_DECLARE_KERNEL(gated_mlp_backward, GatedMlpBwdArgs)
