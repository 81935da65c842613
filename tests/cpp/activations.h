// The activation functions in double, with their derivatives.
#pragma once
#include <cmath>

#include "core/types.h"

namespace testing {

using bmf::Activation;

constexpr Activation kActivations[] = {Activation::none, Activation::relu,    Activation::gelu, Activation::gelu_tanh,
                                       Activation::silu, Activation::sigmoid, Activation::tanh, Activation::relu2};
constexpr double kSteepest = 1.2;  // the largest slope of the functions above, but for relu2

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

inline double activate(Activation kind, double x) {
  switch (kind) {
    case Activation::none: return x;
    case Activation::relu: return x > 0 ? x : 0;
    case Activation::gelu: return x * std::erfc(-x / std::sqrt(2.0)) / 2;
    case Activation::gelu_tanh: return x * sigmoid(2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x));
    case Activation::silu: return x * sigmoid(x);
    case Activation::sigmoid: return sigmoid(x);
    case Activation::tanh: return std::tanh(x);
    case Activation::relu2: return x > 0 ? x * x : 0;
  }
  return 0;
}

inline double activation_slope(Activation kind, double x) {
  if (kind == Activation::relu) return x > 0;
  constexpr double kStep = 1e-6;
  return (activate(kind, x + kStep) - activate(kind, x - kStep)) / (2 * kStep);
}

}  // namespace testing
