// linear: y = dropout(activation(x W^T + b)) + residual.
//
// x [m, k] and W [n, k] with contiguous rows; y, dy, pre [m, n] and dx [m, k] contiguous, in x's dtype; bias and its
// gradient float; the weight's gradient in the weight's dtype. float32 x needs float32 W.
#pragma once
#include "core/isa.h"
#include "core/threads.h"
#include "core/types.h"

namespace bmf {

struct LinearFwdArgs {
  Dtype x_dtype, weight_dtype;
  int64_t m, n, k, x_stride, weight_stride;  // strides between rows, in elements
  const void *x, *weight;
  const float* bias;  // or null
  Activation activation;
  void *y, *pre;  // pre (x W^T + b): null where backward will not need it
  Dtype y_dtype;  // x's, or float32 with a residual
  Finish finish;
};

struct LinearBwdArgs {
  Dtype x_dtype, weight_dtype;
  int64_t m, n, k, x_stride, weight_stride;
  const void *dy, *x, *weight, *pre;  // pre: null without activation
  Activation activation;
  void *dx, *dweight;  // null where not wanted
  float* dbias;
};

// Backward of several layers of one x: dx is the sum over them. dy's rows may be apart.
constexpr int kMostLinears = 4;

struct LinearOfSeveral {
  int64_t n, weight_stride, dy_stride;
  const void *dy, *weight;
  void* dweight;  // null where not wanted
  float* dbias;
};

struct LinearsBwdArgs {
  Dtype x_dtype, weight_dtype;
  int64_t m, k, x_stride;
  const void* x;
  InputGradient dx;
  int count;  // kMostLinears at most
  const LinearOfSeveral* layers;
};

}  // namespace bmf

BMF_DECLARE_KERNEL(linear_forward, LinearFwdArgs)
BMF_DECLARE_KERNEL(linear_backward, LinearBwdArgs)
BMF_DECLARE_KERNEL(linears_backward, LinearsBwdArgs)
