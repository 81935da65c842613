// What the tests of attention's CUDA kernels share: cases, and their exact results by plain loops in double, forward
// and backward.
#pragma once
#include "cuda_emulator.h"
// The emulator comes first.
#include "cuda/attention_launch.h"

#define BMF_ISA cuda_test
#include "core/philox.h"
#include "testing.h"

namespace attention_test {

using namespace testing;
using bmf::cuda::BiasKind;

template <class T>
constexpr double kEpsilon = std::is_same_v<T, bmf::bf16> ? 0x1p-7 : 0x1p-10;
template <class T>
constexpr double kSmallest = std::is_same_v<T, bmf::bf16> ? 0x1p-126 : 0x1p-14;  // below, errors are no longer relative

// A tensor [batches, rows, heads, width] with `gap` unused elements behind each row. The memory ends with the last
// number.
template <class T>
struct Tensor {
  int64_t batches, rows, heads, width, gap;
  std::unique_ptr<T[]> numbers;

  Tensor(int64_t b, int64_t r, int64_t h, int64_t w, int64_t g) : batches(b), rows(r), heads(h), width(w), gap(g) {
    numbers.reset(new T[static_cast<size_t>(count())]);
    std::memset(static_cast<void*>(numbers.get()), 0xff, static_cast<size_t>(count()) * sizeof(T));  // NaN
  }
  static Tensor normal(int64_t b, int64_t r, int64_t h, int64_t w, int64_t g) {
    static std::mt19937 generator(1);
    std::normal_distribution<float> draw(0, 1);
    Tensor t(b, r, h, w, g);
    for (int64_t i = 0; i < t.count(); ++i)
      if (i % (w + g) < w) t.numbers[i].bits = bmf::cuda::rounded(draw(generator), T{});
    return t;
  }
  int64_t count() const { return extent(batches * rows * heads, width, width + gap); }
  double at(int64_t b, int64_t row, int64_t head, int64_t c) const {
    return bmf::cuda::to_float(numbers[((b * rows + row) * heads + head) * (width + gap) + c]);
  }
  bmf::cuda::Operand view() const {
    const int64_t row = heads * (width + gap);
    return bmf::cuda::with_vectors({numbers.get(), rows * row, width + gap, row, false});
  }
  // The same, but whatever is behind the first `lengths` rows of a batch is NaN.
  Tensor cut(const std::vector<int64_t>& lengths) const {
    Tensor t(batches, rows, heads, width, gap);
    std::memcpy(static_cast<void*>(t.numbers.get()), numbers.get(), static_cast<size_t>(count()) * sizeof(T));
    for (size_t b = 0; b < lengths.size(); ++b)
      for (int64_t i = lengths[b] * heads * (width + gap); i < rows * heads * (width + gap); ++i)
        if (const auto at = static_cast<int64_t>(b) * rows * heads * (width + gap) + i; at < count())
          t.numbers[at].bits = 0xffff;
    return t;
  }
  Exact head(int64_t b, int64_t first, int64_t n, int64_t h) const {
    Exact out(n, width);
    for (int64_t i = 0; i < n * width; ++i) out.add(i, at(b, first + i / width, h, i % width));
    return out;
  }
};

struct Sequence {
  int64_t batch, query_first, key_first, queries, keys, present;
};

struct Case {
  const char* name;
  int64_t batches = 1, heads = 1, key_heads = 1, queries = 5, keys = 5, width = 64;
  int64_t left = bmf::cuda::kFar, right = bmf::cuda::kFar;
  float softcap = 0, scale = 0, dropout = 0;
  bool alibi = false;
  BiasKind bias = BiasKind::none;
  bool same_batch = false, same_head = false, same_row = false, same_key = false;
  std::vector<int64_t> lengths = {};                     // keys of each batch
  std::vector<std::pair<int64_t, int64_t>> packed = {};  // queries and keys of each sequence
  int64_t gap = 0;
  int processors = 0;  // of a Hopper
};

// Launches on an emulated GPU.
struct Launch {
  const bmf::cuda::AttentionArgs& args;
  emulator::Order order;
  int hopper;

