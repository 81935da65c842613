// bigmodel_fast::mlp_fwd and mlp_bwd: schemas, allocation, and the hand-over to the kernels.
#include "cpu/mlp.h"

#include "ops/common.h"

namespace bmf {
namespace {

// y and, if it is to be saved, what the activation was applied to (an empty tensor otherwise).
std::tuple<Tensor, Tensor> mlp_fwd(const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
                                   const std::optional<Tensor>& b2, std::string activation, bool save_pre,
                                   const std::optional<Tensor>& residual, const std::optional<Tensor>& seed,
                                   double dropout_p) {
  const int64_t m = x.size(0), f = w1.size(0), k = w1.size(1), n = w2.size(0);
  Tensor y = empty({m, n}, finished_dtype(x, residual), x);
  Tensor pre = empty({save_pre ? m : 0, f}, x.scalar_type(), x);
  mlp_forward({.x_dtype = kernel_dtype(x, "mlp", "x"),
               .weight_dtype = kernel_dtype(w1, "mlp", "w1"),
               .m = m,
               .n = n,
               .f = f,
               .k = k,
               .x_stride = x.stride(0),
               .w1_stride = w1.stride(0),
               .w2_stride = w2.stride(0),
               .x = x.const_data_ptr(),
               .w1 = w1.const_data_ptr(),
               .w2 = w2.const_data_ptr(),
               .b1 = optional_data<float>(b1),
               .b2 = optional_data<float>(b2),
               .activation = parse_activation(activation),
               .y = y.mutable_data_ptr(),
               .pre = save_pre ? pre.mutable_data_ptr() : nullptr,
               .y_dtype = kernel_dtype(y, "mlp", "y"),
               .finish = finish_of(residual, seed, dropout_p, "mlp")},
              torch_threads());
  return {y, pre};
}

// Gradients of the arguments in `wants` (x, w1, b1, w2, b2); the others are empty tensors. That of x is in x's dtype,
// or added to dx_residual in its dtype.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_bwd(const Tensor& dy, const Tensor& x, const Tensor& w1,
                                                           const Tensor& w2, const Tensor& pre, std::string activation,
                                                           std::vector<bool> wants,
                                                           const std::optional<Tensor>& dx_residual) {
  const int64_t m = x.size(0), f = w1.size(0), k = w1.size(1), n = w2.size(0);
  check_contiguous(dy, "mlp_bwd", "dy");
  Tensor dx = empty({wants[0] ? m : 0, k}, (dx_residual ? *dx_residual : x).scalar_type(), x);
  Tensor dw1 = empty({wants[1] ? f : 0, k}, w1.scalar_type(), x);
  Tensor db1 = empty({wants[2] ? f : 0}, ScalarType::Float, x);
  Tensor dw2 = empty({wants[3] ? n : 0, f}, w2.scalar_type(), x);
  Tensor db2 = empty({wants[4] ? n : 0}, ScalarType::Float, x);
  mlp_backward({.x_dtype = kernel_dtype(x, "mlp", "x"),
                .weight_dtype = kernel_dtype(w1, "mlp", "w1"),
                .m = m,
                .n = n,
                .f = f,
                .k = k,
                .x_stride = x.stride(0),
                .w1_stride = w1.stride(0),
                .w2_stride = w2.stride(0),
                .dy = dy.const_data_ptr(),
                .x = x.const_data_ptr(),
                .w1 = w1.const_data_ptr(),
                .w2 = w2.const_data_ptr(),
                .pre = pre.const_data_ptr(),
                .activation = parse_activation(activation),
                .dx = input_gradient(dx, wants[0], dx_residual, "mlp_bwd"),
                .dw1 = wants[1] ? dw1.mutable_data_ptr() : nullptr,
                .dw2 = wants[3] ? dw2.mutable_data_ptr() : nullptr,
                .db1 = wants[2] ? static_cast<float*>(db1.mutable_data_ptr()) : nullptr,
                .db2 = wants[4] ? static_cast<float*>(db2.mutable_data_ptr()) : nullptr},
               torch_threads());
  return {dx, dw1, db1, dw2, db2};
}

}  // namespace
}  // namespace bmf

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_fast, m) {
  m.def(
      "mlp_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, bool save_pre, "
      "Tensor? residual=None, Tensor? seed=None, float dropout_p=0.0) -> (Tensor y, Tensor pre)");
  m.def(
      "mlp_bwd(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor pre, str activation, bool[] wants, "
      "Tensor? dx_residual=None) -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)");
}
STABLE_TORCH_LIBRARY_IMPL(bigmodel_fast, CPU, m) {
  m.impl("mlp_fwd", TORCH_BOX(&bmf::mlp_fwd));
  m.impl("mlp_bwd", TORCH_BOX(&bmf::mlp_bwd));
}
