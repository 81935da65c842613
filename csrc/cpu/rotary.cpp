#include "cpu/rotary.h"

#include "core/simd.h"

namespace bmf::BMF_ISA {
namespace {

// All heads of one operand at one position.
template <class T, class C>
void rotate(const RotaryOperand& t, int64_t batch, int64_t position, int64_t sequence, int64_t half, const C* cos,
            const C* sin, bool inverse) {
  const T* in = static_cast<const T*>(t.in) + batch * t.batch_stride + position * t.sequence_stride;
  T* out = static_cast<T*>(t.out) + (batch * sequence + position) * t.heads * 2 * half;
  const float sign = inverse ? -1.0f : 1.0f;
  const C* sin_first = inverse ? sin + half : sin;
  const C* sin_second = inverse ? sin : sin + half;
  for_lanes(half, [&](int64_t i, int lanes) {
    const Vec cos_a = load_lanes(cos + i, lanes), cos_b = load_lanes(cos + half + i, lanes);
    const Vec sin_a = load_lanes(sin_first + i, lanes) * sign, sin_b = load_lanes(sin_second + i, lanes) * sign;
    for (int64_t h = 0; h < t.heads; ++h) {
      const T* from = in + h * t.head_stride + i;
      T* to = out + h * 2 * half + i;
      const Vec a = load_lanes(from, lanes), b = load_lanes(from + half, lanes);
      store_lanes(to, a * cos_a - b * sin_a, lanes);
      store_lanes(to + half, b * cos_b + a * sin_b, lanes);
    }
  });
}

}  // namespace

void rotary(const RotaryArgs& args, const Threads& threads) {
  const int64_t width = 2 * args.half * (args.query.heads + args.key.heads);
  with_type(args.table_dtype, [&](auto table) {
    using C = decltype(table);
    const auto row = [](const RotaryTable& t, int64_t batch, int64_t position) {
      return static_cast<const C*>(t.data) + batch * t.batch_stride + position * t.sequence_stride;
    };
    parallel_ranges(threads, args.batch * args.sequence, row_grain(width), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t batch = i / args.sequence, position = i % args.sequence;
        const C *cos = row(args.cos, batch, position), *sin = row(args.sin, batch, position);
        const RotaryOperand* operands[] = {&args.query, &args.key};
        for (const RotaryOperand* t : operands)
          with_type(t->dtype, [&](auto type) {
            rotate<decltype(type), C>(*t, batch, position, args.sequence, args.half, cos, sin, args.inverse);
          });
      }
    });
  });
}

}  // namespace bmf::BMF_ISA
