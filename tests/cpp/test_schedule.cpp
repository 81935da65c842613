// How evenly tasks of unequal size keep 8, 32 and 96 threads busy: the busiest has at most a tenth more than the mean.
#include "core/schedule.h"
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

// Pairs of a causal sequence's blocks of queries, each with the keys up to it.
void add_causal_blocks(int64_t length, int64_t block, std::vector<int64_t>& work) {
  for (int64_t row = 0; row < length; row += block) {
    const int64_t end = std::min(length, row + block);
    work.push_back((end * (end + 1) - row * (row + 1)) / 2);
  }
}

void check_order() {
  const std::vector<int64_t> work{3, 9, 3, 0, 9};
  std::vector<int64_t> order(work.size());
  bmf::order_by_work(work.data(), 5, order.data());
  CHECK((order == std::vector<int64_t>{1, 4, 0, 2, 3}));
}

void check_balance() {
  for (const int threads : {8, 32, 96}) {
    context = std::to_string(threads) + " threads";
    std::vector<int64_t> causal, ragged;
    for (int head = 0; head < 16; ++head) add_causal_blocks(4096, 96, causal);  // of forward: blocks of 96 queries
    CHECK(imbalance(causal, threads) <= 1.1);
    for (int64_t i = 0; i < 64; ++i)  // sequences of 17 to 2,033 tokens, 8 heads each
      for (int head = 0; head < 8; ++head) add_causal_blocks(17 + i * 32, 96, ragged);
    CHECK(imbalance(ragged, threads) <= 1.1);
    CHECK(imbalance(std::vector<int64_t>(10 * threads, 7), threads) == 1.0);
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
