// What the kernel tests share: checks, threads, arrays in the kernels' dtypes, and exact results to compare with.
//
// A test computes its result once more with plain loops in double (Exact), carrying along the sum of the absolute
// values of the terms of each number: rounding errors are measured against that, so no test has a tolerance of its own.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/isa.h"
#include "core/threads.h"
#include "core/types.h"

namespace testing {

using bmf::Dtype, bmf::Rows, bmf::Threads;

inline int failures = 0;
inline std::string context;  // what is being tested, for messages

inline void fail(const char* file, int line, const std::string& what) {
  if (++failures <= 20) std::fprintf(stderr, "%s:%d: [%s] %s\n", file, line, context.c_str(), what.c_str());
}

#define CHECK(condition) ((condition) ? void() : testing::fail(__FILE__, __LINE__, #condition " does not hold"))

// The exit status of a test program.
inline int result() {
  if (failures > 0) std::fprintf(stderr, "%d checks failed\n", failures);
  return failures > 0;
}

// One std::thread for each share of the work but the caller's own.
inline Threads threads(int count) {
  return {count, [](int n, void (*body)(int, void*), void* arg) {
            std::vector<std::thread> others;
            for (int i = 1; i < n; ++i) others.emplace_back(body, i, arg);
            body(0, arg);
            for (std::thread& t : others) t.join();
          }};
}

// test(threads) with one thread and with three, under each instruction set this machine has.
template <class Test>
void for_each_isa(const Test& test) {
  for (int i = 0; i < bmf::kIsaCount; ++i) {
    const auto isa = static_cast<bmf::Isa>(i);
    if (!bmf::isa_supported(isa)) continue;
    bmf::set_isa(bmf::isa_name(isa));
    for (const int count : {1, 3}) {
      context = std::string(bmf::isa_name(isa)) + ", " + std::to_string(count) + " threads";
      test(threads(count));
    }
  }
}

inline const char* name_of(Dtype dtype) { return dtype == Dtype::float32 ? "float32" : "bfloat16"; }
inline double epsilon(Dtype dtype) { return dtype == Dtype::float32 ? 0x1p-23 : 0x1p-7; }

// Numbers in one of the kernels' dtypes. The memory ends where they do, so that AddressSanitizer sees any step beyond.
class Array {
 public:
  Array() = default;
  Array(Dtype dtype, int64_t count)  // NaN: an output of which every element has to be written
      : dtype_(dtype), count_(count), bytes_(new unsigned char[static_cast<size_t>(count) * width()]) {
    for (int64_t i = 0; i < count; ++i) set(i, std::numeric_limits<float>::quiet_NaN());
  }

  static Array normal(Dtype dtype, int64_t count, float scale = 1) {
    static std::mt19937 generator(1);
    std::normal_distribution<float> draw(0, scale);
    Array a(dtype, count);
    for (int64_t i = 0; i < count; ++i) a.set(i, draw(generator));
    return a;
  }

  Array copy() const {
    Array a(dtype_, count_);
    std::memcpy(a.bytes_.get(), bytes_.get(), static_cast<size_t>(count_) * width());
    return a;
  }

  double operator[](int64_t i) const {
    uint32_t bits = 0;
    std::memcpy(reinterpret_cast<unsigned char*>(&bits) + 4 - width(), bytes_.get() + i * width(), width());
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  void set(int64_t i, float value) {  // rounded to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype_ == Dtype::bfloat16 && value == value) bits += 0x7fff + (bits >> 16 & 1);
    std::memcpy(bytes_.get() + i * width(), reinterpret_cast<unsigned char*>(&bits) + 4 - width(), width());
  }

  void* data() const { return bytes_.get(); }
  float* floats() const { return reinterpret_cast<float*>(bytes_.get()); }
  Rows rows(int64_t stride) const { return {data(), stride, dtype_}; }
  Dtype dtype() const { return dtype_; }
  int64_t count() const { return count_; }

 private:
  size_t width() const { return dtype_ == Dtype::float32 ? 4 : 2; }

  Dtype dtype_ = Dtype::float32;
  int64_t count_ = 0;
  std::unique_ptr<unsigned char[]> bytes_;
};

// The number of elements of `rows` rows that are `stride` apart: nothing follows the last one.
inline int64_t extent(int64_t rows, int64_t width, int64_t stride) {
  return rows > 0 ? (rows - 1) * stride + width : 0;
}

// A matrix in double. scale[i]: the absolute values of the terms that value[i] is the sum of.
struct Exact {
  int64_t rows, cols;
  std::vector<double> value, scale;

