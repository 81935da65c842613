// Whole training steps of a multilayer perceptron: gather and normalise a batch, forward, loss, backward, update.
//
//   x_0 = augment(image) scale + shift;  z_l = x_l W_l^T + b_l;  x_(l+1) = dropout(activation_l(z_l))
//   cross_entropy: mean over the batch of log sum exp x_L - x_L[label];  mse: mean of (x_L - target)^2
//
// and then adamw or sgd of cpu/optim.h on each W and b, in the order torch does it.
//
// Small networks wait for threads and memory, not for arithmetic. So activations lie feature by feature, with samples
// in the lanes: then W is the A operand of the forward product where it stands and as it stands, in torch's layout; a
// product's result is the B operand of the next; and a loss needs no sums across lanes. Of W's gradient a tile exists
// at a time, in the first-level cache, where it is turned into the update of W: gradients are never stored, no weight
// is packed in float32, and nothing is allocated within a call. Two threads split the rows of each W, not the batch, so
// each keeps its rows of W, of its states and nothing else in its caches; team.h makes such short phases worth while.
//
// Sums are over the batch and over features in an order that does not depend on threads.
#pragma once
#include "core/isa.h"
#include "core/threads.h"
#include "core/types.h"

namespace bmf {

enum class UpdateRule : int32_t { none, sgd, adam };

// A parameter as its optimizer sees it: values and states are updated in place.
struct TrainedTensor {
  float* p;      // null: there is no such parameter
  float *m, *v;  // momentum, or first and second moment; null if the rule has none
  UpdateRule rule;
  bool nesterov, decoupled;  // decoupled: weight decay as AdamW's, and not added to the gradient
  bool fresh;                // sgd: m has no value yet
  int64_t group;
  int64_t steps;  // made before this call
};

// Of a group of parameters, for one step. sgd: first = momentum, second = dampening; adam: first, second = betas.
struct GroupOptions {
  double lr, weight_decay, first, second, eps;
};

struct MlpLayer {
  int64_t in, out;
  TrainedTensor weight, bias;  // [out][in], [out]
  Activation activation;
  float dropout;
};

enum class MlpLoss : int32_t { cross_entropy, mse };

// Random distortions, drawn anew for each sample of each epoch, in one bilinear pass. Nothing: all zero.
struct Augmentation {
  int64_t channels, height, width;  // of an image; features are [channels][height][width]
  float shift;                      // pixels, up to, in each direction
  float rotate;                     // degrees, up to, either way
  float scale;                      // factor within 1 +- scale
  float elastic;                    // pixels: standard deviation of a smooth random displacement (Simard et al. 2003)
  float fill;                       // stored value beyond an image's edge
};

struct MlpTrainArgs {
  const MlpLayer* layers;
  int64_t layer_count;
  MlpLoss loss;
  bool bfloat16;  // operands of products; sums, parameters and states are float32

  const void* x;  // [samples][features], bytes or floats
  bool bytes;
  int64_t features;
  const float *scale, *shift;        // [features]; null: x as it is
  const Augmentation* augmentation;  // null: none
  const int64_t* labels;             // [samples], of cross_entropy
  const float* targets;              // [samples][outputs], of mse
  const int64_t* order;              // [count]: the samples to take, batch by batch; the last batch may be smaller
  int64_t count, batch;
  const GroupOptions* options;  // [steps][groups]
  int64_t groups;
  uint64_t seed, first_step;  // of dropout and augmentation: equal ones draw the same

  double* losses;    // [steps], out
  int64_t* correct;  // [steps], out, of cross_entropy: samples whose largest output is their label's
};

// A batch as mlp_train reads it: augmented and normalised.
struct MlpInputArgs {
  const MlpTrainArgs* of;  // of which what concerns x, order and the seed is read
  float* out;              // [count][features]
};

}  // namespace bmf

BMF_DECLARE_KERNEL(mlp_train, MlpTrainArgs)
BMF_DECLARE_KERNEL(mlp_input, MlpInputArgs)
