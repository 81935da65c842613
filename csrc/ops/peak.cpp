// bigmodel_fast::peak_flops: how many multiply-add operations (two each) a given loop does; the caller takes the time.
#include "cpu/peak.h"

#include "ops/common.h"

namespace bmf {
namespace {

double peak_flops(bool bfloat16, int64_t iterations) {
  double flops = 0;
  PeakArgs args{bfloat16 ? Dtype::bfloat16 : Dtype::float32, iterations, &flops};
  peak(args, torch_threads());
  return flops;
}

}  // namespace
}  // namespace bmf

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_fast, m) { m.def("peak_flops(bool bfloat16, int iterations) -> float"); }
STABLE_TORCH_LIBRARY_IMPL(bigmodel_fast, CompositeExplicitAutograd, m) {
  m.impl("peak_flops", TORCH_BOX(&bmf::peak_flops));
}