  Exact(int64_t r, int64_t c) : rows(r), cols(c), value(r * c), scale(r * c) {}
  Exact(const Array& a, int64_t r, int64_t c, int64_t stride) : Exact(r, c) {
    for (int64_t i = 0; i < r * c; ++i) add(i, a[i / c * stride + i % c]);
  }
  Exact(const Array& a, int64_t r, int64_t c) : Exact(a, r, c, c) {}

  void add(int64_t i, double term, double size) {
    value[i] += term;
    scale[i] += size;
  }
  void add(int64_t i, double term) { add(i, term, std::abs(term)); }
};

inline Exact transposed(const Exact& a) {
  Exact out(a.cols, a.rows);
  for (int64_t r = 0; r < a.rows; ++r)
    for (int64_t c = 0; c < a.cols; ++c) out.add(c * a.rows + r, a.value[r * a.cols + c], a.scale[r * a.cols + c]);
  return out;
}

inline Exact product(const Exact& a, const Exact& b) {
  // Each partial sum is rounded: over a long sum those errors wander off as a random walk does.
  const double growth = std::max(1.0, std::sqrt(static_cast<double>(a.cols)) / 8);
  Exact out(a.rows, b.cols);
  for (int64_t r = 0; r < a.rows; ++r)
    for (int64_t k = 0; k < a.cols; ++k)
      for (int64_t c = 0; c < b.cols; ++c)
        out.add(r * b.cols + c, a.value[r * a.cols + k] * b.value[k * b.cols + c],
                a.scale[r * a.cols + k] * b.scale[k * b.cols + c] * growth);
  return out;
}

// Element by element: a * b.
inline Exact scaled(Exact a, const Exact& b) {
  for (size_t i = 0; i < a.value.size(); ++i) {
    a.value[i] *= b.value[i];
    a.scale[i] *= b.scale[i];
  }
  return a;
}

// f of each element; f changes by at most `steepness` times what its argument does.
template <class F>
Exact mapped(Exact a, double steepness, const F& f) {
  for (size_t i = 0; i < a.value.size(); ++i) {
    a.value[i] = f(a.value[i]);
    a.scale[i] = std::abs(a.value[i]) + steepness * a.scale[i];
  }
  return a;
}

inline Exact column_sums(const Exact& a) {
  Exact out(1, a.cols);
  for (int64_t i = 0; i < a.rows * a.cols; ++i) out.add(i % a.cols, a.value[i], a.scale[i]);
  return out;
}

// Adds a row to each row of a.
inline Exact with_row(Exact a, const Array& row) {
  for (int64_t i = 0; i < a.rows * a.cols; ++i) a.add(i, row[i % a.cols]);
  return a;
}

// Each element within a few units in the last place, at the size of its terms, in the less exact of its dtype and that
// in which the kernel computed.
inline void check_close(const char* file, int line, const char* what, const Array& actual, const Exact& exact,
                        Dtype computed) {
  constexpr double kUlps = 8, kTiny = 1e-30;
  const double eps = std::max(epsilon(actual.dtype()), epsilon(computed));
  if (actual.count() != exact.rows * exact.cols) return fail(file, line, std::string(what) + ": another size");
  for (int64_t i = 0; i < actual.count(); ++i) {
    const double error = std::abs(actual[i] - exact.value[i]), limit = kUlps * eps * exact.scale[i] + kTiny;
    if (error <= limit) continue;
    char message[256];
    std::snprintf(message, sizeof message, "%s (%s) [%lld, %lld]: %.9g, expected %.9g; error %.3g exceeds %.3g", what,
                  name_of(actual.dtype()), static_cast<long long>(i / exact.cols),
                  static_cast<long long>(i % exact.cols), actual[i], exact.value[i], error, limit);
    return fail(file, line, message);
  }
}

#define CHECK_CLOSE(actual, exact, computed) testing::check_close(__FILE__, __LINE__, #actual, actual, exact, computed)

}  // namespace testing
