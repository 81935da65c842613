// The products and passes that mlp and gated_mlp are made of. `multiply(product)` and `pointwise(args)` do one of them
// and return whether they could: on a GPU (mlp.cu), or on the host (tests/cpp).
#pragma once
#include "cuda/mlp.h"
#include "cuda/pointwise.h"

namespace bmf::cuda {

template <class Multiply, class Pointwise>
bool run_mlp_forward(const MlpArgs& a, const Multiply& multiply, const Pointwise& pointwise) {
  const auto inner = [&](void* data) { return Matrix{data, a.type(), a.rows, a.hidden, a.hidden}; };
  const auto biased = [](void* bias, Epilogue e = Epilogue::none) { return with(e, bias != nullptr, Epilogue::bias); };
  const auto first = [&](void* out, Epilogue e, void* aux = nullptr) {
    return multiply({a.x, transposed(a.w1), inner(out), biased(a.b1, e), a.b1, aux, aux != nullptr ? a.hidden : 0});
  };
  bool launched;
  if (a.fused_gelu()) {
    launched = first(a.h, with(Epilogue::gelu, a.z != nullptr, Epilogue::aux), a.z);
  } else if (a.fused_relu()) {
    launched = first(a.h, Epilogue::relu);
  } else {
    void* z = a.z != nullptr ? a.z : a.h;
    launched = first(z, Epilogue::none) && (!a.gated() || multiply({a.x, transposed(a.wu), inner(a.u)})) &&
               pointwise({a.dtype, a.activation, a.rows * a.hidden, z, a.u, a.h, nullptr, nullptr, nullptr});
  }
  return launched &&
         multiply({inner(a.h), transposed(a.w2), {a.y, a.type(), a.rows, a.outputs, a.outputs}, biased(a.b2), a.b2});
}

template <class Multiply, class Pointwise>
bool run_mlp_backward(const MlpArgs& a, const Multiply& multiply, const Pointwise& pointwise) {
  const auto inner = [&](const void* data) {
    return Matrix{const_cast<void*>(data), a.type(), a.rows, a.hidden, a.hidden};
  };
  const auto gradient = [&](void* data, int64_t rows, int64_t columns) {
    return Matrix{data, a.gradient, rows, columns, columns};
  };
  const Matrix dy{const_cast<void*>(a.dy), a.type(), a.rows, a.outputs, a.outputs};
  // The gradient of a weight, left^T right, and with it that of its bias.
  const auto weight_gradient = [&](const Matrix& left, const Matrix& right, void* dw, void* db) {
    const Epilogue epilogue = db != nullptr ? Epilogue::left_sums : Epilogue::none;
    return multiply({transposed(left), right, gradient(dw, left.columns, right.columns), epilogue, db});
  };
  const bool inward = a.dx != nullptr || a.dw1 != nullptr || a.dwu != nullptr || a.db1 != nullptr;
  const bool fused = a.fused_gelu();
  if (inward) {
    Product into{dy, a.w2, inner(a.dz)};
    if (fused) {
      into.epilogue = with(Epilogue::gelu_slope | Epilogue::aux, a.db1 != nullptr, Epilogue::bias_sums);
      into.bias = a.db1;
      into.aux = a.z;
      into.aux_stride = a.hidden;
    }
    if (!multiply(into)) return false;
  }
  const void* dh = inward && !fused ? a.dz : nullptr;
  if ((dh != nullptr || a.dw2 != nullptr) &&
      !pointwise({a.dtype, a.activation, a.rows * a.hidden, a.z, a.u, a.h, dh, a.dz, a.du}))
    return false;
  const Matrix dz = inner(a.dz), du = inner(a.du);
  return (a.dw2 == nullptr || weight_gradient(dy, inner(a.h), a.dw2, a.db2)) &&
         (a.dw1 == nullptr || weight_gradient(dz, a.x, a.dw1, fused ? nullptr : a.db1)) &&
         (a.dwu == nullptr || weight_gradient(du, a.x, a.dwu, nullptr)) &&
         (a.dx == nullptr ||
          (multiply({dz, a.w1, {a.dx, a.type(), a.rows, a.inputs, a.inputs}}) &&
           (a.u == nullptr ||
            multiply({.left = du, .right = a.wu, .out = {a.dx, a.type(), a.rows, a.inputs, a.inputs}, .adds = true}))));
}

}  // namespace bmf::cuda
