#include "cpu/cross_entropy.h"

#include "core/activation.h"
#include "core/pack.h"

namespace bmf::BMF_ISA {
namespace {

constexpr int64_t kBlock = 4096;                  // logits: 16 KiB of float, half of the first-level cache
constexpr int64_t kFewClasses = kBlock / kLanes;  // of which kLanes rows are looked at together, one in each lane

template <bool kCapped>
BMF_INLINE Vec cap(Vec x, float softcap, float inverse) {
  return kCapped ? soft_cap(x, softcap, inverse) : x;
}

struct RowSums {
  float top, log_sum;  // maximum of the (capped) logits; log of the sum of exp(z - top)
  float plain;         // their plain sum, if asked for
};

template <bool kCapped, bool kSum, class T>
RowSums sum_row(const T* x, int64_t classes, float softcap) {
  const float inverse = kCapped ? 1.0f / softcap : 0.0f, infinity = __builtin_inff();
  float top = -infinity, exp_sum = 0, plain_sum = 0;
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const T* block = x + begin;
    const int64_t n = classes - begin < kBlock ? classes - begin : kBlock;
    Vec most[4];
    for (Vec& v : most) v = broadcast(-infinity);
    for_lanes_by_four(n, [&](int64_t i, int lanes, int k) {
      most[k] = max(first_lanes(load_lanes(block + i, lanes), lanes, -infinity), most[k]);
    });
    const float block_top =
        cap<kCapped>(broadcast(max_lane(max(max(most[0], most[1]), max(most[2], most[3])))), softcap, inverse)[0];
    const float new_top = block_top > top ? block_top : top;
    const float shift = new_top == -infinity ? 0.0f : new_top;  // nothing finite yet: every term below is zero, or NaN
    Vec exps[4] = {}, plain[4] = {};
    for_lanes_by_four(n, [&](int64_t i, int lanes, int k) {
      const Vec z = cap<kCapped>(load_lanes(block + i, lanes), softcap, inverse);
      exps[k] += first_lanes(exp(z - shift), lanes, 0);
      if constexpr (kSum) plain[k] += z;  // lanes past the end are zero
    });
    const float rescale = top == -infinity ? 0.0f : exp(broadcast(top - shift))[0];
    exp_sum = exp_sum * rescale + sum(exps);
    if constexpr (kSum) plain_sum += sum(plain);
    top = new_top;
  }
  return {top, __builtin_logf(exp_sum), plain_sum};
}

// Where the row's target is not ignored.
template <bool kCapped, bool kSum, class T>
BMF_INLINE void store_loss(const CrossEntropyForwardArgs& args, int64_t row, const T* x, const RowSums& sums) {
  const float inverse = kCapped ? 1.0f / args.softcap : 0.0f;
  const float hit = cap<kCapped>(broadcast(to_float(x[args.target[row]])), args.softcap, inverse)[0];
  float loss = sums.log_sum + (sums.top - hit);
  if constexpr (kSum) loss += args.label_smoothing * (hit - sums.plain / static_cast<float>(args.classes));
  args.loss[row] = loss;
  args.lse[2 * row] = sums.top;
  args.lse[2 * row + 1] = sums.log_sum;
}

BMF_INLINE bool ignore(const CrossEntropyForwardArgs& args, int64_t row) {
  if (args.target[row] != args.ignore_index) return false;
  args.loss[row] = args.lse[2 * row] = args.lse[2 * row + 1] = 0;
  return true;
}

// A row of few classes is done before the sum over a register's lanes is: lanes are rows here, and squares of logits
// are transposed on the way in.
template <bool kCapped, bool kSum, class T>
void forward_few_classes(const CrossEntropyForwardArgs& args, int64_t begin, int64_t end) {
  const float inverse = kCapped ? 1.0f / args.softcap : 0.0f, infinity = __builtin_inff();
  const T* logits = static_cast<const T*>(args.logits.data);
  float z[kBlock];
  for (int64_t row = begin; row < end; row += kLanes) {
    const int rows = end - row < kLanes ? static_cast<int>(end - row) : kLanes;
    Vec top = broadcast(-infinity), plain{}, exps{};
    for_lanes(args.classes, [&](int64_t from, int classes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i)  // past the end, the last row again
        square[i] = load_lanes(logits + (row + (i < rows ? i : rows - 1)) * args.logits.stride + from, classes);
      transpose_units(square);
      for (int i = 0; i < classes; ++i) {
        const Vec v = cap<kCapped>(square[i], args.softcap, inverse);
        store(z + (from + i) * kLanes, v);
        top = max(v, top);
        if constexpr (kSum) plain += v;
      }
    });
    const Vec shift = select(top == -infinity, Vec{}, top);
    for (int64_t i = 0; i < args.classes; ++i) exps += exp(load(z + i * kLanes) - shift);
    for (int i = 0; i < rows; ++i)
      if (!ignore(args, row + i))
        store_loss<kCapped, kSum>(args, row + i, logits + (row + i) * args.logits.stride,
                                  RowSums{top[i], __builtin_logf(exps[i]), plain[i]});
  }
}

