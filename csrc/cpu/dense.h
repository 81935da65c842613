// The products a dense layer y = activation(x W^T + b) is made of, forward and backward; linear, mlp and gated_mlp are
// put together from them. Shapes: x [m, k], W [n, k], y and g [m, n]; all rows contiguous.
#pragma once
#include "core/activation.h"
#include "core/gemm.h"
#include "cpu/finish.h"

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

constexpr int64_t kSumRows = 256;  // rows summed together, and their sums then in order, for a bias gradient

// At most this many rows are multiplied without packing W: it is then read once, straight into the sums.
constexpr int64_t kFewRows = 16;
// Rows of x that are multiplied with a row of W while it is in registers, where there are m of them.
inline int64_t group_of(int64_t m) { return smaller(m > 2 ? 4 : larger(m, 1), kLanes / 4); }

// `m` rows of x as floats, zero beyond k up to `stride` and beyond m up to whole groups.
class FewRows {
 public:
  template <class X>
  FewRows(const MatrixView<X>& x, int64_t m, int64_t k)
      : group_(group_of(m)),
        stride_(ceil_div(k, kLanes) * kLanes),
        rows_(ceil_div(m, group_) * group_),
        wide_(rows_ * stride_ * 4) {
    for (int64_t r = 0; r < rows_; ++r)
      for_lanes(k, [&](int64_t c, int lanes) {
        store(wide_.at<float>(0) + r * stride_ + c, r < m ? load_lanes(x.at(r, c), lanes) : Vec{});
      });
  }
  int64_t group() const { return group_; }
  int64_t rows() const { return rows_; }
  const float* row(int64_t r) const { return wide_.at<float>(0) + r * stride_; }

 private:
  int64_t group_, stride_, rows_;
  Scratch wide_;
};

// sums[r][c] = x[r] . w[col + c] for c < cols, whole groups of kGroup rows.
template <int kGroup, class W>
void multiply_row_groups(const FewRows& x, const MatrixView<W>& w, int64_t col, int64_t cols, int64_t k, float* sums) {
  constexpr int kColumns = kGroup == 1 ? kLanes / 2 : kLanes / kGroup;  // at most 8: as many streams the hardware sees
  for (int64_t c = 0; c < cols; c += kColumns) {
    const W *weight[kColumns], *next[kColumns];  // the rows of this group, and of the one after it
    for (int j = 0; j < kColumns; ++j) {
      weight[j] = w.at(col + smaller(c + j, cols - 1), 0);
      next[j] = w.at(col + smaller(c + kColumns + j, cols - 1), 0);
    }
    for (int64_t r = 0; r < x.rows(); r += kGroup) {
      Vec acc[kLanes] = {};
      for_lanes(k, [&](int64_t i, int lanes) {
        Vec row[kGroup];
#pragma GCC unroll 4
        for (int g = 0; g < kGroup; ++g) row[g] = load(x.row(r + g) + i);
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j) {
          const Vec column = load_lanes(weight[j] + i, lanes);
          if (r == 0) __builtin_prefetch(next[j] + i);
#pragma GCC unroll 4
          for (int g = 0; g < kGroup; ++g) acc[g * kColumns + j] = fma(row[g], column, acc[g * kColumns + j]);
        }
      });
      transpose_units(acc);
      for (int step = kLanes / 2; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) acc[i] += acc[i + step];
      float group[kLanes];
      store(group, acc[0]);
      for (int g = 0; g < kGroup; ++g)
        __builtin_memcpy(sums + (r + g) * Tile::stride + c, group + g * kColumns, kColumns * 4);
    }
  }
}

template <class W>
void multiply_few_rows(const FewRows& x, const MatrixView<W>& w, int64_t col, int64_t cols, int64_t k, float* sums) {
  if (x.group() == 1) return multiply_row_groups<1>(x, w, col, cols, k, sums);
  if (x.group() == 2) return multiply_row_groups<2>(x, w, col, cols, k, sums);
  multiply_row_groups<4>(x, w, col, cols, k, sums);
}

