// The activation functions of core/activation.h and their derivatives, for one number.
#pragma once
#include "cuda/device.h"

namespace bmf::cuda {

struct ValueAndSlope {
  float value, slope;
};

BMF_DEVICE float sigmoid(float x) {
  constexpr float kLog2e = 1.44269504088896341f;
  return reciprocal(1.0f + exp2(-kLog2e * x));
}

// What is not used of the result is not computed.
template <Activation kKind>
BMF_DEVICE ValueAndSlope activate(float x) {
  constexpr float kSqrtHalf = 0.70710678118654752f, kInvSqrt2Pi = 0.39894228040143268f;
  constexpr float kLinear = 2 * 0.79788456080286536f, kCubic = kLinear * 0.044715f;  // (1 + tanh u) / 2 = sigmoid(2u)
  constexpr float kHalfLog2e = 0.72134752044448170f;
  if constexpr (kKind == Activation::none) return {x, 1.0f};
  if constexpr (kKind == Activation::relu) return {x < 0 ? 0.0f : x, x > 0 ? 1.0f : 0.0f};  // NaN stays NaN
  if constexpr (kKind == Activation::gelu) {
    const float cdf = 0.5f + 0.5f * erf(x * kSqrtHalf);
    return {x * cdf, cdf + x * kInvSqrt2Pi * exp2(-kHalfLog2e * x * x)};
  }
  if constexpr (kKind == Activation::gelu_tanh) {
    const float z = x * x, s = sigmoid(x * (kLinear + kCubic * z));
    return {x * s, s + x * (kLinear + 3 * kCubic * z) * s * (1.0f - s)};
  }
  if constexpr (kKind == Activation::silu) {
    const float s = sigmoid(x);
    return {x * s, s + x * s * (1.0f - s)};
  }
  if constexpr (kKind == Activation::sigmoid) {
    const float s = sigmoid(x);
    return {s, s * (1.0f - s)};
  }
  if constexpr (kKind == Activation::tanh) {
    const float t = tanh(x);
    return {t, 1.0f - t * t};
  }
  if constexpr (kKind == Activation::relu2) {
    const float r = x < 0 ? 0.0f : x;
    return {r * r, 2.0f * r};
  }
}

// f.template operator()<kind>(): the choice is made once, outside of f's loop.
template <class F>
BMF_DEVICE void with_activation(Activation kind, const F& f) {
  switch (kind) {
    case Activation::none: return f.template operator()<Activation::none>();
    case Activation::relu: return f.template operator()<Activation::relu>();
    case Activation::gelu: return f.template operator()<Activation::gelu>();
    case Activation::gelu_tanh: return f.template operator()<Activation::gelu_tanh>();
    case Activation::silu: return f.template operator()<Activation::silu>();
    case Activation::sigmoid: return f.template operator()<Activation::sigmoid>();
    case Activation::tanh: return f.template operator()<Activation::tanh>();
    case Activation::relu2: return f.template operator()<Activation::relu2>();
  }
}

}  // namespace bmf::cuda
