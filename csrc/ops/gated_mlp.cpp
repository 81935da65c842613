// bigmodel_fast::gated_mlp_fwd and gated_mlp_bwd: schemas, allocation, and the hand-over to the kernels.
#include "cpu/gated_mlp.h"

#include "ops/common.h"

namespace bmf {
namespace {

// y and, if they are to be saved, x Wg^T and x Wu^T (empty tensors otherwise).
std::tuple<Tensor, Tensor, Tensor> gated_mlp_fwd(const Tensor& x, const Tensor& w_gate, const Tensor& w_up,
                                                 const Tensor& w_down, std::string activation, bool save,
                                                 const std::optional<Tensor>& residual,
                                                 const std::optional<Tensor>& seed, double dropout_p) {
  const int64_t m = x.size(0), f = w_gate.size(0), k = w_gate.size(1), n = w_down.size(0);
  Tensor y = empty({m, n}, finished_dtype(x, residual), x);
  Tensor gate = empty({save ? m : 0, f}, x.scalar_type(), x);
  Tensor up = empty({save ? m : 0, f}, x.scalar_type(), x);
  gated_mlp_forward({.x_dtype = kernel_dtype(x, "gated_mlp", "x"),
                     .weight_dtype = kernel_dtype(w_gate, "gated_mlp", "w_gate"),
                     .m = m,
                     .n = n,
                     .f = f,
                     .k = k,
                     .x_stride = x.stride(0),
                     .gate_stride = w_gate.stride(0),
                     .up_stride = w_up.stride(0),
                     .down_stride = w_down.stride(0),
                     .x = x.const_data_ptr(),
                     .w_gate = w_gate.const_data_ptr(),
                     .w_up = w_up.const_data_ptr(),
                     .w_down = w_down.const_data_ptr(),
                     .activation = parse_activation(activation),
                     .y = y.mutable_data_ptr(),
                     .gate = save ? gate.mutable_data_ptr() : nullptr,
                     .up = save ? up.mutable_data_ptr() : nullptr,
                     .y_dtype = kernel_dtype(y, "gated_mlp", "y"),
                     .finish = finish_of(residual, seed, dropout_p, "gated_mlp")},
                    torch_threads());
  return {y, gate, up};
}

// Gradients of the arguments in `wants` (x, w_gate, w_up, w_down); the others are empty tensors.
std::tuple<Tensor, Tensor, Tensor, Tensor> gated_mlp_bwd(const Tensor& dy, const Tensor& x, const Tensor& w_gate,
                                                         const Tensor& w_up, const Tensor& w_down, const Tensor& gate,
                                                         const Tensor& up, std::string activation,
                                                         std::vector<bool> wants) {
  const int64_t m = x.size(0), f = w_gate.size(0), k = w_gate.size(1), n = w_down.size(0);
  check_contiguous(dy, "gated_mlp_bwd", "dy");
  Tensor dx = empty({wants[0] ? m : 0, k}, x.scalar_type(), x);
  Tensor dw_gate = empty({wants[1] ? f : 0, k}, w_gate.scalar_type(), x);
  Tensor dw_up = empty({wants[2] ? f : 0, k}, w_up.scalar_type(), x);
  Tensor dw_down = empty({wants[3] ? n : 0, f}, w_down.scalar_type(), x);
  gated_mlp_backward({.x_dtype = kernel_dtype(x, "gated_mlp", "x"),
                      .weight_dtype = kernel_dtype(w_gate, "gated_mlp", "w_gate"),
                      .m = m,
                      .n = n,
                      .f = f,
                      .k = k,
                      .x_stride = x.stride(0),
                      .gate_stride = w_gate.stride(0),
                      .up_stride = w_up.stride(0),
                      .down_stride = w_down.stride(0),
                      .dy = dy.const_data_ptr(),
                      .x = x.const_data_ptr(),
                      .w_gate = w_gate.const_data_ptr(),
                      .w_up = w_up.const_data_ptr(),
                      .w_down = w_down.const_data_ptr(),
                      .gate = gate.const_data_ptr(),
                      .up = up.const_data_ptr(),
                      .activation = parse_activation(activation),
                      .dx = wants[0] ? dx.mutable_data_ptr() : nullptr,
                      .dw_gate = wants[1] ? dw_gate.mutable_data_ptr() : nullptr,
                      .dw_up = wants[2] ? dw_up.mutable_data_ptr() : nullptr,
                      .dw_down = wants[3] ? dw_down.mutable_data_ptr() : nullptr},
                     torch_threads());
  return {dx, dw_gate, dw_up, dw_down};
}

}  // namespace
}  // namespace bmf

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_fast, m) {
  m.def(
      "gated_mlp_fwd(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, str activation, bool save, "
      "Tensor? residual=None, Tensor? seed=None, float dropout_p=0.0) -> (Tensor y, Tensor gate, Tensor up)");
  m.def(
      "gated_mlp_bwd(Tensor dy, Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor gate, Tensor up, str "
      "activation, bool[] wants) -> (Tensor dx, Tensor dw_gate, Tensor dw_up, Tensor dw_down)");
}
STABLE_TORCH_LIBRARY_IMPL(bigmodel_fast, CPU, m) {
  m.impl("gated_mlp_fwd", TORCH_BOX(&bmf::gated_mlp_fwd));
  m.impl("gated_mlp_bwd", TORCH_BOX(&bmf::gated_mlp_bwd));
}
