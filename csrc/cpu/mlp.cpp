// y = h W2^T + b2 with h = activation(pre), pre = x W1^T + b1.
//
// h is never saved: backward makes it again from pre in the epilogue of dy W2, beside dpre = (dy W2) *
// activation'(pre), at the cost of one pass over the tile while it is in L2.
#include "cpu/mlp.h"

#include "cpu/dense.h"

namespace bmf::BMF_ISA {

void mlp_forward(const MlpFwdArgs& a, const Threads& threads) {
  with_dense_types(a.x_dtype, a.weight_dtype, [&](auto types) {
    using Types = decltype(types);
    using Mode = typename Types::Mode;
    using X = typename Types::Input;
    using W = typename Types::Weight;
    const Scratch hidden(a.m * a.f * sizeof(X));
    X* h = hidden.at<X>(0);
    const MatrixView<W> w1{static_cast<const W*>(a.w1), a.w1_stride, 1},
        w2{static_cast<const W*>(a.w2), a.w2_stride, 1};
    dense_forward<Mode>(threads, MatrixView<X>{static_cast<const X*>(a.x), a.x_stride, 1}, w1, a.b1, a.activation, h,
                        static_cast<X*>(a.pre), a.m, a.f, a.k);
    dense_forward<Mode>(threads, MatrixView<X>{h, a.f, 1}, w2, a.b2, Activation::none, static_cast<X*>(a.y),
                        static_cast<X*>(nullptr), a.m, a.n, a.f);
  });
}

void mlp_backward(const MlpBwdArgs& a, const Threads& threads) {
  with_dense_types(a.x_dtype, a.weight_dtype, [&](auto types) {
    using Types = decltype(types);
    using Mode = typename Types::Mode;
    using X = typename Types::Input;
    using W = typename Types::Weight;
    const int64_t f = a.f;
    const Scratch hidden(a.m * f * sizeof(X)), hidden_grad(a.m * f * sizeof(X));
    X *h_out = hidden.at<X>(0), *dpre_out = hidden_grad.at<X>(0);
    const X* pre = static_cast<const X*>(a.pre);
    const MatrixView<X> x{static_cast<const X*>(a.x), a.x_stride, 1}, dy{static_cast<const X*>(a.dy), a.n, 1};
    const MatrixView<X> h{h_out, f, 1}, dpre{dpre_out, f, 1};
    const MatrixView<W> w1{static_cast<const W*>(a.w1), a.w1_stride, 1},
        w2{static_cast<const W*>(a.w2), a.w2_stride, 1};
    with_activation(a.activation, [&](auto tag) {
      constexpr Activation kind = decltype(tag)::value;
      gemm<Mode>(threads, dy, w2, a.m, f, a.n, [=](const Tile& tile) {
        for_tile(tile, f, [=](int64_t row, int64_t col, int lanes, Vec dh) {
          const Vec p = load_lanes(pre + row * f + col, lanes);
          store_lanes(h_out + row * f + col, activate<kind>(p), lanes);
          store_lanes(dpre_out + row * f + col, dh * activate_grad<kind>(p), lanes);
        });
      });
    });
    if (a.db2) column_sums(threads, dy, a.m, a.n, a.db2);
    if (a.db1) column_sums(threads, dpre, a.m, f, a.db1);
    if (a.dw2) dense_wgrad<Mode>(threads, dy, h, static_cast<W*>(a.dw2), a.m, a.n, f);
    if (a.dw1) dense_wgrad<Mode>(threads, dpre, x, static_cast<W*>(a.dw1), a.m, f, a.k);
    if (a.dx) dense_dgrad<Mode>(threads, dpre, w1, static_cast<X*>(a.dx), a.m, f, a.k);
  });
}

}  // namespace bmf::BMF_ISA
