// The activation functions and their derivatives, and the softcap of logits, on registers of floats.
#pragma once
#include "core/simd.h"

namespace bmf::BMF_ISA {

constexpr float kSqrtHalf = 0.70710678118654752f, kInvSqrt2Pi = 0.39894228040143268f,
                kSqrt2OverPi = 0.79788456080286536f;

// Logits kept within (-cap, cap): cap tanh(x / cap).
BMF_INLINE Vec soft_cap(Vec x, float cap, float inverse_cap) {
  Vec z = tanh(x * inverse_cap) * cap;
  __asm__("" : "+x"(z));  // rounded here, and not fused into a later subtraction: the maximum less itself must be zero
  return z;
}

// kFast: good enough for results that are rounded to bf16.
template <Activation kind, bool kFast>
BMF_INLINE Vec activate(Vec x) {
  if constexpr (kind == Activation::none) return x;
  if constexpr (kind == Activation::relu) return max(Vec{}, x);  // NaN stays NaN as the second operand
  if constexpr (kind == Activation::gelu) return x * fma(erf(x * kSqrtHalf), broadcast(0.5f), broadcast(0.5f));
  if constexpr (kind == Activation::gelu_tanh) {  // (1 + tanh u) / 2 = sigmoid(2u)
    return x * sigmoid<kFast>(x * fma(x * x, broadcast(2 * kSqrt2OverPi * 0.044715f), broadcast(2 * kSqrt2OverPi)));
  }
  if constexpr (kind == Activation::silu) return x * sigmoid<kFast>(x);
  if constexpr (kind == Activation::sigmoid) return sigmoid<kFast>(x);
  if constexpr (kind == Activation::tanh) return tanh(x);
  if constexpr (kind == Activation::relu2) {
    const Vec r = max(Vec{}, x);
    return r * r;
  }
}

struct ValueAndSlope {
  Vec value, slope;
};

// activate(x) and its derivative, from what both are made of.
template <Activation kind, bool kFast>
BMF_INLINE ValueAndSlope activate_with_slope(Vec x) {
  if constexpr (kind == Activation::none) return {x, broadcast(1.0f)};
  if constexpr (kind == Activation::relu) return {activate<kind, kFast>(x), select(x > 0.0f, broadcast(1.0f), Vec{})};
  if constexpr (kind == Activation::gelu && kFast) {  // Abramowitz and Stegun 7.1.26, by what the slope needs too
    const Vec gaussian = exp2<3>(x * x * -0.72134752044448170f);
    const Vec t = reciprocal<true>(fma(abs(x), broadcast(0.3275911f * kSqrtHalf), broadcast(1.0f)));
    Vec tail = broadcast(0.5f * 1.061405429f);
    tail = fma(tail, t, broadcast(0.5f * -1.453152027f));
    tail = fma(tail, t, broadcast(0.5f * 1.421413741f));
    tail = fma(tail, t, broadcast(0.5f * -0.284496736f));
    tail = fma(tail, t, broadcast(0.5f * 0.254829592f)) * t * gaussian;
    const Vec cdf = select(x > 0.0f, 1.0f - tail, tail);
    return {x * cdf, fma(x * kInvSqrt2Pi, gaussian, cdf)};
  } else if constexpr (kind == Activation::gelu) {
    const Vec cdf = fma(erf(x * kSqrtHalf), broadcast(0.5f), broadcast(0.5f));
    return {x * cdf, fma(x * kInvSqrt2Pi, exp(x * x * -0.5f), cdf)};
  }
  if constexpr (kind == Activation::gelu_tanh) {
    const Vec z = x * x;
    const Vec s = sigmoid<kFast>(x * fma(z, broadcast(2 * kSqrt2OverPi * 0.044715f), broadcast(2 * kSqrt2OverPi)));
    const Vec slope = fma(z, broadcast(6 * kSqrt2OverPi * 0.044715f), broadcast(2 * kSqrt2OverPi));
    return {x * s, fma(x * slope, s * (1.0f - s), s)};
  }
  if constexpr (kind == Activation::silu) {
    const Vec s = sigmoid<kFast>(x);
    return {x * s, fma(x * s, 1.0f - s, s)};
  }
  if constexpr (kind == Activation::sigmoid) {
    const Vec s = sigmoid<kFast>(x);
    return {s, s * (1.0f - s)};
  }
  if constexpr (kind == Activation::tanh) {
    const Vec t = tanh(x);
    return {t, 1.0f - t * t};
  }
  if constexpr (kind == Activation::relu2) {
    const Vec r = max(Vec{}, x);
    return {r * r, 2.0f * r};
  }
}

template <Activation kind>
struct ActivationTag {
  static constexpr Activation value = kind;
};

// f(ActivationTag<kind>{}): one instantiation of f's loop per activation, chosen once outside of it.
template <class F>
inline void with_activation(Activation kind, const F& f) {
  switch (kind) {
    case Activation::none: return f(ActivationTag<Activation::none>{});
    case Activation::relu: return f(ActivationTag<Activation::relu>{});
    case Activation::gelu: return f(ActivationTag<Activation::gelu>{});
    case Activation::gelu_tanh: return f(ActivationTag<Activation::gelu_tanh>{});
    case Activation::silu: return f(ActivationTag<Activation::silu>{});
    case Activation::sigmoid: return f(ActivationTag<Activation::sigmoid>{});
    case Activation::tanh: return f(ActivationTag<Activation::tanh>{});
    case Activation::relu2: return f(ActivationTag<Activation::relu2>{});
  }
}

}  // namespace bmf::BMF_ISA