// x W^T tile by tile, as gemm() hands it to an epilogue.
template <class Mode, class X, class W, class Epilogue>
inline void dense_product(const Threads& threads, const MatrixView<X>& x, const MatrixView<W>& w, int64_t m, int64_t n,
                          int64_t k, const Epilogue& epilogue) {
  if (m > kFewRows || weights_held(w.data)) return gemm<Mode>(threads, x, transposed(w), m, n, k, epilogue);
  const FewRows rows(x, m, k);
  parallel_tasks(threads, ceil_div(n, kPanel), [&](int64_t panel, int) {
    float sums[kFewRows * Tile::stride];
    const int64_t col = panel * kPanel;
    multiply_few_rows(rows, w, col, smaller(kPanel, n - col), k, sums);
    epilogue(Tile{0, m, panel, 1, sums});
  });
}

// Where a dense layer's output goes: y [m, n], through `finish` if there is something to be done.
struct DenseOutput {
  void* y;
  Dtype dtype;
  const Finish* finish;

  template <class X>
  static DenseOutput plain(X* y) {
    return {y, sizeof(X) == 2 ? Dtype::bfloat16 : Dtype::float32, nullptr};
  }
  static DenseOutput finished(void* y, Dtype dtype, const Finish& finish) {
    return {y, dtype, finish.dropout > 0 || finish.residual.data ? &finish : nullptr};
  }
};

__attribute__((noinline)) inline void finish_tile(const Tile& tile, int64_t n, const DenseOutput& out) {
  with_type(out.dtype, [&](auto type) {
    using Y = decltype(type);
    Finisher<Y> finisher(*out.finish, static_cast<Y*>(out.y), n);
    for_tile(tile, n, [&](int64_t row, int64_t col, int lanes, Vec v) { finisher.store(row, col, lanes, v); });
  });
}

// Epilogue of y = activation(x W^T + b); x W^T + b itself goes to `pre` unless that is null.
template <Activation kind, class X>
struct DenseEpilogue {
  const float* bias;  // or null
  DenseOutput out;    // in X's dtype where it is not finished
  X* pre;
  int64_t n;
  void prefetch(int64_t row, int64_t rows, int64_t panel) const {
    if (pre) prefetch_panel(pre, n, row, rows, panel);
    with_type(out.dtype, [&](auto type) { prefetch_panel(static_cast<decltype(type)*>(out.y), n, row, rows, panel); });
    if (out.finish && out.finish->residual.data)
      with_type(out.finish->residual.dtype, [&](auto type) {
        const auto* residual = static_cast<const decltype(type)*>(out.finish->residual.data);
        prefetch_panel<false>(residual, out.finish->residual.stride, row, rows, panel);
      });
  }
  void operator()(const Tile& tile) const {
    X* y = out.finish ? nullptr : static_cast<X*>(out.y);
    for_tile(tile, n, [&](int64_t row, int64_t col, int lanes, Vec v) {
      if (bias) v += load_lanes(bias + col, lanes);
      if (pre) store_lanes(pre + row * n + col, v, lanes);
      v = activate<kind, sizeof(X) == 2>(v);
      if (y)
        store_lanes(y + row * n + col, v, lanes);
      else
        store(tile.sums + (row - tile.row) * Tile::stride + col - tile.panel * kPanel, v);
    });
    if (out.finish) finish_tile(tile, n, out);
  }
};

template <class Mode, class X, class W>
inline void dense_forward(const Threads& threads, const MatrixView<X>& x, const MatrixView<W>& w, const float* bias,
                          Activation activation, const DenseOutput& out, X* pre, int64_t m, int64_t n, int64_t k) {
  with_activation(activation, [&](auto tag) {
    dense_product<Mode>(threads, x, w, m, n, k, DenseEpilogue<decltype(tag)::value, X>{bias, out, pre, n});
  });
}

