// The update of a run of a parameter's elements from their gradients, in registers.
#pragma once
#include "core/simd.h"
#include "cpu/mlp_trainer.h"

namespace bmf::BMF_ISA {

// What one step of a parameter's rule multiplies with.
struct UpdateFactors {
  float keep, decay;                // of p; what of it is added to the gradient
  float rate;                       // of the step
  float first, first_rest, second;  // sgd: momentum, 1 - dampening; adam: 1 - b1, b2 and what is left of b2
  float second_rest, root, eps;
  bool fresh;
};

inline UpdateFactors update_factors(const TrainedTensor& t, const GroupOptions& o, int64_t steps_before) {
  UpdateFactors f{};
  f.keep = static_cast<float>(t.decoupled ? 1 - o.lr * o.weight_decay : 1.0);
  f.decay = static_cast<float>(t.decoupled ? 0.0 : o.weight_decay);
  f.rate = static_cast<float>(o.lr);
  f.fresh = t.fresh && steps_before == 0;
  if (t.rule == UpdateRule::sgd) {
    f.first = static_cast<float>(o.first);
    f.first_rest = static_cast<float>(1 - o.second);
    return f;
  }
  const double step = static_cast<double>(t.steps + steps_before + 1);
  f.rate = static_cast<float>(o.lr / (1 - __builtin_pow(o.first, step)));
  f.root = static_cast<float>(1 / __builtin_sqrt(1 - __builtin_pow(o.second, step)));
  f.first = static_cast<float>(1 - o.first);
  f.second = static_cast<float>(o.second);
  f.second_rest = static_cast<float>(1 - o.second);
  f.eps = static_cast<float>(o.eps);
  return f;
}

// What update() is about to read: another thread may have it, and rows of a matrix lie too far apart to be foreseen.
inline void prefetch(const TrainedTensor& t, int64_t at, int64_t n) {
  const float* const arrays[] = {t.p, t.m, t.v};
  for (const float* of : arrays)
    for (int64_t i = 0; of && i < n; i += 16) __builtin_prefetch(of + at + i, 1, 3);
}

// Elements [at, at + n) of t, with gradients g[n].
inline void update(const TrainedTensor& t, const UpdateFactors& f, int64_t at, const float* g, int64_t n) {
  float *p = t.p + at, *m = t.m + at, *v = t.v + at;
  switch (t.rule) {
    case UpdateRule::none: return;
    case UpdateRule::sgd:
      return for_lanes(n, [&](int64_t i, int lanes) {
        const Vec old = load_lanes(p + i, lanes);
        Vec grad = fma(old, broadcast(f.decay), load_lanes(g + i, lanes));
        if (t.m) {
          const Vec kept = f.fresh ? grad : fma(load_lanes(m + i, lanes), broadcast(f.first), grad * f.first_rest);
          store_lanes(m + i, kept, lanes);
          grad = t.nesterov ? fma(kept, broadcast(f.first), grad) : kept;
        }
        store_lanes(p + i, fma(grad, broadcast(-f.rate), old), lanes);
      });
    case UpdateRule::adam:
      return for_lanes(n, [&](int64_t i, int lanes) {
        const Vec old = load_lanes(p + i, lanes);
        const Vec grad = fma(old, broadcast(f.decay), load_lanes(g + i, lanes));
        const Vec m_old = load_lanes(m + i, lanes), m_new = fma(grad - m_old, broadcast(f.first), m_old);
        const Vec v_new = fma(grad * grad, broadcast(f.second_rest), load_lanes(v + i, lanes) * f.second);
        store_lanes(m + i, m_new, lanes);
        store_lanes(v + i, v_new, lanes);
        const Vec divisor = fma(sqrt(v_new), broadcast(f.root), broadcast(f.eps));
        store_lanes(p + i, old * f.keep - m_new / divisor * f.rate, lanes);
      });
  }
}

}  // namespace bmf::BMF_ISA
