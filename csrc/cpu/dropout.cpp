#include "cpu/dropout.h"

#include "cpu/finish.h"

namespace bmf::BMF_ISA {

void dropout(const DropoutArgs& a, const Threads& threads) {
  with_type(a.x.dtype, [&](auto x_type) {
    with_type(a.y.dtype, [&](auto y_type) {
      using X = decltype(x_type);
      using Y = decltype(y_type);
      parallel_ranges(threads, a.rows, row_grain(a.width), [&](int64_t begin, int64_t end, int) {
        Finisher<Y> finisher(a.finish, static_cast<Y*>(a.y.data), a.y.stride);
        for (int64_t row = begin; row < end; ++row) {
          const X* x = static_cast<const X*>(a.x.data) + row * a.x.stride;
          for_lanes(a.width,
                    [&](int64_t col, int lanes) { finisher.store(row, col, lanes, load_lanes(x + col, lanes)); });
        }
      });
    });
  });
}

}  // namespace bmf::BMF_ISA