// y = x W^T + b. Not dense_forward with Activation::none, which would compile the product once for each activation.
template <class Mode, class X, class W>
inline void dense_affine(const Threads& threads, const MatrixView<X>& x, const MatrixView<W>& w, const float* bias,
                         const DenseOutput& out, int64_t m, int64_t n, int64_t k) {
  dense_product<Mode>(threads, x, w, m, n, k, DenseEpilogue<Activation::none, X>{bias, out, nullptr, n});
}

// sums[r][c] = sum over i < n of g[r][i] w[i][col + c] for c < cols <= kPanel and r < m.
template <class W>
void multiply_few_rows_across(const FewRows& g, const MatrixView<W>& w, int64_t m, int64_t n, int64_t col, int64_t cols,
                              float* sums) {
  constexpr int64_t kSummed = 256;  // rows of W in one sum: sums of blocks round off less than one long sum
  constexpr int kRowsAtOnce = 4;
  constexpr int64_t kAhead = 16;  // rows of W: their lines are too far apart for the hardware to foresee
  for (int64_t r = 0; r < m; r += kRowsAtOnce) {
    const float* rows[kRowsAtOnce];
    for (int i = 0; i < kRowsAtOnce; ++i) rows[i] = g.row(smaller(r + i, m - 1));
    Vec total[kRowsAtOnce][kPanelVecs] = {};
    for (int64_t first = 0; first < n; first += kSummed) {
      Vec acc[kRowsAtOnce][kPanelVecs] = {};
      auto add = [&](int64_t i, const auto& load_weight) {
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVecs; ++v) {
          if (r == 0) __builtin_prefetch(w.at(i + kAhead, col + v * kLanes));
          const Vec weight = load_weight(w.at(i, col + v * kLanes), v);
#pragma GCC unroll 4
          for (int j = 0; j < kRowsAtOnce; ++j) acc[j][v] = fma(broadcast(rows[j][i]), weight, acc[j][v]);
        }
      };
      for (int64_t i = first; i < smaller(n, first + kSummed); ++i)
        if (cols == kPanel)
          add(i, [](const W* at, int) { return load(at); });
        else
          add(i, [&](const W* at, int v) {
            const int64_t left = cols - v * kLanes;
            return left >= kLanes ? load(at) : left > 0 ? load_partial(at, static_cast<int>(left)) : Vec{};
          });
      for (int j = 0; j < kRowsAtOnce; ++j)
        for (int v = 0; v < kPanelVecs; ++v) total[j][v] += acc[j][v];
    }
    for (int64_t j = 0; j < smaller(kRowsAtOnce, m - r); ++j)
      for (int v = 0; v < kPanelVecs; ++v) store(sums + (r + j) * Tile::stride + v * kLanes, total[j][v]);
  }
}

// g W tile by tile, g [m, n] and W [n, k], as gemm() hands it to an epilogue.
template <class Mode, class X, class W, class Epilogue>
inline void dense_product_across(const Threads& threads, const MatrixView<X>& g, const MatrixView<W>& w, int64_t m,
                                 int64_t n, int64_t k, const Epilogue& epilogue) {
  if (m > kFewRows || weights_held(w.data)) return gemm<Mode>(threads, g, w, m, k, n, epilogue);
  const FewRows rows(g, m, n);
  parallel_tasks(threads, ceil_div(k, kPanel), [&](int64_t panel, int) {
    float sums[kFewRows * Tile::stride];
    const int64_t col = panel * kPanel;
    multiply_few_rows_across(rows, w, m, n, col, smaller(kPanel, k - col), sums);
    epilogue(Tile{0, m, panel, 1, sums});
  });
}

// dx = g W.
template <class Mode, class X, class W>
inline void dense_dgrad(const Threads& threads, const MatrixView<X>& g, const MatrixView<W>& w, X* dx, int64_t m,
                        int64_t n, int64_t k) {
  dense_product_across<Mode>(threads, g, w, m, n, k, StoreTile<X>{dx, k, k});
}

