// The emulated GPU itself: it computes what the PTX ISA says, and it sees the faults that cuda_emulator.h lists. Each
// of those ends the program, so each is made in a process of its own.
#include "cuda_emulator.h"
// The emulator comes first.
#include "cuda/tile.h"
#include "cuda_faults.h"

using namespace bmf::cuda;
using bmf::bf16;
using emulator::Order;
using testing::context;

namespace {

constexpr int kThreads = 64, kBytes = 8192;

void launch(Order order, const std::function<void()>& kernel) {
  emulator::launch({1}, kThreads, kBytes, order, kernel);
}

// Whether the kernel's run ends with a message that contains `message`.
void expect_failure(const char* message, Order order, const std::function<void()>& kernel) {
  testing::expect_failure(message, [&] { launch(order, kernel); });
}

// No order hides that a barrier is missing between one warp's write and another's read.
void test_missing_barrier() {
  const auto kernel = [] {
    if (thread_index() == 0) store_shared(0, Words{});
    if (thread_index() == kThreads - 1) load_shared(0);
  };
  expect_failure("race: read in the interval", Order::first, kernel);
  expect_failure("nobody has written", Order::last, kernel);
}

void test_faults() {
  alignas(16) static const unsigned char source[kThreads * 16] = {};
  const auto own = [] { return static_cast<uint32_t>(thread_index()) * 16; };
  for (const Order order : {Order::first, Order::last, Order::random}) {
    expect_failure("nobody has written", order, [&] { load_shared(own()); });
    expect_failure("misaligned address of shared", order, [&] { store_shared(own() + 2, 1u); });
    expect_failure("beyond the block's shared memory", order, [&] { store_shared(kBytes + own(), 1u); });
    expect_failure("race: two threads write", order, [&] { store_shared(0, 1u); });
    expect_failure("race: ", order, [&] {
      store_shared(own(), Words{});
      barrier();
      load_shared(own());
      store_shared((own() + 512) % 1024, Words{});  // another warp's, which may not have been read yet, or has
    });
    expect_failure("a copy to it is under way", order, [&] {
      copy_async<16>(own(), source + own(), 16);
      commit_copies();
      load_shared(own());
    });
    expect_failure("a copy to it is under way", order, [&] {
      copy_async<16>(own(), source + own(), 16);
      commit_copies();
      wait_copies<1>();
      load_shared(own());
    });
    expect_failure("race: read in the interval", order, [&] {  // waited for, but without a barrier
      copy_async<16>(own(), source + own(), 16);
      commit_copies();
      wait_copies<0>();
      shuffle_xor(0, 1);
      load_shared((own() ^ 16));
    });
    expect_failure("never committed", order, [&] {
      copy_async<16>(own(), source + own(), 16);
      commit_copies();
      copy_async<16>(1024 + own(), source, 0);
    });
    expect_failure("misaligned address of global", order, [&] { copy_async<16>(own(), source + 2, 16); });
    expect_failure("never come", order, [&] {
      if (thread_index() != 5) barrier();
    });
    expect_failure("different instructions", order, [&] {
      if (thread_index() % kWarp < 16) return void(shuffle_xor(0, 1));
      uint32_t v[4];
      load_matrices(v, 0);
    });
    expect_failure("share a bank", order, [&] {
      store_shared(own(), Words{});
      barrier();
      uint32_t v[4];
      load_matrices(v, own() % 512 / 32 * 32);
    });
  }
}

// Of small integers, which all dtypes hold and all sums are exact for.
template <class T, int kDim>
void test_products() {
  constexpr int kStrips = 2, kRows = 32;
  context = "products";
  const auto a = [](int row, int c) { return static_cast<float>((row * 7 + c * 3) % 11 - 5); };
  const auto b = [](int row, int c) { return static_cast<float>((row * 5 + c * 2) % 13 - 6); };
  std::vector<uint16_t> left(64 * kDim), right(kRows * kDim);
  for (int i = 0; i < 64 * kDim; ++i) left[static_cast<size_t>(i)] = rounded(a(i / kDim, i % kDim), T{});
  for (int i = 0; i < kRows * kDim; ++i) right[static_cast<size_t>(i)] = rounded(b(i / kDim, i % kDim), T{});
  const int bytes = 2 * kDim * (64 + kRows);
  for (const bool vectors : {true, false}) {
    std::vector<uint16_t> stored(64 * kDim, 0xffff);
    emulator::launch({1}, kThreads, bytes, Order::random, [&] {
      const Tile<kDim> first{shared_begin()}, second{first.begin + Tile<kDim>::bytes(64)};
      load_tile<64, kDim, kThreads>(first, {left.data(), kDim, 64, kDim, vectors}, 0);
      load_tile<kRows, kDim, kThreads>(second, {right.data(), kDim, kRows, kDim, vectors}, 0);
      commit_copies();
      wait_copies<0>();
      barrier();
      const int row = warp_index() * kStrips * kStrip;
      float scores[kStrips][kRows / kColumns][kPerLane] = {};
      multiply_transposed<T, kDim>(scores, first, row, second);
      for_sums(scores, [&](float& x, const Spot& at) {
        float expected = 0;
        for (int c = 0; c < kDim; ++c) expected += a(row + at.row, c) * b(at.column, c);
        CHECK(x == expected);
        x = a(row + at.row, at.column);
      });
      uint32_t operand[kStrips][kRows / kDepth][4];
      as_operand<T>(operand, scores);
      float sums[kStrips][kDim / kColumns][kPerLane] = {};
      multiply<T, kDim>(sums, operand, second);
      for_sums(sums, [&](float& x, const Spot& at) {
        float expected = 0;
        for (int k = 0; k < kRows; ++k) expected += a(row + at.row, k) * b(k, at.column);
        CHECK(x == expected);
        x = a(row + at.row, at.column);
      });
      barrier();
      put_sums<T>(first, row, sums);
      barrier();
      store_tile<64, kDim, kThreads>({stored.data(), kDim, 63, kDim - 1, vectors}, first, 0);
    });
    for (int i = 0; i < 64 * kDim; ++i)
      CHECK(stored[static_cast<size_t>(i)] ==
            (i / kDim < 63 && i % kDim < kDim - 1 ? left[static_cast<size_t>(i)] : 0xffff));
  }
}

void test_rounding() {
  context = "rounding";
  CHECK(rounded(1.0f, bf16{}) == 0x3f80 && rounded(1.0f, f16{}) == 0x3c00);
  CHECK(rounded(0x1.01p0f, bf16{}) == 0x3f80 && rounded(0x1.03p0f, bf16{}) == 0x3f82);  // ties go to even
  CHECK(rounded(0x1.002p0f, f16{}) == 0x3c00 && rounded(0x1.006p0f, f16{}) == 0x3c02);
  CHECK(rounded(65519.0f, f16{}) == 0x7bff && rounded(-65520.0f, f16{}) == 0xfc00);
  CHECK(rounded(0x1p-24f, f16{}) == 1 && rounded(0x1p-26f, f16{}) == 0);
  for (int bits = 0; bits < 0x10000; ++bits) {
    const f16 half{static_cast<uint16_t>(bits)};
    const bf16 brain{static_cast<uint16_t>(bits)};
    if (to_float(half) == to_float(half)) CHECK(rounded(to_float(half), f16{}) == bits);
    if (to_float(brain) == to_float(brain)) CHECK(rounded(to_float(brain), bf16{}) == bits);
  }
}

}  // namespace

int main() {
  test_rounding();
  test_products<bf16, 64>();
  test_products<f16, 128>();
  test_faults();
  test_missing_barrier();
  return testing::result();
}
