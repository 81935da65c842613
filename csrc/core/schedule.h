// The order in which tasks of unequal size are handed out: the largest first, so that the small ones even out the ends.
#pragma once
#include <cstdint>

namespace bmf {

// order[0, n): the tasks by falling work; equal ones keep their order.
void order_by_work(const int64_t* work, int64_t n, int64_t* order);

// Told of every list of tasks that is put in order; null but in a test of how even they are.
extern void (*observe_work)(const int64_t* work, int64_t n);

// Cuts [0, n) into `parts` runs of about equal work: first[0, parts], with first[0] = 0 and first[parts] = n.
void cut_evenly(const int64_t* work, int64_t n, int64_t parts, int64_t* first);

// A task larger than this share of all work is worth dividing: with tasks of up to total / (threads kTasksPerThread),
// the busiest thread has at most 1 / kTasksPerThread more than the mean.
constexpr int64_t kTasksPerThread = 10;

}  // namespace bmf
