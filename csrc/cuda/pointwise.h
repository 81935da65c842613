// What lies between the two products of mlp and gated_mlp where no epilogue does it, element by element:
//
//   h = activation(gate) up,   dgate = dh up activation'(gate),   dup = dh activation(gate)
//
// with up = 1 where there is none. A thread takes eight neighbouring elements; each is read once and written once.
#pragma once
#include "cuda/activation.h"
#include "cuda/half.h"

namespace bmf::cuda {

struct PointwiseArgs {
  Half dtype;
  Activation activation;
  int64_t count;
  const void *gate, *up;  // contiguous, from a multiple of 16 bytes on, as is all else here; up: null where absent
  void* h;
  // backward only
  const void* grad_h;         // null in forward
  void *grad_gate, *grad_up;  // grad_gate may be the memory of grad_h
};

struct PointwiseShape {
  static constexpr int kThreads = 256, kElements = 8;
  static constexpr int64_t blocks(int64_t count) { return (count + kThreads * kElements - 1) / (kThreads * kElements); }
};

template <class T>
BMF_DEVICE float element(const Words& w, int i) {
  return to_float(T{static_cast<uint16_t>(w.word[i / 2] >> (16 * (i % 2)))});
}

template <class T, bool kGated, bool kBackward>
BMF_KERNEL((PointwiseShape::kThreads))
pointwise_kernel(BMF_CONSTANT const PointwiseArgs a) {
  constexpr int kElements = PointwiseShape::kElements;
  const int64_t first = (int64_t{block_x()} * PointwiseShape::kThreads + thread_index()) * kElements;
  if (first >= a.count) return;
  const int count = a.count - first < kElements ? static_cast<int>(a.count - first) : kElements;
  const auto load = [&](const void* data) {
    const auto* from = static_cast<const uint16_t*>(data) + first;
    if (count == kElements) return *reinterpret_cast<const Words*>(from);
    Words v{};
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      if (i < count) v.word[i / 2] |= static_cast<uint32_t>(from[i]) << (16 * (i % 2));
    return v;
  };
  const auto store = [&](void* data, const float (&x)[kElements]) {
    Words v;
#pragma unroll
    for (int i = 0; i < kElements; i += 2) v.word[i / 2] = pack<T>(x[i], x[i + 1]);
    auto* to = static_cast<uint16_t*>(data) + first;
    if (count == kElements) {
      *reinterpret_cast<Words*>(to) = v;
      return;
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      if (i < count) to[i] = static_cast<uint16_t>(v.word[i / 2] >> (16 * (i % 2)));
  };

  Words up{}, grad{};
  const Words gate = load(a.gate);
  if constexpr (kGated) up = load(a.up);
  if constexpr (kBackward) grad = load(a.grad_h);
  float h[kElements], grad_gate[kElements], grad_up[kElements];
  with_activation(a.activation, [&]<Activation kKind>() {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const auto [value, slope] = activate<kKind>(element<T>(gate, i));
      const float u = kGated ? element<T>(up, i) : 1.0f, g = kBackward ? element<T>(grad, i) : 0.0f;
      h[i] = value * u;
      grad_gate[i] = g * u * slope;
      grad_up[i] = g * value;
    }
  });
  store(a.h, h);
  if constexpr (kBackward) store(a.grad_gate, grad_gate);
  if constexpr (kBackward && kGated) store(a.grad_up, grad_up);
}

// f(kernel) with the one that a call takes.
template <class F>
void with_pointwise(const PointwiseArgs& a, const F& f) {
  const auto with_type = [&]<class T>() {
    if (a.up != nullptr)
      a.grad_h != nullptr ? f(pointwise_kernel<T, true, true>) : f(pointwise_kernel<T, true, false>);
    else
      a.grad_h != nullptr ? f(pointwise_kernel<T, false, true>) : f(pointwise_kernel<T, false, false>);
  };
  a.dtype == Half::bfloat16 ? with_type.template operator()<bf16>() : with_type.template operator()<f16>();
}

}  // namespace bmf::cuda
