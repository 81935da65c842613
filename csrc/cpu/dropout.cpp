#include "cpu/dropout.h"

#include "cpu/finish.h"

namespace bmf::BMF_ISA {
namespace {

// One row, by groups of columns whose choices are made together. f(column, lanes, v): v as it is stored.
template <class X, class Y, class F>
BMF_INLINE void drop_row(const Dropping* dropping, const X* x, Y* y, int64_t row, int64_t width, const F& f) {
  uint16_t keep[8];
  for (int64_t col = 0; col < width; col += kDropoutGroup) {
    if (dropping) dropping->choose(row, col / kDropoutGroup, keep);
    const int64_t left = width - col;
    for_lanes(left < kDropoutGroup ? left : kDropoutGroup, [&](int64_t c, int lanes) {
      Vec v = load_lanes(x + col + c, lanes);
      if (dropping) v = keep_at(v * dropping->scale, keep, c);
      store_lanes(y + col + c, f(col + c, lanes, v), lanes);
    });
  }
}

}  // namespace

void dropout(const DropoutArgs& a, const Threads& threads) {
  const Dropping chosen(a.finish), *dropping = a.finish.dropout > 0 ? &chosen : nullptr;
  const Rows& residual = a.finish.residual;
  with_type(a.x.dtype, [&](auto x_type) {
    with_type(a.y.dtype, [&](auto y_type) {
      parallel_ranges(threads, a.rows, row_grain(a.width), [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
          const auto* x = static_cast<const decltype(x_type)*>(a.x.data) + row * a.x.stride;
          auto* y = static_cast<decltype(y_type)*>(a.y.data) + row * a.y.stride;
          if (residual.data == nullptr) {
            drop_row(dropping, x, y, row, a.width, [](int64_t, int, Vec v) { return v; });
            continue;
          }
          with_type(residual.dtype, [&](auto type) {
            const auto* add = static_cast<const decltype(type)*>(residual.data) + row * residual.stride;
            drop_row(dropping, x, y, row, a.width,
                     [&](int64_t c, int lanes, Vec v) { return v + load_lanes(add + c, lanes); });
          });
        }
      });
    });
  });
}

}  // namespace bmf::BMF_ISA
