// What rms_norm and layer_norm share: their arguments and the loops over rows. kCentered says which of the two it is.
//
//   s = x + residual
//   rms_norm:    y = s rstd w,                 rstd = 1 / sqrt(mean(s^2) + eps)
//   layer_norm:  y = (s - mean) rstd w + b,    rstd = 1 / sqrt(mean((s - mean)^2) + eps)
//   backward, with n = (s - mean) rstd and g = dy w, both means over the row:
//   ds' = ds + rstd (g - n mean(n g) [- mean(g)]),    dw = sum over rows of dy n,    db = sum over rows of dy
//
// x, residual, s, y: [rows, width]; rstd and mean are kept in float for backward. Every operand is read from memory and
// written to it once: a row is small enough to stay in cache for the second and third look at it.
#pragma once
#include "core/isa.h"
#include "core/threads.h"
#include "core/types.h"

namespace bmf {

struct NormForwardArgs {
  int64_t rows, width;
  float eps;
  Rows x, residual;    // residual.data null: s is x, and `sum` is not written
  Rows weight, bias;   // one row each, or null for ones and zeros
  Rows y, sum;         // sum: float if x or residual is
  float *mean, *rstd;  // [rows]; mean null for rms_norm
  Rows y_narrow;       // y once more in bfloat16, for what multiplies it; may be null
};

struct NormBackwardArgs {
  int64_t rows, width;
  Rows grad_y, grad_sum;  // grad_sum: what flows into s from elsewhere, in s's dtype; may be null
  Rows sum, weight;
  const float *mean, *rstd;
  Rows grad;                       // with respect to s, and so to x and to residual; in s's dtype
  Rows grad_narrow;                // the same once more in bfloat16, for that of x and residual which is; may be null
  float *grad_weight, *grad_bias;  // [width]; grad_bias null for rms_norm
  Finish finish;                   // if there is dropout: grad_narrow is the gradient of what it was applied to
};

}  // namespace bmf

#ifdef BMF_ISA
#include <type_traits>

#include "core/scratch.h"
#include "core/simd.h"
#include "cpu/finish.h"

