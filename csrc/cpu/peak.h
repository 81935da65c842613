// The machine's fused multiply-add rate, measured: what "share of peak" in the benchmarks is a share of.
#pragma once
#include "core/isa.h"
#include "core/threads.h"
#include "core/types.h"

namespace bmf {

struct PeakArgs {
  Dtype dtype;         // of the multiplied numbers; the sums are float32
  int64_t iterations;  // of the inner loop, on each thread
  double* flops;       // out: operations done by all threads together
};

}  // namespace bmf

BMF_DECLARE_KERNEL(peak, PeakArgs)