  template <class Kernel, class Args>
  void operator()(Kernel kernel, const bmf::cuda::Grid& grid, const Args& of_kernel) {
    const emulator::Dim blocks{static_cast<int>(grid.x), static_cast<int>(grid.y), static_cast<int>(grid.z)};
    emulator::launch(blocks, grid.threads, grid.shared_bytes, order, [&] { kernel(of_kernel); });
  }
  template <class Kernel>
  void operator()(Kernel kernel, const bmf::cuda::Grid& grid) {
    (*this)(kernel, grid, args);
  }
  int processors() const { return hopper; }
  template <class Boxes>
  bool encode(bmf::cuda::TensorMap& map, const Boxes& boxes) const {
    return emulator::encode(map, boxes);
  }
};

// Kernels::forward<T>(args, launch) and backward: false where they do not take a call.
template <class T, class Kernels>
class Test {
 public:
  explicit Test(const Case& wanted) : c_(wanted) {
    context = std::string(std::is_same_v<T, bmf::bf16> ? "bfloat16, " : "float16, ") + c_.name;
    place_sequences();
    query_ = Tensor<T>::normal(c_.batches, c_.queries, c_.heads, c_.width, c_.gap);
    grad_ = Tensor<T>::normal(c_.batches, c_.queries, c_.heads, c_.width, c_.gap);
    key_ = Tensor<T>::normal(c_.batches, c_.keys, c_.key_heads, c_.width, c_.gap);
    value_ = Tensor<T>::normal(c_.batches, c_.keys, c_.key_heads, c_.width, c_.gap);
    slopes_ = Array::normal(Dtype::float32, c_.heads, 0.1f);
    make_bias();
  }

  void run(emulator::Order order) {
    bmf::cuda::AttentionArgs args = arguments();
    const Tensor<T> key = key_.cut(c_.lengths), value = value_.cut(c_.lengths);
    args.key = key.view();
    args.value = value.view();
    Tensor<T> out(c_.batches, c_.queries, c_.heads, c_.width, c_.gap),
        grad_query(out.batches, out.rows, out.heads, out.width, out.gap);
    Tensor<T> grad_key(c_.batches, c_.keys, c_.key_heads, c_.width, c_.gap),
        grad_value(c_.batches, c_.keys, c_.key_heads, c_.width, c_.gap);
    const auto rows = static_cast<size_t>(c_.batches * c_.heads * c_.queries);
    std::vector<bmf::cuda::RowStats> stats(rows);
    args.term_rows =
        static_cast<int32_t>((c_.queries + bmf::cuda::kTermRows - 1) / bmf::cuda::kTermRows) * bmf::cuda::kTermRows;
    std::vector<bmf::cuda::RowTerms> terms(static_cast<size_t>(c_.batches * c_.heads * args.term_rows));
    Array grad_bias(Dtype::float32, bias_count_);
    args.out = out.view();
    args.stats = stats.data();
    args.grad_out = grad_.view();
    args.grad_query = grad_query.view();
    args.grad_key = grad_key.view();
    args.grad_value = grad_value.view();
    args.terms = terms.data();
    const bool bias_grad = c_.bias != BiasKind::none && c_.bias != BiasKind::boolean;
    args.bias.grad = bias_grad ? grad_bias.floats() : nullptr;
    Launch launch{args, order, c_.processors};
    CHECK(Kernels::template forward<T>(args, launch));
    bmf::cuda::run_terms<T>(args, launch);
    CHECK(Kernels::template backward<T>(args, launch));
    compare(out, grad_query, grad_key, grad_value, grad_bias, bias_grad);
  }

