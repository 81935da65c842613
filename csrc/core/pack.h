// Operands of a matrix product, in memory as the caller has them, and the two forms the micro-kernel reads.
//
// The micro-kernel works in 32-bit units along k: a unit is one float, or a pair of neighbouring bf16 numbers where the
// machine multiplies such pairs (Mode below). A is read in rows of units; B in panels of kPanel columns,
// [unit][kPanel]. Packing is where dtypes are converted: a float weight is read once and becomes bf16 on the way into
// its panel.
#pragma once
#include <cstdint>
#include <cstring>

#include "core/simd.h"

namespace bmf::BMF_ISA {

struct FloatMode {
  using Element = float;
  static constexpr int kPerUnit = 1;
  static BMF_INLINE Vec dot(Vec a, Vec b, Vec acc) { return fma(a, b, acc); }
};

#if defined(__AVX512BF16__)
struct Bf16Mode {
  using Element = bf16;
  static constexpr int kPerUnit = 2;
  static BMF_INLINE Vec dot(Vec a, Vec b, Vec acc) {
    return reinterpret_cast<Vec>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(acc), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }
};
#else
using Bf16Mode = FloatMode;  // bf16 is widened while packing
#endif

constexpr int kPanelVecs = kLanes == 16 ? 4 : 2;
constexpr int kPanel = kPanelVecs * kLanes;  // columns of B in one panel
constexpr int kRows = kLanes == 4 ? 4 : 6;   // rows of A one micro-kernel call takes

template <class Mode>
BMF_INLINE int64_t units_of(int64_t k) {
  return (k + Mode::kPerUnit - 1) / Mode::kPerUnit;
}

// A matrix of T with any strides (in elements); element (row, col) is data[row * row_stride + col * col_stride].
template <class T>
struct MatrixView {
  const T* data;
  int64_t row_stride, col_stride;
  BMF_INLINE const T* at(int64_t row, int64_t col) const { return data + row * row_stride + col * col_stride; }
};

// `lanes` units of a run of contiguous elements of which `n` exist (the rest are zero).
template <class Mode, class T>
BMF_INLINE Vec load_units(const T* p, int64_t n) {
  if constexpr (Mode::kPerUnit == 1) {
    return n >= kLanes ? load(p) : load_partial(p, n > 0 ? static_cast<int>(n) : 0);
  } else {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == 2) {
      const __mmask32 mask = n >= 32 ? 0xffffffffu : n > 0 ? (1u << n) - 1 : 0;
      return reinterpret_cast<Vec>(_mm512_maskz_loadu_epi16(mask, p));
    } else {
      Vec low, high;
      if (n >= 2 * kLanes) {
        low = load(p);
        high = load(p + kLanes);
      } else {
        low = load_partial(p, static_cast<int>(n < 0 ? 0 : n < kLanes ? n : kLanes));
        high = n > kLanes ? load_partial(p + kLanes, static_cast<int>(n - kLanes)) : Vec{};
      }
      return reinterpret_cast<Vec>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low)));
    }
#endif
  }
}

// One register of units from one row (float) or two neighbouring ones (pairs of bf16), of which `lanes` columns exist;
// `second` is null where there is no such row.
template <class Mode, class T>
BMF_INLINE Vec interleave_rows(const T* first, const T* second, int lanes) {
  if constexpr (Mode::kPerUnit == 1) {
    return load_lanes(first, lanes);
  } else if constexpr (sizeof(T) == 2) {
    const VecU low = load_bits(first, lanes), high = second ? load_bits(second, lanes) : VecU{};
    return reinterpret_cast<Vec>(low | (high << 16));
  } else {
    const VecH low = narrow(load_lanes(first, lanes)), high = narrow(second ? load_lanes(second, lanes) : Vec{});
    return reinterpret_cast<Vec>(__builtin_convertvector(low, VecU) | (__builtin_convertvector(high, VecU) << 16));
  }
}

// In place: rows r[i] become columns.
BMF_INLINE void transpose_units(Vec (&r)[kLanes]) {
#if defined(__AVX512F__)
  __m512 t[16];
  auto in = [&](int i) { return reinterpret_cast<__m512>(r[i]); };
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(in(i), in(i + 1));
    t[i + 1] = _mm512_unpackhi_ps(in(i), in(i + 1));
  }
  __m512 u[16];
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  for (int i = 0; i < 4; ++i) {  // u[4q + i] holds columns i, i+4, i+8, i+12 of rows 4q .. 4q+3
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88), b = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xdd), d = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xdd);
    r[i] = reinterpret_cast<Vec>(_mm512_shuffle_f32x4(a, b, 0x88));
    r[i + 8] = reinterpret_cast<Vec>(_mm512_shuffle_f32x4(a, b, 0xdd));
    r[i + 4] = reinterpret_cast<Vec>(_mm512_shuffle_f32x4(c, d, 0x88));
    r[i + 12] = reinterpret_cast<Vec>(_mm512_shuffle_f32x4(c, d, 0xdd));
  }
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = i + 1; j < kLanes; ++j) {
      const float swap = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = swap;
    }
