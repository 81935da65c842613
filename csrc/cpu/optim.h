// Optimizer steps and the norm of gradients, over all parameters in one parallel region.
//
// adamw (Loshchilov and Hutter 2019), in the order torch does it, with t the step that is being made:
//   p = p (1 - lr decay);  m = m + (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2
//   p = p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
// sgd:
//   g = g + decay p;  m = momentum m + (1 - dampening) g (m = g at first);  p = p - lr (nesterov ? g + momentum m : m)
//
// Everything is computed in float; parameters and their states have one dtype, gradients their own. adamw multiplies
// gradients by grad_scale as it reads them, and can round bfloat16 parameters and states stochastically: the choice
// depends on the place of an element, its parameter's place in the list and the step, and on nothing else.
#pragma once
#include "core/isa.h"
#include "core/threads.h"
#include "core/types.h"

namespace bmf {

// A parameter: `count` contiguous elements each. What an optimizer does not use is null.
struct Parameter {
  void* p;
  void* g;
  void *m, *v;
  int64_t count;
  Dtype dtype, grad_dtype;
  int64_t step;  // that is being made, from 1
};

struct AdamWArgs {
  const Parameter* parameters;
  int64_t count;
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
  float grad_scale;
  bool stochastic_rounding;
};

struct SgdArgs {
  const Parameter* parameters;
  int64_t count;
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
};

struct GradNormArgs {
  const Parameter* parameters;  // of which only g, count and grad_dtype are read
  int64_t count;
  double* norm;  // out: the Euclidean norm of all gradients together
};

struct GradScaleArgs {
  const Parameter* parameters;
  int64_t count;
  float factor;  // g *= factor
};

}  // namespace bmf

BMF_DECLARE_KERNEL(adamw, AdamWArgs)
BMF_DECLARE_KERNEL(sgd, SgdArgs)
BMF_DECLARE_KERNEL(grad_norm, GradNormArgs)
BMF_DECLARE_KERNEL(grad_scale, GradScaleArgs)
