// What kernels ask of the machine: threads, barriers, shared memory, asynchronous copies, matrix products of a warp.
// This is all of the hardware they see, so that they also run where there is none: tests/cpp/cuda_emulator.h defines
// the same functions for the host, one fiber for each thread, and is included before the kernels.
//
// Shared memory is a 32-bit address, as in PTX, and read and written by these functions only. Instructions and the
// layouts of their fragments: PTX ISA, "Warp-Level Matrix Instructions" and "Data Movement". All of sm_80.
//
// A fragment of a product of a warp, D[16 x 8] += A[16 x 16] B[16 x 8], as thread `lane` of it holds it, with
// g = lane / 4, t = lane % 4; two 16-bit elements to a register, the lower column or row in the lower half:
//
//   A: rows g, g + 8, g, g + 8; columns 2t, 2t, 2t + 8, 2t + 8 and the next
//   B: rows 2t and 2t + 8 and the next; column g
//   D: rows g, g, g + 8, g + 8; columns 2t, 2t + 1, 2t, 2t + 1
#pragma once
#include <cstdint>

#include "core/types.h"

namespace bmf::cuda {

struct f16 {
  uint16_t bits;
};

struct alignas(16) Words {
  uint32_t word[4];
};

constexpr int kWarp = 32;

}  // namespace bmf::cuda

#if !defined(BMF_CUDA_EMULATED)
#define BMF_DEVICE __device__ __forceinline__
#define BMF_EVERYWHERE __host__ __device__ __forceinline__
#define BMF_KERNEL(threads) __global__ void __launch_bounds__ threads
#define BMF_CONSTANT __grid_constant__

namespace bmf::cuda {

BMF_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
BMF_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
BMF_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
BMF_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }

BMF_DEVICE void barrier() { __syncthreads(); }
// Lanes that went different ways go on together, as instructions of a warp want it.
BMF_DEVICE void converge() { __syncwarp(); }
// v of the lane whose number differs in the bits of `mask`.
BMF_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

// Where the block's shared memory begins, a multiple of 1024.
BMF_DEVICE uint32_t shared_begin() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(bytes));
}
BMF_DEVICE void store_shared(uint32_t to, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(v) : "memory");
}
BMF_DEVICE void store_shared(uint32_t to, const Words& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
               "r"(v.word[3])
               : "memory");
}
BMF_DEVICE Words load_shared(uint32_t from) {
  Words v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(from)
               : "memory");
  return v;
}
BMF_DEVICE float load_shared_float(uint32_t from) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(from) : "memory");
  return v;
}

// kBytes (8 or 16) to shared memory, of which the first `present` come from `from` and the rest is zero. They are there
// for this thread once wait_copies has returned, and for others behind a barrier after that.
template <int kBytes>
BMF_DEVICE void copy_async(uint32_t to, const void* from, int present) {
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(present)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(present) : "memory");
}
// This thread's copies since the last call become a group; wait_copies leaves at most `kPending` groups under way.
BMF_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
BMF_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, whose rows of 16 bytes begin where lanes 0-7, 8-15, 16-23 and 24-31 say. A
// lane gets elements 2t and 2t + 1 of row g of each; transposed, of column g.
BMF_DEVICE void load_matrices(uint32_t (&v)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(row)
               : "memory");
}
BMF_DEVICE void load_matrices_transposed(uint32_t (&v)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(row)
               : "memory");
}

// d += a b, of bf16 or f16; see above.
template <class T>
BMF_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(sizeof(T) == 2);
  if constexpr (__is_same(T, bf16))
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded to T, the first in the lower half.
template <class T>
BMF_DEVICE uint32_t pack(float low, float high) {
  uint32_t v;
  if constexpr (__is_same(T, bf16))
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
BMF_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
BMF_DEVICE uint32_t as_bits(float v) { return __float_as_uint(v); }
BMF_DEVICE float to_float(bf16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
BMF_DEVICE float to_float(f16 v) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v.bits));
  return out;
}

BMF_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
BMF_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
BMF_DEVICE float erf(float x) { return ::erff(x); }
BMF_DEVICE float log2(float x) { return __log2f(x); }
BMF_DEVICE float tanh(float x) { return ::tanhf(x); }
BMF_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
BMF_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

}  // namespace bmf::cuda
#endif
