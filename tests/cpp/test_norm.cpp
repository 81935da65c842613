// layer_norm and rms_norm, forward and backward, with and without a residual, in every mix of dtypes.
#include "cpu/layer_norm.h"
#include "cpu/rms_norm.h"
#include "testing.h"

using namespace testing;

namespace {

constexpr float kEps = 1e-5f;
constexpr Dtype kBoth[] = {Dtype::float32, Dtype::bfloat16};

struct Case {
  int64_t rows, width;
  bool centered, with_residual;
  Dtype x, residual, y;
};

// Of one row: its mean (0 for rms_norm), 1 / root of its mean square, and n = (s - mean) rstd with its terms' size.
struct Normed {
  double mean = 0, rstd = 0;
  std::vector<double> n, size;
};

Normed normalise(const Array& s, int64_t begin, int64_t width, bool centered) {
  Normed out;
  double magnitude = 0, square = 0;
  for (int64_t i = 0; i < width; ++i) {
    out.mean += centered ? s[begin + i] / width : 0;
    magnitude += centered ? std::abs(s[begin + i]) / width : 0;
  }
  for (int64_t i = 0; i < width; ++i) square += std::pow(s[begin + i] - out.mean, 2) / width;
  out.rstd = 1 / std::sqrt(square + kEps);
  for (int64_t i = 0; i < width; ++i) {
    out.n.push_back((s[begin + i] - out.mean) * out.rstd);
    out.size.push_back((std::abs(s[begin + i]) + magnitude) * out.rstd);
  }
  return out;
}

void check(const Threads& threads, const Case& c) {
  const auto [rows, width, centered, with_residual, x_dtype, residual_dtype, y_dtype] = c;
  const int64_t stride = width + 3;
  const bool wide = x_dtype == Dtype::float32 || (with_residual && residual_dtype == Dtype::float32);
  const Dtype sum_dtype = wide ? Dtype::float32 : Dtype::bfloat16;
  const Array x = Array::normal(x_dtype, extent(rows, width, stride));
  const Array residual = Array::normal(residual_dtype, extent(rows, width, stride));
  const Array weight = Array::normal(y_dtype, width), bias = Array::normal(Dtype::float32, width);

  Array y(y_dtype, rows * width), sum(sum_dtype, rows * width), mean(Dtype::float32, centered ? rows : 0);
  Array rstd(Dtype::float32, rows);
  auto forward = centered ? bmf::layer_norm_forward : bmf::rms_norm_forward;
  forward({rows, width, kEps, x.rows(stride), with_residual ? residual.rows(stride) : Rows{}, weight.rows(width),
           centered ? bias.rows(width) : Rows{}, y.rows(width), with_residual ? sum.rows(width) : Rows{},
           centered ? mean.floats() : nullptr, rstd.floats()},
          threads);
  Exact sum_exact(x, rows, width, stride);
  for (int64_t i = 0; with_residual && i < rows * width; ++i)
    sum_exact.add(i, residual[i / width * stride + i % width]);
  if (with_residual)
    CHECK_CLOSE(sum, sum_exact, sum_dtype);
  else  // the rows themselves are normed, and saved for backward
    for (int64_t i = 0; i < rows * width; ++i) sum.set(i, static_cast<float>(sum_exact.value[i]));

  const Array grad_y = Array::normal(y_dtype, rows * width), grad_sum = Array::normal(sum_dtype, rows * width);
  Array grad(sum_dtype, rows * width), narrow(Dtype::bfloat16, wide ? rows * width : 0);
  Array grad_weight(Dtype::float32, width), grad_bias(Dtype::float32, centered ? width : 0);
  auto backward = centered ? bmf::layer_norm_backward : bmf::rms_norm_backward;
  backward({rows, width, grad_y.rows(width), with_residual ? grad_sum.rows(width) : Rows{}, sum.rows(width),
            weight.rows(width), centered ? mean.floats() : nullptr, rstd.floats(), grad.rows(width),
            wide ? narrow.rows(width) : Rows{}, grad_weight.floats(), centered ? grad_bias.floats() : nullptr},
           threads);

  Exact y_exact(rows, width), grad_exact(rows, width), grad_weight_exact(1, width), grad_bias_exact(1, width);
  for (int64_t row = 0; row < rows; ++row) {
    const Normed normed = normalise(sum, row * width, width, centered);
    double dot = 0, dot_size = 0, mean_g = 0, mean_g_size = 0;
    for (int64_t i = 0; i < width; ++i) {
      const double dy = grad_y[row * width + i], g = dy * weight[i];
      dot += g * normed.n[i] / width;
      dot_size += std::abs(g) * normed.size[i] / width;
      mean_g += centered ? g / width : 0;
      mean_g_size += centered ? std::abs(g) / width : 0;
      grad_weight_exact.add(i, dy * normed.n[i], std::abs(dy) * normed.size[i]);
      grad_bias_exact.add(i, dy);
    }
    for (int64_t i = 0; i < width; ++i) {
      const int64_t at = row * width + i;
      const double g = grad_y[at] * weight[i];
      y_exact.add(at, normed.n[i] * weight[i], normed.size[i] * std::abs(weight[i]));
      if (centered) y_exact.add(at, bias[i]);
      grad_exact.add(at, (g - normed.n[i] * dot - mean_g) * normed.rstd,
                     (std::abs(g) + normed.size[i] * dot_size + mean_g_size) * normed.rstd);
      if (with_residual) grad_exact.add(at, grad_sum[at]);
    }
  }
  CHECK_CLOSE(y, y_exact, Dtype::float32);
  CHECK_CLOSE(grad, grad_exact, Dtype::float32);
  if (wide) CHECK_CLOSE(narrow, grad_exact, Dtype::float32);
  CHECK_CLOSE(grad_weight, grad_weight_exact, Dtype::float32);
  if (centered) CHECK_CLOSE(grad_bias, grad_bias_exact, Dtype::float32);
}

}  // namespace

int main() {
  constexpr int64_t kShapes[][2] = {{1, 1}, {5, 3}, {2, 17}, {3, 64}, {130, 131}, {0, 7}};
  for_each_isa([&](const Threads& threads) {
    for (const auto& [rows, width] : kShapes)
      for (const bool centered : {false, true})
        for (const Dtype x : kBoth)
          for (const Dtype y : kBoth) {
            check(threads, {rows, width, centered, false, x, x, y});
            for (const Dtype residual : kBoth) check(threads, {rows, width, centered, true, x, residual, y});
          }
  });
  return result();
}
