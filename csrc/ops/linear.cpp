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

// y of each of several layers of one x, without activation.
std::vector<Tensor> linears_fwd(const Tensor& x, const std::vector<Tensor>& weights,
                                const std::vector<std::optional<Tensor>>& biases) {
  std::vector<Tensor> out;
  for (size_t i = 0; i < weights.size(); ++i)
    out.push_back(std::get<0>(linear_fwd(x, weights[i], biases[i], "none", false, std::nullopt, std::nullopt, 0.0)));
  return out;
}

// dx in the dtype asked for, plus dx_residual of the same, then all weights' gradients, then all biases'; what `wants`
// (in this order) does not name is empty.
std::vector<Tensor> linears_bwd(const std::vector<Tensor>& dy, const Tensor& x, const std::vector<Tensor>& weights,
                                ScalarType dx_dtype, const std::vector<bool>& wants,
                                const std::optional<Tensor>& dx_residual) {
  const int64_t m = x.size(0), k = x.size(1);
  const size_t count = weights.size();
  STD_TORCH_CHECK(count > 0 && count <= kMostLinears && dy.size() == count && wants.size() == 1 + 2 * count,
                  "linears_bwd: a gradient for each of up to ", kMostLinears, " layers, and what is wanted");
  std::vector<Tensor> out{empty({wants[0] ? m : 0, k}, dx_dtype, x)};
  for (size_t i = 0; i < count; ++i)
    out.push_back(empty({wants[1 + i] ? weights[i].size(0) : 0, k}, weights[i].scalar_type(), x));
  for (size_t i = 0; i < count; ++i)
    out.push_back(empty({wants[1 + count + i] ? weights[i].size(0) : 0}, ScalarType::Float, x));
  std::vector<LinearOfSeveral> layers;
  for (size_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(weights[i].scalar_type() == weights[0].scalar_type() && dy[i].scalar_type() == x.scalar_type() &&
                        (dy[i].size(1) < 2 || dy[i].stride(1) == 1),
                    "linears_bwd: weights must be of one dtype, gradients of x's with contiguous rows");
    Tensor &dweight = out[1 + i], &dbias = out[1 + count + i];
    layers.push_back({.n = weights[i].size(0),
                      .weight_stride = weights[i].stride(0),
                      .dy_stride = dy[i].stride(0),
                      .dy = dy[i].const_data_ptr(),
                      .weight = weights[i].const_data_ptr(),
                      .dweight = wants[1 + i] ? dweight.mutable_data_ptr() : nullptr,
                      .dbias = wants[1 + count + i] ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr});
  }
  linears_backward({.x_dtype = kernel_dtype(x, "linear", "x"),
                    .weight_dtype = kernel_dtype(weights[0], "linear", "weight"),
                    .m = m,
                    .k = k,
                    .x_stride = x.stride(0),
                    .x = x.const_data_ptr(),
                    .dx = input_gradient(out[0], wants[0], dx_residual, "linears_bwd"),
                    .count = static_cast<int>(count),
                    .layers = layers.data()},
                   torch_threads());
  return out;
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
  m.def("linears_fwd(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]");
  m.def(
      "linears_bwd(Tensor[] dy, Tensor x, Tensor[] weights, ScalarType dx_dtype, bool[] wants, Tensor? "
      "dx_residual=None) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(bigmodel_fast, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&bmf::linear_fwd));
  m.impl("linear_bwd", TORCH_BOX(&bmf::linear_bwd));
  m.impl("linears_fwd", TORCH_BOX(&bmf::linears_fwd));
  m.impl("linears_bwd", TORCH_BOX(&bmf::linears_bwd));
}
