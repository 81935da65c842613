// rotary: every pair (a, b) = (t[i], t[i + D/2]) of a head of query or key becomes
//   (a cos[i] - b sin[i],  b cos[i + D/2] + a sin[i + D/2]),
// and in the inverse (transposed) direction, which is the gradient,
//   (a cos[i] + b sin[i + D/2],  b cos[i + D/2] - a sin[i]).
//
// query, key: [batch, heads, sequence, D] with any strides but the last; the outputs lie in memory as
// [batch, sequence, heads, D]. One position's cos and sin serve all heads of both, so each byte of query and key is
// read and written once.
#pragma once
#include "core/isa.h"
#include "core/threads.h"
#include "core/types.h"

namespace bmf {

struct RotaryOperand {
  const void* in;
  void* out;
  int64_t heads, batch_stride, head_stride, sequence_stride;  // of `in`, in elements
  Dtype dtype;
};

struct RotaryTable {
  const void* data;
  int64_t batch_stride, sequence_stride;
};

struct RotaryArgs {
  int64_t batch, sequence, half;  // half: D / 2
  RotaryOperand query, key;
  RotaryTable cos, sin;
  Dtype table_dtype;
  bool inverse;
};

}  // namespace bmf

BMF_DECLARE_KERNEL(rotary, RotaryArgs)
