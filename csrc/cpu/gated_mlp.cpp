// y = h Wd^T with h = activation(gate) * up, gate = x Wg^T, up = x Wu^T.
//
// Forward packs the panels of Wg and Wu alternately, so that one tile of the first product holds both factors of h.
// Backward makes h again beside dgate and dup in the epilogue of dy Wd; dx is the sum of two products in one tile.
#include "cpu/gated_mlp.h"

#include "cpu/dense.h"

namespace bmf::BMF_ISA {
namespace {

// f(row, col, lanes, gate, up) for each register of a tile whose panels alternate between gate and up.
template <class F>
BMF_INLINE void for_gated_tile(const Tile& tile, int64_t n, const F& f) {
  for (int64_t p = 0; p < tile.panels; p += 2) {
    const int64_t col = (tile.panel + p) / 2 * kPanel;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const float* gate = tile.sums + r * Tile::stride + p * kPanel;
      for_lanes(smaller(kPanel, n - col), [&](int64_t c, int lanes) {
        f(tile.row + r, col + c, lanes, load(gate + c), load(gate + kPanel + c));
      });
    }
  }
}

}  // namespace

void gated_mlp_forward(const GatedMlpFwdArgs& a, const Threads& threads) {
  with_dense_types(a.x_dtype, a.weight_dtype, [&](auto types) {
    using Types = decltype(types);
    using Mode = typename Types::Mode;
    using X = typename Types::Input;
    using W = typename Types::Weight;
    const int64_t f = a.f;
    const Scratch hidden(a.m * f * sizeof(X));
    X *h = hidden.at<X>(0), *gate_out = static_cast<X*>(a.gate), *up_out = static_cast<X*>(a.up);
    const MatrixView<X> x{static_cast<const X*>(a.x), a.x_stride, 1};
    const MatrixView<W> w_gate{static_cast<const W*>(a.w_gate), a.gate_stride, 1};
    const MatrixView<W> w_up{static_cast<const W*>(a.w_up), a.up_stride, 1};
    const MatrixView<W> w_down{static_cast<const W*>(a.w_down), a.down_stride, 1};
    with_activation(a.activation, [&](auto tag) {
      auto finish = [=](int64_t row, int64_t col, int lanes, Vec gate, Vec up) {
        const int64_t at = row * f + col;
        if (gate_out) store_lanes(gate_out + at, gate, lanes);
        if (up_out) store_lanes(up_out + at, up, lanes);
        store_lanes(h + at, activate<decltype(tag)::value, sizeof(X) == 2>(gate) * up, lanes);
      };
      if (a.m <= kFewRows &&
          !weights_held(a.w_gate)) {  // as linear does: nothing is packed for a product that reads each weight once
        const Scratch both(2 * a.m * f * sizeof(X));
        X *gate = gate_out ? gate_out : both.at<X>(0), *up = up_out ? up_out : both.at<X>(a.m * f * sizeof(X));
        dense_affine<Mode>(threads, x, w_gate, nullptr, DenseOutput::plain(gate), a.m, f, a.k);
        dense_affine<Mode>(threads, x, w_up, nullptr, DenseOutput::plain(up), a.m, f, a.k);
        for_lanes(a.m * f, [&](int64_t i, int lanes) {
          finish(0, i, lanes, load_lanes(gate + i, lanes), load_lanes(up + i, lanes));
        });
        return;
      }
      const OperandB<Mode> panels = OperandB<Mode>::of_weights(threads, a.k, f, transposed(w_gate), transposed(w_up));
      const OperandA<Mode> rows(threads, x, a.m, a.k);
      const Product<Mode> product{&rows, &panels};
      const auto prefetch = [&](int64_t row, int64_t rows, int64_t panel) {
        if (panel % 2 == 0) return prefetch_panel(h, f, row, rows, panel / 2);
        if (gate_out) prefetch_panel(gate_out, f, row, rows, panel / 2);
        if (up_out) prefetch_panel(up_out, f, row, rows, panel / 2);
      };
      const auto store = [&](const Tile& tile) { for_gated_tile(tile, f, finish); };
      gemm<Mode>(threads, a.m, &product, 1, 2, PrefetchingEpilogue{prefetch, store});
    });
    dense_affine<Mode>(threads, MatrixView<X>{h, f, 1}, w_down, nullptr,
                       DenseOutput::finished(a.y, a.y_dtype, a.finish), a.m, a.n, f);
  });
}

