// mlp and gated_mlp, forward and backward.
#include "activations.h"
#include "cpu/gated_mlp.h"
#include "cpu/mlp.h"
#include "testing.h"

using namespace testing;

namespace {

struct Case {
  int64_t m, n, f, k;  // rows, width out, hidden width, width in
  Dtype x, weight;
};

Exact activated(const Exact& pre, Activation kind) {
  return mapped(pre, kSteepest, [&](double v) { return activate(kind, v); });
}
Exact slopes(const Exact& pre, Activation kind) {
  return mapped(pre, 1, [&](double v) { return activation_slope(kind, v); });
}

void check_mlp(const Threads& threads, const Case& c) {
  const auto [m, n, f, k, x_dtype, weight_dtype] = c;
  constexpr Activation kKind = Activation::gelu_tanh;
  const Array x = Array::normal(x_dtype, m * k), dy = Array::normal(x_dtype, m * n);
  const Array w1 = Array::normal(weight_dtype, f * k, 0.3f), w2 = Array::normal(weight_dtype, n * f, 0.3f);
  const Array b1 = Array::normal(Dtype::float32, f), b2 = Array::normal(Dtype::float32, n);
  const Exact x_exact(x, m, k), w1_exact(w1, f, k), w2_exact(w2, n, f), dy_exact(dy, m, n);

  Array y(x_dtype, m * n), pre(x_dtype, m * f);
  bmf::mlp_forward({x_dtype,
                    weight_dtype,
                    m,
                    n,
                    f,
                    k,
                    k,
                    k,
                    f,
                    x.data(),
                    w1.data(),
                    w2.data(),
                    b1.floats(),
                    b2.floats(),
                    kKind,
                    y.data(),
                    pre.data(),
                    x_dtype,
                    {}},
                   threads);
  const Exact pre_exact = with_row(product(x_exact, transposed(w1_exact)), b1);
  CHECK_CLOSE(pre, pre_exact, x_dtype);
  CHECK_CLOSE(y, with_row(product(activated(pre_exact, kKind), transposed(w2_exact)), b2), x_dtype);

  Array dx(x_dtype, m * k), dw1(weight_dtype, f * k), dw2(weight_dtype, n * f);
  Array db1(Dtype::float32, f), db2(Dtype::float32, n);
  const Array residual = Array::normal(x_dtype, m * k);
  bmf::mlp_backward({x_dtype,
                     weight_dtype,
                     m,
                     n,
                     f,
                     k,
                     k,
                     k,
                     f,
                     dy.data(),
                     x.data(),
                     w1.data(),
                     w2.data(),
                     pre.data(),
                     kKind,
                     {dx.data(), x_dtype, residual.data()},
                     dw1.data(),
                     dw2.data(),
                     db1.floats(),
                     db2.floats()},
                    threads);
  const Exact saved(pre, m, f), dpre = scaled(product(dy_exact, w2_exact), slopes(saved, kKind));
  Exact dx_exact = product(dpre, w1_exact);
  for (int64_t i = 0; i < m * k; ++i) dx_exact.add(i, residual[i]);
  CHECK_CLOSE(dx, dx_exact, x_dtype);
  CHECK_CLOSE(dw1, product(transposed(dpre), x_exact), x_dtype);
  CHECK_CLOSE(dw2, product(transposed(dy_exact), activated(saved, kKind)), x_dtype);
  CHECK_CLOSE(db1, column_sums(dpre), x_dtype);
  CHECK_CLOSE(db2, column_sums(dy_exact), x_dtype);
}

void check_gated_mlp(const Threads& threads, const Case& c) {
  const auto [m, n, f, k, x_dtype, weight_dtype] = c;
  constexpr Activation kKind = Activation::silu;
  const Array x = Array::normal(x_dtype, m * k), dy = Array::normal(x_dtype, m * n);
  const Array w_gate = Array::normal(weight_dtype, f * k, 0.3f), w_up = Array::normal(weight_dtype, f * k, 0.3f);
  const Array w_down = Array::normal(weight_dtype, n * f, 0.3f);
  const Exact x_exact(x, m, k), dy_exact(dy, m, n);
  const Exact gate_weight(w_gate, f, k), up_weight(w_up, f, k), down_weight(w_down, n, f);

  Array y(x_dtype, m * n), gate(x_dtype, m * f), up(x_dtype, m * f);
  bmf::gated_mlp_forward(
      {x_dtype,     weight_dtype,  m,     n,        f,           k,         k,       k, k, f, x.data(), w_gate.data(),
       w_up.data(), w_down.data(), kKind, y.data(), gate.data(), up.data(), x_dtype, {}},
      threads);
  const Exact gate_exact = product(x_exact, transposed(gate_weight)),
              up_exact = product(x_exact, transposed(up_weight));
  CHECK_CLOSE(gate, gate_exact, x_dtype);
  CHECK_CLOSE(up, up_exact, x_dtype);
  CHECK_CLOSE(y, product(scaled(activated(gate_exact, kKind), up_exact), transposed(down_weight)), x_dtype);

  Array dx(x_dtype, m * k), dw_gate(weight_dtype, f * k), dw_up(weight_dtype, f * k), dw_down(weight_dtype, n * f);
  bmf::gated_mlp_backward({x_dtype,
                           weight_dtype,
                           m,
                           n,
                           f,
                           k,
                           k,
                           k,
                           k,
                           f,
                           dy.data(),
                           x.data(),
                           w_gate.data(),
                           w_up.data(),
                           w_down.data(),
                           gate.data(),
                           up.data(),
                           kKind,
                           dx.data(),
                           dw_gate.data(),
                           dw_up.data(),
                           dw_down.data()},
                          threads);
  const Exact gate_saved(gate, m, f), up_saved(up, m, f), dh = product(dy_exact, down_weight);
  const Exact dgate = scaled(scaled(dh, up_saved), slopes(gate_saved, kKind));
  const Exact dup = scaled(dh, activated(gate_saved, kKind));
  Exact dx_exact = product(dgate, gate_weight);
  const Exact dx_up = product(dup, up_weight);
  for (int64_t i = 0; i < m * k; ++i) dx_exact.add(i, dx_up.value[i], dx_up.scale[i]);
  CHECK_CLOSE(dx, dx_exact, x_dtype);
  CHECK_CLOSE(dw_gate, product(transposed(dgate), x_exact), x_dtype);
  CHECK_CLOSE(dw_up, product(transposed(dup), x_exact), x_dtype);
  CHECK_CLOSE(dw_down, product(transposed(dy_exact), scaled(activated(gate_saved, kKind), up_saved)), x_dtype);
}

}  // namespace

int main() {
  constexpr int64_t kShapes[][4] = {{1, 1, 1, 1}, {3, 17, 70, 5}, {31, 65, 129, 33}, {0, 3, 4, 5}};
  constexpr std::pair<Dtype, Dtype> kDtypes[] = {
      {Dtype::float32, Dtype::float32}, {Dtype::bfloat16, Dtype::float32}, {Dtype::bfloat16, Dtype::bfloat16}};
  for_each_isa([&](const Threads& threads) {
    for (const auto& [m, n, f, k] : kShapes)
      for (const auto& [x, weight] : kDtypes) {
        check_mlp(threads, {m, n, f, k, x, weight});
        check_gated_mlp(threads, {m, n, f, k, x, weight});
      }
  });
  return result();
}
