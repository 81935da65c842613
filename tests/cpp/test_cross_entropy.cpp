// cross_entropy forward and backward, and linear_cross_entropy: losses and all gradients in one call.
#include "cpu/cross_entropy.h"
#include "cpu/linear_cross_entropy.h"
#include "testing.h"

using namespace testing;

namespace {

constexpr int64_t kIgnored = -100;

struct Options {
  float smoothing, softcap;
};
constexpr Options kOptions[] = {{0, 0}, {0.1f, 0}, {0, 3}, {0.1f, 3}};

std::vector<int64_t> draw_targets(int64_t rows, int64_t classes) {
  std::vector<int64_t> target;
  for (int64_t row = 0; row < rows; ++row) target.push_back(row % 5 == 3 ? kIgnored : row * 7919 % classes);
  return target;
}

struct LossAndGradient {
  Exact loss, grad;
};

// Of logits [rows, classes], whose scale says how exact they are. The gradient is that of each loss, times scale[row].
LossAndGradient cross_entropy(const Exact& x, const std::vector<int64_t>& target, const Options& o,
                              const Array& scale) {
  const int64_t classes = x.cols;
  LossAndGradient out{Exact(1, x.rows), Exact(x.rows, classes)};
  for (int64_t row = 0; row < x.rows; ++row) {
    if (target[row] == kIgnored) continue;
    const double* logits = &x.value[row * classes];
    auto capped = [&](int64_t j) { return o.softcap != 0 ? o.softcap * std::tanh(logits[j] / o.softcap) : logits[j]; };
    double top = capped(0), exp_sum = 0, mean = 0, size = 0;
    for (int64_t j = 1; j < classes; ++j) top = std::max(top, capped(j));
    for (int64_t j = 0; j < classes; ++j) {
      exp_sum += std::exp(capped(j) - top);
      mean += capped(j) / static_cast<double>(classes);
      size = std::max(size, x.scale[row * classes + j]);
    }
    const double lse = top + std::log(exp_sum), hit = capped(target[row]);
    out.loss.add(row, (1 - o.smoothing) * (lse - hit) + o.smoothing * (lse - mean), std::abs(lse) + 2 * size + 1);
    for (int64_t j = 0; j < classes; ++j) {
      const double p = std::exp(capped(j) - lse), even = o.smoothing / static_cast<double>(classes);
      const double expected = even + (j == target[row] ? 1 - o.smoothing : 0);
      const double slope = o.softcap != 0 ? 1 - std::pow(capped(j) / o.softcap, 2) : 1;
      out.grad.add(row * classes + j, scale[row] * (p - expected) * slope,
                   std::abs(scale[row]) * (p * (1 + 2 * size) + expected));
    }
  }
  return out;
}

void check_cross_entropy(const Threads& threads, int64_t rows, int64_t classes, Dtype dtype, const Options& o) {
  const int64_t stride = classes + 3;
  const Array logits = Array::normal(dtype, extent(rows, classes, stride), 3);
  const Array scale = Array::normal(Dtype::float32, rows);
  const std::vector<int64_t> target = draw_targets(rows, classes);
  Array loss(Dtype::float32, rows), lse(Dtype::float32, 2 * rows), grad(dtype, rows * classes);
  bmf::cross_entropy_forward({rows, classes, logits.rows(stride), target.data(), kIgnored, o.smoothing, o.softcap,
                              loss.floats(), lse.floats()},
                             threads);
  bmf::cross_entropy_backward({rows, classes, logits.rows(stride), grad.rows(classes), target.data(), kIgnored,
                               o.smoothing, o.softcap, lse.floats(), scale.floats(), 1},
                              threads);
  const auto [loss_exact, grad_exact] = cross_entropy(Exact(logits, rows, classes, stride), target, o, scale);
  CHECK_CLOSE(loss, loss_exact, Dtype::float32);
  CHECK_CLOSE(grad, grad_exact, Dtype::float32);
}

struct LinearCase {
  int64_t tokens, width, classes;
  Dtype x, weight;
  bool ignores = true;  // some tokens
};

void check_linear_cross_entropy(const Threads& threads, const LinearCase& c, const Options& o) {
  const int64_t x_stride = c.width + 1, weight_stride = c.width + 3;
  const Array x = Array::normal(c.x, extent(c.tokens, c.width, x_stride));
  const Array weight = Array::normal(c.weight, extent(c.classes, c.width, weight_stride), 0.5f);
  const Array bias = Array::normal(Dtype::float32, c.classes), scale = Array::normal(Dtype::float32, c.tokens);
  std::vector<int64_t> target = draw_targets(c.tokens, c.classes);
  if (!c.ignores) std::replace(target.begin(), target.end(), kIgnored, int64_t{0});
  Array loss(Dtype::float32, c.tokens), dx(c.x, c.tokens * c.width);
  const auto correct = std::make_unique<bool[]>(c.tokens);
  Array dweight(Dtype::float32, c.classes * c.width), dbias(Dtype::float32, c.classes);
  bmf::linear_cross_entropy({c.x,           c.weight,      c.tokens,       c.width,
                             c.classes,     x_stride,      weight_stride,  x.data(),
                             weight.data(), bias.floats(), target.data(),  kIgnored,
                             o.smoothing,   o.softcap,     scale.floats(), 1,
                             loss.floats(), correct.get(), dx.data(),      dweight.floats(),
                             dbias.floats()},
                            threads);
  const Exact x_exact(x, c.tokens, c.width, x_stride), weight_exact(weight, c.classes, c.width, weight_stride);
  const Exact logits = with_row(product(x_exact, transposed(weight_exact)), bias);
  const auto [loss_exact, g] = cross_entropy(logits, target, o, scale);
  CHECK_CLOSE(loss, loss_exact, c.x);
  CHECK_CLOSE(dx, product(g, weight_exact), c.x);
  CHECK_CLOSE(dweight, product(transposed(g), x_exact), c.x);
  CHECK_CLOSE(dbias, column_sums(g), c.x);
  for (int64_t row = 0; row < c.tokens; ++row) {
    if (target[row] == kIgnored) continue;
    const double* z = &logits.value[row * c.classes];
    const double top = *std::max_element(z, z + c.classes);
    const double error = epsilon(c.x) * logits.scale[row * c.classes + target[row]];
    if (z[target[row]] == top) CHECK(correct[row]);
    if (z[target[row]] < top - error) CHECK(!correct[row]);
  }
}

}  // namespace

