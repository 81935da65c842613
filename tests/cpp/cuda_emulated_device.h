// The functions of csrc/cuda/device.h over an emulated block; the second half of cuda_emulator.h.
#pragma once

namespace bmf::cuda {

using emulator::block;

inline int thread_index() { return block->thread().index; }
inline int block_x() { return block->index().x; }
inline int block_y() { return block->index().y; }
inline int block_z() { return block->index().z; }
inline void barrier() { block->barrier(); }

inline void converge() {
  const auto first = static_cast<size_t>(thread_index() / kWarp * kWarp);
  block->together("converge", nullptr, [&](void**) { block->synchronize(first, first + kWarp); });
}
inline float shuffle_xor(float v, int mask) {
  struct Lane {
    float in, out;
    int mask;
  } own{v, 0, mask};
  block->together("shuffle_xor", &own, [](void** lanes) {
    for (int i = 0; i < kWarp; ++i) {
      auto* lane = static_cast<Lane*>(lanes[i]);
      lane->out = static_cast<Lane*>(lanes[i ^ lane->mask])->in;
    }
  });
  return own.out;
}

inline uint32_t shared_begin() { return 0; }
inline void store_shared(uint32_t to, uint32_t v) { std::memcpy(block->writing(to, 4), &v, 4); }
inline void store_shared(uint32_t to, const Words& v) { std::memcpy(block->writing(to, 16), &v, 16); }
inline Words load_shared(uint32_t from) {
  Words v;
  std::memcpy(&v, block->reading(from, 16), 16);
  return v;
}
inline float load_shared_float(uint32_t from) {
  float v;
  std::memcpy(&v, block->reading(from, 4), 4);
  return v;
}

template <int kBytes>
void copy_async(uint32_t to, const void* from, int present) {
  static_assert(kBytes == 8 || kBytes == 16);
  if (reinterpret_cast<uintptr_t>(from) % kBytes != 0) block->fail("misaligned address of global memory");
  if (present < 0 || present > kBytes) block->fail("a copy of more than its bytes");
  block->begin_copy({to, from, kBytes, present});
}
inline void commit_copies() { block->commit(); }
template <int kPending>
void wait_copies() {
  block->wait(kPending);
}

// ldmatrix .x4: "threads 0-7, 8-15, 16-23, 24-31 give the row addresses of the four matrices"; thread i of the warp
// receives row i / 4, elements 2 (i % 4) and the next.
template <bool kTransposed>
void load_four_matrices(uint32_t (&v)[4], uint32_t row) {
  struct Lane {
    uint32_t row;
    uint32_t* out;
    emulator::Thread* thread;
  } own{row, v, &block->thread()};
  block->together(kTransposed ? "load_matrices_transposed" : "load_matrices", &own, [](void** lanes) {
    for (int m = 0; m < 4; ++m) {
      uint16_t matrix[8][8];
      unsigned banks = 0;
      for (int r = 0; r < 8; ++r) {
        const auto* lane = static_cast<Lane*>(lanes[8 * m + r]);
        std::memcpy(matrix[r], block->reading(lane->row, 16, lane->thread), 16);
        banks |= 1u << (lane->row / 16 % 8);
      }
      if (banks != 0xff) block->fail("rows of a matrix share a bank");
      for (int i = 0; i < kWarp; ++i) {
        const int r = i / 4, c = i % 4 * 2;
        const uint32_t low = kTransposed ? matrix[c][r] : matrix[r][c];
        const uint32_t high = kTransposed ? matrix[c + 1][r] : matrix[r][c + 1];
        static_cast<Lane*>(lanes[i])->out[m] = low | high << 16;
      }
    }
  });
}
inline void load_matrices(uint32_t (&v)[4], uint32_t row) { load_four_matrices<false>(v, row); }
inline void load_matrices_transposed(uint32_t (&v)[4], uint32_t row) { load_four_matrices<true>(v, row); }

inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t as_bits(float v) { return std::bit_cast<uint32_t>(v); }
inline float to_float(bf16 v) { return as_float(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(f16 v) {  // IEEE 754 binary16
  const int exponent = v.bits >> 10 & 0x1f, fraction = v.bits & 0x3ff;
  const float sign = v.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 0x1f) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                               : std::ldexp(static_cast<float>(fraction + 0x400), exponent - 25));
}

// To nearest, ties to even.
inline uint16_t rounded(float x, bf16) {
  const uint32_t bits = as_bits(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t rounded(float x, f16) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::abs(x);
  if (x != x) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<int>(std::nearbyint(std::ldexp(size, 24))));
  int exponent;
  const float fraction = std::frexp(size, &exponent);                            // in [0.5, 1)
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(fraction, 11)));  // 1024 to 2048
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + steps - 0x400));
}
template <class T>
uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(rounded(low, T{})) | static_cast<uint32_t>(rounded(high, T{})) << 16;
}

// mma.m16n8k16: with group = lane >> 2 and thread = lane % 4,
//   a_i: row = group for 0 <= i < 2 and 4 <= i < 6, else group + 8; column = 2 thread + (i & 1), + 8 for i >= 4
//   b_i: row = 2 thread + (i & 1), + 8 for i >= 2; column = group
//   c_i: row = group for i < 2, else group + 8; column = 2 thread + (i & 1)
template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    const uint32_t* a;
    uint32_t b[2];
    float* d;
  } own{a, {b0, b1}, d};
  block->together("multiply_add", &own, [](void** lanes) {
    float left[16][16], right[8][16];
    const auto element = [](const uint32_t* registers, int i) {
      return to_float(T{static_cast<uint16_t>(registers[i / 2] >> (16 * (i % 2)))});
    };
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto& l = *static_cast<Lane*>(lanes[lane]);
      const int group = lane >> 2, thread = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const int row = (i < 2 || (4 <= i && i < 6)) ? group : group + 8;
        left[row][thread * 2 + (i & 1) + (i >= 4 ? 8 : 0)] = element(l.a, i);
      }
      for (int i = 0; i < 4; ++i) right[group][thread * 2 + (i & 1) + (i >= 2 ? 8 : 0)] = element(l.b, i);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      auto& l = *static_cast<Lane*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = (lane >> 2) + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
        float sum = l.d[i];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[column][k];
        l.d[i] = sum;
      }
    }
  });
}

inline float exp2(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float erf(float x) { return std::erf(x); }
inline float log2(float x) { return std::log2(x); }
inline float tanh(float x) { return std::tanh(x); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }

}  // namespace bmf::cuda
