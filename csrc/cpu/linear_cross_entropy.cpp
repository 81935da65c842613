// Tokens are taken in chunks, so that a chunk's logits fit in kLogitsBytes; the vocabulary in blocks, whose weights are
// packed where the cache is. For each chunk, first all logits with the maximum and the sum of exponentials of each
// row's panels, found while a tile is still in L2; then, block by block, their gradients are made of them, as rows in
// their place and as panels that the caches hold, and multiplied into dx and dW. The first chunk's logits take no
// memory of their own: a block of them lies where its block of dW will be written, which is when nobody needs them any
// more.
//
// What is kept of a logit is exp(z - top of its panel): as exact in bf16 as its gradient will be, whatever the size of
// z. Capped ones are kept as z - top, which the derivative of the cap needs: those that matter most are near zero,
// where bf16 is the most exact.
#include "cpu/linear_cross_entropy.h"

#include "core/activation.h"
#include "cpu/dense.h"

namespace bmf::BMF_ISA {
namespace {

constexpr int64_t kLogitsBytes = int64_t{104} << 20, kFewestTokens = 256;
constexpr int64_t kMostBlockClasses = 3072;
constexpr int64_t kRowsAtOnce = 32;  // differentiated together: as many pages are read at a time
constexpr float kLowest = -3.402823466e38f;

// What is known of one token's logits in one panel, or of the panels of one tile together.
struct PanelStats {
  float top;      // the maximum
  float exp_sum;  // the sum of exp(z - top); once the row's panels are known, what makes exp(z - top) a probability
};

template <class Mode, class X, class W>
class Chunks {
  using Element = typename Mode::Element;

 public:
  Chunks(const LinearCrossEntropyArgs& args, const Threads& threads, const int64_t* used, int64_t used_count)
      : args_(args),
        threads_(threads),
        used_(used),
        grads_(args.dx || args.dweight || args.dbias),
        in_order_(used_count == args.tokens),
        few_classes_(args.classes < args.width),
        keeps_rows_(args.dx || args.dbias || (args.dweight && few_classes_)),
        keeps_panels_(args.dweight && !few_classes_),
        capped_(args.softcap != 0),
        smooth_(args.label_smoothing != 0),
        inverse_(capped_ ? 1.0f / args.softcap : 0),
        stride_(ceil_div(args.classes, kPanel) * kPanel),
        panels_(stride_ / kPanel),
        blocks_(ceil_div(args.classes, kMostBlockClasses)),
        block_classes_(ceil_div(panels_, blocks_) * kPanel),
        x_stride_(units_of<Mode>(args.width) * Mode::kPerUnit),
        in_dweight_(smaller(tokens_in_dweight(), used_count)),
        chunk_(chunk_tokens(used_count - in_dweight_)),
        most_(larger(in_dweight_, chunk_)),
        x_(in_order_ ? 0 : most_ * x_stride_ * sizeof(Element)),
        logits_(grads_ ? blocks_ * chunk_ * row_stride(0) * sizeof(Element) : 0),
        stats_(most_ * panels_ * sizeof(PanelStats)),
        plain_sums_(smooth_ ? most_ * panels_ * sizeof(float) : 0),
        tokens_(most_ * sizeof(Token)),
        dx_(args.dx && blocks_ > 1 ? most_ * args.width * sizeof(float) : 0),
        dbias_(args.dbias ? block_classes_ * sizeof(float) : 0) {
    if (in_dweight_ > 0) run(0, in_dweight_);
    for (int64_t first = in_dweight_; first < used_count; first += chunk_)
      run(first, smaller(chunk_, used_count - first));
  }

 private:
  struct Token {
    int64_t target;
    float hit;  // the target's logit
    float top, log_sum;
    float scale;
  };

  int64_t classes_of(int64_t block) const { return smaller(block_classes_, args_.classes - block * block_classes_); }
  // Of a block's logits: an odd number of panels, since rows a power of two apart would share cache sets.
  int64_t row_stride(int64_t block) const { return (ceil_div(classes_of(block), kPanel) | 1) * kPanel; }

