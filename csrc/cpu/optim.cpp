#include "cpu/optim.h"

#include "core/philox.h"
#include "core/scratch.h"
#include "core/simd.h"

namespace bmf::BMF_ISA {
namespace {

constexpr int64_t kChunk = 1 << 15;  // elements a thread takes at once: a few pages of each array

// f(parameter, begin, end, chunk): all chunks of all parameters, numbered in order, on all threads.
template <class F>
void for_chunks(const Threads& threads, const Parameter* parameters, int64_t count, const F& f) {
  const Scratch firsts((count + 1) * sizeof(int64_t));  // first chunk of each parameter
  int64_t* first = firsts.at<int64_t>(0);
  first[0] = 0;
  for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + (parameters[i].count + kChunk - 1) / kChunk;
  parallel_ranges(threads, first[count], 2, [&](int64_t begin, int64_t end, int) {
    int64_t i = 0;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (first[i + 1] <= chunk) ++i;
      const int64_t from = (chunk - first[i]) * kChunk, left = parameters[i].count - from;
      f(parameters[i], from, from + (left < kChunk ? left : kChunk), chunk);
    }
  });
}

template <bool kStochastic, class P, class G>
void adamw_chunk(const AdamWArgs& a, const Parameter& of, int64_t begin, int64_t end) {
  P *p = static_cast<P*>(of.p), *m = static_cast<P*>(of.m), *v = static_cast<P*>(of.v);
  const G* g = static_cast<const G*>(of.g);
  const double step = static_cast<double>(of.step);
  const double correction1 = 1 - __builtin_pow(a.beta1, step), correction2 = 1 - __builtin_pow(a.beta2, step);
  const float keep = static_cast<float>(1 - a.lr * a.weight_decay), rate = static_cast<float>(a.lr / correction1);
  const float root = static_cast<float>(1 / __builtin_sqrt(correction2)), eps = static_cast<float>(a.eps);
  const float beta1 = static_cast<float>(1 - a.beta1), beta2 = static_cast<float>(a.beta2);
  const float rest2 = static_cast<float>(1 - a.beta2), sign = (a.maximize ? -1.0f : 1.0f) * a.grad_scale;
  const uint64_t seed = static_cast<uint64_t>(of.step) << 32 | static_cast<uint64_t>(&of - a.parameters);
  for_lanes(end - begin, [&](int64_t i, int lanes) {
    const int64_t at = begin + i;
    const Vec grad = load_lanes(g + at, lanes) * sign;
    const Vec m_old = load_lanes(m + at, lanes), m_new = fma(grad - m_old, broadcast(beta1), m_old);
    const Vec v_new = fma(grad * grad, broadcast(rest2), load_lanes(v + at, lanes) * beta2);
    const Vec divisor = fma(sqrt(v_new), broadcast(root), broadcast(eps));
    const Vec p_new = load_lanes(p + at, lanes) * keep - m_new / divisor * rate;
    if constexpr (kStochastic) {
      const int64_t block = at / 16;  // counted in 16 whatever the register's size
      VecU random[4] = {reinterpret_cast<VecU>(lane_index()) + static_cast<uint32_t>(at % 16),
                        VecU{} + static_cast<uint32_t>(block), VecU{} + static_cast<uint32_t>(block >> 32), VecU{}};
      philox(seed, random);
      store_lanes(m + at, round_to_bf16(m_new, random[0]), lanes);
      store_lanes(v + at, round_to_bf16(v_new, random[1]), lanes);
      store_lanes(p + at, round_to_bf16(p_new, random[2]), lanes);
    } else {
      store_lanes(m + at, m_new, lanes);
      store_lanes(v + at, v_new, lanes);
      store_lanes(p + at, p_new, lanes);
    }
  });
}

template <class P, class G>
void sgd_chunk(const SgdArgs& a, const Parameter& of, int64_t begin, int64_t end) {
  P *p = static_cast<P*>(of.p), *m = static_cast<P*>(of.m);
  const G* g = static_cast<const G*>(of.g);
  const float lr = static_cast<float>(a.lr), decay = static_cast<float>(a.weight_decay);
  const float momentum = static_cast<float>(a.momentum), fresh = static_cast<float>(1 - a.dampening);
  const float sign = a.maximize ? -1.0f : 1.0f;
  for_lanes(end - begin, [&](int64_t i, int lanes) {
    const int64_t at = begin + i;
    const Vec old = load_lanes(p + at, lanes);
    Vec grad = fma(old, broadcast(decay), load_lanes(g + at, lanes) * sign);
    if (m) {
      const Vec m_new = of.step == 1 ? grad : fma(load_lanes(m + at, lanes), broadcast(momentum), grad * fresh);
      store_lanes(m + at, m_new, lanes);
      grad = a.nesterov ? fma(m_new, broadcast(momentum), grad) : m_new;
    }
    store_lanes(p + at, fma(grad, broadcast(-lr), old), lanes);
  });
}

template <class F>
void with_dtypes(const Parameter& of, const F& f) {
  with_type(of.dtype, [&](auto p) { with_type(of.grad_dtype, [&](auto g) { f(p, g); }); });
}

template <class G>
float sum_of_squares(const G* g, int64_t count) {
  Vec total[4] = {};
  for_lanes_by_four(count, [&](int64_t i, int lanes, int k) {
    const Vec v = load_lanes(g + i, lanes);
    total[k] = fma(v, v, total[k]);
  });
  return sum(total);
}

}  // namespace

void adamw(const AdamWArgs& args, const Threads& threads) {
  for_chunks(threads, args.parameters, args.count, [&](const Parameter& of, int64_t begin, int64_t end, int64_t) {
    with_dtypes(of, [&](auto p, auto g) {
      using P = decltype(p);
      using G = decltype(g);
      if (sizeof(P) == 2 && args.stochastic_rounding) return adamw_chunk<true, P, G>(args, of, begin, end);
      adamw_chunk<false, P, G>(args, of, begin, end);
    });
  });
}

void sgd(const SgdArgs& args, const Threads& threads) {
  for_chunks(threads, args.parameters, args.count, [&](const Parameter& of, int64_t begin, int64_t end, int64_t) {
    with_dtypes(of, [&](auto p, auto g) { sgd_chunk<decltype(p), decltype(g)>(args, of, begin, end); });
  });
}

void grad_norm(const GradNormArgs& args, const Threads& threads) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < args.count; ++i) chunks += (args.parameters[i].count + kChunk - 1) / kChunk;
  const Scratch partials(chunks * sizeof(float));  // one for each chunk: the same bits for any number of threads
  float* partial = partials.at<float>(0);
  for_chunks(threads, args.parameters, args.count, [&](const Parameter& of, int64_t begin, int64_t end, int64_t chunk) {
    with_type(of.grad_dtype, [&](auto type) {
      partial[chunk] = sum_of_squares(static_cast<const decltype(type)*>(of.g) + begin, end - begin);
    });
  });
  double total = 0;
  for (int64_t i = 0; i < chunks; ++i) total += partial[i];
  *args.norm = __builtin_sqrt(total);
}

void grad_scale(const GradScaleArgs& args, const Threads& threads) {
  for_chunks(threads, args.parameters, args.count, [&](const Parameter& of, int64_t begin, int64_t end, int64_t) {
    with_type(of.grad_dtype, [&](auto type) {
      auto* g = static_cast<decltype(type)*>(of.g) + begin;
      for_lanes(end - begin,
                [&](int64_t i, int lanes) { store_lanes(g + i, load_lanes(g + i, lanes) * args.factor, lanes); });
    });
  });
}

}  // namespace bmf::BMF_ISA
