// How evenly tasks of unequal size keep 8, 32 and 96 threads busy: the busiest has at most a tenth more than the mean.
#include "core/schedule.h"

#include "cpu/attention.h"
#include "testing.h"

using namespace testing;

namespace {

// Largest share over mean, when each thread takes the next task in order as soon as it is free.
double imbalance(const std::vector<int64_t>& work, int threads) {
  std::vector<int64_t> order(work.size()), busy(threads, 0);
  bmf::order_by_work(work.data(), static_cast<int64_t>(work.size()), order.data());
  for (const int64_t task : order) *std::min_element(busy.begin(), busy.end()) += work[task];
  int64_t total = 0;
  for (const int64_t w : work) total += w;
  return static_cast<double>(*std::max_element(busy.begin(), busy.end())) * threads / static_cast<double>(total);
}

// The tasks that attention itself hands out, forward and backward, were there so many threads.
std::vector<std::vector<int64_t>> attention_tasks(const std::vector<int64_t>& lengths, int64_t heads, int64_t key_heads,
                                                  bool causal, int count) {
  constexpr int64_t kWidth = 1;  // the work lists count pairs of queries and keys, whatever they cost
  static std::vector<std::vector<int64_t>> lists;
  lists.clear();
  bmf::observe_work = [](const int64_t* work, int64_t n) { lists.emplace_back(work, work + n); };
  const Threads none{count, [](int, void (*)(int, void*), void*) {}};  // plans are made, and not carried out
  int64_t rows = 0;
  std::vector<bmf::AttentionSequence> sequences;
  for (const int64_t length : lengths) {
    sequences.push_back({0, rows, rows, length, length, 0});
    rows += length;
  }
  const Array query(Dtype::bfloat16, rows * heads * kWidth), key(Dtype::bfloat16, rows * key_heads * kWidth);
  std::vector<bmf::RowStats> stats(static_cast<size_t>(heads * rows));
  bmf::AttentionArgs args{};
  args.dtype = Dtype::bfloat16;
  args.heads = heads;
  args.key_heads = key_heads;
  args.head_dim = kWidth;
  args.sequences = sequences.data();
  args.sequence_count = std::ssize(sequences);
  args.query = args.out = args.grad_out = args.grad_query = {query.data(), 0, kWidth, heads * kWidth};
  args.key = args.value = args.grad_key = args.grad_value = {key.data(), 0, kWidth, key_heads * kWidth};
  args.stats = stats.data();
  args.stats_rows = rows;
  args.scale = 1;
  args.left = int64_t{1} << 30;
  args.right = causal ? 0 : int64_t{1} << 30;
  bmf::attention_forward(args, none);
  bmf::attention_backward(args, none);
  bmf::observe_work = nullptr;
  return lists;
}

void check_order() {
  const std::vector<int64_t> work{3, 9, 3, 0, 9};
  std::vector<int64_t> order(work.size());
  bmf::order_by_work(work.data(), 5, order.data());
  CHECK((order == std::vector<int64_t>{1, 4, 0, 2, 3}));
}

void check_balance() {
  for (const int threads : {8, 32, 96}) {
    CHECK(imbalance(std::vector<int64_t>(10 * threads, 7), threads) == 1.0);
    std::vector<int64_t> ragged;  // 17 to 2,033 tokens
    for (int64_t i = 0; i < 64; ++i) ragged.push_back(17 + i * 32);
    const std::vector<int64_t> even(8, 2048);
    struct Batch {
      const char* name;
      std::vector<int64_t> lengths;
      int64_t heads, key_heads;
      bool causal;
    };
    for (const Batch& batch : {Batch{"causal", even, 16, 16, true}, Batch{"causal, shared keys", even, 16, 4, true},
                               Batch{"full", even, 16, 16, false}, Batch{"ragged", ragged, 8, 8, true}}) {
      context = std::to_string(threads) + " threads, " + batch.name;
      const auto lists = attention_tasks(batch.lengths, batch.heads, batch.key_heads, batch.causal, threads);
      CHECK(lists.size() == 2);
      for (const std::vector<int64_t>& work : lists) {
        const double most = imbalance(work, threads);
        CHECK(most <= 1.1);
        if (most > 1.1) std::fprintf(stderr, "  %.3f of the mean, %zu tasks\n", most, work.size());
      }
    }
  }
}

// Backward divides a causal head's key blocks, of which the first are seen by the most queries, into runs.
void check_cuts() {
  std::vector<int64_t> work;
  for (int64_t key = 0; key < 64; ++key) work.push_back((64 - key) * 128 * 128);
  for (const int64_t parts : {1, 2, 7, 24}) {
    context = std::to_string(parts) + " parts";
    std::vector<int64_t> first(parts + 1), share(parts, 0);
    bmf::cut_evenly(work.data(), 64, parts, first.data());
    CHECK(first[0] == 0);
    CHECK(first[parts] == 64);
    int64_t total = 0;
    for (int64_t part = 0; part < parts; ++part) {
      CHECK(first[part] <= first[part + 1]);
      for (int64_t i = first[part]; i < first[part + 1]; ++i) share[part] += work[i];
      total += share[part];
    }
    // A run is at most one block larger than an equal share.
    for (const int64_t s : share) CHECK(s <= total / parts + work[0]);
  }
}

}  // namespace

int main() {
  check_order();
  check_balance();
  check_cuts();
  return result();
}
