// attention's portable CUDA kernels, forward and backward, as csrc/cuda has them, on an emulated GPU (cuda_emulator.h):
// every feature against plain loops in double, in several orders of the threads. What it cannot show is how fast they
// are.
#include "attention_cuda.h"

using namespace attention_test;

namespace {

struct Kernels {
  template <class T>
  static bool forward(const bmf::cuda::AttentionArgs& args, Launch& launch) {
    bmf::cuda::run_forward<T>(args, launch);
    return true;
  }
  template <class T>
  static bool backward(const bmf::cuda::AttentionArgs& args, Launch& launch) {
    bmf::cuda::run_backward<T>(args, launch);
    return true;
  }
};

const Case kCases[] = {
    {.name = "one query, one key", .queries = 1, .keys = 1, .width = 1},
    {.name = "plain", .batches = 2, .heads = 2, .key_heads = 2, .queries = 70, .keys = 130, .width = 64},
    {.name = "causal, shared keys", .heads = 4, .key_heads = 2, .queries = 67, .keys = 131, .width = 64, .right = 0},
    {.name = "rows without keys", .queries = 150, .keys = 40, .width = 40, .right = 0},
    {.name = "window", .queries = 190, .keys = 200, .width = 16, .left = 50, .right = 3},
    {.name = "128 wide, causal", .queries = 70, .keys = 70, .width = 128, .right = 0},
    {.name = "odd width and strides", .heads = 2, .key_heads = 1, .queries = 33, .keys = 65, .width = 83, .gap = 3},
    {.name = "256 wide", .heads = 2, .key_heads = 1, .queries = 20, .keys = 37, .width = 256, .right = 0},
    {.name = "lengths", .batches = 3, .queries = 40, .keys = 70, .width = 24, .lengths = {70, 0, 33}},
    {.name = "no keys", .queries = 3, .keys = 0},
    {.name = "no queries", .queries = 0, .keys = 3},
    {.name = "packed",
     .heads = 2,
     .key_heads = 1,
     .width = 32,
     .right = 0,
     .packed = {{3, 3}, {70, 90}, {0, 5}, {9, 0}, {65, 20}}},
    {.name = "softcap", .queries = 40, .keys = 50, .width = 64, .softcap = 1.5f},
    {.name = "negative scale", .queries = 20, .keys = 30, .width = 32, .scale = -0.3f},
    {.name = "slopes", .heads = 2, .key_heads = 1, .queries = 50, .keys = 80, .width = 64, .right = 0, .alibi = true},
    {.name = "bias", .heads = 2, .key_heads = 2, .queries = 70, .keys = 40, .width = 32, .bias = BiasKind::float32},
    {.name = "bias of all rows",
     .batches = 2,
     .heads = 2,
     .key_heads = 2,
     .queries = 70,
     .keys = 40,
     .width = 32,
     .bias = BiasKind::bfloat16,
     .same_row = true},
    {.name = "bias of all batches and heads",
     .batches = 2,
     .heads = 2,
     .key_heads = 1,
     .queries = 20,
     .keys = 40,
     .width = 80,
     .right = 0,
     .bias = BiasKind::float16,
     .same_batch = true,
     .same_head = true,
     .lengths = {40, 21}},
    {.name = "mask",
     .batches = 2,
     .heads = 2,
     .key_heads = 2,
     .queries = 30,
     .keys = 70,
     .width = 64,
     .bias = BiasKind::boolean,
     .same_head = true},
    {.name = "dropout",
     .heads = 2,
     .key_heads = 1,
     .queries = 40,
     .keys = 300,
     .width = 64,
     .left = 100,
     .right = 0,
     .dropout = 0.3f},
    {.name = "everything",
     .batches = 2,
     .heads = 2,
     .key_heads = 1,
     .queries = 70,
     .keys = 150,
     .width = 96,
     .left = 90,
     .right = 0,
     .softcap = 2,
     .dropout = 0.2f,
     .alibi = true,
     .bias = BiasKind::float32,
     .same_batch = true,
     .same_key = true,
     .lengths = {150, 77},
     .gap = 1},
    {.name = "everything, 256 wide",
     .queries = 20,
     .keys = 40,
     .width = 200,
     .right = 0,
     .softcap = 2,
     .dropout = 0.2f,
     .alibi = true,
     .bias = BiasKind::float32},
};

}  // namespace

int main() {
  int i = 0;
  for (const Case& c : kCases) {
    const auto order = static_cast<emulator::Order>(i % 3);
    Test<bmf::bf16, Kernels>(c).run(order);
    if (i++ % 2 == 0)
      Test<bmf::cuda::f16, Kernels>(c).run(order);  // the same code but for rounding and the product's name
  }
  return result();
}