  // How many tokens' logits fit where dW will be, every block's in its own block; 0 if they are too few for a chunk.
  int64_t tokens_in_dweight() const {
    if (args_.dweight == nullptr) return 0;
    const auto fit = [&](int64_t block) {
      return classes_of(block) * args_.width * static_cast<int64_t>(sizeof(float)) /
             (row_stride(block) * static_cast<int64_t>(sizeof(Element)));
    };
    const int64_t fewest = smaller(fit(0), fit(blocks_ - 1));  // all blocks but the last are alike
    return fewest < kFewestTokens ? 0 : fewest;
  }

  int64_t chunk_tokens(int64_t left) const {
    if (!grads_ || left == 0) return left;
    const int64_t fit = kLogitsBytes / (stride_ * static_cast<int64_t>(sizeof(Element)));
    return ceil_div(left, ceil_div(left, larger(fit, kFewestTokens)));
  }

  const X* x_row(int64_t row) const { return static_cast<const X*>(args_.x) + row * args_.x_stride; }
  // One row of the block of logits that begins with class `col`; their gradients take their place.
  Element* logits(int64_t row, int64_t col) const {
    const int64_t block = col / block_classes_;
    Element* begin = in_dweight_ > 0 && first_chunk_
                         ? reinterpret_cast<Element*>(args_.dweight + block * block_classes_ * args_.width)
                         : logits_.template at<Element>(block * chunk_ * row_stride(0) * sizeof(Element));
    return begin + row * row_stride(block);
  }
  PanelStats* stats(int64_t row) const { return stats_.template at<PanelStats>(0) + row * panels_; }
  float* plain_sums(int64_t row) const { return plain_sums_.template at<float>(0) + row * panels_; }
  Token& token(int64_t row) const { return tokens_.template at<Token>(0)[row]; }

  void run(int64_t first, int64_t count) {
    first_chunk_ = first == 0;
    if (in_order_) return run(MatrixView<X>{x_row(first), args_.x_stride, 1}, args_.width, first, count);
    gather(first, count);
    run(MatrixView<Element>{x_.template at<Element>(0), x_stride_, 1}, x_stride_, first, count);
  }

  // `x`: the chunk's rows, `width` elements each, zeros among them.
  template <class T>
  void run(const MatrixView<T>& x, int64_t width, int64_t first, int64_t count) {
    for (int64_t row = 0; row < count; ++row) {
      const int64_t at = used_[first + row];
      token(row) = {args_.target[at], 0, 0, 0, args_.scale ? args_.scale[at * args_.scale_stride] : 0};
    }
    const OperandA<Mode> x_rows(threads_, x, count, width);
    for_blocks([&](int64_t col, int64_t cols) { multiply_logits(x_rows, count, col, cols); });
    parallel_ranges(threads_, count, 16, [&](int64_t begin, int64_t end, int) { merge(first, begin, end); });
    if (!grads_) return;
    // The narrower operand of dW = g^T x is the one that is transposed.
    const OperandA<Mode> x_columns(threads_, transposed(x), keeps_panels_ ? args_.width : 0, count);
    const OperandB<Mode> x_panels(threads_, args_.dweight && few_classes_ ? count : 0, args_.width, x);
    for_blocks([&](int64_t col, int64_t cols) {
      const OperandB<Mode> panels(keeps_panels_ ? count : 0, cols);
      parallel_tasks(threads_, ceil_div(count, kRowsAtOnce), [&](int64_t task, int) {
        differentiate(task * kRowsAtOnce, smaller(count, (task + 1) * kRowsAtOnce), col, cols, panels);
      });
      const MatrixView<Element> g{logits(0, col), row_stride(col / block_classes_), 1};
      if (args_.dbias) add_bias_gradient(g, first, count, col, cols);
      if (args_.dx) add_input_gradient(g, first, count, col, cols);
      if (keeps_panels_) add_weight_gradient(x_columns, panels, first, col, cols);
      if (args_.dweight && few_classes_) add_weight_gradient(g, x_panels, first, count, col, cols);
    });
  }