 private:
  void place_sequences() {
    if (c_.packed.empty()) {
      for (int64_t b = 0; b < c_.batches; ++b)
        sequences_.push_back(
            {b, 0, 0, c_.queries, c_.keys, c_.lengths.empty() ? c_.keys : c_.lengths[static_cast<size_t>(b)]});
      return;
    }
    c_.queries = c_.keys = 0;
    for (const auto& [queries, keys] : c_.packed) {
      sequences_.push_back({0, c_.queries, c_.keys, queries, keys, keys});
      query_starts_.push_back(static_cast<int32_t>(c_.queries));
      key_starts_.push_back(c_.keys);
      c_.queries += queries;
      c_.keys += keys;
    }
    query_starts_.push_back(static_cast<int32_t>(c_.queries));
    key_starts_.push_back(c_.keys);
  }

  void make_bias() {
    if (c_.bias == BiasKind::none) return;
    const int64_t sizes[4] = {c_.same_batch ? 1 : c_.batches, c_.same_head ? 1 : c_.heads, c_.same_row ? 1 : c_.queries,
                              c_.same_key ? 1 : c_.keys};
    int64_t stride = 1;
    for (int d = 3; d >= 0; stride *= sizes[d--]) bias_strides_[d] = sizes[d] == 1 ? 0 : stride;
    bias_count_ = stride;
    bias_ = Array::normal(Dtype::float32, stride);
    if (c_.bias == BiasKind::float32) return;
    bias_bytes_.resize(static_cast<size_t>(stride) * (c_.bias == BiasKind::boolean ? 1 : 2));
    for (int64_t i = 0; i < stride; ++i) {
      if (c_.bias == BiasKind::boolean) {
        bias_bytes_[static_cast<size_t>(i)] = bias_[i] > -0.5;
        bias_.set(i, bias_[i] > -0.5 ? 0 : -INFINITY);
        continue;
      }
      const auto x = static_cast<float>(bias_[i]);
      const bool wide = c_.bias == BiasKind::bfloat16;
      const uint16_t bits = wide ? bmf::cuda::rounded(x, bmf::bf16{}) : bmf::cuda::rounded(x, bmf::cuda::f16{});
      std::memcpy(&bias_bytes_[static_cast<size_t>(2 * i)], &bits, 2);
      bias_.set(i, wide ? bmf::cuda::to_float(bmf::bf16{bits}) : bmf::cuda::to_float(bmf::cuda::f16{bits}));
    }
  }

  bmf::cuda::AttentionArgs arguments() const {
    bmf::cuda::AttentionArgs a{};
    a.dtype = std::is_same_v<T, bmf::bf16> ? bmf::cuda::Half::bfloat16 : bmf::cuda::Half::float16;
    a.heads = static_cast<int32_t>(c_.heads);
    a.group = static_cast<int32_t>(c_.heads / c_.key_heads);
    a.head_dim = static_cast<int32_t>(c_.width);
    a.batches = static_cast<int32_t>(c_.batches);
    a.sequences = static_cast<int32_t>(sequences_.size());
    a.queries = static_cast<int32_t>(c_.queries);
    a.keys = static_cast<int32_t>(c_.keys);
    if (!c_.lengths.empty()) a.key_lengths = {c_.lengths.data(), true};
    if (!c_.packed.empty()) {
      a.query_starts = {query_starts_.data(), false};
      a.key_starts = {key_starts_.data(), true};
    }
    a.query = query_.view();
    a.scale = scale();
    a.softcap = c_.softcap;
    a.left = static_cast<int32_t>(c_.left);
    a.right = static_cast<int32_t>(c_.right);
    a.alibi = c_.alibi ? slopes_.floats() : nullptr;
    a.bias.kind = c_.bias;
    a.bias.data = c_.bias == BiasKind::float32 ? bias_.data() : bias_bytes_.data();
    a.bias.batch_stride = bias_strides_[0];
    a.bias.head_stride = bias_strides_[1];
    a.bias.row_stride = bias_strides_[2];
    a.bias.key_stride = bias_strides_[3];
    a.bias.same_batch = c_.same_batch;
    a.bias.same_head = c_.same_head;
    a.bias.same_row = c_.same_row;
    a.bias.same_key = c_.same_key;
    a.dropout = c_.dropout;
    a.seed = &seed_;
    return a;
  }
  float scale() const { return c_.scale != 0 ? c_.scale : 1 / std::sqrt(static_cast<float>(c_.width)); }

