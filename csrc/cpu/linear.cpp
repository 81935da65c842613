// y = dropout(activation(x W^T + b)) + residual: one GEMM with the rest in its epilogue. Backward: g = dy *
// activation'(pre) and the bias gradient in one pass, then dx = g W and dW = g^T x.
//
// bf16 with float weights converts them on the way into the packed panels, so no bf16 copy of the weights is ever
// stored.
#include "cpu/linear.h"

#include "cpu/dense.h"

namespace bmf::BMF_ISA {

void linear_forward(const LinearFwdArgs& a, const Threads& threads) {
  with_dense_types(a.x_dtype, a.weight_dtype, [&](auto types) {
    using Types = decltype(types);
    using X = typename Types::Input;
    using W = typename Types::Weight;
    const MatrixView<X> x{static_cast<const X*>(a.x), a.x_stride, 1};
    const MatrixView<W> weight{static_cast<const W*>(a.weight), a.weight_stride, 1};
    const DenseOutput out = DenseOutput::finished(a.y, a.y_dtype, a.finish);
    dense_forward<typename Types::Mode>(threads, x, weight, a.bias, a.activation, out, static_cast<X*>(a.pre), a.m, a.n,
                                        a.k);
  });
}

void linear_backward(const LinearBwdArgs& a, const Threads& threads) {
  with_dense_types(a.x_dtype, a.weight_dtype, [&](auto types) {
    using Types = decltype(types);
    using Mode = typename Types::Mode;
    using X = typename Types::Input;
    using W = typename Types::Weight;
    const bool activated = a.activation != Activation::none;
    const Scratch activated_grad(activated ? a.m * a.n * sizeof(X) : 0);
    const X* dy = static_cast<const X*>(a.dy);
    const X* g_data = activated ? activated_grad.at<X>(0) : dy;
    const MatrixView<X> x{static_cast<const X*>(a.x), a.x_stride, 1}, g{g_data, a.n, 1};
    const MatrixView<W> weight{static_cast<const W*>(a.weight), a.weight_stride, 1};
    if (activated)
      activation_backward(threads, dy, static_cast<const X*>(a.pre), a.activation, activated_grad.at<X>(0), a.dbias,
                          a.m, a.n);
    if (a.dx) dense_dgrad<Mode>(threads, g, weight, static_cast<X*>(a.dx), a.m, a.n, a.k);
    dense_wgrad<Mode>(threads, g, x, static_cast<W*>(a.dweight), activated ? nullptr : a.dbias, a.m, a.n, a.k);
  });
}

namespace {

template <class X>
MatrixView<X> gradient_of(const LinearOfSeveral& layer) {
  return {static_cast<const X*>(layer.dy), layer.dy_stride, 1};
}

// dx = sum of g_i W_i, with the operands of the layers before `i` in `products` already.
template <class Mode, class X, class W>
void linears_dgrad(const LinearsBwdArgs& a, const Threads& threads, int i, Product<Mode> (&products)[kMostLinears]) {
  if (i < a.count) {
    const LinearOfSeveral& layer = a.layers[i];
    const MatrixView<W> weight{static_cast<const W*>(layer.weight), layer.weight_stride, 1};
    const OperandA<Mode> rows(threads, gradient_of<X>(layer), a.m, layer.n);
    const OperandB<Mode> panels = OperandB<Mode>::of_weights(threads, layer.n, a.k, weight);
    products[i] = {&rows, &panels};
    return linears_dgrad<Mode, X, W>(a, threads, i + 1, products);
  }
  with_type(a.dx.dtype, [&](auto type) {
    gemm<Mode>(threads, a.m, products, a.count, 1, StoreInputGradient<decltype(type)>(a.dx, a.k));
  });
}

}  // namespace

void linears_backward(const LinearsBwdArgs& a, const Threads& threads) {
  with_dense_types(a.x_dtype, a.weight_dtype, [&](auto types) {
    using Types = decltype(types);
    using Mode = typename Types::Mode;
    using X = typename Types::Input;
    using W = typename Types::Weight;
    if (a.dx.dx) {
      Product<Mode> products[kMostLinears];
      linears_dgrad<Mode, X, W>(a, threads, 0, products);
    }
    bool any = false;
    for (const LinearOfSeveral* layer = a.layers; layer < a.layers + a.count; ++layer) {
      if (layer->dbias) column_sums(threads, gradient_of<X>(*layer), a.m, layer->n, layer->dbias);
      any = any || layer->dweight;
    }
    if (!any) return;
    const OperandB<Mode> x(threads, a.m, a.k, MatrixView<X>{static_cast<const X*>(a.x), a.x_stride, 1});
    for (const LinearOfSeveral* layer = a.layers; layer < a.layers + a.count; ++layer)
      if (layer->dweight)
        dense_wgrad<Mode>(threads, gradient_of<X>(*layer), x, static_cast<W*>(layer->dweight), a.m, layer->n, a.k);
  });
}

}  // namespace bmf::BMF_ISA