// Epilogue of dx = the products + a residual, [m, k] both.
template <class T>
struct StoreInputGradient {
  explicit StoreInputGradient(const InputGradient& to, int64_t columns)
      : dx(static_cast<T*>(to.dx)), residual(static_cast<const T*>(to.residual)), k(columns) {}

  T* dx;
  const T* residual;  // or null
  int64_t k;
  void prefetch(int64_t row, int64_t rows, int64_t panel) const {
    prefetch_panel(dx, k, row, rows, panel);
    if (residual) prefetch_panel<false>(residual, k, row, rows, panel);
  }
  void operator()(const Tile& tile) const {
    for_tile(tile, k, [&](int64_t row, int64_t col, int lanes, Vec v) {
      if (residual) v += load_lanes(residual + row * k + col, lanes);
      store_lanes(dx + row * k + col, v, lanes);
    });
  }
};

template <class Mode, class X, class W>
inline void dense_dgrad(const Threads& threads, const MatrixView<X>& g, const MatrixView<W>& w, const InputGradient& to,
                        int64_t m, int64_t n, int64_t k) {
  with_type(to.dtype, [&](auto type) {
    dense_product_across<Mode>(threads, g, w, m, n, k, StoreInputGradient<decltype(type)>(to, k));
  });
}

// sums[n] = the sum of `count` rows of partial sums, `stride` apart, in order.
inline void add_partial_sums(const Threads& threads, const float* partials, int64_t count, int64_t stride, int64_t n,
                             float* sums) {
  parallel_ranges(threads, n, 1024, [&](int64_t begin, int64_t end, int) {
    for_lanes(end - begin, [&](int64_t c, int lanes) {
      Vec total{};
      for (int64_t i = 0; i < count; ++i) total += load_lanes(partials + i * stride + begin + c, lanes);
      store_lanes(sums + begin + c, total, lanes);
    });
  });
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
  if (sums) add_partial_sums(threads, partials.at<float>(0), chunks, stride, n, sums);
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

// dW = g^T x of few rows: every element is written once, straight from its sum, in one stream, and nothing is packed.
template <class X, class W>
inline void few_rows_wgrad(const Threads& threads, const MatrixView<X>& g, const MatrixView<X>& x, W* dw, int64_t m,
                           int64_t n, int64_t k) {
  constexpr int64_t kColumns = 4 * kLanes;
  const FewRows rows(x, m, k);
  parallel_ranges(threads, n, row_grain(k), [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      float factor[kFewRows];
      for (int64_t r = 0; r < m; ++r) factor[r] = to_float(*g.at(r, row));
      int64_t c = 0;
      for (; c + kColumns <= k; c += kColumns) {
        Vec total[4] = {};
        for (int64_t r = 0; r < m; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v)
            total[v] = fma(broadcast(factor[r]), load(rows.row(r) + c + v * kLanes), total[v]);
        for (int v = 0; v < 4; ++v) store(dw + row * k + c + v * kLanes, total[v]);
      }
      for_lanes(k - c, [&](int64_t i, int lanes) {
        Vec total{};
        for (int64_t r = 0; r < m; ++r) total = fma(broadcast(factor[r]), load(rows.row(r) + c + i), total);
        store_lanes(dw + row * k + c + i, total, lanes);
      });
    }
  });
}

// dW = g^T x with g in panels, as (x^T g)^T: what is transposed on the way in is x.
template <class Mode, class X, class W>
inline void dense_wgrad(const Threads& threads, const OperandB<Mode>& g, const MatrixView<X>& x, W* dw, int64_t m,
                        int64_t n, int64_t k) {
  const OperandA<Mode> rows(threads, transposed(x), k, m);
  const Product<Mode> product{&rows, &g};
  gemm<Mode>(threads, k, &product, 1, 1, StoreTransposed<W>{dw, n, k});
}

// dW = g^T x with x in panels.
template <class Mode, class X, class W>
inline void dense_wgrad(const Threads& threads, const MatrixView<X>& g, const OperandB<Mode>& x, W* dw, int64_t m,
                        int64_t n, int64_t k) {
  const OperandA<Mode> rows(threads, transposed(g), n, m);
  const Product<Mode> product{&rows, &x};
  gemm<Mode>(threads, n, &product, 1, 1, StoreTile<W>{dw, k, k});
}