  // Whether dropout keeps a weight, as the CPU kernels choose.
  bool kept(int64_t sequence, int64_t head, int64_t query, int64_t key) const {
    if (c_.dropout == 0) return true;
    uint16_t keep[8];
    const auto threshold = static_cast<uint32_t>(c_.dropout * 65536.0f + 0.5f);
    bmf::cuda_test::dropout_choices(static_cast<uint64_t>(seed_), static_cast<uint32_t>(sequence * c_.heads + head),
                                    static_cast<uint32_t>(query), static_cast<uint32_t>(key / 128), threshold, keep);
    return keep[key % 128 / 16] >> (key % 16) & 1;
  }

  void compare(const Tensor<T>& out, const Tensor<T>& grad_query, const Tensor<T>& grad_key,
               const Tensor<T>& grad_value, const Array& grad_bias, bool bias_grad) {
    const int64_t group = c_.heads / c_.key_heads;
    Exact bias_exact(1, bias_count_);
    for (size_t i = 0; i < sequences_.size(); ++i) {
      const Sequence& s = sequences_[i];
      for (int64_t key_head = 0; key_head < c_.key_heads; ++key_head) {
        const Exact k = key_.head(s.batch, s.key_first, s.keys, key_head);
        const Exact v = value_.head(s.batch, s.key_first, s.keys, key_head);
        Exact key_exact(s.keys, c_.width), value_exact(s.keys, c_.width);
        for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
          const Exact q = query_.head(s.batch, s.query_first, s.queries, head);
          const Exact g = grad_.head(s.batch, s.query_first, s.queries, head);
          const auto [weights, slopes, keep] = softmax(static_cast<int64_t>(i), head, q, k);
          const Exact dropped = scaled(weights, keep), result = product(dropped, v);
          check("out", out, s.batch, s.query_first, head, result);
          Exact dlogits = scaled(product(g, transposed(v)), keep);
          for (int64_t row = 0; row < s.queries; ++row) {
            double delta = 0, size = 0;
            for (int64_t c = 0; c < c_.width; ++c) {
              delta += result.value[row * c_.width + c] * g.value[row * c_.width + c];
              size += result.scale[row * c_.width + c] * g.scale[row * c_.width + c];
            }
            for (int64_t j = row * s.keys; j < (row + 1) * s.keys; ++j) {
              dlogits.value[j] = weights.value[j] * (dlogits.value[j] - delta);
              dlogits.scale[j] = weights.scale[j] * (dlogits.scale[j] + size);
            }
          }
          if (bias_grad) add_to_bias(bias_exact, s, head, dlogits);
          const Exact inner = scaled(dlogits, slopes);
          check("grad_query", grad_query, s.batch, s.query_first, head, product(inner, k));
          add(key_exact, product(transposed(inner), q));
          add(value_exact, product(transposed(dropped), g));
        }
        check("grad_key", grad_key, s.batch, s.key_first, key_head, key_exact);
        check("grad_value", grad_value, s.batch, s.key_first, key_head, value_exact);
      }
    }
    if (bias_grad)
      for (int64_t i = 0; i < bias_count_; ++i)
        close("grad_bias", i, grad_bias[i], bias_exact.value[static_cast<size_t>(i)],
              bias_exact.scale[static_cast<size_t>(i)]);
  }

