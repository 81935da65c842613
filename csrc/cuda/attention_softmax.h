// Softmax over keys that come tile by tile (Milakov and Gimelshein 2018): a lane's share of its rows' largest logits
// and sums, as the sums of a warp's products lie.
#pragma once
#include "cuda/attention.h"
#include "cuda/tile.h"

namespace bmf::cuda {

template <int kStrips>
struct OnlineSoftmax {
  float top[kStrips][2], total[kStrips][2] = {};  // logits to base 2

  BMF_DEVICE OnlineSoftmax() {
    for (auto& strip : top) strip[0] = strip[1] = -__builtin_huge_valf();
  }

  // Logits over `factor` become weights, and what was summed with earlier ones is to shrink.
  template <int kBlocks>
  BMF_DEVICE void add(float (&weights)[kStrips][kBlocks][kPerLane], float factor, float (&shrink)[kStrips][2]) {
    constexpr float kNone = -__builtin_huge_valf();
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = kNone;
#pragma unroll
        for (int n = 0; n < kBlocks; ++n)
          most = maximum(most, maximum(weights[s][n][2 * half], weights[s][n][2 * half + 1]));
        most = maximum(most, shuffle_xor(most, 1));
        most = maximum(most, shuffle_xor(most, 2));
        const float risen = maximum(top[s][half], most * factor), base = risen == kNone ? 0.0f : risen;
        shrink[s][half] = exp2(top[s][half] - base);
        top[s][half] = risen;
        total[s][half] *= shrink[s][half];
#pragma unroll
        for (int n = 0; n < kBlocks; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            weights[s][n][i] = exp2(weights[s][n][i] * factor - base);
            total[s][half] += weights[s][n][i];
          }
      }
  }

  // A row's statistics, and what its sums are to be multiplied by if dropout kept `kept` of the weights.
  BMF_DEVICE RowStats finish(int strip, int half, float kept, float& inverse) {
    float sum = total[strip][half];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const bool any = sum != 0;
    inverse = any ? 1.0f / (sum * kept) : 0.0f;
    return {any ? top[strip][half] + log2(sum) : __builtin_huge_valf(), any ? 1.0f : 0.0f};
  }
};

// Each row of a lane's sums times a number of its own.
template <int kStrips, int kBlocks>
BMF_DEVICE void scale_rows(float (&sums)[kStrips][kBlocks][kPerLane], const float (&by)[kStrips][2]) {
#pragma unroll
  for (int s = 0; s < kStrips; ++s)
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) sums[s][n][i] *= by[s][i / 2];
}

}  // namespace bmf::cuda
