// What Hopper (sm_90a) has beyond device.h: barriers in shared memory that count arrivals and bytes (mbarrier), copies
// of boxes of a tensor (TMA), products of a warpgroup (wgmma), and barriers of some warps. As there, this is all of it
// that kernels see, and tests/cpp/cuda_emulated_hopper.h is the same for the host. PTX ISA, "Parallel Synchronization
// and Communication Instructions", "Data Movement" and "Asynchronous Warpgroup Level Matrix Multiply-Accumulate".
//
// An operand in shared memory consists of panels of 64 columns of 16 bits, a row of 128 bytes each. Of its eight chunks
// of 16 bytes, chunk c is where c ^ (row % 8) would be: the 128-byte swizzle, by bits 4-6 and 7-9 of the address, so
// that a panel begins at a multiple of 1024.
#pragma once
#include "cuda/device.h"

namespace bmf::cuda {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kPanel = 64, kPanelRowBytes = 128;

// A CUtensorMap: a tensor [batch, head, row, column] and the box of a copy, kPanel columns by some rows.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// Of the descriptor of an operand: bits 0-13 where it begins, 16-29 how far apart are its panels, 32-45 its groups of
// eight rows, all in units of 16 bytes; 62-63 the swizzle.
constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;

}  // namespace bmf::cuda

#if !defined(BMF_CUDA_EMULATED)
namespace bmf::cuda {

// Kernels are empty where they are compiled for something else.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kOnHopper = true;
#else
constexpr bool kOnHopper = false;
#endif

// A phase of a barrier ends when `count` have arrived and all bytes that were expected have come; the next begins.
BMF_DEVICE void init_barrier(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Behind the last init_barrier, before another thread hears of them at a barrier of the block.
BMF_DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
BMF_DEVICE void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
BMF_DEVICE void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of this parity has ended; that before the first has parity 1.
BMF_DEVICE void wait_barrier(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Copies by one thread, whose bytes count for `barrier`. What lies outside of the tensor is zero.
BMF_DEVICE void copy_box(uint32_t to, const TensorMap& map, int column, int row, int head, int batch,
                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
}
// `bytes`, a multiple of 16, from and to multiples of 16.
BMF_DEVICE void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
// What this thread has stored to shared memory is seen by copies and products that begin later.
BMF_DEVICE void publish_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barrier `id` (1 to 15) of `threads` threads: some wait there, others only say that they have come so far.
BMF_DEVICE void meet(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
BMF_DEVICE void announce(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// v, which all lanes of a warp have, so that the compiler knows.
BMF_DEVICE int uniform(int v) { return __shfl_sync(0xffffffffu, v, 0); }

// How many registers a thread of this warpgroup has from now on.
template <int kCount>
BMF_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
BMF_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Nothing moves registers' uses over this, as the compiler does not know that products are under way.
template <int kStrips, int kCount>
BMF_DEVICE void pin(float (&sums)[kStrips][kCount][4]) {
#pragma unroll
  for (int s = 0; s < kStrips; ++s)
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(sums[s][n][i])::"memory");
}
template <int kStrips, int kCount>
BMF_DEVICE void pin(uint32_t (&operand)[kStrips][kCount][4]) {
#pragma unroll
  for (int s = 0; s < kStrips; ++s)
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(operand[s][n][i])::"memory");
}

// Products of a warpgroup run on their own. Before the first, and whenever its threads have touched registers of theirs
// since, comes begin_products; what was begun up to commit_products is a group, and wait_products leaves at most
// `kPending` groups under way. Until then their operands and sums must be left alone. Both are told the registers.
template <class... Registers>
BMF_DEVICE void begin_products(Registers&... registers) {
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
BMF_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending, class... Registers>
BMF_DEVICE void wait_products(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (pin(registers), ...);
}

#define BMF_LIST_32                                                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define BMF_LIST_64                                                                                             \
  BMF_LIST_32                                                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BMF_SUM(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define BMF_SUMS_8 BMF_SUM(0), BMF_SUM(1), BMF_SUM(2), BMF_SUM(3), BMF_SUM(4), BMF_SUM(5), BMF_SUM(6), BMF_SUM(7)
#define BMF_SUMS_16 \
  BMF_SUMS_8, BMF_SUM(8), BMF_SUM(9), BMF_SUM(10), BMF_SUM(11), BMF_SUM(12), BMF_SUM(13), BMF_SUM(14), BMF_SUM(15)

// d[64 x 8 kBlocks] = (add ? d : 0) + a b^T with both operands in shared memory, 16 columns of each. A warp has 16 rows
// of d, as device.h has them of its products.
#define BMF_PRODUCT(type, n, list, sums, a, b, add)                                                                    \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type \
               "." type " {" list "}, " a ", " b ", add, 1, 1, 0, 0;\n}"                                               \
               : sums                                                                                                  \
               : "l"(left), "l"(right), "r"(static_cast<int>(accumulate)))
template <class T, int kBlocks>
BMF_DEVICE void group_product(float (*d)[4], uint64_t left, uint64_t right, bool accumulate) {
  static_assert(kBlocks == 8 || kBlocks == 16);
  if constexpr (__is_same(T, bf16) && kBlocks == 8)
    BMF_PRODUCT("bf16", "64", BMF_LIST_32, BMF_SUMS_8, "%32", "%33", "%34");
  else if constexpr (__is_same(T, bf16))
    BMF_PRODUCT("bf16", "128", BMF_LIST_64, BMF_SUMS_16, "%64", "%65", "%66");
  else if constexpr (kBlocks == 8)
    BMF_PRODUCT("f16", "64", BMF_LIST_32, BMF_SUMS_8, "%32", "%33", "%34");
  else
    BMF_PRODUCT("f16", "128", BMF_LIST_64, BMF_SUMS_16, "%64", "%65", "%66");
}
#undef BMF_PRODUCT

// d[64 x 8 kBlocks] += a b: a in registers, as device.h has it of its products; b, 16 rows, in shared memory.
#define BMF_PRODUCT(type, n, list, sums, a, b)                                                           \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" list "}, {" a "}, " b \
               ", 1, 1, 1, 1;"                                                                           \
               : sums                                                                                    \
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right))
template <class T, int kBlocks>
BMF_DEVICE void group_product_add(float (*d)[4], const uint32_t (&left)[4], uint64_t right) {
  static_assert(kBlocks == 8 || kBlocks == 16);
  if constexpr (__is_same(T, bf16) && kBlocks == 8)
    BMF_PRODUCT("bf16", "64", BMF_LIST_32, BMF_SUMS_8, "%32, %33, %34, %35", "%36");
  else if constexpr (__is_same(T, bf16))
    BMF_PRODUCT("bf16", "128", BMF_LIST_64, BMF_SUMS_16, "%64, %65, %66, %67", "%68");
  else if constexpr (kBlocks == 8)
    BMF_PRODUCT("f16", "64", BMF_LIST_32, BMF_SUMS_8, "%32, %33, %34, %35", "%36");
  else
    BMF_PRODUCT("f16", "128", BMF_LIST_64, BMF_SUMS_16, "%64, %65, %66, %67", "%68");
}
#undef BMF_PRODUCT
#undef BMF_SUMS_16
#undef BMF_SUMS_8
#undef BMF_SUM
#undef BMF_LIST_64
#undef BMF_LIST_32

}  // namespace bmf::cuda
#endif
