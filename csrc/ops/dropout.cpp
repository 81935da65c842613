// bigmodel_fast::dropout_fwd: schema, allocation, and the hand-over to the kernel. Its backward is itself.
#include "cpu/dropout.h"

#include "ops/common.h"

namespace bmf {
namespace {

Tensor dropout_fwd(const Tensor& x, const std::optional<Tensor>& seed, double p, const std::optional<Tensor>& residual,
                   ScalarType dtype) {
  const Finish finish = finish_of(residual, seed, p, "dropout");
  Tensor y = empty({x.size(0), x.size(1)}, dtype, x);
  dropout({.rows = x.size(0),
           .width = x.size(1),
           .x = {x.data_ptr(), x.stride(0), kernel_dtype(x, "dropout", "x")},
           .y = {y.mutable_data_ptr(), x.size(1), kernel_dtype(y, "dropout", "y")},
           .finish = finish},
          torch_threads());
  return y;
}

}  // namespace
}  // namespace bmf

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_fast, m) {
  m.def("dropout_fwd(Tensor x, Tensor? seed, float p, Tensor? residual, ScalarType dtype) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(bigmodel_fast, CPU, m) { m.impl("dropout_fwd", TORCH_BOX(&bmf::dropout_fwd)); }
