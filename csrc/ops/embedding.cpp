// bigmodel_fast::embedding_fwd and embedding_bwd: schemas, allocation, and the hand-over to the kernels.
#include "cpu/embedding.h"

#include "ops/targets.h"

namespace bmf {
namespace {

constexpr auto kOp = "embedding";

// Class numbers as the kernels read them; every one is in range.
Tensor checked(const Tensor& token, int64_t classes) {
  const Tensor held = torch::stable::contiguous(token);
  STD_TORCH_CHECK(held.scalar_type() == ScalarType::Long && held.dim() == 1, kOp, ": token must be int64[tokens]");
  STD_TORCH_CHECK(classes > 0 && find_bad_target(held, classes, 0) < 0, kOp, ": token out of range");
  return held;
}

Tensor embedding_fwd(const Tensor& token, const Tensor& weight) {
  const RowTensor rows = row_tensor(weight, kOp, "weight");
  const Tensor held = checked(token, weight.size(0));
  Tensor out = empty({held.numel(), weight.size(1)}, weight.scalar_type(), weight);
  embedding_forward({.dtype = rows.rows.dtype,
                     .tokens = held.numel(),
                     .classes = weight.size(0),
                     .width = weight.size(1),
                     .token = static_cast<const int64_t*>(held.const_data_ptr()),
                     .weight = rows.rows,
                     .out = out.mutable_data_ptr()},
                    torch_threads());
  return out;
}

Tensor embedding_bwd(const Tensor& grad_out, const Tensor& token, int64_t classes, ScalarType dtype) {
  const RowTensor rows = row_tensor(grad_out, kOp, "grad_out");
  const Tensor held = checked(token, classes);
  Tensor grad_weight = empty({classes, grad_out.size(1)}, dtype, grad_out);
  embedding_backward({.dtype = kernel_dtype(grad_weight, kOp, "weight"),
                      .tokens = held.numel(),
                      .classes = classes,
                      .width = grad_out.size(1),
                      .token = static_cast<const int64_t*>(held.const_data_ptr()),
                      .grad_out = rows.rows,
                      .grad_weight = grad_weight.mutable_data_ptr()},
                     torch_threads());
  return grad_weight;
}

}  // namespace
}  // namespace bmf

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_fast, m) {
  m.def("embedding_fwd(Tensor token, Tensor weight) -> Tensor");
  m.def("embedding_bwd(Tensor grad_out, Tensor token, int classes, ScalarType dtype) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(bigmodel_fast, CPU, m) {
  m.impl("embedding_fwd", TORCH_BOX(&bmf::embedding_fwd));
  m.impl("embedding_bwd", TORCH_BOX(&bmf::embedding_bwd));
}
