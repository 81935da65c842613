#include "cpu/embedding.h"

#include "core/scratch.h"
#include "core/simd.h"

namespace bmf::BMF_ISA {
namespace {

constexpr int64_t kAhead = 4;  // rows asked for before they are copied: they follow no order that hardware would see

}  // namespace

void embedding_forward(const EmbeddingArgs& args, const Threads& threads) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    const T* weight = static_cast<const T*>(args.weight.data);
    T* out = static_cast<T*>(args.out);
    const int64_t bytes = args.width * static_cast<int64_t>(sizeof(T));
    const auto row = [&](int64_t i) {
      return reinterpret_cast<const char*>(weight + args.token[i] * args.weight.stride);
    };
    parallel_ranges(threads, args.tokens, row_grain(args.width), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        if (i + kAhead < end)
          for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row(i + kAhead) + at, 0, 2);
        __builtin_memcpy(out + i * args.width, row(i), static_cast<size_t>(bytes));
      }
    });
  });
}

void embedding_backward(const EmbeddingGradArgs& args, const Threads& threads) {
  // The tokens' positions in order of their classes, each class's in ascending order: class v has [first[v], first[v +
  // 1]).
  const Scratch sorted((args.classes + 1 + args.tokens) * sizeof(int64_t));
  int64_t *first = sorted.at<int64_t>(0), *position = first + args.classes + 1;
  for (int64_t v = 0; v <= args.classes; ++v) first[v] = 0;
  for (int64_t i = 0; i < args.tokens; ++i) ++first[args.token[i] + 1];
  for (int64_t v = 0; v < args.classes; ++v) first[v + 1] += first[v];
  for (int64_t i = 0; i < args.tokens; ++i) position[first[args.token[i]]++] = i;
  for (int64_t v = args.classes; v > 0; --v) first[v] = first[v - 1];
  first[0] = 0;

  // Of one task: few classes still make even shares, and frequent ones are divided by columns.
  constexpr int64_t kColumns = 256, kMostClasses = 64, kFewestTasks = 32;
  const int64_t some = args.classes / kFewestTasks;
  const int64_t task_classes = some < 1 ? 1 : some < kMostClasses ? some : kMostClasses;
  const int64_t column_blocks = (args.width + kColumns - 1) / kColumns;
  const int64_t class_blocks = (args.classes + task_classes - 1) / task_classes;
  with_type(args.dtype, [&](auto out_type) {
    using W = decltype(out_type);
    with_type(args.grad_out.dtype, [&](auto grad_type) {
      using G = decltype(grad_type);
      const G* grad = static_cast<const G*>(args.grad_out.data);
      W* out = static_cast<W*>(args.grad_weight);
      const bool past = past_caches(out, args.classes, args.width * sizeof(W), args.width * sizeof(W));
      parallel_tasks(threads, class_blocks * column_blocks, [&](int64_t task, int) {
        const int64_t from = task % column_blocks * kColumns, from_class = task / column_blocks * task_classes;
        const int64_t columns = args.width - from < kColumns ? args.width - from : kColumns;
        const auto sum = [&](auto registers, int64_t v, int64_t col, int lanes) {
          constexpr int kRegisters = registers;
          Vec total[kRegisters] = {};
          for (int64_t i = first[v]; i < first[v + 1]; ++i)
            for (int r = 0; r < kRegisters; ++r)
              total[r] += load_lanes(grad + position[i] * args.grad_out.stride + col + r * kLanes, lanes);
          for (int r = 0; r < kRegisters; ++r)
            store_lanes(out + v * args.width + col + r * kLanes, total[r], lanes, past);
        };
        for (int64_t v = from_class; v < from_class + task_classes && v < args.classes; ++v) {
          constexpr std::integral_constant<int, 8> kAtOnce{};  // registers, whose sums do not wait for each other
          int64_t c = 0;
          for (; c + kAtOnce * kLanes <= columns; c += kAtOnce * kLanes) sum(kAtOnce, v, from + c, kLanes);
          for_lanes(columns - c,
                    [&](int64_t i, int lanes) { sum(std::integral_constant<int, 1>{}, v, from + c + i, lanes); });
        }
        if (past) end_streams();
      });
    });
  });
}

}  // namespace bmf::BMF_ISA
