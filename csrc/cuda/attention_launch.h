// Which kernels a call of attention takes, and their grids. `launch(kernel, Grid)` runs one of them: on a GPU
// (attention_launch.cuh), or emulated (tests/cpp).
#pragma once
#include "cuda/attention_backward.h"
#include "cuda/attention_bias.h"
#include "cuda/attention_forward.h"

namespace bmf::cuda {

// Of a block, on all GPUs from sm_80 on (sm_86 and sm_89 have least).
constexpr int kMostSharedBytes = 99 << 10;

struct Grid {
  int64_t x, y, z;
  int threads, shared_bytes;
};

// f.template operator()<columns>() for the head dimension as tiles have it.
template <class F>
void with_dim(int head_dim, const F& f) {
  if (head_dim <= 64)
    f.template operator()<64>();
  else if (head_dim <= 128)
    f.template operator()<128>();
  else
    f.template operator()<256>();
}

template <class T, class Launch>
void run_forward(const AttentionArgs& a, Launch& launch) {
  with_dim(a.head_dim, [&]<int kDim>() {
    const auto run = [&]<bool kFull>() {
      using Shape = ForwardShape<kDim, kFull>;
      static_assert(Shape::kSharedBytes <= kMostSharedBytes);
      launch(attention_forward_kernel<T, kDim, kFull>,
             Grid{blocks_of(a, a.queries, Shape::kQueries), a.heads, 1, Shape::kThreads, Shape::kSharedBytes});
    };
    needs_all(a) ? run.template operator()<true>() : run.template operator()<false>();
  });
}

// Backward's first kernel; the others follow it.
template <class T, class Launch>
void run_terms(const AttentionArgs& a, Launch& launch) {
  launch(attention_terms_kernel<T>,
         Grid{int64_t{a.batches} * (a.term_rows / TermsShape::kRows), a.heads, 1, TermsShape::kThreads, 0});
}

template <class T, class Launch>
void run_backward(const AttentionArgs& a, Launch& launch) {
  with_dim(a.head_dim, [&]<int kDim>() {
    const auto run = [&]<bool kFull>() {
      using Query = QueryGradientShape<kDim, kFull>;
      using Key = KeyGradientsShape<kDim, kFull>;
      static_assert(Query::kSharedBytes <= kMostSharedBytes && Key::kSharedBytes <= kMostSharedBytes);
      launch(attention_query_gradient_kernel<T, kDim, kFull>,
             Grid{blocks_of(a, a.queries, Query::kQueries), a.heads, 1, Query::kThreads, Query::kSharedBytes});
      launch(attention_key_gradients_kernel<T, kDim, kFull>,
             Grid{blocks_of(a, a.keys, Key::kKeys), a.heads / a.group, Key::kBlocks, Key::kThreads, Key::kSharedBytes});
    };
    needs_all(a) ? run.template operator()<true>() : run.template operator()<false>();
    if (a.bias.grad == nullptr) return;
    using Shape = BiasGradientShape<kDim>;
    static_assert(Shape::kSharedBytes <= kMostSharedBytes);
    const BiasTiles<kDim> tiles(a);
    launch(attention_bias_gradient_kernel<T, kDim>,
           Grid{int64_t{tiles.own_queries} * tiles.own_keys * tiles.own_heads * tiles.own_batches, 1, 1,
                Shape::kThreads, Shape::kSharedBytes});
  });
}

}  // namespace bmf::cuda
