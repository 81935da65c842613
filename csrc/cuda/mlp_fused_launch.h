// The grids of the fused MLP's kernels, and how they share out a block's memory. `launch(kernel, Grid, args)` runs one
// of them and `launch.resident(kernel, threads, bytes)` says how many of its blocks a GPU holds at once: on a GPU
// (mlp_fused.cu), or emulated (tests/cpp).
#pragma once
#include "cuda/mlp_fused_backward.h"
#include "cuda/mlp_fused_forward.h"

namespace bmf::cuda {

struct FusedGrid {
  int64_t x, y;
  int threads, shared_bytes;
};

// f.template operator()<T, width>() with the call's dtype and width.
template <class F>
void with_network(const MlpFusedArgs& a, const F& f) {
  const auto with_width = [&]<class T>() {
    a.width == 64 ? f.template operator()<T, 64>() : f.template operator()<T, 128>();
  };
  a.dtype == Half::bfloat16 ? with_width.template operator()<bf16>() : with_width.template operator()<f16>();
}

// What shared memory of `bytes` holds beside the tiles of rows, no more than is used; or why that is not enough.
template <class Shape>
const char* share_memory(MlpFusedArgs& a, int used, int matrices, int bytes) {
  const int left = bytes - Shape::kTilesBytes;
  a.slots = left / Shape::kSlotBytes < used ? left / Shape::kSlotBytes : used;
  a.kept = 0;
  if (left < 0 || a.slots < (used < Shape::kFewestSlots ? used : Shape::kFewestSlots))
    return "a block has too little shared memory on this GPU";
  if constexpr (requires { Shape::kSumsBytes; }) {
    const int kept = (left - a.slots * Shape::kSlotBytes) / Shape::kSumsBytes;
    a.kept = kept < matrices ? kept : matrices;
  }
  return nullptr;
}
inline int blocks_for(int64_t rows, int rows_of_a_block, int64_t most) {
  const int64_t tiles = (rows + rows_of_a_block - 1) / rows_of_a_block;
  return static_cast<int>(tiles < most ? tiles : most);
}

// bytes: the most shared memory that a block may have.
template <class T, int kWidth, class Launch>
const char* run_fused_forward(MlpFusedArgs a, int bytes, Launch& launch) {
  using Shape = FusedForwardShape<kWidth>;
  const int matrices = Network<kWidth>(a).count;
  if (const char* why = share_memory<Shape>(a, matrices, matrices, bytes)) return why;
  const int shared_bytes = Shape::kTilesBytes + a.slots * Shape::kSlotBytes;
  const auto kernel = mlp_fused_forward_kernel<T, kWidth>;
  a.blocks = blocks_for(a.rows, Shape::kRows, launch.resident(kernel, Shape::kThreads, shared_bytes));
  launch(kernel, FusedGrid{a.blocks, 1, Shape::kThreads, shared_bytes}, a);
  return nullptr;
}

// A block for each of `processors`, which has its shared memory for itself.
template <int kWidth>
const char* plan_fused_backward(MlpFusedArgs& a, int bytes, int processors) {
  using Shape = FusedBackwardShape<kWidth>;
  const int matrices = Network<kWidth>(a).count, used = a.grad_x != nullptr ? matrices : a.hidden;
  if (const char* why = share_memory<Shape>(a, used, a.grad_weights != nullptr ? matrices : 0, bytes)) return why;
  a.blocks = blocks_for(a.rows, Shape::kRows, processors);
  a.sums_count = int64_t{a.blocks} * matrices * (Shape::kSumsBytes / static_cast<int>(sizeof(float)));
  return nullptr;
}

template <class T, int kWidth, class Launch>
void run_fused_backward(const MlpFusedArgs& a, Launch& launch) {
  using Shape = FusedBackwardShape<kWidth>;
  const int shared_bytes = Shape::kTilesBytes + a.slots * Shape::kSlotBytes + a.kept * Shape::kSumsBytes;
  launch(mlp_fused_backward_kernel<T, kWidth>, FusedGrid{a.blocks, 1, Shape::kThreads, shared_bytes}, a);
  using Sum = FusedSumShape<kWidth>;
  if (a.grad_weights != nullptr)
    launch(mlp_fused_sum_kernel<kWidth>,
           FusedGrid{Sum::kBlocks, Network<kWidth>(a).count, Sum::kThreads, Sum::kSharedBytes}, a);
}

}  // namespace bmf::cuda
