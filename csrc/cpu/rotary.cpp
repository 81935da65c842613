#include "cpu/rotary.h"

#include "core/simd.h"

namespace bmf::BMF_ISA {
namespace {

// All heads of one operand at one position.
template <bool kInverse, class T, class C>
void rotate(const RotaryOperand& t, int64_t batch, int64_t position, int64_t sequence, int64_t half, const C* cos,
            const C* sin, bool past) {
  const T* from = static_cast<const T*>(t.in) + batch * t.batch_stride + position * t.sequence_stride;
  T* to = static_cast<T*>(t.out) + (batch * sequence + position) * t.heads * 2 * half;
  for (int64_t h = 0; h < t.heads; ++h, from += t.head_stride, to += 2 * half)
    for_lanes(half, [&](int64_t i, int lanes) {
      const Vec a = load_lanes(from + i, lanes), b = load_lanes(from + half + i, lanes);
      const Vec cos_a = load_lanes(cos + i, lanes), cos_b = load_lanes(cos + half + i, lanes);
      const Vec sin_a = load_lanes(sin + i, lanes), sin_b = load_lanes(sin + half + i, lanes);
      store_lanes(to + i, kInverse ? a * cos_a + b * sin_b : a * cos_a - b * sin_a, lanes, past);
      store_lanes(to + half + i, kInverse ? b * cos_b - a * sin_a : b * cos_b + a * sin_b, lanes, past);
    });
}

bool streamed(const RotaryArgs& args, const RotaryOperand& t) {
  const int64_t head = 2 * args.half * (t.dtype == Dtype::float32 ? 4 : 2);
  return args.half % kLanes == 0 && past_caches(t.out, args.batch * args.sequence * t.heads, head, head);
}

}  // namespace

void rotary(const RotaryArgs& args, const Threads& threads) {
  const int64_t width = 2 * args.half * (args.query.heads + args.key.heads);
  const RotaryOperand* operands[] = {&args.query, &args.key};
  const bool past[] = {streamed(args, args.query), streamed(args, args.key)};
  with_type(args.table_dtype, [&](auto table) {
    using C = decltype(table);
    const auto row = [](const RotaryTable& t, int64_t batch, int64_t position) {
      return static_cast<const C*>(t.data) + batch * t.batch_stride + position * t.sequence_stride;
    };
    with_bool(args.inverse, [&](auto inverse) {
      parallel_ranges(threads, args.batch * args.sequence, row_grain(width), [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t batch = i / args.sequence, position = i % args.sequence;
          const C *cos = row(args.cos, batch, position), *sin = row(args.sin, batch, position);
          for (int t = 0; t < 2; ++t)
            with_type(operands[t]->dtype, [&](auto type) {
              rotate<inverse.value, decltype(type), C>(*operands[t], batch, position, args.sequence, args.half, cos,
                                                       sin, past[t]);
            });
        }
        if (past[0] || past[1]) end_streams();
      });
    });
  });
}

}  // namespace bmf::BMF_ISA