template <bool kCapped, bool kSum, class T>
void forward_rows(const CrossEntropyForwardArgs& args, int64_t begin, int64_t end) {
  if (kLanes == 16 && args.classes <= kFewClasses) return forward_few_classes<kCapped, kSum, T>(args, begin, end);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.logits.data) + row * args.logits.stride;
    if (!ignore(args, row))
      store_loss<kCapped, kSum>(args, row, x, sum_row<kCapped, kSum>(x, args.classes, args.softcap));
  }
}

template <bool kCapped, class T>
void backward_rows(const CrossEntropyBackwardArgs& args, int64_t begin, int64_t end) {
  const float inverse = kCapped ? 1.0f / args.softcap : 0.0f;
  const float everywhere = args.label_smoothing / static_cast<float>(args.classes);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.logits.data) + row * args.logits.stride;
    T* out = static_cast<T*>(args.grad.data) + row * args.grad.stride;
    const int64_t target = args.target[row];
    if (target == args.ignore_index) {
      for_lanes(args.classes, [&](int64_t i, int lanes) { store_lanes(out + i, Vec{}, lanes); });
      continue;
    }
    const float scale = args.scale[row * args.scale_stride], top = args.lse[2 * row], log_sum = args.lse[2 * row + 1];
    const auto gradient = [&](Vec logits, Vec expected) {
      const Vec z = cap<kCapped>(logits, args.softcap, inverse);
      Vec g = (exp(z - top - log_sum) - expected) * scale;
      if constexpr (kCapped) g *= tanh_derivative(logits * inverse);
      return g;
    };
    for_lanes(args.classes, [&](int64_t i, int lanes) {
      store_lanes(out + i, gradient(load_lanes(x + i, lanes), broadcast(everywhere)), lanes);
    });
    const Vec hit = gradient(broadcast(to_float(x[target])), broadcast(everywhere + (1.0f - args.label_smoothing)));
    from_float(hit[0], out + target);
  }
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForwardArgs& args, const Threads& threads) {
  with_type(args.logits.dtype, [&](auto type) {
    with_bool(args.softcap != 0, [&](auto capped) {
      with_bool(args.label_smoothing != 0, [&](auto smooth) {
        parallel_ranges(threads, args.rows, row_grain(args.classes), [&](int64_t begin, int64_t end, int) {
          forward_rows<capped.value, smooth.value, decltype(type)>(args, begin, end);
        });
      });
    });
  });
}

void cross_entropy_backward(const CrossEntropyBackwardArgs& args, const Threads& threads) {
  with_type(args.logits.dtype, [&](auto type) {
    with_bool(args.softcap != 0, [&](auto capped) {
      parallel_ranges(threads, args.rows, row_grain(args.classes), [&](int64_t begin, int64_t end, int) {
        backward_rows<capped.value, decltype(type)>(args, begin, end);
      });
    });
  });
}

}  // namespace bmf::BMF_ISA
