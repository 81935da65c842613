// linear, forward and backward: packing, the micro-kernel and its tails, epilogues, few rows, long sums, nothing at
// all.
#include "activations.h"
#include "cpu/linear.h"
#include "testing.h"

using namespace testing;

namespace {

struct Shape {
  int64_t m, n, k;
};

unsigned char* element(const Array& a, int64_t i) {
  return static_cast<unsigned char*>(a.data()) + i * (a.dtype() == Dtype::float32 ? 4 : 2);
}

// Rows of x and weight are further apart than they are long, by an odd number of elements.
void check(const Threads& threads, Shape s, Dtype x_dtype, Dtype weight_dtype, Activation activation) {
  const auto [m, n, k] = s;
  const int64_t x_stride = k + 3, weight_stride = k + 1;
  const Array x = Array::normal(x_dtype, extent(m, k, x_stride));
  const Array weight = Array::normal(weight_dtype, extent(n, k, weight_stride), 0.3f);
  const Array bias = Array::normal(Dtype::float32, n);
  const Exact x_exact(x, m, k, x_stride), weight_exact(weight, n, k, weight_stride);

  Array y(x_dtype, m * n), pre(x_dtype, m * n);
  bmf::linear_forward({x_dtype,
                       weight_dtype,
                       m,
                       n,
                       k,
                       x_stride,
                       weight_stride,
                       x.data(),
                       weight.data(),
                       bias.floats(),
                       activation,
                       y.data(),
                       pre.data(),
                       x_dtype,
                       {}},
                      threads);
  const Exact pre_exact = with_row(product(x_exact, transposed(weight_exact)), bias);
  CHECK_CLOSE(pre, pre_exact, x_dtype);
  CHECK_CLOSE(y, mapped(pre_exact, kSteepest, [&](double v) { return activate(activation, v); }), x_dtype);

  const Array dy = Array::normal(x_dtype, m * n);
  Array dx(x_dtype, m * k), dweight(weight_dtype, n * k), dbias(Dtype::float32, n);
  bmf::linear_backward(
      {x_dtype, weight_dtype, m, n, k, x_stride, weight_stride, dy.data(), x.data(), weight.data(),
       activation == Activation::none ? nullptr : pre.data(), activation, dx.data(), dweight.data(), dbias.floats()},
      threads);
  const Exact slope =
      mapped(Exact(pre, m, n), 1, [&](double v) { return activation_slope(activation, v); });  // pre as it was saved
  const Exact g = scaled(Exact(dy, m, n), slope);
  CHECK_CLOSE(dx, product(g, weight_exact), x_dtype);
  CHECK_CLOSE(dweight, product(transposed(g), x_exact), x_dtype);
  CHECK_CLOSE(dbias, column_sums(g), x_dtype);
}

// Backward of several layers of one x: of a single one whose weight is cut between rows.
void check_several(const Threads& threads, Shape s, Dtype x_dtype, Dtype weight_dtype) {
  const auto [m, n, k] = s;
  const int64_t widths[] = {n, 1, n / 2 + 2};
  const int64_t total = widths[0] + widths[1] + widths[2], x_stride = k + 3, weight_stride = k + 1;
  const Array x = Array::normal(x_dtype, extent(m, k, x_stride));
  const Array weight = Array::normal(weight_dtype, extent(total, k, weight_stride), 0.3f);
  const Array dy = Array::normal(x_dtype, m * total);
  const Array residual = Array::normal(Dtype::float32, m * k);
  Array dx(Dtype::float32, m * k), dweight(weight_dtype, total * k), dbias(Dtype::float32, total);

  bmf::LinearOfSeveral layers[3];
  int64_t row = 0;
  for (int i = 0; i < 3; row += widths[i++])
    layers[i] = {widths[i],
                 weight_stride,
                 total,
                 element(dy, row),
                 element(weight, row * weight_stride),
                 element(dweight, row * k),
                 dbias.floats() + row};
  bmf::linears_backward(
      {x_dtype, weight_dtype, m, k, x_stride, x.data(), {dx.data(), Dtype::float32, residual.data()}, 3, layers},
      threads);
  const Exact g(dy, m, total);
  Exact dx_exact = product(g, Exact(weight, total, k, weight_stride));
  for (int64_t i = 0; i < m * k; ++i) dx_exact.add(i, residual[i]);
  CHECK_CLOSE(dx, dx_exact, x_dtype);
  CHECK_CLOSE(dweight, product(transposed(g), Exact(x, m, k, x_stride)), x_dtype);
  CHECK_CLOSE(dbias, column_sums(g), x_dtype);
}

// Each activation over its whole range: the identity matrix of one element leaves nothing else to go wrong.
void check_activations(const Threads& threads) {
  constexpr int64_t kPoints = 4001;
  const Array one = Array::normal(Dtype::float32, 1, 0);
  Array weight(Dtype::float32, 1), x(Dtype::float32, kPoints);
  weight.set(0, 1);
  for (int64_t i = 0; i < kPoints; ++i) x.set(i, static_cast<float>(i - kPoints / 2) / 100);
  for (const Activation kind : kActivations) {
    Array y(Dtype::float32, kPoints);
    bmf::linear_forward({Dtype::float32,
                         Dtype::float32,
                         kPoints,
                         1,
                         1,
                         1,
                         1,
                         x.data(),
                         weight.data(),
                         one.floats(),
                         kind,
                         y.data(),
                         nullptr,
                         Dtype::float32,
                         {}},
                        threads);
    CHECK_CLOSE(y, mapped(Exact(x, kPoints, 1), 0.5, [&](double v) { return activate(kind, v); }), Dtype::float32);
  }
}

}  // namespace

int main() {
  constexpr Shape kShapes[] = {{1, 1, 1},      {1, 70, 33},   {4, 65, 17},   {5, 3, 2}, {7, 129, 31}, {97, 66, 130},
                               {25, 67, 1030}, {16, 300, 64}, {17, 131, 33}, {0, 3, 4}, {3, 0, 4},    {3, 4, 0}};
  constexpr std::pair<Dtype, Dtype> kDtypes[] = {
      {Dtype::float32, Dtype::float32}, {Dtype::bfloat16, Dtype::float32}, {Dtype::bfloat16, Dtype::bfloat16}};
  for_each_isa([&](const Threads& threads) {
    check_activations(threads);
    for (const auto& [x, weight] : kDtypes)
      for (const Shape& shape : kShapes) {
        for (const Activation kind : {Activation::none, Activation::gelu}) check(threads, shape, x, weight, kind);
        check_several(threads, shape, x, weight);
      }
  });
  return result();
}