// dW = g^T x (null: not wanted), and db, the sums of g's columns (likewise). The narrower operand is the one that is
// transposed; g, if it is the wider, is summed while it is packed.
template <class Mode, class X, class W>
inline void dense_wgrad(const Threads& threads, const MatrixView<X>& g, const MatrixView<X>& x, W* dw, float* db,
                        int64_t m, int64_t n, int64_t k) {
  if (dw == nullptr || n <= k || m <= kFewRows) {
    if (db) column_sums(threads, g, m, n, db);
    if (dw && m <= kFewRows) return few_rows_wgrad(threads, g, x, dw, m, n, k);
    if (dw) dense_wgrad<Mode>(threads, g, OperandB<Mode>(threads, m, k, x), dw, m, n, k);
    return;
  }
  const OperandB<Mode> panels(m, n);
  const int64_t blocks = ceil_div(m, kSumRows), stride = ceil_div(n, kPanel) * kPanel;
  const Scratch partials(db ? blocks * stride * 4 : 0);
  parallel_shares(threads, panels.count() * blocks, [&](int64_t task, int) {
    const int64_t col = task / blocks * kPanel, row = task % blocks * kSumRows, rows = smaller(kSumRows, m - row);
    const int cols = panels.columns(task / blocks);
    const MatrixView<X> part{g.at(row, 0), g.row_stride, g.col_stride};
    pack_panel<Mode>(part, rows, col, cols, panels.place(row, col));
    if (db == nullptr) return;
    float* sums = partials.at<float>((task % blocks * stride + col) * 4);
    for_lanes(cols, [&](int64_t c, int lanes) {
      Vec total{};
      for (int64_t r = 0; r < rows; ++r) total += load_lanes(part.at(r, col + c), lanes);
      store_lanes(sums + c, total, lanes);
    });
  });
  if (db) add_partial_sums(threads, partials.at<float>(0), blocks, stride, n, db);
  dense_wgrad<Mode>(threads, panels, x, dw, m, n, k);
}

// g = dy * activation'(pre), and the sums of its columns unless `sums` is null.
template <class T>
inline void activation_backward(const Threads& threads, const T* dy, const T* pre, Activation activation, T* g,
                                float* sums, int64_t m, int64_t n) {
  with_activation(activation, [&](auto tag) {
    chunked_column_sums(threads, m, n, sums, [&](int64_t row, float* partial) {
      for_lanes(n, [&](int64_t c, int lanes) {
        const int64_t at = row * n + c;
        const Vec v = load_lanes(dy + at, lanes) *
                      activate_with_slope<decltype(tag)::value, sizeof(T) == 2>(load_lanes(pre + at, lanes)).slope;
        store_lanes(g + at, v, lanes);
        if (sums) store_lanes(partial + c, load_lanes(partial + c, lanes) + v, lanes);
      });
    });
  });
}

// What backward makes of a hidden layer, [m, f], in the epilogue of the product that gives the gradient of its output:
// rows for dgrad, panels for wgrad (rows again if they are few), sums of columns for the bias; each only if wanted.
template <class Mode, class X>
class HiddenOperand {
 public:
  HiddenOperand(int64_t m, int64_t f, bool dgrad, bool wgrad, bool sums = false)
      : m_(m),
        f_(f),
        stride_(ceil_div(f, kPanel) * kPanel),
        has_rows_(dgrad || (wgrad && m <= kFewRows)),
        has_panels_(wgrad && m > kFewRows),
        has_sums_(sums),
        rows_(has_rows_ ? m * f * static_cast<int64_t>(sizeof(X)) : 0),
        sums_(sums ? ceil_div(m, kStep) * stride_ * 4 : 0),
        panels_(has_panels_ ? m : 0, f) {}

