// A whole multilayer perceptron in one kernel (Müller et al. 2021, "Real-time neural radiance caching for path
// tracing"), of bfloat16 and float16, with sums in float32:
//
//   h_0 = x,   z_l = h_l W_l^T + b_l,   h_l+1 = activation(z_l),   y = h_L W_L^T + b_L
//
// x [rows, inputs], L >= 1 hidden layers, all 64 or all 128 wide, y [rows, outputs] with no more outputs than that.
// Between two layers nothing leaves the chip; for backward forward writes each z_l once, and backward reads it once.
// Gradients of the weights are sums that each block makes over its rows and that are added in a fixed order: the same
// bits from run to run.
#pragma once
#include "core/types.h"
#include "cuda/half.h"

namespace bmf::cuda {

struct MlpFusedArgs {
  Half dtype;
  Activation activation;
  int64_t rows;
  int32_t width, inputs, outputs, hidden;  // hidden: how many layers
  const void* weights;                     // W_0 [width, inputs], then [width, width] each, then [outputs, width]
  const float* biases;                     // b_0 to b_L, one behind the other; or null
  const void* x;
  int64_t x_stride;  // in elements, between rows
  void* y;           // contiguous
  void* pre;         // z [hidden, rows, width]; null where nobody asks for it
  // backward only
  const void* grad_y;   // contiguous
  void* grad_x;         // contiguous; null where it is not wanted
  float* grad_weights;  // as the weights are; null where no parameter's gradient is wanted
  float* grad_biases;   // as the biases are
  float* sums;          // workspace of sums_count floats, wherever grad_weights is wanted
  // set by plan_mlp_fused_backward, and by forward for itself
  int32_t blocks, slots, kept;  // slots: matrices that shared memory holds; kept: gradients of such, summed there
  int64_t sums_count;
};

// As attention's: null, or a line that says what is wrong. The plan comes before backward, when all but `sums` is set.
const char* mlp_fused_forward(const MlpFusedArgs& args, void* stream);
const char* plan_mlp_fused_backward(MlpFusedArgs& args);
const char* mlp_fused_backward(const MlpFusedArgs& args, void* stream);

}  // namespace bmf::cuda
