// The one matrix-product kernel of each instruction set: rows x kPanel of C from `units` units of A's rows and one
// packed panel of B, all sums in registers.
//
// On AVX-512 that is 6 x 64: 24 registers of sums, 4 of B, 1 broadcast unit of A, which gives 24 multiply-adds for 10
// loads.
#pragma once
#include "core/pack.h"

namespace bmf::BMF_ISA {

// The operands of one call, as far as strides go: a transposed A, or a B that lies in rows of its own, needs no copy.
struct UnitView {  // A: unit u of row r is at data + r row_stride + u unit_stride, all in bytes
  const void* data;
  int64_t row_stride, unit_stride = 4;
  UnitView from(int64_t row) const {
    return {static_cast<const char*>(data) + row * row_stride, row_stride, unit_stride};
  }
};
struct PanelView {  // B: kPanel columns of unit u begin at data + u unit_stride, in floats
  const float* data;
  int64_t unit_stride = kPanel;
};

// One 32-bit unit of A in every lane. memcpy: rows of bf16 may start on a 2-byte boundary.
BMF_INLINE Vec broadcast_unit(const char* p) {
  int32_t bits;
  __builtin_memcpy(&bits, p, 4);
  return as_float(bits - VecI{});
}

template <class Mode, int kR, int kV, bool kAccumulate>
void micro_tile(const UnitView& a, const PanelView& b, int64_t units, float* c, int64_t c_stride) {
  const char* row = static_cast<const char*>(a.data);
  const float* panel = b.data;
  const int64_t row_stride = a.row_stride, a_step = a.unit_stride, b_step = b.unit_stride;
  Vec acc[kR][kV];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) acc[r][v] = Vec{};
  for (int64_t u = 0; u < units; ++u) {
    Vec columns[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) columns[v] = load(panel + v * kLanes);
    // The rows after these, one line at a time: what is new of them is too short for the hardware to foresee.
    __builtin_prefetch(row + (kR + (u & 7)) * row_stride, 0, 2);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const Vec unit = broadcast_unit(row + r * row_stride);
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) acc[r][v] = Mode::dot(unit, columns[v], acc[r][v]);
    }
    row += a_step;
    panel += b_step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      // Added last and not summed onto: sums of blocks round off less than one long sum.
      float* at = c + r * c_stride + v * kLanes;
      store(at, kAccumulate ? load(at) + acc[r][v] : acc[r][v]);
    }
}

template <class Mode, bool kAccumulate, int kR, int kV>
BMF_INLINE void micro_for_vecs(int vecs, const UnitView& a, const PanelView& b, int64_t units, float* c,
                               int64_t c_stride) {
  if constexpr (kV > 1)
    if (vecs < kV) return micro_for_vecs<Mode, kAccumulate, kR, kV - 1>(vecs, a, b, units, c, c_stride);
  micro_tile<Mode, kR, kV, kAccumulate>(a, b, units, c, c_stride);
}

template <class Mode, bool kAccumulate, int kR>
BMF_INLINE void micro_for_rows(int rows, int vecs, const UnitView& a, const PanelView& b, int64_t units, float* c,
                               int64_t c_stride) {
  if constexpr (kR > 1)
    if (rows < kR) return micro_for_rows<Mode, kAccumulate, kR - 1>(rows, vecs, a, b, units, c, c_stride);
  micro_for_vecs<Mode, kAccumulate, kR, kPanelVecs>(vecs, a, b, units, c, c_stride);
}

// c[rows][cols] (+)= A B for any number of rows and cols <= kPanel. C: float rows `c_stride` floats apart, of which
// whole registers are written (room for cols rounded up to kLanes), as whole registers of B are read.
template <class Mode, bool kAccumulate>
void multiply_panel(const UnitView& a, const PanelView& b, int64_t units, int64_t rows, int cols, float* c,
                    int64_t c_stride) {
  const int vecs = (cols + kLanes - 1) / kLanes;
  for (int64_t r = 0; r < rows; r += kRows) {
    const int here = rows - r < kRows ? static_cast<int>(rows - r) : kRows;
    micro_for_rows<Mode, kAccumulate, kRows>(here, vecs, a.from(r), b, units, c + r * c_stride, c_stride);
  }
}

// Compiled once per instruction set, in csrc/cpu/microkernel.cpp: they are most of what the compiler's time goes into.
#ifdef BMF_DEFINE_MICROKERNEL
#define BMF_SHARED_TEMPLATE template
#else
#define BMF_SHARED_TEMPLATE extern template
#endif
#define BMF_SHARED_MODE(Mode)                                                                                    \
  BMF_SHARED_TEMPLATE void multiply_panel<Mode, false>(const UnitView&, const PanelView&, int64_t, int64_t, int, \
                                                       float*, int64_t);                                         \
  BMF_SHARED_TEMPLATE void multiply_panel<Mode, true>(const UnitView&, const PanelView&, int64_t, int64_t, int,  \
                                                      float*, int64_t);
#define BMF_SHARED_PACK(Mode, T)                                                                     \
  BMF_SHARED_TEMPLATE void pack_panel<Mode, T>(const MatrixView<T>&, int64_t, int64_t, int, float*); \
  BMF_SHARED_TEMPLATE void pack_rows<Mode, T>(const MatrixView<T>&, int64_t, int64_t, int, float*, int64_t);
BMF_SHARED_MODE(FloatMode)
BMF_SHARED_PACK(FloatMode, float)
BMF_SHARED_PACK(FloatMode, bf16)
#if defined(__AVX512BF16__)
BMF_SHARED_MODE(Bf16Mode)
BMF_SHARED_PACK(Bf16Mode, float)
BMF_SHARED_PACK(Bf16Mode, bf16)
#endif
#undef BMF_SHARED_PACK
#undef BMF_SHARED_MODE
#undef BMF_SHARED_TEMPLATE

}  // namespace bmf::BMF_ISA