  template <class F>
  void for_blocks(const F& f) const {
    for (int64_t block = 0; block < blocks_; ++block) f(block * block_classes_, classes_of(block));
  }

  MatrixView<W> weight(int64_t col) const {
    return {static_cast<const W*>(args_.weight) + col * args_.weight_stride, args_.weight_stride, 1};
  }

  // The chunk's rows of x, side by side, as the micro-kernel reads them.
  void gather(int64_t first, int64_t count) const {
    parallel_ranges(threads_, count, row_grain(args_.width), [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        const MatrixView<X> x{x_row(used_[first + row]), args_.x_stride, 1};
        Element* to = x_.template at<Element>(0) + row * x_stride_;
        pack_rows<Mode>(x, args_.width, 0, 1, reinterpret_cast<float*>(to), 0);
      }
    });
  }

  void multiply_logits(const OperandA<Mode>& x_rows, int64_t count, int64_t col, int64_t cols) const {
    const OperandB<Mode> panels = OperandB<Mode>::of_weights(threads_, args_.width, cols, transposed(weight(col)));
    const Product<Mode> product{&x_rows, &panels};
    gemm<Mode>(threads_, count, &product, 1, 1, [&](const Tile& tile) {
      const int64_t at = tile.panel * kPanel, here = smaller(tile.panels * kPanel, cols - at);
      for (int64_t r = 0; r < tile.rows; ++r)
        take_row(tile.row + r, col, at, here, tile.panels, tile.sums + r * Tile::stride);
    });
  }

  // One row of a tile of logits, `cols` of them from `at` on in the block that begins with class `block`. All of its
  // panels get one maximum, and the first of them the sums.
  BMF_INLINE void take_row(int64_t row, int64_t block, int64_t at, int64_t cols, int64_t panels, float* z) const {
    const int64_t col = block + at;
    Element* kept = grads_ ? logits(row, block) + at : nullptr;
    if (args_.bias || capped_)
      for_lanes(cols, [&](int64_t c, int lanes) {
        Vec v = load(z + c);
        if (args_.bias) v += load_lanes(args_.bias + col + c, lanes);
        store(z + c, capped_ ? soft_cap(v, args_.softcap, inverse_) : v);
      });
    Vec most = broadcast(kLowest);
    for_lanes(cols, [&](int64_t c, int lanes) { most = max(first_lanes(load(z + c), lanes, kLowest), most); });
    const float top = max_lane(most);
    Vec exp_sum{}, plain_sum{};
    for_lanes(cols, [&](int64_t c, int lanes) {
      const Vec distance = load(z + c) - top, e = exp(distance);
      if (kept) store(kept + c, capped_ ? distance : e);
      exp_sum += first_lanes(e, lanes, 0);
      if (smooth_) plain_sum += first_lanes(load(z + c), lanes, 0);
    });
    PanelStats* of = stats(row) + col / kPanel;
    for (int64_t p = 0; p < panels; ++p) of[p] = {top, 0};
    of->exp_sum = sum(exp_sum);
    if (smooth_) {
      float* sums = plain_sums(row) + col / kPanel;
      for (int64_t p = 0; p < panels; ++p) sums[p] = 0;
      *sums = sum(plain_sum);
    }
    Token& t = token(row);
    if (const int64_t hit = t.target - col; hit >= 0 && hit < cols) t.hit = z[hit];
  }

