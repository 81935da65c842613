// bigmodel_fast::linear_fwd and linear_bwd: schemas, allocation, and the hand-over to the kernels.
#include "cpu/linear.h"

#include "ops/common.h"

namespace bmf {
namespace {

// y and, if it is to be saved, what the activation was applied to (an empty tensor otherwise).
std::tuple<Tensor, Tensor> linear_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                      std::string activation, bool save_pre, const std::optional<Tensor>& residual,
                                      const std::optional<Tensor>& seed, double dropout_p) {
  const int64_t m = x.size(0), n = weight.size(0), k = weight.size(1);
  Tensor y = empty({m, n}, finished_dtype(x, residual), x);
  Tensor pre = empty({save_pre ? m : 0, n}, x.scalar_type(), x);
  linear_forward({.x_dtype = kernel_dtype(x, "linear", "x"),
                  .weight_dtype = kernel_dtype(weight, "linear", "weight"),
                  .m = m,
                  .n = n,
                  .k = k,
                  .x_stride = x.stride(0),
                  .weight_stride = weight.stride(0),
                  .x = x.const_data_ptr(),
                  .weight = weight.const_data_ptr(),
                  .bias = optional_data<float>(bias),
                  .activation = parse_activation(activation),
                  .y = y.mutable_data_ptr(),
                  .pre = save_pre ? pre.mutable_data_ptr() : nullptr,
                  .y_dtype = kernel_dtype(y, "linear", "y"),
                  .finish = finish_of(residual, seed, dropout_p, "linear")},
                 torch_threads());
  return {y, pre};
}

// Gradients of the arguments in `wants` (x, weight, bias); the others are empty tensors.
std::tuple<Tensor, Tensor, Tensor> linear_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                              const Tensor& pre, std::string activation, std::vector<bool> wants) {
  const int64_t m = x.size(0), n = weight.size(0), k = weight.size(1);
  check_contiguous(dy, "linear_bwd", "dy");
  Tensor dx = empty({wants[0] ? m : 0, k}, x.scalar_type(), x);
  Tensor dweight = empty({wants[1] ? n : 0, k}, weight.scalar_type(), x);
  Tensor dbias = empty({wants[2] ? n : 0}, ScalarType::Float, x);
  linear_backward({.x_dtype = kernel_dtype(x, "linear", "x"),
                   .weight_dtype = kernel_dtype(weight, "linear", "weight"),
                   .m = m,
                   .n = n,
                   .k = k,
                   .x_stride = x.stride(0),
                   .weight_stride = weight.stride(0),
                   .dy = dy.const_data_ptr(),
                   .x = x.const_data_ptr(),
                   .weight = weight.const_data_ptr(),
                   .pre = pre.const_data_ptr(),
                   .activation = parse_activation(activation),
                   .dx = wants[0] ? dx.mutable_data_ptr() : nullptr,
                   .dweight = wants[1] ? dweight.mutable_data_ptr() : nullptr,
                   .dbias = wants[2] ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr},
                  torch_threads());
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace bmf

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_fast, m) {
  m.def(
      "linear_fwd(Tensor x, Tensor weight, Tensor? bias, str activation, bool save_pre, "
      "Tensor? residual=None, Tensor? seed=None, float dropout_p=0.0) -> (Tensor y, Tensor pre)");
  m.def(
      "linear_bwd(Tensor dy, Tensor x, Tensor weight, Tensor pre, str activation, bool[] wants) -> (Tensor dx, Tensor "
      "dweight, Tensor dbias)");
}
STABLE_TORCH_LIBRARY_IMPL(bigmodel_fast, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&bmf::linear_fwd));
  m.impl("linear_bwd", TORCH_BOX(&bmf::linear_bwd));
}
