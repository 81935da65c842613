// Which calls of attention Hopper's kernels take, and their grids. `launch` is as in attention_launch.h, and has
// besides processors(), 0 where there is no Hopper, and encode(map, Boxes), false where TMA does not take a tensor.
#pragma once
#include <algorithm>

#include "cuda/attention_backward_hopper.h"
#include "cuda/attention_forward_hopper.h"
#include "cuda/attention_launch.h"

namespace bmf::cuda {

// What a section of the schedule may walk over: of the second-level cache's 50 MB, what streams through it left aside.
constexpr int64_t kCacheBytes = 32 << 20;

inline bool for_hopper(const AttentionArgs& a) {
  return !needs_all(a) && a.query_starts.data == nullptr && a.head_dim % kChunk == 0 && a.head_dim <= kMostDim &&
         a.queries > 0 && a.keys > 0 && a.batches > 0 && a.heads > 0 && a.out.vectors;
}

inline Boxes boxes_of(const Operand& t, int64_t rows, int64_t heads, const AttentionArgs& a, int box_rows) {
  // A dimension of one element has a stride of no meaning, which TMA might refuse.
  const auto bytes = [](int64_t size, int64_t stride) { return size > 1 ? 2 * stride : kChunkBytes; };
  return {t.data,
          a.head_dim,
          rows,
          heads,
          a.batches,
          bytes(rows, t.row_stride),
          bytes(heads, t.head_stride),
          bytes(a.batches, t.batch_stride),
          box_rows};
}

// Of `rows` rows in each of `slices`; `together` slices walk over `walked` bytes. False: too much to count.
inline bool make_schedule(Schedule& s, int64_t rows, int64_t slices, int64_t together, int64_t walked, int processors,
                          bool last_first) {
  const int64_t tiles = (rows + kHopperRows - 1) / kHopperRows, items = tiles * slices;
  const int64_t fitting = std::min(slices, together * std::max<int64_t>(1, kCacheBytes / std::max<int64_t>(1, walked)));
  if (items > kFar) return false;
  s = {static_cast<int32_t>(tiles),
       static_cast<int32_t>(slices),
       static_cast<int32_t>(fitting),
       static_cast<int32_t>(items),
       static_cast<int32_t>(std::min<int64_t>(items, processors)),
       last_first};
  return true;
}

// Each returns whether its kernel took the call.
template <class T, class Launch>
bool run_forward_hopper(const AttentionArgs& a, Launch& launch) {
  const int processors = launch.processors();
  if (processors == 0 || !for_hopper(a)) return false;
  bool taken = false;
  with_dim(a.head_dim, [&]<int kDim>() {
    using Shape = HopperForwardShape<kDim>;
    static_assert(Shape::kSharedBytes <= kHopperSharedBytes);
    HopperForwardArgs args{a, {}, {}, {}, {}};
    const int64_t slices = int64_t{a.batches} * a.heads, key_heads = a.heads / a.group;
    taken = make_schedule(args.schedule, a.queries, slices, a.group, 4 * int64_t{a.keys} * kDim, processors,
                          a.right < a.keys) &&
            launch.encode(args.query, boxes_of(a.query, a.queries, a.heads, a, kHopperRows)) &&
            launch.encode(args.key, boxes_of(a.key, a.keys, key_heads, a, Shape::kKeys)) &&
            launch.encode(args.value, boxes_of(a.value, a.keys, key_heads, a, Shape::kKeys));
    if (taken)
      launch(attention_forward_hopper_kernel<T, kDim>,
             Grid{args.schedule.blocks, 1, 1, kHopperThreads, Shape::kSharedBytes}, args);
  });
  return taken;
}

template <class T, class Launch>
bool run_backward_hopper(const AttentionArgs& a, Launch& launch) {
  const int processors = launch.processors();
  if (processors == 0 || !for_hopper(a)) return false;
  if (!a.grad_query.vectors || !a.grad_key.vectors || !a.grad_value.vectors) return false;
  bool taken = false;
  with_dim(a.head_dim, [&]<int kDim>() {
    using Shape = HopperBackward<kDim>;
    static_assert(Shape::kSharedBytes <= kHopperSharedBytes && kTermRows % Shape::kRows == 0);
    HopperBackwardArgs query{a, {}, {}, {}, {}, {}}, key = query;
    const int64_t heads = a.heads, key_heads = a.heads / a.group, row_bytes = 4 * int64_t{kDim};
    taken = make_schedule(query.schedule, a.queries, a.batches * heads, a.group, a.keys * row_bytes, processors,
                          a.right < a.keys) &&
            make_schedule(key.schedule, a.keys, a.batches * key_heads, 1, a.group * a.queries * row_bytes, processors,
                          false);
    const auto encode = [&](TensorMap& kept, TensorMap& walked, const Operand& t, int64_t rows, int64_t of_heads) {
      taken = taken && launch.encode(kept, boxes_of(t, rows, of_heads, a, kHopperRows)) &&
              launch.encode(walked, boxes_of(t, rows, of_heads, a, Shape::kRows));
    };
    encode(query.kept, key.walked, a.query, a.queries, heads);
    encode(query.kept_other, key.walked_other, a.grad_out, a.queries, heads);
    encode(key.kept, query.walked, a.key, a.keys, key_heads);
    encode(key.kept_other, query.walked_other, a.value, a.keys, key_heads);
    if (!taken) return;
    const auto grid = [](const HopperBackwardArgs& args) {
      return Grid{args.schedule.blocks, 1, 1, kHopperThreads, Shape::kSharedBytes};
    };
    launch(attention_query_gradient_hopper_kernel<T, kDim>, grid(query), query);
    if constexpr (kDim > 128) {
      launch(attention_key_gradients_hopper_kernel<T, kDim, true, false>, grid(key), key);
      launch(attention_key_gradients_hopper_kernel<T, kDim, false, true>, grid(key), key);
    } else {
      launch(attention_key_gradients_hopper_kernel<T, kDim, true, true>, grid(key), key);
    }
  });
  return taken;
}

}  // namespace bmf::cuda