#endif
}

// Two neighbouring rows of B, already multiplied out, as one column block of a packed panel: pairs of bf16, or one
// float row after the other (the second only if there is one).
template <class Mode>
BMF_INLINE void store_row_pair(float* panel, Vec first, Vec second, bool has_second = true) {
#if defined(__AVX512BF16__)
  if constexpr (Mode::kPerUnit == 2) {
    const __m512i both = reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    store(panel, reinterpret_cast<Vec>(_mm512_permutexvar_epi16(order, both)));
    return;
  }
#endif
  store(panel, first);
  if (has_second) store(panel + kPanel, second);
}

// One panel of B: columns [col, col + cols) and all `k` rows of the view, to panel[unit][kPanel]. Of missing columns
// those that complete a register are zero; the others are not read by anyone.
template <class Mode, class T>
void pack_panel(const MatrixView<T>& b, int64_t k, int64_t col, int cols, float* panel) {
  constexpr int64_t kRowsAhead = 16, kLine = 64 / sizeof(T);  // weights come from memory, in runs too short to foresee
  const int64_t units = units_of<Mode>(k);
  if (b.col_stride == 1) {
    for (int64_t u = 0; u < units; ++u) {
      for (int64_t row = u * Mode::kPerUnit; row < (u + 1) * Mode::kPerUnit; ++row)
        for (int64_t c = 0; c < kPanel; c += kLine) __builtin_prefetch(b.at(row + kRowsAhead, col + c), 0, 2);
      const int64_t row = u * Mode::kPerUnit;
      const bool has_second = Mode::kPerUnit == 2 && row + 1 < k;
      for (int v = 0; v < kPanelVecs; ++v) {  // a number that the compiler knows: it is twice as fast
        const int c = v * kLanes, left = cols - c;
        if (left <= 0) break;
        const int lanes = left < kLanes ? left : kLanes;
        const T* second = has_second ? b.at(row + 1, col + c) : nullptr;
        store(panel + u * kPanel + c, interleave_rows<Mode>(b.at(row, col + c), second, lanes));
      }
    }
    return;
  }
  // Rows are contiguous (weights as torch keeps them: [out, in]): transpose squares of kLanes units. All of kLanes rows
  // before the next: the hardware prefetches so many streams and not kPanel of them.
  for (int c = 0; c < cols; c += kLanes) {
    for (int64_t u = 0; u < units; u += kLanes) {
      const int64_t here = units - u < kLanes ? units - u : kLanes;
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        for (int64_t at = 0; at < kLanes * Mode::kPerUnit; at += kLine)
          __builtin_prefetch(b.at(u * Mode::kPerUnit + at, col + c + kLanes + i), 0, 2);
      for (int i = 0; i < kLanes; ++i)
        square[i] =
            c + i < cols ? load_units<Mode>(b.at(u * Mode::kPerUnit, col + c + i), k - u * Mode::kPerUnit) : Vec{};
      transpose_units(square);
      for (int i = 0; i < here; ++i) store(panel + (u + i) * kPanel + c, square[i]);
    }
  }
}

// Rows [row, row + rows) of A, converted to Mode's element type, each padded with zeros to whole units:
// out[rows][stride].
template <class Mode, class T>
void pack_rows(const MatrixView<T>& a, int64_t k, int64_t row, int rows, float* out, int64_t stride) {
  const int64_t units = units_of<Mode>(k);
  if (a.col_stride == 1) {
    for (int r = 0; r < rows; ++r)
      for (int64_t u = 0; u < units; u += kLanes) {
        const Vec v = load_units<Mode>(a.at(row + r, u * Mode::kPerUnit), k - u * Mode::kPerUnit);
        const int64_t here = units - u < kLanes ? units - u : kLanes;
        store_lanes(out + r * stride + u, v, static_cast<int>(here));
      }
    return;
  }
  // Columns are contiguous (the transpose of a row-major matrix): all that is read of a cache line follows at once.
  for (int64_t u = 0; u < units; u += kLanes) {
    const int64_t here = units - u < kLanes ? units - u : kLanes;
    for (int r = 0; r < rows; r += kLanes) {
      const int lanes = rows - r < kLanes ? rows - r : kLanes;
      Vec square[kLanes] = {};
      for (int i = 0; i < here; ++i) {
        const int64_t c = (u + i) * Mode::kPerUnit;
        const T* second = Mode::kPerUnit == 2 && c + 1 < k ? a.at(row + r, c + 1) : nullptr;
        square[i] = interleave_rows<Mode>(a.at(row + r, c), second, lanes);
      }
      transpose_units(square);
      for (int i = 0; i < lanes; ++i) store_lanes(out + (r + i) * stride + u, square[i], static_cast<int>(here));
    }
  }
}

}  // namespace bmf::BMF_ISA
