// Packed copies of weights that are held: made once, right for each use, gone when released.
#include "core/packed_weights.h"

#include "cpu/linear.h"
#include "testing.h"

using namespace testing;

namespace {

constexpr int64_t kRows = 19, kOut = 131, kIn = 37;

// y = x W^T.
Array multiply(const Array& x, const Array& weight, const Threads& threads) {
  Array y(x.dtype(), kRows * kOut);
  bmf::linear_forward({.x_dtype = x.dtype(),
                       .weight_dtype = weight.dtype(),
                       .m = kRows,
                       .n = kOut,
                       .k = kIn,
                       .x_stride = kIn,
                       .weight_stride = kIn,
                       .x = x.data(),
                       .weight = weight.data(),
                       .bias = nullptr,
                       .activation = bmf::Activation::none,
                       .y = y.data(),
                       .pre = nullptr,
                       .y_dtype = x.dtype(),
                       .finish = {}},
                      threads);
  return y;
}

bool same(const Array& a, const Array& b) {
  for (int64_t i = 0; i < a.count(); ++i)
    if (a[i] != b[i]) return false;
  return true;
}

void hold(const Array& weight) { bmf::hold_weights(weight.data(), static_cast<size_t>(weight.count()) * 4); }

}  // namespace

int main() {
  for_each_isa([](const Threads& threads) {
    for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16}) {
      const Array x = Array::normal(dtype, kRows * kIn);
      Array weight = Array::normal(Dtype::float32, kOut * kIn);
      const Array expected = multiply(x, weight, threads);
      CHECK(bmf::packed_weights_bytes() == 0);
      hold(weight);
      hold(weight);
      for (int i = 0; i < 3; ++i) CHECK(same(multiply(x, weight, threads), expected));
      const size_t bytes = bmf::packed_weights_bytes();
      CHECK(bytes > 0);
      bmf::release_weights(weight.data());
      CHECK(bmf::packed_weights_bytes() == bytes);
      bmf::release_weights(weight.data());
      CHECK(bmf::packed_weights_bytes() == 0);
      for (int64_t i = 0; i < weight.count(); ++i) weight.set(i, 0);
      hold(weight);
      const Array zeros = multiply(x, weight, threads);
      for (int64_t i = 0; i < zeros.count(); ++i) CHECK(zeros[i] == 0);
      bmf::release_weights(weight.data());
    }
  });
  context = "several callers at once";
  const Array x = Array::normal(Dtype::float32, kRows * kIn), weight = Array::normal(Dtype::float32, kOut * kIn);
  const Array expected = multiply(x, weight, threads(1));
  for (int round = 0; round < 50; ++round) {
    hold(weight);
    std::vector<std::thread> callers;
    std::vector<char> right(4, false);
    for (char& ok : right) callers.emplace_back([&] { ok = same(multiply(x, weight, threads(1)), expected); });
    for (std::thread& caller : callers) caller.join();
    for (const char ok : right) CHECK(ok);
    bmf::release_weights(weight.data());
  }
  return result();
}
