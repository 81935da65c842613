// Plain types that cross the border between the operator layer and the kernels. No functions here: this header is
// compiled under different instruction sets, and an inline function shared by two of them could be linked in the wrong
// version.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bmf {

struct bf16 {
  uint16_t bits;
};

enum class Dtype : int32_t { float32, bfloat16 };

// Rows of contiguous elements, `stride` elements apart. data is null where an optional operand is absent.
struct Rows {
  void* data;
  int64_t stride;
  Dtype dtype;
};

// What is done to an output before it is stored: y = dropout(y) + residual.
struct Finish {
  float dropout;  // the probability to drop an element, 0 for none; what is left is divided by its complement
  uint64_t seed;  // of the choices
  Rows residual;
};

// Where the gradient of an input goes, [rows, width] contiguous: dx = what flows through the operator + residual.
struct InputGradient {
  void* dx;  // null where not wanted
  Dtype dtype;
  const void* residual;  // what flows into the input from elsewhere, as dx; or null
};

enum class Activation : int32_t { none, relu, gelu, gelu_tanh, silu, sigmoid, tanh, relu2 };

}  // namespace bmf
