// bigmodel_fast::mlp_fused_fwd_cuda and mlp_fused_bwd_cuda: what bigmodel_fast/ops/_mlp_fused.py calls, the current
// stream being the last argument.
#include <tuple>

#include "cuda/mlp_fused.h"
#include "ops/common.h"

namespace bmf::cuda {
namespace {

constexpr auto kOp = "mlp_fused";

using Optional = std::optional<Tensor>;
using torch::stable::new_empty;

int32_t size_of(int64_t n) {
  STD_TORCH_CHECK(n > 0 && n < int64_t{1} << 24, kOp, ": layers must have 1 to 2^24 features, got ", n);
  return static_cast<int32_t>(n);
}

// x [rows, inputs] with contiguous rows; weights and biases flat, as MlpFusedArgs has them.
MlpFusedArgs arguments(const Tensor& x, const Tensor& weights, const Optional& biases, int64_t width, int64_t outputs,
                       const std::string& activation) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half, kOp,
                  ": x must be bfloat16 or float16");
  STD_TORCH_CHECK(weights.scalar_type() == x.scalar_type(), kOp, ": weights must have x's dtype");
  STD_TORCH_CHECK(width == 64 || width == 128, kOp, ": hidden layers must be 64 or 128 wide, got ", width);
  STD_TORCH_CHECK(outputs <= width, kOp, ": no more outputs than hidden features, got ", outputs);
  check_contiguous(weights, kOp, "weights");
  MlpFusedArgs args{};
  args.dtype = x.scalar_type() == ScalarType::BFloat16 ? Half::bfloat16 : Half::float16;
  args.activation = parse_activation(activation);
  args.rows = x.size(0);
  args.width = size_of(width);
  args.inputs = size_of(x.size(1));
  args.outputs = size_of(outputs);
  const int64_t between = weights.numel() - width * (x.size(1) + outputs);
  STD_TORCH_CHECK(between >= 0 && between % (width * width) == 0, kOp, ": weights are of another network");
  args.hidden = size_of(between / (width * width) + 1);
  args.weights = weights.const_data_ptr();
  if (biases) {
    check_contiguous(*biases, kOp, "biases");
    STD_TORCH_CHECK(biases->scalar_type() == ScalarType::Float && biases->numel() == args.hidden * width + outputs, kOp,
                    ": biases must be float32, one for each feature of each layer");
  }
  args.biases = optional_data<const float>(biases);
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  return args;
}

void check_launch(const char* error) { STD_TORCH_CHECK(error == nullptr, error); }

// y and, if it is to be saved, what the activations were applied to (an empty tensor otherwise).
std::tuple<Tensor, Tensor> mlp_fused_fwd(const Tensor& x, const Tensor& weights, const Optional& biases, int64_t width,
                                         int64_t outputs, std::string activation, bool save_pre, int64_t stream) {
  const Tensor rows = with_contiguous_rows(x);
  MlpFusedArgs args = arguments(rows, weights, biases, width, outputs, activation);
  Tensor y = new_empty(x, {args.rows, outputs});
  Tensor pre = new_empty(x, {save_pre ? args.hidden : 0, args.rows, width});
  args.y = y.mutable_data_ptr();
  args.pre = save_pre ? pre.mutable_data_ptr() : nullptr;
  check_launch(mlp_fused_forward(args, reinterpret_cast<void*>(stream)));
  return {y, pre};
}

// Gradients of x, of the flat weights and of the flat biases, the last two in float32; empty where not wanted.
std::tuple<Tensor, Tensor, Tensor> mlp_fused_bwd(const Tensor& grad_y, const Tensor& x, const Tensor& weights,
                                                 const Optional& biases, const Tensor& pre, int64_t width,
                                                 std::string activation, bool wants_x, bool wants_parameters,
                                                 int64_t stream) {
  const Tensor rows = with_contiguous_rows(x);
  check_contiguous(grad_y, kOp, "grad_y");
  check_contiguous(pre, kOp, "pre");
  MlpFusedArgs args = arguments(rows, weights, biases, width, grad_y.size(1), activation);
  Tensor grad_x = new_empty(x, {wants_x ? args.rows : 0, args.inputs});
  Tensor grad_weights = new_empty(x, {wants_parameters ? weights.numel() : 0}, ScalarType::Float);
  Tensor grad_biases = new_empty(x, {wants_parameters && biases ? biases->numel() : 0}, ScalarType::Float);
  args.pre = pre.data_ptr();
  args.grad_y = grad_y.const_data_ptr();
  args.grad_x = wants_x ? grad_x.mutable_data_ptr() : nullptr;
  args.grad_weights = wants_parameters ? static_cast<float*>(grad_weights.mutable_data_ptr()) : nullptr;
  args.grad_biases = wants_parameters && biases ? static_cast<float*>(grad_biases.mutable_data_ptr()) : nullptr;
  check_launch(plan_mlp_fused_backward(args));
  Tensor sums = new_empty(x, {wants_parameters ? args.sums_count : 0}, ScalarType::Float);
  args.sums = static_cast<float*>(sums.mutable_data_ptr());
  check_launch(mlp_fused_backward(args, reinterpret_cast<void*>(stream)));
  return {grad_x, grad_weights, grad_biases};
}

}  // namespace
}  // namespace bmf::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_fast, m) {
  m.def(
      "mlp_fused_fwd_cuda(Tensor x, Tensor weights, Tensor? biases, int width, int outputs, str activation, bool "
      "save_pre, int stream) -> (Tensor y, Tensor pre)");
  m.def(
      "mlp_fused_bwd_cuda(Tensor grad_y, Tensor x, Tensor weights, Tensor? biases, Tensor pre, int width, str "
      "activation, bool wants_x, bool wants_parameters, int stream) -> (Tensor grad_x, Tensor grad_weights, Tensor "
      "grad_biases)");
}
STABLE_TORCH_LIBRARY_IMPL(bigmodel_fast, CUDA, m) {
  m.impl("mlp_fused_fwd_cuda", TORCH_BOX(&bmf::cuda::mlp_fused_fwd));
  m.impl("mlp_fused_bwd_cuda", TORCH_BOX(&bmf::cuda::mlp_fused_bwd));
}
