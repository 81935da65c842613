// One register of floats, written once for every instruction set: GCC/Clang vector extensions give the arithmetic, the
// few operations they lack (fused multiply-add, rounding, bf16 conversion, masked tails) are chosen here by BMF_ISA.
// Everything lives in namespace bmf::BMF_ISA, so that code compiled for one instruction set is never linked into
// another.
#pragma once
#include <cstdint>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/types.h"

namespace bmf::BMF_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

#if defined(__AVX512BF16__)
constexpr bool kHasBf16Dot = true;
#else
constexpr bool kHasBf16Dot = false;
#endif

#define BMF_INLINE inline __attribute__((always_inline))
#define BMF_FLATTEN __attribute__((flatten))  // of a function: all that it calls is inlined, lambdas too

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));
typedef uint8_t VecB __attribute__((vector_size(kLanes)));

BMF_INLINE Vec broadcast(float x) { return x - Vec{}; }
BMF_INLINE VecI as_int(Vec x) { return reinterpret_cast<VecI>(x); }
BMF_INLINE Vec as_float(VecI x) { return reinterpret_cast<Vec>(x); }
BMF_INLINE Vec select(VecI mask, Vec yes, Vec no) { return mask ? yes : no; }
BMF_INLINE VecI lane_index() {  // 0, 1, 2, ...
  VecI index{};
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}

BMF_INLINE Vec fma(Vec a, Vec b, Vec c) {  // a * b + c
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

BMF_INLINE Vec max(Vec a, Vec b) {  // the second operand where either is NaN
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

BMF_INLINE Vec min(Vec a, Vec b) {  // the second operand where either is NaN
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}

BMF_INLINE Vec round_nearest(Vec x) {        // |x| < 2^22
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: the sum has no fraction bits left
  Vec shifted = x + magic;
  __asm__("" : "+x"(shifted));  // keep the compiler from cancelling the two additions
  return shifted - magic;
}

BMF_INLINE Vec sqrt(Vec x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
  Vec r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_sqrtf(x[i]);
  return r;
#endif
}

// ---- memory: float or bf16 in memory, float in the register ----

BMF_INLINE Vec widen(VecH h) {  // the upper halves of floats, with zeros below
#if defined(__AVX512VBMI__)     // one permutation of bytes, where a conversion and a shift would be two operations
  const VecI from = lane_index() * 0x02020000 + 0x01000000;  // of lane i: bytes 2i and 2i + 1 into its upper two
  return reinterpret_cast<Vec>(_mm512_maskz_permutexvar_epi8(0xcccccccccccccccc, reinterpret_cast<__m512i>(from),
                                                             _mm512_castsi256_si512(reinterpret_cast<__m256i>(h))));
#else
  return reinterpret_cast<Vec>(__builtin_convertvector(h, VecU) << 16);
#endif
}

BMF_INLINE VecH narrow(Vec x) {  // round to nearest even; NaN stays NaN
#if defined(__AVX512BF16__)
  return reinterpret_cast<VecH>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
#else
  VecU bits = reinterpret_cast<VecU>(x);
  VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  VecU quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(x == x ? rounded : quiet, VecH);
#endif
}

BMF_INLINE float to_float(float x) { return x; }
BMF_INLINE float to_float(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
BMF_INLINE void from_float(float x, float* out) { *out = x; }
BMF_INLINE void from_float(float x, bf16* out) { out->bits = narrow(broadcast(x))[0]; }

BMF_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
BMF_INLINE Vec load(const bf16* p) {
  VecH h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(h);
}
BMF_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
BMF_INLINE void store(bf16* p, Vec v) {
  VecH h = narrow(v);
  __builtin_memcpy(p, &h, sizeof h);
}

// A store past the caches, of a register that lies at a multiple of its size in memory; `end_streams` before another
// thread may read it.
BMF_INLINE void stream(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#else
  store(p, v);
#endif
}
BMF_INLINE void stream(bf16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(narrow(v)));
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(narrow(v)));
#else
  store(p, v);
#endif
}
BMF_INLINE void end_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// The first n lanes (0 <= n <= kLanes); the others read as zero and are not written.
BMF_INLINE Vec load_partial(const float* p, int n) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
#else
  float buffer[kLanes] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
#endif
}
BMF_INLINE Vec load_partial(const bf16* p, int n) {
#if defined(__AVX512F__)
  return widen(reinterpret_cast<VecH>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p)));
#else
  bf16 buffer[kLanes] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
#endif
}
BMF_INLINE void store_partial(float* p, Vec v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512>(v));
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}
BMF_INLINE void store_partial(bf16* p, Vec v, int n) {
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m256i>(narrow(v)));
#else
  VecH h = narrow(v);
  for (int i = 0; i < n; ++i) p[i].bits = h[i];
