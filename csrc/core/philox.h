// Counter-based random numbers (Philox4x32, Salmon et al. 2011) for dropout, whose choices backward makes again instead
// of reading a stored mask, and for stochastic rounding. Seven rounds, the fewest that pass the authors' test
// batteries; the same numbers on every instruction set.
//
// For dropout a counter stands for 16 lanes of 128 neighbouring columns of one row (of attention: keys of a query); it
// yields 16 random bits for each of them.
#pragma once
#include "core/simd.h"

namespace bmf::BMF_ISA {

constexpr int kDropoutGroup = 128;  // columns whose choices are made together

#if defined(__AVX2__) || defined(__AVX512F__)
// The high and low halves of a * m, lane by lane.
BMF_INLINE void multiply_halves(VecU a, uint32_t m, VecU& high, VecU& low) {
#if defined(__AVX512F__)
  const __m512i x = reinterpret_cast<__m512i>(a), by = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32(x, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), by);
  low = reinterpret_cast<VecU>(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)));
  high = reinterpret_cast<VecU>(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd));
#else
  const __m256i x = reinterpret_cast<__m256i>(a), by = _mm256_set1_epi32(static_cast<int>(m));
  const __m256i even = _mm256_mul_epu32(x, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), by);
  low = reinterpret_cast<VecU>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
  high = reinterpret_cast<VecU>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
#endif
}
#else
BMF_INLINE void multiply_halves(VecU a, uint32_t m, VecU& high, VecU& low) {
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = uint64_t{a[i]} * m;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
}
#endif

// x: a counter in each lane, replaced by 128 random bits.
BMF_INLINE void philox(uint64_t seed, VecU (&x)[4]) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    VecU high0, low0, high1, low1;
    multiply_halves(x[0], 0xD2511F53u, high0, low0);
    multiply_halves(x[2], 0xCD9E8D57u, high1, low1);
    x[0] = high1 ^ x[1] ^ (VecU{} + key0);
    x[1] = low1;
    x[2] = high0 ^ x[3] ^ (VecU{} + key1);
    x[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Bit i of the result: whether lane i of a is at least `least`.
BMF_INLINE uint32_t at_least(VecU a, uint32_t least) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epu32_mask(reinterpret_cast<__m512i>(a), _mm512_set1_epi32(static_cast<int>(least)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(a[i] >= least) << i;
  return bits;
#endif
}

// Bit i of keep[j]: whether column 128 group + 16 j + i of this row is kept, which happens with probability
// 1 - threshold / 65536.
BMF_INLINE void dropout_choices(uint64_t seed, uint32_t head, uint32_t row, uint32_t group, uint32_t threshold,
                                uint16_t (&keep)[8]) {
  for (int j = 0; j < 8; ++j) keep[j] = 0;
  for (int first = 0; first < 16; first += kLanes) {
    const VecU lane = reinterpret_cast<VecU>(lane_index() + first);
    VecU x[4] = {lane, VecU{} + row, VecU{} + head, VecU{} + group};
    philox(seed, x);
    for (int word = 0; word < 4; ++word) {
      keep[2 * word] |= static_cast<uint16_t>(at_least(x[word] & 0xffffu, threshold) << first);
      keep[2 * word + 1] |= static_cast<uint16_t>(at_least(x[word] >> 16, threshold) << first);
    }
  }
}

// v as a bfloat16: the neighbour above with the probability of v's place between the two, else the one below, by 16
// random bits in each lane. The mean of many roundings is v, so steps smaller than half an ulp are not lost.
BMF_INLINE Vec round_to_bf16(Vec v, VecU random) {
  const VecU rounded = (reinterpret_cast<VecU>(v) + (random & 0xffffu)) & 0xffff0000u;
  return select(v == v, reinterpret_cast<Vec>(rounded), v);
}

// v where the bit of the lane is set, 0 elsewhere; `bits` starts with the first lane's.
BMF_INLINE Vec keep_lanes(Vec v, uint32_t bits) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), reinterpret_cast<__m512>(v)));
#else
  VecI bit;
  for (int i = 0; i < kLanes; ++i) bit[i] = 1 << i;
  return select(((VecI{} + static_cast<int32_t>(bits)) & bit) != 0, v, Vec{});
#endif
}
// v where it is kept; `column` is that of its first lane, in its group.
BMF_INLINE Vec keep_at(Vec v, const uint16_t* keep, int64_t column) {
  return keep_lanes(v, static_cast<uint32_t>(keep[column / 16]) >> (column % 16));
}

}  // namespace bmf::BMF_ISA