  // The panels of a row put together: its loss, and what its gradients need.
  void merge(int64_t first, int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      PanelStats* of = stats(row);
      float top = kLowest, plain_sum = 0;
      double exp_sum = 0;
      for (int64_t p = 0; p < panels_; ++p) top = of[p].top > top ? of[p].top : top;
      for (int64_t p = 0; p < panels_; ++p) {
        const float in_panel = of[p].exp_sum;
        of[p].exp_sum = p > 0 && of[p].top == of[p - 1].top ? of[p - 1].exp_sum : exp(broadcast(of[p].top - top))[0];
        exp_sum += in_panel * of[p].exp_sum;
        if (smooth_) plain_sum += plain_sums(row)[p];
      }
      for (int64_t p = 0; p < panels_; ++p) of[p].exp_sum *= static_cast<float>(1 / exp_sum);
      Token& t = token(row);
      t.log_sum = static_cast<float>(__builtin_log(exp_sum));
      t.top = top;
      if (args_.correct) args_.correct[used_[first + row]] = t.hit >= top;
      if (args_.loss == nullptr) continue;
      float loss = t.log_sum + (top - t.hit);
      if (args_.label_smoothing != 0)
        loss += args_.label_smoothing * (t.hit - plain_sum / static_cast<float>(args_.classes));
      args_.loss[used_[first + row]] = loss;
    }
  }

  // What was kept of the logits of rows [first, last), the first of them even, to their gradients: in rows, for dx and
  // db, and in panels, for dW. Up to the next multiple of kPanel they are zero. Panel by panel, so that a panel is
  // written in runs and each row is read along.
  void differentiate(int64_t first, int64_t last, int64_t col, int64_t cols, const OperandB<Mode>& panels) const {
    const float everywhere = args_.label_smoothing / static_cast<float>(args_.classes);
    auto gradient = [&](const Token& t, Vec probability, Vec z, float less) {
      const Vec g = (probability - less) * t.scale;
      return capped_ ? g * (1.0f - (z * inverse_) * (z * inverse_)) : g;
    };
    for (int64_t c = 0; c < cols; c += kPanel)
      for (int64_t row = first; row < last; row += 2) {
        const int rows = row + 1 < last ? 2 : 1;
        Vec g[2][kPanelVecs] = {};
        for (int i = 0; i < rows; ++i) {
          const Token& t = token(row + i);
          const PanelStats& of = stats(row + i)[(col + c) / kPanel];
          const float shift = (of.top - t.top) - t.log_sum;
          Element* at = logits(row + i, col) + c;
#pragma GCC unroll 4
          for (int v = 0; v < kPanelVecs; ++v) {
            const Vec kept = load(at + v * kLanes);
            const Vec probability = capped_ ? exp(kept + shift) : kept * of.exp_sum;
            const int64_t left = cols - c - v * kLanes;
            g[i][v] = first_lanes(gradient(t, probability, kept + of.top, everywhere),
                                  static_cast<int>(left >= kLanes ? kLanes
                                                   : left > 0     ? left
                                                                  : 0),
                                  0);
            if (keeps_rows_) store(at + v * kLanes, g[i][v]);
          }
        }
        if (keeps_panels_)
#pragma GCC unroll 4
          for (int v = 0; v < kPanelVecs; ++v)
            store_row_pair<Mode>(panels.place(row, c) + v * kLanes, g[0][v], g[1][v], rows == 2);
      }
    for (int64_t row = first; row < last; ++row) {
      const Token& t = token(row);
      const int64_t hit = t.target - col;
      if (hit < 0 || hit >= cols) continue;
      // From the exact logit, over what was made of its rounded one.
      const Vec probability = exp(broadcast((t.hit - t.top) - t.log_sum));
      const float g = gradient(t, probability, broadcast(t.hit), everywhere + (1.0f - args_.label_smoothing))[0];
      if (keeps_rows_) from_float(g, logits(row, col) + hit);
      if (keeps_panels_) from_float(g, reinterpret_cast<Element*>(panels.place(row, hit)) + row % Mode::kPerUnit);
    }
  }

  void add_bias_gradient(const MatrixView<Element>& g, int64_t first, int64_t count, int64_t col, int64_t cols) const {
    float* sums = dbias_.template at<float>(0);
    column_sums(threads_, g, count, cols, sums);
    for_lanes(cols, [&](int64_t c, int lanes) {
      const Vec before = first == 0 ? Vec{} : load_lanes(args_.dbias + col + c, lanes);
      store_lanes(args_.dbias + col + c, before + load_lanes(sums + c, lanes), lanes);
    });
  }