#endif
}

// x rounded to the precision of T, in which it is about to be stored.
template <class T>
BMF_INLINE Vec round_to(Vec x) {
  if constexpr (sizeof(T) == 2)
    return widen(narrow(x));
  else
    return x;
}

// f(T{}) where T is the C++ type of `dtype`.
template <class Body>
BMF_INLINE void with_type(Dtype dtype, Body&& f) {
  if (dtype == Dtype::float32)
    f(float{});
  else
    f(bf16{});
}

// f(std::true_type{}) or f(std::false_type{}).
template <class Body>
BMF_INLINE void with_bool(bool value, Body&& f) {
  if (value)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// f(i, lanes) for i = 0, kLanes, 2 kLanes, ... below n; lanes is kLanes but for the last call, where it may be fewer.
template <class Body>
BMF_INLINE void for_lanes(int64_t n, Body&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, static_cast<int>(n - i));
}
// As for_lanes; f also gets a number that cycles through 0..3, the accumulator to add to, so that one sum does not wait
// for the one before it.
template <class Body>
BMF_INLINE void for_lanes_by_four(int64_t n, Body&& f) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    f(i, kLanes, 0);
    f(i + kLanes, kLanes, 1);
    f(i + 2 * kLanes, kLanes, 2);
    f(i + 3 * kLanes, kLanes, 3);
  }
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes, 0);
  if (i < n) f(i, static_cast<int>(n - i), 0);
}
// The first `lanes` lanes of v, and `rest` in the others.
BMF_INLINE Vec first_lanes(Vec v, int lanes, float rest) {
  return lanes == kLanes ? v : select(lane_index() < lanes, v, broadcast(rest));
}
template <class T>
BMF_INLINE Vec load_lanes(const T* p, int lanes) {
  return lanes == kLanes ? load(p) : load_partial(p, lanes);
}
// As load_lanes, but the numbers' bits, in the low half of each lane.
BMF_INLINE VecU load_bits(const bf16* p, int lanes) {
  VecH h;
  if (lanes == kLanes)
    __builtin_memcpy(&h, p, sizeof h);
  else
#if defined(__AVX512F__)
    h = reinterpret_cast<VecH>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << lanes) - 1), p));
#else
    h = VecH{}, __builtin_memcpy(&h, p, lanes * sizeof(bf16));
#endif
  return __builtin_convertvector(h, VecU);
}
template <class T>
BMF_INLINE void store_lanes(T* p, Vec v, int lanes) {
  if (lanes == kLanes)
    store(p, v);
  else
    store_partial(p, v, lanes);
}

// Rows of this size together do not stay in a last-level cache for whoever reads them next. They are written past the
// caches, which saves reading each line before it is written.
constexpr int64_t kPastCaches = int64_t{24} << 20;

// Whether rows of `width` bytes that begin `stride` bytes apart are to be written by `stream`, and can be.
inline bool past_caches(const void* to, int64_t rows, int64_t width, int64_t stride) {
  constexpr int64_t kLine = 64;
  return rows * width >= kPastCaches && reinterpret_cast<uintptr_t>(to) % kLine == 0 && stride % kLine == 0;
}

template <class T>
BMF_INLINE void store_lanes(T* p, Vec v, int lanes, bool past) {
  if (past && lanes == kLanes)
    stream(p, v);
  else
    store_lanes(p, v, lanes);
}

// ---- horizontal ----

BMF_INLINE float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float s = 0;
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) v[i] += v[i + step];
  s = v[0];
  return s;
#endif
}

BMF_INLINE float sum(const Vec (&v)[4]) { return sum((v[0] + v[1]) + (v[2] + v[3])); }

BMF_INLINE float max_lane(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#else
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) v[i] = v[i] > v[i + step] ? v[i] : v[i + step];
  return v[0];
#endif
}

// ---- functions ----

