// attention's kernels for Hopper, forward and backward, as test_attention_cuda.cpp has the portable ones; and which
// calls they leave to those.
#include "attention_cuda.h"
// What they are made of.
#include "cuda/attention_hopper_launch.h"

using namespace attention_test;

namespace {

struct Kernels {
  template <class T>
  static bool forward(const bmf::cuda::AttentionArgs& args, Launch& launch) {
    return bmf::cuda::run_forward_hopper<T>(args, launch);
  }
  template <class T>
  static bool backward(const bmf::cuda::AttentionArgs& args, Launch& launch) {
    return bmf::cuda::run_backward_hopper<T>(args, launch);
  }
};

const Case kCases[] = {
    {.name = "plain", .batches = 2, .queries = 130, .keys = 300, .width = 64, .processors = 3},
    {.name = "causal, shared keys",
     .heads = 4,
     .key_heads = 2,
     .queries = 200,
     .keys = 278,
     .width = 128,
     .right = 0,
     .processors = 3},
    {.name = "rows without keys", .queries = 300, .keys = 150, .width = 40, .right = 0, .processors = 2},
    {.name = "window", .queries = 290, .keys = 400, .width = 64, .left = 90, .right = 3, .processors = 1},
    {.name = "256 wide", .queries = 150, .keys = 200, .width = 208, .right = 0, .processors = 1},
    {.name = "lengths",
     .batches = 4,
     .queries = 40,
     .keys = 200,
     .width = 96,
     .lengths = {200, 0, 33, 127},
     .gap = 8,
     .processors = 1},
    {.name = "one query, one key", .queries = 1, .keys = 1, .width = 8, .processors = 5},
};

// What the portable kernels are left with.
void test_refused() {
  context = "refused";
  int64_t starts[2] = {0, 64};
  alignas(16) static uint16_t memory[64 * 64 * 4];
  static bmf::cuda::RowStats stats[64];
  bmf::cuda::AttentionArgs plain{};
  plain.heads = plain.group = plain.batches = plain.sequences = 1;
  plain.head_dim = plain.queries = plain.keys = 64;
  plain.scale = 1;
  plain.left = plain.right = bmf::cuda::kFar;
  plain.query = plain.key = plain.value = plain.out = bmf::cuda::with_vectors({memory, 4096, 64, 64, false});
  plain.stats = stats;
  std::memset(memory, 0, sizeof memory);
  const auto taken = [](const bmf::cuda::AttentionArgs& args, int processors) {
    Launch launch{args, emulator::Order::first, processors};
    return Kernels::forward<bmf::bf16>(args, launch);
  };
  CHECK(taken(plain, 1));
  CHECK(!taken(plain, 0));
  const auto refused = [&](const std::function<void(bmf::cuda::AttentionArgs&)>& change) {
    bmf::cuda::AttentionArgs args = plain;
    change(args);
    return !taken(args, 1);
  };
  CHECK(refused([](auto& a) { a.softcap = 1; }));
  CHECK(refused([](auto& a) { a.scale = -1; }));
  CHECK(refused([](auto& a) { a.dropout = 0.5f; }));
  CHECK(refused([](auto& a) { a.bias.kind = BiasKind::boolean; }));
  CHECK(refused([](auto& a) { a.head_dim = 60; }));
  CHECK(refused([](auto& a) { a.queries = 0; }));
  CHECK(refused([](auto& a) { a.keys = 0; }));
  CHECK(refused([](auto& a) { a.query.row_stride = 65; }));  // TMA's own refusal
  CHECK(refused([](auto& a) { a.value.data = memory + 1; }));
  CHECK(refused([](auto& a) { a.out = bmf::cuda::with_vectors({memory + 1, 4096, 64, 64, false}); }));
  CHECK(refused([&](auto& a) { a.query_starts = a.key_starts = {starts, true}; }));
}

// Each item once, in sections that are of the size asked for, longest tiles first.
void test_schedule() {
  context = "schedule";
  for (const bool last_first : {false, true})
    for (const int64_t slices : {1, 6, 14})
      for (const int64_t walked : {int64_t{1} << 20, int64_t{8} << 20, int64_t{1} << 30}) {
        bmf::cuda::Schedule s{};
        CHECK(bmf::cuda::make_schedule(s, 300, slices, 2, walked, 4, last_first));
        CHECK(s.tiles == 3 && s.items == 3 * slices && s.blocks == std::min<int64_t>(4, s.items));
        CHECK(s.together == std::min(slices, walked < 1 << 21 ? slices : walked < 1 << 24 ? 8 : 2));
        std::vector<int> seen(static_cast<size_t>(s.items));
        for (int i = 0; i < s.items; ++i) {
          const bmf::cuda::Item item = bmf::cuda::item_of(s, i);
          CHECK(0 <= item.tile && item.tile < s.tiles && 0 <= item.slice && item.slice < s.slices);
          ++seen[static_cast<size_t>(item.tile * s.slices + item.slice)];
          CHECK(i > 0 || item.tile == (last_first ? 2 : 0));
          CHECK(item.slice / s.together == i / (s.tiles * s.together));
        }
        CHECK(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
      }
  bmf::cuda::Schedule s{};
  CHECK(!bmf::cuda::make_schedule(s, int64_t{1} << 29, 1 << 10, 1, 1, 4, false));
}

}  // namespace

int main() {
  test_refused();
  test_schedule();
  int i = 0;
  for (const Case& c : kCases) {
    const auto order = static_cast<emulator::Order>(i % 3);
    Test<bmf::bf16, Kernels>(c).run(order);
    if (i++ % 2 == 0)
      Test<bmf::cuda::f16, Kernels>(c).run(order);  // the same code but for rounding and the product's name
  }
  return result();
}
