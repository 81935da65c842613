// What the operators rms_norm and layer_norm share: allocation and the kernels' argument structs.
#pragma once
#include "cpu/norm.h"

#include <tuple>

#include "ops/common.h"

namespace bmf {

struct NormOutputs {
  Tensor y, sum, mean, rstd, y_narrow;  // sum is empty without a residual, mean for rms_norm, y_narrow unless asked for
};

struct NormGradients {
  Tensor grad, grad_narrow, grad_weight, grad_bias;  // grad_narrow is empty unless asked for, grad_bias for rms_norm
};

// The first row of an optional tensor of one dimension; `held` keeps it alive.
inline Rows parameter(const std::optional<Tensor>& t, std::optional<RowTensor>& held, const char* op,
                      const char* name) {
  if (!t) return Rows{};
  held = row_tensor(*t, op, name);
  return held->rows;
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

inline NormOutputs norm_forward(void (*kernel)(const NormForwardArgs&, const Threads&), const char* op, bool centered,
                                const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                const std::optional<Tensor>& residual, double eps, ScalarType dtype,
                                bool narrow = false) {
  const RowTensor x_rows = row_tensor(x, op, "x");
  std::optional<RowTensor> residual_rows, weight_row, bias_row;
  NormForwardArgs args{};
  args.rows = x_rows.count;
  args.width = x_rows.width;
  args.eps = static_cast<float>(eps);
  args.x = x_rows.rows;
  args.residual = parameter(residual, residual_rows, op, "residual");
  args.weight = parameter(weight, weight_row, op, "weight");
  args.bias = parameter(bias, bias_row, op, "bias");
  const bool wide = args.x.dtype == Dtype::float32 || (residual && args.residual.dtype == Dtype::float32);
  NormOutputs out{
      empty(x.sizes(), dtype, x),
      residual ? empty(x.sizes(), wide ? ScalarType::Float : ScalarType::BFloat16, x) : empty({0}, x.scalar_type(), x),
      empty({centered ? args.rows : 0}, ScalarType::Float, x), empty({args.rows}, ScalarType::Float, x),
      narrow ? empty(x.sizes(), ScalarType::BFloat16, x) : empty({0}, ScalarType::BFloat16, x)};
  args.y = row_tensor(out.y, op, "y").rows;
  if (residual) args.sum = row_tensor(out.sum, op, "sum").rows;
  if (narrow) args.y_narrow = row_tensor(out.y_narrow, op, "y_narrow").rows;
  args.mean = floats(out.mean);
  args.rstd = floats(out.rstd);
  kernel(args, torch_threads());
  return out;
}

inline NormGradients norm_backward(void (*kernel)(const NormBackwardArgs&, const Threads&), const char* op,
                                   bool centered, const Tensor& grad_y, const std::optional<Tensor>& grad_sum,
                                   const Tensor& sum, const std::optional<Tensor>& weight, const Tensor* mean,
                                   const Tensor& rstd, bool narrow, const std::optional<Tensor>& seed = std::nullopt,
                                   double dropout_p = 0) {
  const RowTensor grad_y_rows = row_tensor(grad_y, op, "grad_y"), sum_rows = row_tensor(sum, op, "sum");
  std::optional<RowTensor> grad_sum_rows, weight_row;
  NormBackwardArgs args{};
  args.rows = sum_rows.count;
  args.width = sum_rows.width;
  args.grad_y = grad_y_rows.rows;
  args.sum = sum_rows.rows;
  args.grad_sum = parameter(grad_sum, grad_sum_rows, op, "grad_sum");
  STD_TORCH_CHECK(!grad_sum || args.grad_sum.dtype == args.sum.dtype, op, ": grad_sum and sum differ in dtype");
  args.weight = parameter(weight, weight_row, op, "weight");
  STD_TORCH_CHECK(narrow || dropout_p == 0, op, ": dropout is for the narrow gradient");
  args.finish = finish_of(std::nullopt, seed, dropout_p, op);
  args.mean = mean ? floats(*mean) : nullptr;
  args.rstd = floats(rstd);
  NormGradients out{empty(sum.sizes(), sum.scalar_type(), sum),
                    narrow ? empty(sum.sizes(), ScalarType::BFloat16, sum) : empty({0}, ScalarType::BFloat16, sum),
                    empty({args.width}, ScalarType::Float, sum),
                    empty({centered ? args.width : 0}, ScalarType::Float, sum)};
  args.grad = row_tensor(out.grad, op, "grad").rows;
  if (narrow) args.grad_narrow = row_tensor(out.grad_narrow, op, "grad_narrow").rows;
  args.grad_weight = floats(out.grad_weight);
  args.grad_bias = floats(out.grad_bias);
  kernel(args, torch_threads());
  return out;
}

}  // namespace bmf
