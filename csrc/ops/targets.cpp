// bigmodel_fast::find_bad_target, which the losses' checks ask before any kernel runs.
#include "ops/targets.h"

namespace bmf {

int64_t find_bad_target(const Tensor& target, int64_t classes, int64_t ignore_index) {
  const Tensor held = torch::stable::contiguous(target);
  const int64_t* t = static_cast<const int64_t*>(held.const_data_ptr());
  for (int64_t i = 0, count = held.numel(); i < count; ++i)
    if ((t[i] < 0 || t[i] >= classes) && t[i] != ignore_index) return i;
  return -1;
}

int64_t count_used(const Tensor& target, int64_t ignore_index) {
  const int64_t* t = static_cast<const int64_t*>(target.const_data_ptr());
  int64_t count = 0;
  for (int64_t i = 0, most = target.numel(); i < most; ++i) count += t[i] != ignore_index;
  return count;
}

}  // namespace bmf

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_fast, m) {
  m.def("find_bad_target(Tensor target, int classes, int ignore_index) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(bigmodel_fast, CPU, m) { m.impl("find_bad_target", TORCH_BOX(&bmf::find_bad_target)); }
