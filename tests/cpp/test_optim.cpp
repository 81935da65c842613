// Optimizer steps, the norm of gradients and their scaling, over several parameters that threads share.
#include "cpu/optim.h"
#include "testing.h"

using namespace testing;

namespace {

constexpr int64_t kCounts[] = {1, 0, 31, 70001, 5};  // the fourth is handed out in three pieces

struct Parameters {
  std::vector<Array> p, g, m, v;
  std::vector<bmf::Parameter> list;

  Parameters(Dtype dtype, Dtype grad_dtype, int64_t step) {
    for (const int64_t count : kCounts) {
      p.push_back(Array::normal(dtype, count));
      g.push_back(Array::normal(grad_dtype, count));
      m.push_back(Array::normal(dtype, count, 0.1f));
      v.push_back(Array::normal(dtype, count, 0.1f));
      for (int64_t i = 0; i < count; ++i) v.back().set(i, static_cast<float>(std::abs(v.back()[i])));
      list.push_back(
          {p.back().data(), g.back().data(), m.back().data(), v.back().data(), count, dtype, grad_dtype, step});
    }
  }

  static std::vector<Array> copies(const std::vector<Array>& of) {
    std::vector<Array> out;
    for (const Array& a : of) out.push_back(a.copy());
    return out;
  }
};

void check_adamw(const Threads& threads, Dtype dtype, Dtype grad_dtype, bool maximize) {
  constexpr double kLr = 0.01, kBeta1 = 0.9, kBeta2 = 0.95, kEps = 1e-8, kDecay = 0.1;
  constexpr int64_t kStep = 3;
  constexpr float kGradScale = 0.75f;
  Parameters after(dtype, grad_dtype, kStep);
  const auto p = Parameters::copies(after.p), m = Parameters::copies(after.m), v = Parameters::copies(after.v);
  bmf::adamw(
      {after.list.data(), std::ssize(after.list), kLr, kBeta1, kBeta2, kEps, kDecay, maximize, kGradScale, false},
      threads);
  for (size_t k = 0; k < p.size(); ++k) {
    const int64_t n = p[k].count();
    Exact p_exact(1, n), m_exact(1, n), v_exact(1, n);
    for (int64_t i = 0; i < n; ++i) {
      const double g = after.g[k][i] * (maximize ? -1 : 1) * kGradScale;
      const double m_new = m[k][i] + (1 - kBeta1) * (g - m[k][i]), v_new = kBeta2 * v[k][i] + (1 - kBeta2) * g * g;
      const double divisor = std::sqrt(v_new / (1 - std::pow(kBeta2, kStep))) + kEps;
      const double rate = kLr / (1 - std::pow(kBeta1, kStep));
      const double m_size = std::abs(m[k][i]) + (1 - kBeta1) * std::abs(g);
      m_exact.add(i, m_new, m_size);
      v_exact.add(i, v_new);
      p_exact.add(i, p[k][i] * (1 - kLr * kDecay));
      p_exact.add(i, -rate * m_new / divisor, rate * m_size / divisor);
    }
    CHECK_CLOSE(after.m[k], m_exact, Dtype::float32);
    CHECK_CLOSE(after.v[k], v_exact, Dtype::float32);
    CHECK_CLOSE(after.p[k], p_exact, Dtype::float32);
  }
}

void check_sgd(const Threads& threads, Dtype dtype, Dtype grad_dtype, double momentum, bool nesterov, int64_t step) {
  constexpr double kLr = 0.1, kDampening = 0.25, kDecay = 0.1;
  Parameters after(dtype, grad_dtype, step);
  if (momentum == 0)
    for (bmf::Parameter& p : after.list) p.m = nullptr;
  const auto p = Parameters::copies(after.p), m = Parameters::copies(after.m);
  bmf::sgd({after.list.data(), std::ssize(after.list), kLr, momentum, kDampening, kDecay, nesterov, false}, threads);
  for (size_t k = 0; k < p.size(); ++k) {
    const int64_t n = p[k].count();
    Exact p_exact(1, n), m_exact(1, n);
    for (int64_t i = 0; i < n; ++i) {
      double g = after.g[k][i] + kDecay * p[k][i];
      const double size = std::abs(g) + std::abs(p[k][i]) + std::abs(m[k][i]);
      const double m_new = step == 1 ? g : momentum * m[k][i] + (1 - kDampening) * g;
      if (momentum != 0) g = nesterov ? g + momentum * m_new : m_new;
      m_exact.add(i, momentum != 0 ? m_new : m[k][i], size);
      p_exact.add(i, p[k][i] - kLr * g, size);
    }
    CHECK_CLOSE(after.m[k], m_exact, Dtype::float32);
    CHECK_CLOSE(after.p[k], p_exact, Dtype::float32);
  }
}

void check_norm_and_scaling(const Threads& threads, Dtype grad_dtype) {
  Parameters of(Dtype::float32, grad_dtype, 1);
  const auto before = Parameters::copies(of.g);
  double norm = 0, squares = 0;
  bmf::grad_norm({of.list.data(), std::ssize(of.list), &norm}, threads);
  bmf::grad_scale({of.list.data(), std::ssize(of.list), 0.3f}, threads);
  for (size_t k = 0; k < before.size(); ++k) {
    const int64_t n = before[k].count();
    Exact scaled(1, n);
    for (int64_t i = 0; i < n; ++i) {
      squares += before[k][i] * before[k][i];
      scaled.add(i, 0.3f * before[k][i]);
    }
    CHECK_CLOSE(of.g[k], scaled, Dtype::float32);
  }
  // Each lane adds up thousands of squares in float.
  CHECK(std::abs(norm - std::sqrt(squares)) <= 32 * epsilon(Dtype::float32) * norm);
}

}  // namespace

int main() {
  for_each_isa([&](const Threads& threads) {
    for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16})
      for (const Dtype grad : {Dtype::float32, Dtype::bfloat16}) {
        for (const bool maximize : {false, true}) check_adamw(threads, dtype, grad, maximize);
        check_sgd(threads, dtype, grad, 0, false, 2);
        for (const bool nesterov : {false, true})
          for (const int64_t step : {1, 2}) check_sgd(threads, dtype, grad, 0.9, nesterov, step);
      }
    for (const Dtype grad : {Dtype::float32, Dtype::bfloat16}) check_norm_and_scaling(threads, grad);
  });
  return result();
}