  // Summed over the blocks in float; the last block's sums are the result.
  void add_input_gradient(const MatrixView<Element>& g, int64_t first, int64_t count, int64_t col, int64_t cols) const {
    const OperandB<Mode> panels = OperandB<Mode>::of_weights(threads_, cols, args_.width, weight(col));
    const OperandA<Mode> rows(threads_, g, count, units_of<Mode>(cols) * Mode::kPerUnit);
    const Product<Mode> product{&rows, &panels};
    float* so_far = dx_.template at<float>(0);
    if (col + cols < args_.classes) {
      gemm<Mode>(threads_, count, &product, 1, 1, AddTile<float>{so_far, args_.width, args_.width, col == 0});
      return;
    }
    gemm<Mode>(threads_, count, &product, 1, 1, [&](const Tile& tile) {
      for_tile(tile, args_.width, [&](int64_t row, int64_t c, int lanes, Vec v) {
        if (col > 0) v += load_lanes(so_far + row * args_.width + c, lanes);
        store_lanes(static_cast<X*>(args_.dx) + used_[first + row] * args_.width + c, v, lanes);
      });
    });
  }

  void add_weight_gradient(const OperandA<Mode>& x_columns, const OperandB<Mode>& g, int64_t first, int64_t col,
                           int64_t cols) const {
    const Product<Mode> product{&x_columns, &g};
    gemm<Mode>(threads_, args_.width, &product, 1, 1,
               AddTransposed<float>{args_.dweight + col * args_.width, cols, args_.width, first == 0});
  }

  void add_weight_gradient(const MatrixView<Element>& g, const OperandB<Mode>& x_panels, int64_t first, int64_t count,
                           int64_t col, int64_t cols) const {
    const OperandA<Mode> g_columns(threads_, transposed(g), cols, count);
    const Product<Mode> product{&g_columns, &x_panels};
    gemm<Mode>(threads_, cols, &product, 1, 1,
               AddTile<float>{args_.dweight + col * args_.width, args_.width, args_.width, first == 0});
  }

  const LinearCrossEntropyArgs& args_;
  const Threads& threads_;
  const int64_t* used_;
  const bool grads_;
  const bool in_order_;                   // no token is left out: x is read where it is
  const bool few_classes_;                // fewer than x is wide
  const bool keeps_rows_, keeps_panels_;  // the forms in which gradients of logits are needed
  const bool capped_, smooth_;
  const float inverse_;  // of the softcap
  const int64_t stride_, panels_, blocks_, block_classes_;
  const int64_t x_stride_;
  const int64_t in_dweight_, chunk_, most_;  // tokens of the first chunk if dW lends it memory, of the others, of any
  const Scratch x_, logits_, stats_, plain_sums_, tokens_, dx_, dbias_;
  bool first_chunk_ = true;
};

template <class T>
void zero(const Threads& threads, T* data, int64_t count) {
  if (data == nullptr) return;
  parallel_ranges(threads, count, 1 << 16, [&](int64_t begin, int64_t end, int) {
    __builtin_memset(data + begin, 0, (end - begin) * sizeof(T));
  });
}

}  // namespace

void linear_cross_entropy(const LinearCrossEntropyArgs& args, const Threads& threads) {
  const Scratch positions(args.tokens * sizeof(int64_t));
  int64_t* used = positions.at<int64_t>(0);
  int64_t count = 0;
  for (int64_t i = 0; i < args.tokens; ++i)
    if (args.target[i] != args.ignore_index) used[count++] = i;
  if (count < args.tokens) {
    zero(threads, args.loss, args.tokens);
    with_type(args.x_dtype,
              [&](auto type) { zero(threads, static_cast<decltype(type)*>(args.dx), args.tokens * args.width); });
  }
  if (count == 0) {
    zero(threads, args.dweight, args.classes * args.width);
    zero(threads, args.dbias, args.classes);
    return;
  }
  with_dense_types(args.x_dtype, args.weight_dtype, [&](auto types) {
    using Types = decltype(types);
    Chunks<typename Types::Mode, typename Types::Input, typename Types::Weight>(args, threads, used, count);
  });
}

}  // namespace bmf::BMF_ISA
