// bigmodel_fast::rms_norm_fwd and rms_norm_bwd: schemas, and the hand-over to the kernels.
#include "cpu/rms_norm.h"

#include "ops/norm.h"

namespace bmf {
namespace {

std::tuple<Tensor, Tensor, Tensor> rms_norm_fwd(const Tensor& x, const Tensor& weight,
                                                const std::optional<Tensor>& residual, double eps, ScalarType dtype) {
  const NormOutputs out =
      norm_forward(rms_norm_forward, "rms_norm", false, x, weight, std::nullopt, residual, eps, dtype);
  return {out.y, out.sum, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_bwd(const Tensor& grad_y, const std::optional<Tensor>& grad_sum,
                                                const Tensor& sum, const Tensor& weight, const Tensor& rstd,
                                                bool narrow) {
  const NormGradients out =
      norm_backward(rms_norm_backward, "rms_norm", false, grad_y, grad_sum, sum, weight, nullptr, rstd, narrow);
  return {out.grad, out.grad_narrow, out.grad_weight};
}

}  // namespace
}  // namespace bmf

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_fast, m) {
  m.def(
      "rms_norm_fwd(Tensor x, Tensor weight, Tensor? residual, float eps, ScalarType dtype)"
      " -> (Tensor y, Tensor sum, Tensor rstd)");
  m.def(
      "rms_norm_bwd(Tensor grad_y, Tensor? grad_sum, Tensor sum, Tensor weight, Tensor rstd, bool narrow)"
      " -> (Tensor grad, Tensor grad_narrow, Tensor grad_weight)");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_fast, CPU, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&bmf::rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&bmf::rms_norm_bwd));
}
