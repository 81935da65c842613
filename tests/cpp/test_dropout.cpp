// dropout alone and as the end of a product: the same choices everywhere, and what is left of them.
#include "cpu/dropout.h"

#include "cpu/linear.h"
#include "testing.h"

using namespace testing;

namespace {

constexpr float kDropped = 0.3f;
constexpr uint64_t kSeed = 0x123456789abcdef;

bmf::Finish finish(float p, const Array& residual, int64_t stride) {
  return {p, kSeed, residual.count() ? residual.rows(stride) : bmf::Rows{}};
}

// What dropout makes of ones.
std::vector<double> factors(int64_t rows, int64_t width, const Threads& threads) {
  Array x(Dtype::float32, rows * width), y(Dtype::float32, rows * width);
  for (int64_t i = 0; i < x.count(); ++i) x.set(i, 1);
  bmf::dropout({rows, width, x.rows(width), y.rows(width), finish(kDropped, Array(), 0)}, threads);
  std::vector<double> out;
  for (int64_t i = 0; i < y.count(); ++i) out.push_back(y[i]);
  return out;
}

void check_dropout(const Threads& threads, int64_t rows, int64_t width, Dtype x_dtype, Dtype y_dtype) {
  const int64_t stride = width + 3;
  const Array x = Array::normal(x_dtype, extent(rows, width, stride));
  const Array residual = Array::normal(y_dtype, extent(rows, width, stride + 1));
  Array y(y_dtype, rows * width);
  bmf::dropout({rows, width, x.rows(stride), y.rows(width), finish(kDropped, residual, stride + 1)}, threads);
  const std::vector<double> factor = factors(rows, width, threads);
  Exact exact(residual, rows, width, stride + 1);
  for (int64_t i = 0; i < rows * width; ++i) exact.add(i, factor[i] * x[i / width * stride + i % width]);
  CHECK_CLOSE(y, exact, Dtype::float32);
}

void check_linear(const Threads& threads, int64_t m, int64_t n, int64_t k, Dtype dtype, Dtype y_dtype) {
  const Array x = Array::normal(dtype, m * k), weight = Array::normal(Dtype::float32, n * k);
  const Array residual = Array::normal(y_dtype, m * n);
  Array y(y_dtype, m * n);
  bmf::linear_forward({dtype, Dtype::float32, m, n, k, k, k, x.data(), weight.data(), nullptr, bmf::Activation::none,
                       y.data(), nullptr, y_dtype, finish(kDropped, residual, n)},
                      threads);
  const std::vector<double> factor = factors(m, n, threads);
  const Exact product_exact = product(Exact(x, m, k), transposed(Exact(weight, n, k)));
  Exact exact(residual, m, n);
  for (int64_t i = 0; i < m * n; ++i) exact.add(i, factor[i] * product_exact.value[i], 2 * product_exact.scale[i]);
  CHECK_CLOSE(y, exact, dtype);
}

}  // namespace

int main() {
  constexpr int64_t kManyRows = 64, kManyColumns = 300;
  const std::vector<double> expected = factors(kManyRows, kManyColumns, threads(1));
  int64_t kept = 0;
  for (const double factor : expected) {
    CHECK(factor == 0 || std::abs(factor - 1 / (1 - kDropped)) < 1e-6);
    kept += factor != 0;
  }
  const double share = static_cast<double>(kept) / static_cast<double>(expected.size());
  CHECK(std::abs(share - (1 - kDropped)) < 4 * std::sqrt(0.21 / static_cast<double>(expected.size())));
  for_each_isa([&](const Threads& threads) {
    CHECK(factors(kManyRows, kManyColumns, threads) == expected);
    for (const auto& [rows, width] : {std::pair{1, 1}, {3, 17}, {5, 128}, {7, 300}, {0, 4}, {2, 0}})
      for (const Dtype x : {Dtype::float32, Dtype::bfloat16})
        for (const Dtype y : {Dtype::float32, Dtype::bfloat16}) check_dropout(threads, rows, width, x, y);
    for (const auto& [m, n, k] : {std::tuple{1, 70, 5}, {4, 131, 9}, {101, 300, 33}}) {
      check_linear(threads, m, n, k, Dtype::float32, Dtype::float32);
      check_linear(threads, m, n, k, Dtype::bfloat16, Dtype::bfloat16);
      check_linear(threads, m, n, k, Dtype::bfloat16, Dtype::float32);
    }
  });
  return result();
}