// e^x within 1 ulp or so; 0 below -104, inf above 88.7; NaN stays NaN.
BMF_INLINE Vec exp(Vec x) {
  const Vec clamped = min(broadcast(89.0f), max(broadcast(-104.0f), x));  // NaN passes through as second operand
  const Vec n = round_nearest(clamped * broadcast(1.44269504088896341f));
  Vec r = fma(n, broadcast(-0.693145751953125f), clamped);  // ln 2 in two parts
  r = fma(n, broadcast(-1.42860682030941723e-6f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p * r, r, r) + 1.0f;
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  const VecI k =
      __builtin_convertvector(n == n ? n : Vec{}, VecI);  // 2^k in two halves: k may leave the exponent's range
  const VecI half = k >> 1;
  return p * as_float((half + 127) << 23) * as_float((k - half + 127) << 23);
#endif
}

BMF_INLINE Vec abs(Vec x) { return as_float(as_int(x) & 0x7fffffff); }

// 2^x for x <= 128, which gives inf; NaN stays NaN, -inf gives 0. The relative error is 1e-4 in three terms (enough for
// what is rounded to bf16 next) and 2e-9 in six.
template <int kTerms>
BMF_INLINE Vec exp2(Vec x) {
  static_assert(kTerms == 3 || kTerms == 6);
  const Vec clamped = max(broadcast(-200.0f), x);
#if defined(__AVX512F__)
  const Vec n = reinterpret_cast<Vec>(_mm512_roundscale_ps(reinterpret_cast<__m512>(clamped), 0));
#else
  const Vec n = round_nearest(clamped);
#endif
  const Vec r = clamped - n;
  Vec p;
  if constexpr (kTerms == 3) {
    p = fma(broadcast(5.500877156e-2f), r, broadcast(2.422110094e-1f));
    p = fma(p, r, broadcast(6.932829587e-1f));
  } else {
    p = fma(broadcast(1.535335575e-4f), r, broadcast(1.339887719e-3f));
    p = fma(p, r, broadcast(9.618437405e-3f));
    p = fma(p, r, broadcast(5.550332462e-2f));
    p = fma(p, r, broadcast(2.402264791e-1f));
    p = fma(p, r, broadcast(6.931472029e-1f));
  }
  p = fma(p, r, broadcast(1.0f));
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  const VecI k = __builtin_convertvector(n == n ? n : Vec{}, VecI);
  return select(n < -126.0f, Vec{}, p * as_float((k + 127) << 23));  // a NaN p stays NaN
#endif
}

// 1 / x, within 2 ulp, or within 2^-14 of it if kFast (enough for what is rounded to bf16 next).
template <bool kFast>
BMF_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec y = reinterpret_cast<Vec>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));  // a third of a division's time
  if constexpr (kFast) return y;
  return select(abs(x) < 8e37f, y * fma(-x, y, broadcast(2.0f)), y);  // 1 / inf is y: the step would make it NaN
#else
  return 1.0f / x;
#endif
}

template <bool kFast>
BMF_INLINE Vec sigmoid(Vec x) {
  return reciprocal<kFast>(1.0f + exp2<kFast ? 3 : 6>(min(broadcast(128.0f), x * -1.44269504088896341f)));
}

BMF_INLINE Vec tanh(Vec x) {
  const Vec a = abs(x), z = x * x;
  Vec p = broadcast(-5.70498872745e-3f);  // odd polynomial near zero, where the exponential form cancels
  p = fma(p, z, broadcast(2.06390887954e-2f));
  p = fma(p, z, broadcast(-5.37397155531e-2f));
  p = fma(p, z, broadcast(1.33314422036e-1f));
  p = fma(p, z, broadcast(-3.33332819422e-1f));
  const Vec small = fma(p * z, x, x);
  const Vec t = exp(a * -2.0f);
  const Vec big = (1.0f - t) * reciprocal<false>(1.0f + t);
  const Vec signed_big = as_float(as_int(big) | (as_int(x) & static_cast<int32_t>(0x80000000)));
  return select(a < 0.625f, small, signed_big);
}

// 1 - tanh(x)^2, without the cancellation.
BMF_INLINE Vec tanh_derivative(Vec x) {
  const Vec t = exp(abs(x) * -2.0f), d = 1.0f + t;
  return 4.0f * t * reciprocal<false>(d * d);
}

// Rational approximation on [-4, 4], beyond which erf is +-1 in float: x P(x^2) / Q(x^2).
BMF_INLINE Vec erf(Vec x) {
  const Vec c = min(broadcast(4.0f), max(broadcast(-4.0f), x));
  const Vec z = c * c;
  Vec p = broadcast(-2.72614225801306e-10f);
  p = fma(p, z, broadcast(2.77068142495902e-08f));
  p = fma(p, z, broadcast(-2.10102402082508e-06f));
  p = fma(p, z, broadcast(-5.69250639462346e-05f));
  p = fma(p, z, broadcast(-7.34990630326855e-04f));
  p = fma(p, z, broadcast(-2.95459980854025e-03f));
  p = fma(p, z, broadcast(-1.60960333262415e-02f));
  Vec q = broadcast(-1.45660718464996e-05f);
  q = fma(q, z, broadcast(-2.13374055278905e-04f));
  q = fma(q, z, broadcast(-1.68282697438203e-03f));
  q = fma(q, z, broadcast(-7.37332916720468e-03f));
  q = fma(q, z, broadcast(-1.42647390514189e-02f));
  return c * p * reciprocal<false>(q);
}

}  // namespace bmf::BMF_ISA
