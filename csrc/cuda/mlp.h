// mlp and gated_mlp on NVIDIA GPUs as products of cuBLASLt, with their epilogues, and what epilogues cannot do in
// passes of its own. Of bfloat16 and float16:
//
//   mlp:        z = x W1^T + b1,   h = activation(z),   y = h W2^T + b2
//   gated_mlp:  g = x Wg^T,   u = x Wu^T,   h = activation(g) u,   y = h Wd^T
//
// gelu of tanh, and its derivative with the sums for db1, is an epilogue; h is made again in backward, so that only z
// (or g and u) is kept, or x alone.
#pragma once
#include "core/types.h"
#include "cuda/cublaslt.h"

namespace bmf::cuda {

struct MlpArgs {
  Half dtype;
  Activation activation;
  int64_t rows, inputs, hidden, outputs;
  Matrix x, w1, w2;  // w1: [hidden, inputs], w2: [outputs, hidden]; wu stands beside w1 in gated_mlp
  Matrix wu;         // data null in mlp
  void *b1, *b2;     // of dtype, or null
  void *z, *u, *h;   // [rows, hidden], contiguous; z may be null in forward where it is not kept; u only with wu
  void* y;           // [rows, outputs], contiguous
  // backward only. Gradients are null where not wanted; those of weights and biases have the weights' own type.
  const void* dy;         // contiguous
  void *dz, *du;          // [rows, hidden], workspace
  void* dx;               // [rows, inputs]
  void *dw1, *dw2, *dwu;  // as the weights, contiguous
  void *db1, *db2;        // db1 of dtype if fused_gelu(), else of the weights' type
  lt::DataType gradient;  // of weights

  lt::DataType type() const { return dtype == Half::bfloat16 ? lt::kBFloat16 : lt::kFloat16; }
  bool gated() const { return wu.data != nullptr; }
  // Whether gelu and its derivative are epilogues: rows of z must begin at multiples of 16 bytes.
  bool fused_gelu() const { return !gated() && activation == Activation::gelu_tanh && hidden % 8 == 0; }
  // Whether relu is one. Its z is then h itself, which has the same relu and the same slope.
  bool fused_relu() const { return !gated() && activation == Activation::relu; }
};

// As attention's: null, or a line that says what is wrong.
const char* mlp_forward(const MlpArgs& args, const Workspace& workspace, void* stream);
const char* mlp_backward(const MlpArgs& args, const Workspace& workspace, void* stream);

}  // namespace bmf::cuda
