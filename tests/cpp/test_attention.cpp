// attention, forward and backward: masks, shared key heads, softcap, slopes, a bias, few and many rows.
#include <optional>

#include "cpu/attention.h"
#include "testing.h"

using namespace testing;

namespace {

constexpr int64_t kFar = int64_t{1} << 30;  // a window that hides nothing

struct Case {
  int64_t heads, key_heads, queries, keys, width;
  int64_t left = kFar, right = kFar;
  float softcap = 0;
  bool alibi = false, bias = false;
  Dtype dtype = Dtype::float32;
};

// One head's operand in double, from memory [rows, heads, width + 1].
struct Operand {
  Array numbers;
  int64_t heads, width;

  Operand(Dtype dtype, int64_t rows, int64_t h, int64_t d, bool input)
      : numbers(input ? Array::normal(dtype, extent(rows * h, d, d + 1)) : Array(dtype, extent(rows * h, d, d + 1))),
        heads(h),
        width(d) {}
  bmf::AttentionOperand view() const { return {numbers.data(), 0, width + 1, heads * (width + 1)}; }
  Exact head(int64_t h, int64_t rows) const {
    Exact out(rows, width);
    for (int64_t i = 0; i < rows * width; ++i) out.add(i, at(h, i / width, i % width));
    return out;
  }
  double at(int64_t h, int64_t row, int64_t c) const { return numbers[(row * heads + h) * (width + 1) + c]; }
  Array head_array(int64_t h, int64_t rows) const {
    Array out(numbers.dtype(), rows * width);
    for (int64_t i = 0; i < rows * width; ++i) out.set(i, static_cast<float>(at(h, i / width, i % width)));
    return out;
  }
};

// Weights [queries, keys] of one head, with the derivative of its cap and the size of its logits.
struct Softmax {
  Exact weights, slope;
};

Softmax softmax(const Case& c, const Exact& query, const Exact& key, double scale, double alibi, const Array* bias) {
  Exact logits = product(query, transposed(key));
  Softmax out{Exact(c.queries, c.keys), Exact(c.queries, c.keys)};
  for (int64_t q = 0; q < c.queries; ++q) {
    const int64_t position = q + c.keys - c.queries, row = q * c.keys;
    double top = -INFINITY, total = 0, size = 0;
    for (int64_t k = 0; k < c.keys; ++k) {
      double& z = logits.value[row + k];
      z *= scale;
      const double capped = c.softcap != 0 ? c.softcap * std::tanh(z / c.softcap) : z;
      out.slope.add(row + k, c.softcap != 0 ? 1 - std::pow(capped / c.softcap, 2) : 1, 1);
      size = std::max(size, std::abs(scale) * logits.scale[row + k] + (bias ? std::abs((*bias)[row + k]) : 0));
      z = capped - alibi * std::abs(static_cast<double>(position - k)) + (bias ? (*bias)[row + k] : 0);
      if (k < position - c.left || k > position + c.right) z = -INFINITY;
      top = std::max(top, z);
    }
    for (int64_t k = 0; k < c.keys; ++k) total += top == -INFINITY ? 0 : std::exp(logits.value[row + k] - top);
    for (int64_t k = 0; k < c.keys; ++k) {
      const double p = total == 0 ? 0 : std::exp(logits.value[row + k] - top) / total;
      out.weights.add(row + k, p, p * (1 + 2 * size));
    }
  }
  return out;
}

void add_to(Exact& sum, const Exact& a) {
  for (size_t i = 0; i < a.value.size(); ++i) sum.add(static_cast<int64_t>(i), a.value[i], a.scale[i]);
}

void check(const Threads& threads, const Case& c) {
  const double scale = 1 / std::sqrt(static_cast<double>(c.width));
  const Operand query(c.dtype, c.queries, c.heads, c.width, true), key(c.dtype, c.keys, c.key_heads, c.width, true);
  const Operand value(c.dtype, c.keys, c.key_heads, c.width, true), dout(c.dtype, c.queries, c.heads, c.width, true);
  const Operand out(c.dtype, c.queries, c.heads, c.width, false), dquery(c.dtype, c.queries, c.heads, c.width, false);
  const Operand dkey(c.dtype, c.keys, c.key_heads, c.width, false);
  const Operand dvalue(c.dtype, c.keys, c.key_heads, c.width, false);
  const Array alibi = Array::normal(Dtype::float32, c.heads, 0.1f);
  const Array bias = Array::normal(Dtype::float32, c.queries * c.keys);
  const bmf::AttentionSequence sequence{0, 0, 0, c.queries, c.keys, c.keys - c.queries};
  std::vector<bmf::RowStats> stats(static_cast<size_t>(c.heads * c.queries));

  bmf::AttentionArgs args{};
  args.dtype = c.dtype;
  args.heads = c.heads;
  args.key_heads = c.key_heads;
  args.head_dim = c.width;
  args.sequences = &sequence;
  args.sequence_count = 1;
  args.query = query.view();
  args.key = key.view();
  args.value = value.view();
  args.out = out.view();
  args.stats = stats.data();
  args.stats_rows = c.queries;
  args.scale = static_cast<float>(scale);
  args.softcap = c.softcap;
  args.left = c.left;
  args.right = c.right;
  args.alibi = c.alibi ? alibi.floats() : nullptr;
  if (c.bias) {  // the same for all heads
    args.bias.kind = bmf::BiasKind::float32;
    args.bias.data = bias.data();
    args.bias.row_stride = c.keys;
    args.bias.key_stride = 1;
  }
  bmf::attention_forward(args, threads);
  args.grad_out = dout.view();
  args.grad_query = dquery.view();
  args.grad_key = dkey.view();
  args.grad_value = dvalue.view();
  bmf::attention_backward(args, threads);

  const int64_t group = c.heads / c.key_heads;
  std::optional<Exact> dkey_exact, dvalue_exact;
  for (int64_t h = 0; h < c.heads; ++h) {
    const Exact q = query.head(h, c.queries), k = key.head(h / group, c.keys), v = value.head(h / group, c.keys);
    const Exact g = dout.head(h, c.queries);
    const auto [weights, slope] = softmax(c, q, k, scale, c.alibi ? alibi[h] : 0, c.bias ? &bias : nullptr);
    CHECK_CLOSE(out.head_array(h, c.queries), product(weights, v), c.dtype);

    const Exact dweights = product(g, transposed(v));
    Exact dlogits(c.queries, c.keys);
    for (int64_t row = 0; row < c.queries; ++row) {
      double delta = 0, delta_size = 0;
      for (int64_t i = row * c.keys; i < (row + 1) * c.keys; ++i) {
        delta += weights.value[i] * dweights.value[i];
        delta_size += weights.scale[i] * dweights.scale[i];
      }
      for (int64_t i = row * c.keys; i < (row + 1) * c.keys; ++i)
        dlogits.add(i, weights.value[i] * (dweights.value[i] - delta) * slope.value[i] * scale,
                    weights.scale[i] * (dweights.scale[i] + delta_size) * scale);
    }
    CHECK_CLOSE(dquery.head_array(h, c.queries), product(dlogits, k), c.dtype);
    if (h % group == 0) {
      dkey_exact.emplace(c.keys, c.width);
      dvalue_exact.emplace(c.keys, c.width);
    }
    add_to(*dkey_exact, product(transposed(dlogits), q));
    add_to(*dvalue_exact, product(transposed(weights), g));
    if (h % group != group - 1) continue;
    CHECK_CLOSE(dkey.head_array(h / group, c.keys), *dkey_exact, c.dtype);
    CHECK_CLOSE(dvalue.head_array(h / group, c.keys), *dvalue_exact, c.dtype);
  }
}

}  // namespace

int main() {
  for_each_isa([&](const Threads& threads) {
    for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16}) {
      check(threads, {.heads = 1, .key_heads = 1, .queries = 1, .keys = 1, .width = 1, .dtype = dtype});
      check(threads, {.heads = 2, .key_heads = 1, .queries = 1, .keys = 70, .width = 33, .dtype = dtype});
      check(threads, {.heads = 4, .key_heads = 2, .queries = 67, .keys = 67, .width = 17, .right = 0, .dtype = dtype});
      check(threads, {.heads = 1, .key_heads = 1, .queries = 5, .keys = 3, .width = 8, .right = 0, .dtype = dtype});
      check(threads, {.heads = 1,
                      .key_heads = 1,
                      .queries = 140,
                      .keys = 150,
                      .width = 64,
                      .left = 20,
                      .right = 3,
                      .dtype = dtype});
      check(threads, {.heads = 2,
                      .key_heads = 2,
                      .queries = 33,
                      .keys = 65,
                      .width = 16,
                      .softcap = 2,
                      .alibi = true,
                      .bias = true,
                      .dtype = dtype});
    }
  });
  return result();
}
