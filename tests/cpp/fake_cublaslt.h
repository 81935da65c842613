// cuBLASLt on the host: the entry points that cuda/cublaslt.h uses, which compute in double what their descriptors say,
// and fail on what the library's documentation does not allow. Matrices go by columns, as cublasLt.h has them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "cuda_emulator.h"
// The emulator comes first; of it, the rounding of 16-bit numbers.
#include "activations.h"
#include "cuda/cublaslt.h"

namespace fake_lt {

using namespace bmf::cuda;
using bmf::bf16;

struct Desc {
  std::map<int, int64_t> values;
  bool has(int attribute) const { return values.count(attribute) > 0; }
  int64_t at(int attribute) const { return has(attribute) ? values.at(attribute) : 0; }
};
struct Layout {
  int type;
  int64_t rows, columns, stride;
};

inline int living = 0;              // objects that were made and not destroyed
inline std::vector<int> epilogues;  // of the products made so far

[[noreturn]] inline void refuse(const char* what) {
  std::fprintf(stderr, "cuBLASLt: %s\n", what);
  std::abort();
}
inline void demand(bool condition, const char* what) {
  if (!condition) refuse(what);
}

inline int bytes_of(int type) { return type == lt::kFloat32 ? 4 : 2; }
inline double read(int type, const void* data, int64_t i) {
  if (type == lt::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return type == lt::kBFloat16 ? to_float(bf16{bits}) : to_float(f16{bits});
}
inline void write(int type, void* data, int64_t i, double x) {
  const auto v = static_cast<float>(x);
  if (type == lt::kFloat32)
    static_cast<float*>(data)[i] = v;
  else
    static_cast<uint16_t*>(data)[i] = type == lt::kBFloat16 ? rounded(v, bf16{}) : rounded(v, f16{});
}

inline int create_desc(void** desc, int compute, int scale_type) {
  demand(compute == 68 && scale_type == lt::kFloat32, "sums and scales are to be float32");
  *desc = new Desc;
  ++living;
  return 0;
}
template <class T>
int destroy(void* object) {
  delete static_cast<T*>(object);
  --living;
  return 0;
}
inline int set_attribute(void* desc, int attribute, const void* value, size_t bytes) {
  const bool pointer = attribute == 8 || attribute == 11, wide = pointer || attribute == 12;
  demand(attribute == 3 || attribute == 4 || attribute == 7 || wide, "an attribute that nobody should set");
  demand(bytes == (wide ? 8 : 4), "an attribute of another size");
  int64_t v = 0;
  std::memcpy(&v, value, bytes);
  static_cast<Desc*>(desc)->values[attribute] = v;
  return 0;
}
inline int create_layout(void** layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
  demand(type == 0 || type == 2 || type == 14, "a type of number that is not float32, float16 or bfloat16");
  demand(rows > 0 && columns > 0 && stride >= static_cast<int64_t>(rows), "a leading dimension below the rows");
  *layout = new Layout{type, static_cast<int64_t>(rows), static_cast<int64_t>(columns), stride};
  ++living;
  return 0;
}
inline int create_preference(void** preference) {
  *preference = new Desc;
  ++living;
  return 0;
}
inline int set_preference(void* preference, int attribute, const void* value, size_t bytes) {
  demand(attribute == 1 ? bytes == 8 : attribute >= 5 && attribute <= 8 && bytes == 4, "a preference of another size");
  int64_t v = 0;
  std::memcpy(&v, value, bytes);
  static_cast<Desc*>(preference)->values[attribute] = v;
  return 0;
}

// D [rows, columns] = op(A) op(B), less its epilogue.
struct Shape {
  int64_t rows, columns, depth;
};
inline Shape check(const Desc& d, const Layout& a, const Layout& b, const Layout& c, const Layout& out) {
  const bool turned_a = d.at(3) != 0, turned_b = d.at(4) != 0;
  const Shape s{turned_a ? a.columns : a.rows, turned_b ? b.rows : b.columns, turned_a ? a.rows : a.columns};
  demand((turned_b ? b.columns : b.rows) == s.depth, "inner dimensions differ");
  demand(out.rows == s.rows && out.columns == s.columns, "the result has another shape");
  demand(c.rows == out.rows && c.columns == out.columns && c.type == out.type, "C and D differ");
  demand(a.type == b.type && a.type != lt::kFloat32 && (out.type == a.type || out.type == lt::kFloat32),
         "types that do not go together");
  const auto epilogue = static_cast<int>(d.at(7));
  constexpr int kKnown[] = {1, 2, 4, 6, 32, 36, 160, 164, 192, 208, 512};
  demand(std::find(std::begin(kKnown), std::end(kKnown), epilogue) != std::end(kKnown), "no such epilogue");
  const bool bias = epilogue & (4 | 16 | 512), aux = epilogue & 128;
  demand(bias == (d.at(8) != 0) && aux == (d.at(11) != 0),
         "an epilogue without what it needs, or with what it does not");
  if (aux)
    demand(d.at(12) % 8 == 0 && d.at(12) >= s.rows && d.at(11) % 16 == 0 && out.type == a.type,
           "what gelu is applied to must lie at multiples of 16 bytes, in the operands' type");
  return s;
}

inline int heuristic(void*, void* desc, void* a, void* b, void* c, void* d, void* preference, int, lt::Heuristic* found,
                     int* count) {
  check(*static_cast<Desc*>(desc), *static_cast<Layout*>(a), *static_cast<Layout*>(b), *static_cast<Layout*>(c),
        *static_cast<Layout*>(d));
  const Desc& wishes = *static_cast<Desc*>(preference);
  for (int attribute = 5; attribute <= 8; ++attribute) {
    demand(wishes.at(attribute) >= 2, "no alignment: cuBLASLt would expect 256 bytes");
    found->algo.data[attribute - 5] = static_cast<uint64_t>(wishes.at(attribute));
  }
  found->workspace_bytes = 0;
  found->state = 0;
  *count = 1;
  return 0;
}

inline int multiply(void*, void* desc, const void* alpha, const void* a, void* a_layout, const void* b, void* b_layout,
                    const void* beta, const void* c, void* c_layout, void* out, void* out_layout, const lt::Algo* algo,
                    void*, size_t, void*) {
  const Desc& d = *static_cast<Desc*>(desc);
  const Layout &la = *static_cast<Layout*>(a_layout), &lb = *static_cast<Layout*>(b_layout),
               &lc = *static_cast<Layout*>(c_layout), &lo = *static_cast<Layout*>(out_layout);
  const Shape s = check(d, la, lb, lc, lo);
  const void* data[4] = {a, b, c, out};
  const Layout* layouts[4] = {&la, &lb, &lc, &lo};
  for (int i = 0; i < 4; ++i) {
    const auto at = static_cast<int64_t>(algo->data[i]);
    demand(reinterpret_cast<int64_t>(data[i]) % at == 0, "a matrix is less aligned than was said");
    demand(layouts[i]->stride * bytes_of(layouts[i]->type) % at == 0, "columns are less aligned than was said");
  }
  demand(c == out, "C is D");
  const auto epilogue = static_cast<int>(d.at(7));
  epilogues.push_back(epilogue);
  auto* bias = reinterpret_cast<void*>(d.at(8));
  auto* aux = reinterpret_cast<void*>(d.at(11));
  const auto left = [&](int64_t row, int64_t k) {
    return read(la.type, a, d.at(3) ? row * la.stride + k : k * la.stride + row);
  };
  const auto right = [&](int64_t k, int64_t column) {
    return read(lb.type, b, d.at(4) ? k * lb.stride + column : column * lb.stride + k);
  };
  std::vector<double> sums(static_cast<size_t>(s.rows));
  for (int64_t column = 0; column < s.columns; ++column) {
    for (int64_t row = 0; row < s.rows; ++row) {
      double x = 0;
      for (int64_t k = 0; k < s.depth; ++k) x += left(row, k) * right(k, column);
      x *= *static_cast<const float*>(alpha);
      if (*static_cast<const float*>(beta) != 0)
        x += *static_cast<const float*>(beta) * read(lo.type, out, column * lo.stride + row);
      if (epilogue & 4) x += read(lo.type, bias, row);
      const int64_t at = column * d.at(12) + row;
      if (epilogue & 2) x = x > 0 ? x : 0;
      if (epilogue & 32) {
        if (aux != nullptr) write(lo.type, aux, at, x);
        x = testing::activate(bmf::Activation::gelu_tanh, x);
      }
      if (epilogue & 64) x *= testing::activation_slope(bmf::Activation::gelu_tanh, read(lo.type, aux, at));
      sums[static_cast<size_t>(row)] += x;
      write(lo.type, out, column * lo.stride + row, x);
    }
    if (epilogue & 512) {
      double sum = 0;
      for (int64_t k = 0; k < s.depth; ++k) sum += right(k, column);
      write(lo.type, bias, column, sum);
    }
  }
  if (epilogue & 16)
    for (int64_t row = 0; row < s.rows; ++row) write(lo.type, bias, row, sums[static_cast<size_t>(row)]);
  return 0;
}

inline const lt::Api kApi{
    .Create = nullptr,
    .MatmulDescCreate = create_desc,
    .MatmulDescDestroy = destroy<Desc>,
    .MatmulDescSetAttribute = set_attribute,
    .MatrixLayoutCreate = create_layout,
    .MatrixLayoutDestroy = destroy<Layout>,
    .MatmulPreferenceCreate = create_preference,
    .MatmulPreferenceDestroy = destroy<Desc>,
    .MatmulPreferenceSetAttribute = set_preference,
    .MatmulAlgoGetHeuristic = heuristic,
    .Matmul = multiply,
};

}  // namespace fake_lt
