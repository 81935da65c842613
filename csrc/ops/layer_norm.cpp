// bigmodel_fast::layer_norm_fwd and layer_norm_bwd: schemas, and the hand-over to the kernels.
#include "cpu/layer_norm.h"

#include "ops/norm.h"

namespace bmf {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const std::optional<Tensor>& weight,
                                                          const std::optional<Tensor>& bias,
                                                          const std::optional<Tensor>& residual, double eps,
                                                          ScalarType dtype) {
  const NormOutputs out = norm_forward(layer_norm_forward, "layer_norm", true, x, weight, bias, residual, eps, dtype);
  return {out.y, out.sum, out.mean, out.rstd};
}

// y, and once more in bfloat16.
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_twice_fwd(const Tensor& x, const Tensor& weight,
                                                                const Tensor& bias, double eps) {
  const NormOutputs out =
      norm_forward(layer_norm_forward, "layer_norm", true, x, weight, bias, std::nullopt, eps, x.scalar_type(), true);
  return {out.y, out.y_narrow, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& grad_y, const std::optional<Tensor>& grad_sum,
                                                          const Tensor& sum, const std::optional<Tensor>& weight,
                                                          const Tensor& mean, const Tensor& rstd, bool narrow,
                                                          const std::optional<Tensor>& seed, double dropout_p) {
  const NormGradients out = norm_backward(layer_norm_backward, "layer_norm", true, grad_y, grad_sum, sum, weight, &mean,
                                          rstd, narrow, seed, dropout_p);
  return {out.grad, out.grad_narrow, out.grad_weight, out.grad_bias};
}

}  // namespace
}  // namespace bmf

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_fast, m) {
  m.def(
      "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, ScalarType dtype)"
      " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_bwd(Tensor grad_y, Tensor? grad_sum, Tensor sum, Tensor? weight, Tensor mean, Tensor rstd, "
      "bool narrow, Tensor? seed=None, float dropout_p=0.0) -> (Tensor grad, Tensor grad_narrow, Tensor grad_weight, "
      "Tensor grad_bias)");
  m.def(
      "layer_norm_twice_fwd(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor y_narrow, "
      "Tensor mean, Tensor rstd)");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_fast, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&bmf::layer_norm_fwd));
  m.impl("layer_norm_twice_fwd", TORCH_BOX(&bmf::layer_norm_twice_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&bmf::layer_norm_bwd));
}
