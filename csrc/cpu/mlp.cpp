// y = h W2^T + b2 with h = activation(pre), pre = x W1^T + b1.
//
// h is never saved: backward makes it again from pre in the epilogue of dy W2, beside dpre = (dy W2) *
// activation'(pre), while the tile is in L2, and stores both as the operands of the products that follow.
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
    dense_forward<Mode>(threads, MatrixView<X>{static_cast<const X*>(a.x), a.x_stride, 1}, w1, a.b1, a.activation,
                        DenseOutput::plain(h), static_cast<X*>(a.pre), a.m, a.f, a.k);
    dense_affine<Mode>(threads, MatrixView<X>{h, a.f, 1}, w2, a.b2, DenseOutput::finished(a.y, a.y_dtype, a.finish),
                       a.m, a.n, a.f);
  });
}

void mlp_backward(const MlpBwdArgs& a, const Threads& threads) {
  with_dense_types(a.x_dtype, a.weight_dtype, [&](auto types) {
    using Types = decltype(types);
    using Mode = typename Types::Mode;
    using X = typename Types::Input;
    using W = typename Types::Weight;
    const int64_t m = a.m, f = a.f;
    const X *pre = static_cast<const X*>(a.pre), *dy_data = static_cast<const X*>(a.dy);
    const MatrixView<X> x{static_cast<const X*>(a.x), a.x_stride, 1}, dy{dy_data, a.n, 1};
    const MatrixView<W> w1{static_cast<const W*>(a.w1), a.w1_stride, 1},
        w2{static_cast<const W*>(a.w2), a.w2_stride, 1};
    const HiddenOperand<Mode, X> h(m, f, false, a.dw2 != nullptr);
    const HiddenOperand<Mode, X> dpre(m, f, a.dx.dx != nullptr, a.dw1 != nullptr, a.db1 != nullptr);
    with_activation(a.activation, [&](auto tag) {
      const auto prefetch = [&](int64_t row, int64_t rows, int64_t panel) {
        prefetch_panel<false>(pre, f, row, rows, panel);
        h.prefetch(row, rows, panel);
        dpre.prefetch(row, rows, panel);
      };
      const auto differentiate = [&](const Tile& tile) {
        for_row_pairs(tile, f, [&](int64_t row, int64_t col, int lanes, Vec dh0, Vec dh1) {
          Vec p[2];
          load_pair(pre, m, f, row, col, lanes, p);
          const ValueAndSlope first = activate_with_slope<decltype(tag)::value, sizeof(X) == 2>(p[0]),
                              second = activate_with_slope<decltype(tag)::value, sizeof(X) == 2>(p[1]);
          h.store_pair(row, col, lanes, first.value, second.value);
          dpre.store_pair(row, col, lanes, dh0 * first.slope, dh1 * second.slope);
        });
      };
      dense_product_across<Mode>(threads, dy, w2, m, a.n, f, PrefetchingEpilogue{prefetch, differentiate});
    });
    if (a.db2) column_sums(threads, dy, m, a.n, a.db2);
    if (a.db1) dpre.add_sums(threads, a.db1);
    if (a.dw2) wgrad_of_hidden(threads, dy, h, static_cast<W*>(a.dw2), m, a.n, f);
    if (a.dw1) hidden_wgrad(threads, dpre, x, static_cast<W*>(a.dw1), m, f, a.k);
    if (a.dx.dx) dense_dgrad<Mode>(threads, dpre.rows(), w1, a.dx, m, f, a.k);
  });
}

}  // namespace bmf::BMF_ISA
