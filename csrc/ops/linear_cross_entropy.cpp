// bigmodel_fast::linear_cross_entropy_fwd and linear_cross_entropy_bwd: reduction over tokens, allocation, and the
// hand-over to the kernel, which finds losses and gradients in one call.
#include "cpu/linear_cross_entropy.h"

#include <tuple>

#include "core/scratch.h"
#include "ops/targets.h"

namespace bmf {
namespace {

constexpr auto kOp = "linear_cross_entropy";

struct Options {
  int64_t ignore_index;
  double label_smoothing, softcap;
};

// Everything but the outputs.
LinearCrossEntropyArgs inputs(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                              const Tensor& target, const Options& options) {
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.numel() == x.size(0), kOp,
                  ": one int64 target for each token");
  check_contiguous(target, kOp, "target");
  check_targets(target, weight.size(0), options.ignore_index, kOp);
  return {.x_dtype = kernel_dtype(x, kOp, "x"),
          .weight_dtype = kernel_dtype(weight, kOp, "weight"),
          .tokens = x.size(0),
          .width = x.size(1),
          .classes = weight.size(0),
          .x_stride = x.stride(0),
          .weight_stride = weight.stride(0),
          .x = x.const_data_ptr(),
          .weight = weight.const_data_ptr(),
          .bias = optional_data<float>(bias),
          .target = static_cast<const int64_t*>(target.const_data_ptr()),
          .ignore_index = options.ignore_index,
          .label_smoothing = static_cast<float>(options.label_smoothing),
          .softcap = static_cast<float>(options.softcap),
          .scale = nullptr,
          .scale_stride = 0,
          .loss = nullptr,
          .correct = nullptr,
          .dx = nullptr,
          .dweight = nullptr,
          .dbias = nullptr};
}

struct Gradients {
  Tensor dx, dweight, dbias;
};

// Gradients of those of x, weight and bias that are in `wants`, allocated and put into `args`; empty tensors otherwise.
Gradients allocate(const Tensor& x, const std::vector<bool>& wants, LinearCrossEntropyArgs& args) {
  Gradients g{empty({wants[0] ? args.tokens : 0, args.width}, x.scalar_type(), x),
              empty({wants[1] ? args.classes : 0, args.width}, ScalarType::Float, x),
              empty({wants[2] ? args.classes : 0}, ScalarType::Float, x)};
  if (wants[0]) args.dx = g.dx.mutable_data_ptr();
  if (wants[1]) args.dweight = static_cast<float*>(g.dweight.mutable_data_ptr());
  if (wants[2]) args.dbias = static_cast<float*>(g.dbias.mutable_data_ptr());
  return g;
}

Tensor scalar(double value, const Tensor& like) {
  const Tensor t = empty({}, ScalarType::Float, like);
  *static_cast<float*>(t.mutable_data_ptr()) = static_cast<float>(value);
  return t;
}

// The loss, and with reduction "mean" or "sum" the gradients of it; with "none", where the gradient of each loss is not
// known yet, `wants` must be all false. Last the share of tokens whose target has the highest logit.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_fwd(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target,
    int64_t ignore_index, double label_smoothing, double softcap, std::string reduction, std::vector<bool> wants) {
  LinearCrossEntropyArgs args = inputs(x, weight, bias, target, {ignore_index, label_smoothing, softcap});
  const Gradients g = allocate(x, wants, args);
  const Tensor losses = empty({args.tokens}, ScalarType::Float, x);
  args.loss = static_cast<float*>(losses.mutable_data_ptr());
  const Scratch correct(static_cast<size_t>(args.tokens));
  args.correct = correct.at<bool>(0);
  __builtin_memset(args.correct, 0, static_cast<size_t>(args.tokens));
  const double used = static_cast<double>(count_used(target, ignore_index));
  const double divisor = reduction == "mean" ? used : 1;
  const float scale = static_cast<float>(1 / divisor);
  args.scale = &scale;
  linear_cross_entropy(args, torch_threads());
  double loss = 0, hits = 0;
  for (int64_t i = 0; i < args.tokens; ++i) {
    loss += args.loss[i];
    hits += args.correct[i];
  }
  const Tensor accuracy = scalar(hits / used, x);
  if (reduction == "none") return {losses, g.dx, g.dweight, g.dbias, accuracy};
  return {scalar(loss / divisor, x), g.dx, g.dweight, g.dbias, accuracy};
}

// Gradients from the gradient of the loss: of each token's (reduction "none"), else of the one there is.
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_bwd(const Tensor& dloss, const Tensor& x, const Tensor& weight,
                                                            const std::optional<Tensor>& bias, const Tensor& target,
                                                            int64_t ignore_index, double label_smoothing,
                                                            double softcap, std::string reduction,
                                                            std::vector<bool> wants) {
  LinearCrossEntropyArgs args = inputs(x, weight, bias, target, {ignore_index, label_smoothing, softcap});
  const Gradients g = allocate(x, wants, args);
  STD_TORCH_CHECK(dloss.scalar_type() == ScalarType::Float, kOp, ": dloss must be float32");
  check_contiguous(dloss, kOp, "dloss");
  args.scale = static_cast<const float*>(dloss.const_data_ptr());
  args.scale_stride = reduction == "none" ? 1 : 0;
  float mean_scale;
  if (reduction == "mean") {
    mean_scale = *args.scale / static_cast<float>(count_used(target, ignore_index));
    args.scale = &mean_scale;
  }
  linear_cross_entropy(args, torch_threads());
  return {g.dx, g.dweight, g.dbias};
}

}  // namespace
}  // namespace bmf

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_fast, m) {
  m.def(
      "linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, "
      "float label_smoothing, float softcap, str reduction, bool[] wants) -> "
      "(Tensor loss, Tensor dx, Tensor dweight, Tensor dbias, Tensor accuracy)");
  m.def(
      "linear_cross_entropy_bwd(Tensor dloss, Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, "
      "float label_smoothing, float softcap, str reduction, bool[] wants) -> "
      "(Tensor dx, Tensor dweight, Tensor dbias)");
}
STABLE_TORCH_LIBRARY_IMPL(bigmodel_fast, CPU, m) {
  m.impl("linear_cross_entropy_fwd", TORCH_BOX(&bmf::linear_cross_entropy_fwd));
  m.impl("linear_cross_entropy_bwd", TORCH_BOX(&bmf::linear_cross_entropy_bwd));
}
