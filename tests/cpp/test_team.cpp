// Team and parallel_shares: every task of every phase once, and before the next phase, however threads come.
#define BMF_ISA here
#include "core/team.h"

#include "testing.h"

using namespace testing;

namespace {

// The bodies one after the other, as a thread pool may run them inside of a parallel region.
Threads one_after_the_other(int count) {
  return {count, [](int n, void (*body)(int, void*), void* arg) {
            for (int i = 0; i < n; ++i) body(i, arg);
          }};
}

// Long enough for a leader that does not wait to be caught.
void work_a_little() {
  for (volatile int i = 0; i < 500;) i = i + 1;
}

void check_phases(const Threads& threads) {
  constexpr int64_t kPhases = 300, kMostTasks = 17;
  std::vector<int> times(kPhases * kMostTasks);
  std::vector<int64_t> last(kMostTasks);  // the phase in which a task was done
  bmf::here::with_team(threads, threads.count, [&](bmf::here::Team& team) {
    for (int64_t phase = 1; phase < kPhases; ++phase) {
      const int64_t tasks = 1 + phase % kMostTasks;
      team.run(tasks, [&](int64_t task, int thread) {
        CHECK(thread >= 0 && thread < threads.count);
        work_a_little();
        ++times[phase * kMostTasks + task];
        last[task] = phase;
      });
      for (int64_t task = 0; task < tasks; ++task) CHECK(last[task] == phase);
    }
  });
  for (int64_t phase = 1; phase < kPhases; ++phase)
    for (int64_t task = 0; task < kMostTasks; ++task)
      CHECK(times[phase * kMostTasks + task] == (task <= phase % kMostTasks));
}

void check_shares(const Threads& threads) {
  for (const int64_t n : {0, 1, 2, 7, 100}) {
    std::vector<int> times(n);
    bmf::here::parallel_shares(threads, n, [&](int64_t task, int thread) {
      CHECK(thread >= 0 && thread < threads.count);
      __atomic_fetch_add(&times[task], 1, __ATOMIC_RELAXED);
    });
    for (const int found : times) CHECK(found == 1);
  }
}

// The last thread comes first: it begins with its own share, and then does those of the others.
void check_order_of_shares() {
  const Threads backwards{3, [](int n, void (*body)(int, void*), void* arg) {
                            for (int i = n; i-- > 0;) body(i, arg);
                          }};
  std::vector<int64_t> order;
  bmf::here::parallel_shares(backwards, 7, [&](int64_t task, int thread) {
    CHECK(thread == 2);
    order.push_back(task);
  });
  CHECK((order == std::vector<int64_t>{4, 5, 6, 0, 1, 2, 3}));
}

}  // namespace

int main() {
  check_order_of_shares();
  for (const int count : {1, 2, 3, 70}) {
    context = std::to_string(count) + " threads";
    check_shares(threads(count));
    check_shares(one_after_the_other(count));
    if (count == 70) continue;
    check_phases(threads(count));
    context += ", one after the other";
    check_phases(one_after_the_other(count));
  }
  return result();
}