  // Two neighbouring rows, the first of them even, and `lanes` columns from a multiple of kLanes on.
  BMF_INLINE void store_pair(int64_t row, int64_t col, int lanes, Vec first, Vec second) const {
    const bool has_second = row + 1 < m_;
    if (has_rows_) {
      X* at = rows_.template at<X>(0) + row * f_ + col;
      store_lanes(at, first, lanes);
      if (has_second) store_lanes(at + f_, second, lanes);
    }
    if (has_panels_) store_row_pair<Mode>(panels_.place(row, col), first, second, has_second);
    if (has_sums_) {
      float* at = sums_.template at<float>(row / kStep * stride_ * 4) + col;
      const Vec both = has_second ? first + second : first;
      store(at, row % kStep == 0 ? both : load(at) + both);
    }
  }

  void prefetch(int64_t row, int64_t rows, int64_t panel) const {
    if (has_rows_) prefetch_panel(rows_.template at<X>(0), f_, row, rows, panel);
    if (has_panels_) prefetch_panel(panels_.panel(panel), kPanel, row / Mode::kPerUnit, units_of<Mode>(rows), 0);
  }

  MatrixView<X> rows() const { return {rows_.template at<X>(0), f_, 1}; }
  const OperandB<Mode>& panels() const { return panels_; }
  void add_sums(const Threads& threads, float* sums) const {
    add_partial_sums(threads, sums_.template at<float>(0), ceil_div(m_, kStep), stride_, f_, sums);
  }

 private:
  // Rows summed by one thread, whatever the number of threads; they come in their order, in strips.
  static constexpr int64_t kStep = kFewestTileRows;

  int64_t m_, f_, stride_;
  bool has_rows_, has_panels_, has_sums_;
  Scratch rows_, sums_;
  OperandB<Mode> panels_;
};

// dW [f, k] = g^T x of a hidden layer's gradient g.
template <class Mode, class X, class W>
inline void hidden_wgrad(const Threads& threads, const HiddenOperand<Mode, X>& g, const MatrixView<X>& x, W* dw,
                         int64_t m, int64_t f, int64_t k) {
  if (m <= kFewRows) return few_rows_wgrad(threads, g.rows(), x, dw, m, f, k);
  dense_wgrad<Mode>(threads, g.panels(), x, dw, m, f, k);
}

// dW [n, f] = g^T h of a hidden layer h.
template <class Mode, class X, class W>
inline void wgrad_of_hidden(const Threads& threads, const MatrixView<X>& g, const HiddenOperand<Mode, X>& h, W* dw,
                            int64_t m, int64_t n, int64_t f) {
  if (m <= kFewRows) return few_rows_wgrad(threads, g, h.rows(), dw, m, n, f);
  dense_wgrad<Mode>(threads, g, h.panels(), dw, m, n, f);
}

// f(row, col, lanes, sums of row, sums of row + 1) for each register of each pair of rows of a tile; the second are
// zero if there is no such row.
template <class F>
BMF_INLINE void for_row_pairs(const Tile& tile, int64_t n, const F& f) {
  const int64_t col = tile.panel * kPanel, cols = smaller(tile.panels * kPanel, n - col);
  for (int64_t r = 0; r < tile.rows; r += 2) {
    const float* sums = tile.sums + r * Tile::stride;
    for_lanes(cols, [&](int64_t c, int lanes) {
      f(tile.row + r, col + c, lanes, load(sums + c), r + 1 < tile.rows ? load(sums + Tile::stride + c) : Vec{});
    });
  }
}

// Rows `row` and row + 1 of x [m, n] at one register of columns; zeros for a row that is not there.
template <class X>
BMF_INLINE void load_pair(const X* x, int64_t m, int64_t n, int64_t row, int64_t col, int lanes, Vec (&out)[2]) {
  const X* at = x + row * n + col;
  out[0] = load_lanes(at, lanes);
  out[1] = row + 1 < m ? load_lanes(at + n, lanes) : Vec{};
}

}  // namespace bmf::BMF_ISA
