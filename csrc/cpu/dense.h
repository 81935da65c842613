// The products a dense layer y = activation(x W^T + b) is made of, forward and backward; linear, mlp and gated_mlp are
// put together from them. Shapes: x [m, k], W [n, k], y and g [m, n]; all rows contiguous.
#pragma once
#include "core/activation.h"
#include "core/gemm.h"

namespace bmf::BMF_ISA {

template <class M, class X, class W>
struct DenseTypes {
  using Mode = M;
  using Input = X;
  using Weight = W;
};

// f(DenseTypes<...>{}) for activations and weights of these dtypes; float activations come with float weights only.
template <class F>
inline void with_dense_types(Dtype input, Dtype weight, const F& f) {
  if (input == Dtype::float32) return f(DenseTypes<FloatMode, float, float>{});
  if (weight == Dtype::float32) return f(DenseTypes<Bf16Mode, bf16, float>{});
  return f(DenseTypes<Bf16Mode, bf16, bf16>{});
}

// W as the B operand of x W^T, and of g W.
template <class T>
BMF_INLINE MatrixView<T> transposed(const MatrixView<T>& w) {
  return {w.data, w.col_stride, w.row_stride};
}

// At most this many rows are multiplied without packing: each weight is then read once, straight into the sums.
constexpr int64_t kFewRows = 4;

// sums[r][c] = x[r] . w[col + c] for r < m and c < cols; x is float here, its rows zero beyond k up to `stride`.
template <class W>
void multiply_few_rows(const float* x, int64_t stride, const MatrixView<W>& w, int64_t m, int64_t col, int64_t cols,
                       int64_t k, float* sums) {
  for (int64_t c = 0; c < cols; ++c) {
    Vec acc[kFewRows] = {};
    for_lanes(k, [&](int64_t i, int lanes) {
      const Vec weight = load_lanes(w.at(col + c, i), lanes);
      for (int64_t r = 0; r < m; ++r) acc[r] = fma(weight, load(x + r * stride + i), acc[r]);
    });
    for (int64_t r = 0; r < m; ++r) sums[r * Tile::stride + c] = sum(acc[r]);
  }
}

// x W^T tile by tile, as gemm() hands it to an epilogue.
template <class Mode, class X, class W, class Epilogue>
inline void dense_product(const Threads& threads, const MatrixView<X>& x, const MatrixView<W>& w, int64_t m, int64_t n,
                          int64_t k, const Epilogue& epilogue) {
  if (m > kFewRows) return gemm<Mode>(threads, x, transposed(w), m, n, k, epilogue);
  const int64_t stride = ceil_div(k, kLanes) * kLanes;
  const Scratch wide(m * stride * 4);
  for (int64_t r = 0; r < m; ++r)
    for_lanes(k,
              [&](int64_t c, int lanes) { store(wide.at<float>(0) + r * stride + c, load_lanes(x.at(r, c), lanes)); });
  parallel_tasks(threads, ceil_div(n, kPanel), [&](int64_t panel, int) {
    float sums[kFewRows * Tile::stride];
    const int64_t col = panel * kPanel;
    multiply_few_rows(wide.at<float>(0), stride, w, m, col, smaller(kPanel, n - col), k, sums);
    epilogue(Tile{0, m, panel, 1, sums});
  });
}

// Epilogue of y = activation(x W^T + b); x W^T + b itself goes to `pre` unless that is null.
template <Activation kind, class X>
struct DenseEpilogue {
  const float* bias;  // or null
  X *y, *pre;
  int64_t n;
  void operator()(const Tile& tile) const {
    for_tile(tile, n, [&](int64_t row, int64_t col, int lanes, Vec v) {
      if (bias) v += load_lanes(bias + col, lanes);
      if (pre) store_lanes(pre + row * n + col, v, lanes);
      store_lanes(y + row * n + col, activate<kind>(v), lanes);
    });
  }
};

template <class Mode, class X, class W>
inline void dense_forward(const Threads& threads, const MatrixView<X>& x, const MatrixView<W>& w, const float* bias,
                          Activation activation, X* y, X* pre, int64_t m, int64_t n, int64_t k) {
  with_activation(activation, [&](auto tag) {
    dense_product<Mode>(threads, x, w, m, n, k, DenseEpilogue<decltype(tag)::value, X>{bias, y, pre, n});
  });
}

// dx = g W.
template <class Mode, class X, class W>
inline void dense_dgrad(const Threads& threads, const MatrixView<X>& g, const MatrixView<W>& w, X* dx, int64_t m,
                        int64_t n, int64_t k) {
  gemm<Mode>(threads, g, w, m, k, n, StoreTile<X>{dx, k, k});
}

// dW = g^T x.
template <class Mode, class X, class W>
inline void dense_wgrad(const Threads& threads, const MatrixView<X>& g, const MatrixView<X>& x, W* dw, int64_t m,
                        int64_t n, int64_t k) {
  gemm<Mode>(threads, transposed(g), x, n, k, m, StoreTile<W>{dw, k, k});
}

// For each row in [0, m): row_step(row, partial) adds the row to its chunk's partial sums [n]; totals go to `sums`.
// The chunks depend on m alone.
template <class RowStep>
inline void chunked_column_sums(const Threads& threads, int64_t m, int64_t n, float* sums, const RowStep& row_step) {
  constexpr int64_t kMostChunks = 64, kFewestRows = 16;
  const int64_t rows = ceil_div(m, kMostChunks) > kFewestRows ? ceil_div(m, kMostChunks) : kFewestRows;
  const int64_t chunks = ceil_div(m, rows), stride = ceil_div(n, 16) * 16;
  const Scratch partials(chunks * stride * 4);
  parallel_tasks(threads, chunks, [&](int64_t chunk, int) {
    float* partial = partials.at<float>(chunk * stride * 4);
    for_lanes(n, [&](int64_t c, int) { store(partial + c, Vec{}); });
    for (int64_t row = chunk * rows; row < smaller((chunk + 1) * rows, m); ++row) row_step(row, partial);
  });
  if (sums == nullptr) return;
  parallel_ranges(threads, n, 1024, [&](int64_t begin, int64_t end, int) {
    for_lanes(end - begin, [&](int64_t c, int lanes) {
      Vec total{};
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        total += load_lanes(partials.at<float>(chunk * stride * 4) + begin + c, lanes);
      store_lanes(sums + begin + c, total, lanes);
    });
  });
}

// sums[n] = the columns of g summed over its rows.
template <class T>
inline void column_sums(const Threads& threads, const MatrixView<T>& g, int64_t m, int64_t n, float* sums) {
  chunked_column_sums(threads, m, n, sums, [&](int64_t row, float* partial) {
    for_lanes(n, [&](int64_t c, int lanes) {
      store_lanes(partial + c, load_lanes(partial + c, lanes) + load_lanes(g.at(row, c), lanes), lanes);
    });
  });
}

// g = dy * activation'(pre), and the sums of its columns unless `sums` is null.
template <class T>
inline void activation_backward(const Threads& threads, const T* dy, const T* pre, Activation activation, T* g,
                                float* sums, int64_t m, int64_t n) {
  with_activation(activation, [&](auto tag) {
    chunked_column_sums(threads, m, n, sums, [&](int64_t row, float* partial) {
      for_lanes(n, [&](int64_t c, int lanes) {
        const int64_t at = row * n + c;
        const Vec v = load_lanes(dy + at, lanes) * activate_grad<decltype(tag)::value>(load_lanes(pre + at, lanes));
        store_lanes(g + at, v, lanes);
        if (sums) store_lanes(partial + c, load_lanes(partial + c, lanes) + v, lanes);
      });
    });
  });
}

}  // namespace bmf::BMF_ISA
