// bigmodel_fast::cross_entropy_fwd and cross_entropy_bwd: reduction over rows, and the hand-over to the kernels.
#include "cpu/cross_entropy.h"

#include <tuple>

#include "ops/targets.h"

namespace bmf {
namespace {

constexpr auto kOp = "cross_entropy";

std::tuple<Tensor, Tensor> cross_entropy_fwd(const Tensor& logits, const Tensor& target, int64_t ignore_index,
                                             double label_smoothing, double softcap, std::string reduction) {
  const RowTensor x = row_tensor(logits, kOp, "logits");
  const Tensor t = torch::stable::contiguous(target);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.numel() == x.count, kOp, ": one int64 target for each row");
  check_targets(t, x.width, ignore_index, kOp);
  const Tensor losses = empty(target.sizes(), ScalarType::Float, logits);
  const Tensor lse = empty({x.count, 2}, ScalarType::Float, logits);
  CrossEntropyForwardArgs args{};
  args.rows = x.count;
  args.classes = x.width;
  args.logits = x.rows;
  args.target = static_cast<const int64_t*>(t.data_ptr());
  args.ignore_index = ignore_index;
  args.label_smoothing = static_cast<float>(label_smoothing);
  args.softcap = static_cast<float>(softcap);
  args.loss = static_cast<float*>(losses.data_ptr());
  args.lse = static_cast<float*>(lse.data_ptr());
  cross_entropy_forward(args, torch_threads());
  if (reduction == "none") return {losses, lse};
  double sums[4] = {};
  for (int64_t i = 0; i < args.rows; ++i) sums[i % 4] += args.loss[i];
  double loss = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  if (reduction == "mean") loss /= static_cast<double>(count_used(t, ignore_index));
  const Tensor reduced = empty({}, ScalarType::Float, logits);
  *static_cast<float*>(reduced.data_ptr()) = static_cast<float>(loss);
  return {reduced, lse};
}

Tensor cross_entropy_bwd(const Tensor& grad_loss, const Tensor& logits, const Tensor& target, const Tensor& lse,
                         int64_t ignore_index, double label_smoothing, double softcap, std::string reduction) {
  const RowTensor x = row_tensor(logits, kOp, "logits");
  const Tensor t = torch::stable::contiguous(target), scales = torch::stable::contiguous(grad_loss);
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float, kOp, ": grad_loss must be float32");
  const Tensor grad = empty(logits.sizes(), logits.scalar_type(), logits);
  CrossEntropyBackwardArgs args{};
  args.rows = x.count;
  args.classes = x.width;
  args.logits = x.rows;
  args.grad = row_tensor(grad, kOp, "grad").rows;
  args.target = static_cast<const int64_t*>(t.data_ptr());
  args.ignore_index = ignore_index;
  args.label_smoothing = static_cast<float>(label_smoothing);
  args.softcap = static_cast<float>(softcap);
  args.lse = static_cast<const float*>(lse.data_ptr());
  args.scale = static_cast<const float*>(scales.data_ptr());
  args.scale_stride = reduction == "none" ? 1 : 0;
  float mean_scale;
  if (reduction == "mean") {
    mean_scale = *args.scale / static_cast<float>(count_used(t, ignore_index));
    args.scale = &mean_scale;
  }
  cross_entropy_backward(args, torch_threads());
  return grad;
}

}  // namespace
}  // namespace bmf

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_fast, m) {
  m.def(
      "cross_entropy_fwd(Tensor logits, Tensor target, int ignore_index, float label_smoothing, float softcap, "
      "str reduction) -> (Tensor loss, Tensor lse)");
  m.def(
      "cross_entropy_bwd(Tensor grad_loss, Tensor logits, Tensor target, Tensor lse, int ignore_index, "
      "float label_smoothing, float softcap, str reduction) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_fast, CPU, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&bmf::cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&bmf::cross_entropy_bwd));
}
