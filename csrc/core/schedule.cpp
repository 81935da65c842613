#include "core/schedule.h"

#include <algorithm>
#include <numeric>

namespace bmf {

void (*observe_work)(const int64_t* work, int64_t n) = nullptr;

void order_by_work(const int64_t* work, int64_t n, int64_t* order) {
  if (observe_work) observe_work(work, n);
  std::iota(order, order + n, int64_t{0});
  std::stable_sort(order, order + n, [&](int64_t a, int64_t b) { return work[a] > work[b]; });
}

void cut_evenly(const int64_t* work, int64_t n, int64_t parts, int64_t* first) {
  const int64_t total = std::accumulate(work, work + n, int64_t{0});
  int64_t done = 0, at = 0;
  first[0] = 0;
  for (int64_t part = 1; part < parts; ++part) {
    // The border nearest to an equal share, with an element left for each part to come if there are so many.
    const int64_t share = total * part / parts;
    while (at < n && done + work[at] / 2 < share) done += work[at++];
    first[part] = at;
  }
  first[parts] = n;
}

}  // namespace bmf