void gated_mlp_backward(const GatedMlpBwdArgs& a, const Threads& threads) {
  with_dense_types(a.x_dtype, a.weight_dtype, [&](auto types) {
    using Types = decltype(types);
    using Mode = typename Types::Mode;
    using X = typename Types::Input;
    using W = typename Types::Weight;
    const int64_t m = a.m, f = a.f;
    const X *gate_in = static_cast<const X*>(a.gate), *up_in = static_cast<const X*>(a.up);
    const MatrixView<X> x{static_cast<const X*>(a.x), a.x_stride, 1}, dy{static_cast<const X*>(a.dy), a.n, 1};
    const MatrixView<W> w_gate{static_cast<const W*>(a.w_gate), a.gate_stride, 1};
    const MatrixView<W> w_up{static_cast<const W*>(a.w_up), a.up_stride, 1};
    const MatrixView<W> w_down{static_cast<const W*>(a.w_down), a.down_stride, 1};
    const HiddenOperand<Mode, X> h(m, f, false, a.dw_down != nullptr);
    const HiddenOperand<Mode, X> dgate(m, f, a.dx != nullptr, a.dw_gate != nullptr);
    const HiddenOperand<Mode, X> dup(m, f, a.dx != nullptr, a.dw_up != nullptr);
    with_activation(a.activation, [&](auto tag) {
      const auto prefetch = [&](int64_t row, int64_t rows, int64_t panel) {
        prefetch_panel<false>(gate_in, f, row, rows, panel);
        prefetch_panel<false>(up_in, f, row, rows, panel);
        h.prefetch(row, rows, panel);
        dgate.prefetch(row, rows, panel);
        dup.prefetch(row, rows, panel);
      };
      const auto differentiate = [&](const Tile& tile) {
        for_row_pairs(tile, f, [&](int64_t row, int64_t col, int lanes, Vec dh0, Vec dh1) {
          Vec gate[2], up[2];
          load_pair(gate_in, m, f, row, col, lanes, gate);
          load_pair(up_in, m, f, row, col, lanes, up);
          const ValueAndSlope first = activate_with_slope<decltype(tag)::value, sizeof(X) == 2>(gate[0]),
                              second = activate_with_slope<decltype(tag)::value, sizeof(X) == 2>(gate[1]);
          h.store_pair(row, col, lanes, first.value * up[0], second.value * up[1]);
          dgate.store_pair(row, col, lanes, dh0 * up[0] * first.slope, dh1 * up[1] * second.slope);
          dup.store_pair(row, col, lanes, dh0 * first.value, dh1 * second.value);
        });
      };
      dense_product_across<Mode>(threads, dy, w_down, m, a.n, f, PrefetchingEpilogue{prefetch, differentiate});
    });
    if (a.dw_down) wgrad_of_hidden(threads, dy, h, static_cast<W*>(a.dw_down), m, a.n, f);
    if (a.dw_gate) hidden_wgrad(threads, dgate, x, static_cast<W*>(a.dw_gate), m, f, a.k);
    if (a.dw_up) hidden_wgrad(threads, dup, x, static_cast<W*>(a.dw_up), m, f, a.k);
    const StoreTile<X> store_dx{static_cast<X*>(a.dx), a.k, a.k};
    if (a.dx && m <= kFewRows && !weights_held(a.w_gate)) {
      const FewRows gate_rows(dgate.rows(), m, f), up_rows(dup.rows(), m, f);
      parallel_tasks(threads, ceil_div(a.k, kPanel), [&](int64_t panel, int) {
        float sums[kFewRows * Tile::stride], more[kFewRows * Tile::stride];
        const int64_t col = panel * kPanel, cols = smaller(kPanel, a.k - col);
        multiply_few_rows_across(gate_rows, w_gate, m, f, col, cols, sums);
        multiply_few_rows_across(up_rows, w_up, m, f, col, cols, more);
        for (int64_t r = 0; r < m; ++r)
          for (int64_t c = r * Tile::stride; c < r * Tile::stride + kPanel; c += kLanes)
            store(sums + c, load(sums + c) + load(more + c));
        store_dx(Tile{0, m, panel, 1, sums});
      });
    } else if (a.dx) {
      const OperandB<Mode> gate_panels = OperandB<Mode>::of_weights(threads, f, a.k, w_gate);
      const OperandB<Mode> up_panels = OperandB<Mode>::of_weights(threads, f, a.k, w_up);
      const OperandA<Mode> gate_rows(threads, dgate.rows(), m, f), up_rows(threads, dup.rows(), m, f);
      const Product<Mode> products[] = {{&gate_rows, &gate_panels}, {&up_rows, &up_panels}};
      gemm<Mode>(threads, m, products, 2, 1, store_dx);
    }
  });
}

}  // namespace bmf::BMF_ISA