  struct Weights {
    Exact weights, slopes, keep;  // slopes: derivative of a logit by q . k; keep: over 1 - rate
  };
  Weights softmax(int64_t sequence, int64_t head, const Exact& q, const Exact& k) const {
    const Sequence& s = sequences_[static_cast<size_t>(sequence)];
    Exact logits = product(q, transposed(k));
    Weights w{Exact(s.queries, s.keys), Exact(s.queries, s.keys), Exact(s.queries, s.keys)};
    for (int64_t row = 0; row < s.queries; ++row) {
      const int64_t position = row + s.keys - s.queries;
      double top = -INFINITY, total = 0;
      for (int64_t key = 0; key < s.keys; ++key) {
        const int64_t at = row * s.keys + key;
        double& x = logits.value[at];
        x *= scale();
        double slope = scale();
        if (c_.softcap != 0) {
          const double z = std::tanh(x / c_.softcap);
          slope *= 1 - z * z;
          x = z * c_.softcap;
        }
        if (c_.bias != BiasKind::none) x += bias_[bias_at(s, head, row, key)];
        if (c_.alibi) x -= slopes_[head] * std::abs(static_cast<double>(position - key));
        if (key >= s.present || key < position - c_.left || key > position + c_.right) x = -INFINITY;
        w.slopes.add(at, slope);
        w.keep.add(at, kept(sequence, head, row, key) ? 1 / (1 - static_cast<double>(c_.dropout)) : 0);
        top = std::max(top, x);
      }
      for (int64_t key = 0; key < s.keys; ++key)
        total += top == -INFINITY ? 0 : std::exp(logits.value[row * s.keys + key] - top);
      for (int64_t key = 0; key < s.keys; ++key) {
        const double p = total == 0 ? 0 : std::exp(logits.value[row * s.keys + key] - top) / total;
        w.weights.add(row * s.keys + key, p, p == 0 ? 0 : std::max(p, kSmallest<T>));
      }
    }
    return w;
  }
  int64_t bias_at(const Sequence& s, int64_t head, int64_t row, int64_t key) const {
    return s.batch * bias_strides_[0] + head * bias_strides_[1] + row * bias_strides_[2] + key * bias_strides_[3];
  }
  void add_to_bias(Exact& sum, const Sequence& s, int64_t head, const Exact& dlogits) const {
    for (int64_t i = 0; i < s.queries * s.keys; ++i)
      sum.add(bias_at(s, head, i / s.keys, i % s.keys), dlogits.value[static_cast<size_t>(i)],
              dlogits.scale[static_cast<size_t>(i)]);
  }
  static void add(Exact& sum, const Exact& a) {
    for (size_t i = 0; i < a.value.size(); ++i) sum.add(static_cast<int64_t>(i), a.value[i], a.scale[i]);
  }

  // Operands are exact; of what is computed from them, weights, their gradients and results are rounded to T once each.
  static void close(const char* what, int64_t i, double actual, double expected, double scale) {
    const double error = std::abs(actual - expected), limit = 2 * kEpsilon<T> * scale + 1e-7;
    if (error <= limit) return;
    char message[256];
    std::snprintf(message, sizeof message, "%s [%lld]: %.6g, expected %.6g; error %.3g exceeds %.3g", what,
                  static_cast<long long>(i), actual, expected, error, limit);
    fail(__FILE__, __LINE__, message);
  }
  static void check(const char* what, const Tensor<T>& actual, int64_t batch, int64_t first, int64_t head,
                    const Exact& exact) {
    for (int64_t i = 0; i < exact.rows * exact.cols; ++i)
      close(what, i, actual.at(batch, first + i / exact.cols, head, i % exact.cols),
            exact.value[static_cast<size_t>(i)], exact.scale[static_cast<size_t>(i)]);
  }

  Case c_;
  std::vector<Sequence> sequences_;
  std::vector<int32_t> query_starts_;
  std::vector<int64_t> key_starts_;
  Tensor<T> query_{0, 0, 0, 0, 0}, key_{0, 0, 0, 0, 0}, value_{0, 0, 0, 0, 0}, grad_{0, 0, 0, 0, 0};
  Array slopes_, bias_;
  std::vector<unsigned char> bias_bytes_;
  int64_t bias_strides_[4] = {}, bias_count_ = 0;
  int64_t seed_ = 0x123456789abcdef;
};

}  // namespace attention_test