namespace bmf::BMF_ISA {

struct Absent {};  // stands for the element type of an operand that is not there

template <class T>
constexpr bool kPresent = true;
template <>
constexpr bool kPresent<Absent> = false;

template <class Body>
BMF_INLINE void with_optional_type(const Rows& rows, Body&& f) {
  if (rows.data == nullptr)
    f(Absent{});
  else
    with_type(rows.dtype, f);
}

template <class T>
BMF_INLINE T* row_of(const Rows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

// One row of parameters as floats; `absent` in every place if there is none.
inline void load_parameters(const Rows& from, float absent, int64_t width, float* out) {
  with_optional_type(from, [&](auto type) {
    using T = decltype(type);
    for_lanes(width, [&](int64_t i, int lanes) {
      Vec v = broadcast(absent);
      if constexpr (kPresent<T>) v = load_lanes(row_of<T>(from, 0) + i, lanes);
      store_lanes(out + i, v, lanes);
    });
  });
}

template <bool kCentered, class X, class R, class Y>
BMF_FLATTEN inline void norm_forward_rows(const NormForwardArgs& args, const float* weight, const float* bias,
                                          int64_t begin, int64_t end) {
  using S = std::conditional_t<kPresent<R>, std::conditional_t<sizeof(X) == 4 || sizeof(R) == 4, float, bf16>, X>;
  const int64_t n = args.width;
  const float count = static_cast<float>(n);
  const bool past = past_caches(args.y.data, args.rows, n * sizeof(Y), args.y.stride * sizeof(Y));
  const bool narrow = args.y_narrow.data != nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const X* x = row_of<X>(args.x, row);
    const S* s;
    Vec acc[4] = {};
    if constexpr (kPresent<R>) {
      const R* residual = row_of<R>(args.residual, row);
      S* out = row_of<S>(args.sum, row);
      for_lanes_by_four(n, [&](int64_t i, int lanes, int k) {
        const Vec v = round_to<S>(load_lanes(x + i, lanes) + load_lanes(residual + i, lanes));
        store_lanes(out + i, v, lanes);
        acc[k] = kCentered ? acc[k] + v : fma(v, v, acc[k]);
      });
      s = out;
    } else {
      s = x;
      for_lanes_by_four(n, [&](int64_t i, int lanes, int k) {
        const Vec v = load_lanes(s + i, lanes);
        acc[k] = kCentered ? acc[k] + v : fma(v, v, acc[k]);
      });
    }
    float mean = 0, square = sum(acc) / count;
    if constexpr (kCentered) {
      mean = square;
      Vec deviation[4] = {};
      for_lanes_by_four(n, [&](int64_t i, int lanes, int k) {
        const Vec v = first_lanes(load_lanes(s + i, lanes) - mean, lanes, 0);
        deviation[k] = fma(v, v, deviation[k]);
      });
      square = sum(deviation) / count;
      args.mean[row] = mean;
    }
    const float rstd = 1.0f / __builtin_sqrtf(square + args.eps);
    args.rstd[row] = rstd;
    Y* y = row_of<Y>(args.y, row);
    for_lanes(n, [&](int64_t i, int lanes) {
      Vec v = load_lanes(s + i, lanes);
      if constexpr (kCentered) {
        v = fma((v - mean) * rstd, load_lanes(weight + i, lanes), load_lanes(bias + i, lanes));
      } else {
        v = v * rstd * load_lanes(weight + i, lanes);
      }
      store_lanes(y + i, v, lanes, past);
      if (narrow) store_lanes(row_of<bf16>(args.y_narrow, row) + i, v, lanes);
    });
  }
  if (past) end_streams();
}

template <bool kCentered>
inline void norm_forward(const NormForwardArgs& args, const Threads& threads) {
  const Scratch scratch(2 * args.width * sizeof(float));
  float *weight = scratch.at<float>(0), *bias = weight + args.width;
  load_parameters(args.weight, 1, args.width, weight);
  if (kCentered) load_parameters(args.bias, 0, args.width, bias);
  with_type(args.x.dtype, [&](auto x) {
    with_optional_type(args.residual, [&](auto residual) {
      with_type(args.y.dtype, [&](auto y) {
        parallel_ranges(threads, args.rows, row_grain(args.width), [&](int64_t begin, int64_t end, int) {
          norm_forward_rows<kCentered, decltype(x), decltype(residual), decltype(y)>(args, weight, bias, begin, end);
        });
      });
    });
  });
}

// grad_weight and grad_bias: the sums over these rows.
template <bool kCentered, class G, class S, bool kGradSum, bool kNarrow>
BMF_FLATTEN inline void norm_backward_rows(const NormBackwardArgs& args, const float* weight, float* grad_weight,
                                           float* grad_bias, int64_t begin, int64_t end) {
  const int64_t n = args.width;
  const float count = static_cast<float>(n);
  const bool past = past_caches(args.grad.data, args.rows, n * sizeof(S), args.grad.stride * sizeof(S));
  const Dropping dropping(args.finish);
  const bool drops = args.finish.dropout > 0;
  for (int64_t i = 0; i < n; ++i) grad_weight[i] = 0;
  if (kCentered)
    for (int64_t i = 0; i < n; ++i) grad_bias[i] = 0;
  for (int64_t row = begin; row < end; ++row) {
    const G* grad_y = row_of<G>(args.grad_y, row);
    const S* s = row_of<S>(args.sum, row);
    const float rstd = args.rstd[row], mean = kCentered ? args.mean[row] : 0.0f;
    Vec dots[4] = {}, sums[4] = {};
    for_lanes_by_four(n, [&](int64_t i, int lanes, int k) {
      const Vec dy = load_lanes(grad_y + i, lanes), g = dy * load_lanes(weight + i, lanes);
      const Vec normed = (load_lanes(s + i, lanes) - mean) * rstd;
      dots[k] = fma(g, normed, dots[k]);
      store_lanes(grad_weight + i, fma(dy, normed, load_lanes(grad_weight + i, lanes)), lanes);
      if constexpr (kCentered) {
        sums[k] += g;
        store_lanes(grad_bias + i, load_lanes(grad_bias + i, lanes) + dy, lanes);
      }
    });
    const float dot = sum(dots) / count, mean_g = kCentered ? sum(sums) / count : 0.0f;
    S* grad = row_of<S>(args.grad, row);
    uint16_t keep[8];
    for_lanes(n, [&](int64_t i, int lanes) {
      const Vec g = load_lanes(grad_y + i, lanes) * load_lanes(weight + i, lanes);
      const Vec normed = (load_lanes(s + i, lanes) - mean) * rstd;
      Vec v = (g - normed * dot - mean_g) * rstd;
      if constexpr (kGradSum) v += load_lanes(row_of<S>(args.grad_sum, row) + i, lanes);
      store_lanes(grad + i, v, lanes, past);
      if constexpr (kNarrow) {
        if (drops) {
          if (i % kDropoutGroup == 0) dropping.choose(row, i / kDropoutGroup, keep);
          v = keep_at(v * dropping.scale, keep, i % kDropoutGroup);
        }
        store_lanes(row_of<bf16>(args.grad_narrow, row) + i, v, lanes);
      }
    });
  }
  if (past) end_streams();
}

constexpr int64_t kSummedRows = 256;  // sums over more rows are sums of such sums, which round less

template <bool kCentered>
inline void norm_backward(const NormBackwardArgs& args, const Threads& threads) {
  const int64_t padded = (args.width + 15) / 16 * 16;  // whole cache lines: threads do not share one
  const Scratch scratch((1 + 4 * threads.count) * padded * sizeof(float));
  float *weight = scratch.at<float>(0), *partial = weight + padded;
  load_parameters(args.weight, 1, args.width, weight);
  int used = 0;
  with_type(args.grad_y.dtype, [&](auto grad_y) {
    with_type(args.sum.dtype, [&](auto s) {
      with_bool(args.grad_sum.data != nullptr, [&](auto grad_sum) {
        with_bool(args.grad_narrow.data != nullptr, [&](auto narrow) {
          const auto rows = [&](int64_t begin, int64_t end, int thread) {
            float *sums = partial + 4 * thread * padded, *few = sums + 2 * padded;
            for (int64_t i = 0; i < 4 * padded; ++i) sums[i] = 0;
            for (int64_t row = begin; row < end; row += kSummedRows) {
              norm_backward_rows<kCentered, decltype(grad_y), decltype(s), grad_sum.value, narrow.value>(
                  args, weight, few, few + padded, row, row + kSummedRows < end ? row + kSummedRows : end);
              for (int64_t i = 0; i < (kCentered ? 2 : 1) * padded; ++i) sums[i] += few[i];
            }
          };
          used = parallel_ranges(threads, args.rows, row_grain(args.width), rows);
        });
      });
    });
  });
  const auto reduce = [&](const float* parts, float* out) {  // in the order of threads: the same bits every time
    for_lanes(args.width, [&](int64_t i, int lanes) {
      Vec v = {};
      for (int t = 0; t < used; ++t) v += load_lanes(parts + 4 * t * padded + i, lanes);
      store_lanes(out + i, v, lanes);
    });
  };
  reduce(partial, args.grad_weight);
  if (kCentered) reduce(partial + padded, args.grad_bias);
}

}  // namespace bmf::BMF_ISA
#endif
