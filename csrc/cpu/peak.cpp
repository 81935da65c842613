// Independent multiply-adds on registers only: no memory is touched, so nothing but the FMA units can be the limit.
#include "cpu/peak.h"

#include "core/simd.h"

namespace bmf::BMF_ISA {
namespace {

constexpr int kAccumulators = 12;  // enough to cover latency (4-5 cycles) at two a cycle

BMF_INLINE void keep(Vec& v) { __asm__ volatile("" : "+x"(v)); }

double run_float(int64_t iterations) {
  Vec acc[kAccumulators] = {};
  Vec a = broadcast(1.0f), b = broadcast(1e-9f);
  keep(a);
  keep(b);
  for (int j = 0; j < kAccumulators; ++j) keep(acc[j]);  // opaque: equal accumulators would be computed once
  for (int64_t i = 0; i < iterations; ++i)
    for (int j = 0; j < kAccumulators; ++j) acc[j] = fma(a, b, acc[j]);
  for (int j = 0; j < kAccumulators; ++j) keep(acc[j]);
  return 2.0 * kLanes * kAccumulators * static_cast<double>(iterations);
}

#if defined(__AVX512BF16__)
double run_bf16(int64_t iterations) {
  __m512 acc[kAccumulators] = {};
  Vec ones = broadcast(1.0f);
  keep(ones);
  for (int j = 0; j < kAccumulators; ++j) keep(reinterpret_cast<Vec&>(acc[j]));
  const __m512bh a = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(ones), reinterpret_cast<__m512>(ones));
  for (int64_t i = 0; i < iterations; ++i)
    for (int j = 0; j < kAccumulators; ++j) acc[j] = _mm512_dpbf16_ps(acc[j], a, a);
  for (int j = 0; j < kAccumulators; ++j) keep(reinterpret_cast<Vec&>(acc[j]));
  return 4.0 * kLanes * kAccumulators * static_cast<double>(iterations);
}
#else
double run_bf16(int64_t iterations) { return run_float(iterations); }  // bf16 is widened and multiplied as float here
#endif

}  // namespace

void peak(const PeakArgs& args, const Threads& threads) {
  double each = 0;
  auto body = [&](int thread) {
    const double flops = args.dtype == Dtype::bfloat16 ? run_bf16(args.iterations) : run_float(args.iterations);
    if (thread == 0) each = flops;
  };
  parallel(threads, threads.count, body);
  *args.flops = each * threads.count;
}

}  // namespace bmf::BMF_ISA