int main() {
  for_each_isa([&](const Threads& threads) {
    for (const Options& options : kOptions) {
      for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16})
        for (const auto& [rows, classes] :
             {std::pair{1, 1}, {7, 3}, {5, 67}, {83, 65}, {33, 257}, {40, 1000}, {4, 9000}, {0, 5}})
          check_cross_entropy(threads, rows, classes, dtype, options);
      for (const auto& [x, weight] : {std::pair{Dtype::float32, Dtype::float32},
                                      {Dtype::bfloat16, Dtype::float32},
                                      {Dtype::bfloat16, Dtype::bfloat16}}) {
        check_linear_cross_entropy(threads, {1, 1, 1, x, weight}, options);
        check_linear_cross_entropy(threads, {70, 33, 131, x, weight}, options);
        check_linear_cross_entropy(threads, {70, 131, 33, x, weight, false}, options);
        check_linear_cross_entropy(threads, {0, 3, 5, x, weight}, options);
      }
    }
    // Two blocks of classes.
    check_linear_cross_entropy(threads, {9, 5, 4100, Dtype::bfloat16, Dtype::float32}, kOptions[1]);
  });
  // Two chunks of tokens, on the fastest instruction set.
  context += ", two chunks";
  check_linear_cross_entropy(threads(2), {301, 2, 92000, Dtype::float32, Dtype::float32}, kOptions[0]);
  return result();
}
