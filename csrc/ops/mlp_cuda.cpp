// bigmodel_fast::mlp_fwd_cuda, gated_mlp_fwd_cuda and their backward: what mlp_fwd and the others are for CUDA tensors
// where BMF_BACKEND=native asks for it, but for residuals and dropout. The last argument is the current stream:
// bigmodel_fast/ops/_cuda.py calls them.
#include "cuda/mlp.h"

#include <tuple>
#include <vector>

#include "ops/common.h"

namespace bmf::cuda {
namespace {

using Optional = std::optional<Tensor>;
using torch::stable::new_empty;

Matrix matrix(const Tensor& t, int64_t rows, int64_t columns) {
  const lt::DataType type = t.scalar_type() == ScalarType::Float      ? lt::kFloat32
                            : t.scalar_type() == ScalarType::BFloat16 ? lt::kBFloat16
                                                                      : lt::kFloat16;
  return {t.data_ptr(), type, rows, columns, t.dim() == 2 && t.size(0) > 1 ? t.stride(0) : columns};
}

// cuBLASLt takes rows that lie side by side or further apart.
Tensor rows_apart(const Tensor& t) {
  const bool overlap = t.size(0) > 1 && t.stride(0) < t.size(1);
  return overlap ? torch::stable::contiguous(t) : with_contiguous_rows(t);
}

// The operands as cuBLASLt takes them, in one dtype, held while the arguments point into them.
struct Call {
  const char* op;
  Tensor x, w1, wu, w2;
  std::vector<Tensor> kept;
  MlpArgs args{};

  Call(const char* name, const Tensor& input, const Tensor& first, const Tensor* up, const Tensor& second,
       const std::string& activation)
      : op(name),
        x(rows_apart(input)),
        w1(rows_apart(as_x(first))),
        wu(up != nullptr ? rows_apart(as_x(*up)) : first),
        w2(rows_apart(as_x(second))) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half, op,
                    ": x must be bfloat16 or float16 in CUDA C++");
    args.dtype = x.scalar_type() == ScalarType::BFloat16 ? Half::bfloat16 : Half::float16;
    args.activation = parse_activation(activation);
    args.rows = x.size(0);
    args.inputs = x.size(1);
    args.hidden = w1.size(0);
    args.outputs = w2.size(0);
    args.x = matrix(x, args.rows, args.inputs);
    args.w1 = matrix(w1, args.hidden, args.inputs);
    args.w2 = matrix(w2, args.outputs, args.hidden);
    if (up != nullptr) args.wu = matrix(wu, args.hidden, args.inputs);
    args.gradient = first.scalar_type() == ScalarType::Float ? lt::kFloat32 : args.type();
  }

  Tensor as_x(const Tensor& t) const { return torch::stable::to(t, x.scalar_type()); }
  void* bias(const Optional& b) {
    if (!b) return nullptr;
    kept.push_back(torch::stable::contiguous(as_x(*b)));
    return kept.back().data_ptr();
  }
  Tensor make(int64_t rows, int64_t columns) const { return new_empty(x, {rows, columns}); }
  void* scratch(int64_t rows, int64_t columns) {
    kept.push_back(make(rows, columns));
    return kept.back().mutable_data_ptr();
  }
  template <class Run>
  void launch(const Run& run, int64_t stream) {
    Tensor workspace = new_empty(x, {static_cast<int64_t>(kWorkspaceBytes)}, ScalarType::Byte);
    const char* error = run(args, {workspace.mutable_data_ptr(), kWorkspaceBytes}, reinterpret_cast<void*>(stream));
    STD_TORCH_CHECK(error == nullptr, error);
  }
};

void check_plain(const char* op, const Optional& residual, const Optional& seed) {
  STD_TORCH_CHECK(!residual && !seed, op, ": no residual and no dropout in CUDA C++");
}

// A gradient in the weight's dtype and its memory; both empty where neither it nor what comes with it is wanted.
Tensor like(const Tensor& weight, bool wanted, void*& data) {
  Tensor grad = new_empty(weight, {wanted ? weight.size(0) : 0, weight.size(1)});
  data = wanted ? grad.mutable_data_ptr() : nullptr;
  return grad;
}
Tensor bias_like(const Tensor& t, bool wanted, int64_t count, void*& data) {
  Tensor grad = new_empty(t, {wanted ? count : 0});
  data = wanted ? grad.mutable_data_ptr() : nullptr;
  return grad;
}

std::tuple<Tensor, Tensor> mlp_fwd(const Tensor& x, const Tensor& w1, const Optional& b1, const Tensor& w2,
                                   const Optional& b2, std::string activation, bool save_pre, const Optional& residual,
                                   const Optional& seed, double, int64_t stream) {
  check_plain("mlp", residual, seed);
  Call call("mlp", x, w1, nullptr, w2, activation);
  MlpArgs& args = call.args;
  args.b1 = call.bias(b1);
  args.b2 = call.bias(b2);
  Tensor y = call.make(args.rows, args.outputs), pre = call.make(save_pre ? args.rows : 0, args.hidden);
  args.y = y.mutable_data_ptr();
  args.z = save_pre ? pre.mutable_data_ptr() : nullptr;
  args.h = save_pre && args.fused_relu() ? args.z : call.scratch(args.rows, args.hidden);
  call.launch(mlp_forward, stream);
  return {y, pre};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_bwd(const Tensor& dy, const Tensor& x, const Tensor& w1,
                                                           const Tensor& w2, const Tensor& pre, std::string activation,
                                                           std::vector<bool> wants, int64_t stream) {
  check_contiguous(dy, "mlp", "dy");
  check_contiguous(pre, "mlp", "pre");
  Call call("mlp", x, w1, nullptr, w2, activation);
  MlpArgs& args = call.args;
  const bool fused = args.fused_gelu();
  Tensor dx = call.make(wants[0] ? args.rows : 0, args.inputs);
  Tensor dw1 = like(w1, wants[1] || (wants[2] && !fused), args.dw1), dw2 = like(w2, wants[3] || wants[4], args.dw2);
  Tensor db1 = bias_like(fused ? call.x : w1, wants[2], args.hidden, args.db1);
  Tensor db2 = bias_like(w2, wants[4], args.outputs, args.db2);
  args.z = pre.data_ptr();
  args.dy = dy.data_ptr();
  args.dx = wants[0] ? dx.mutable_data_ptr() : nullptr;
  args.h = call.scratch(args.rows, args.hidden);
  args.dz = call.scratch(args.rows, args.hidden);
  call.launch(mlp_backward, stream);
  const auto wide = [](const Tensor& t) { return torch::stable::to(t, ScalarType::Float); };
  return {dx, wants[1] ? dw1 : new_empty(w1, {0, args.inputs}), wide(db1),
          wants[3] ? dw2 : new_empty(w2, {0, args.hidden}), wide(db2)};
}

std::tuple<Tensor, Tensor, Tensor> gated_mlp_fwd(const Tensor& x, const Tensor& w_gate, const Tensor& w_up,
                                                 const Tensor& w_down, std::string activation, bool save,
                                                 const Optional& residual, const Optional& seed, double,
                                                 int64_t stream) {
  check_plain("gated_mlp", residual, seed);
  Call call("gated_mlp", x, w_gate, &w_up, w_down, activation);
  MlpArgs& args = call.args;
  Tensor y = call.make(args.rows, args.outputs);
  Tensor gate = call.make(save ? args.rows : 0, args.hidden), up = call.make(save ? args.rows : 0, args.hidden);
  args.y = y.mutable_data_ptr();
  args.z = save ? gate.mutable_data_ptr() : nullptr;
  args.u = save ? up.mutable_data_ptr() : call.scratch(args.rows, args.hidden);
  args.h = call.scratch(args.rows, args.hidden);
  call.launch(mlp_forward, stream);
  return {y, gate, up};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_mlp_bwd(const Tensor& dy, const Tensor& x, const Tensor& w_gate,
                                                         const Tensor& w_up, const Tensor& w_down, const Tensor& gate,
                                                         const Tensor& up, std::string activation,
                                                         std::vector<bool> wants, int64_t stream) {
  check_contiguous(dy, "gated_mlp", "dy");
  check_contiguous(gate, "gated_mlp", "gate");
  check_contiguous(up, "gated_mlp", "up");
  Call call("gated_mlp", x, w_gate, &w_up, w_down, activation);
  MlpArgs& args = call.args;
  Tensor dx = call.make(wants[0] ? args.rows : 0, args.inputs);
  Tensor dw_gate = like(w_gate, wants[1], args.dw1), dw_up = like(w_up, wants[2], args.dwu);
  Tensor dw_down = like(w_down, wants[3], args.dw2);
  args.z = gate.data_ptr();
  args.u = up.data_ptr();
  args.dy = dy.data_ptr();
  args.dx = wants[0] ? dx.mutable_data_ptr() : nullptr;
  args.h = call.scratch(args.rows, args.hidden);
  args.dz = call.scratch(args.rows, args.hidden);
  args.du = call.scratch(args.rows, args.hidden);
  call.launch(mlp_backward, stream);
  return {dx, dw_gate, dw_up, dw_down};
}

}  // namespace
}  // namespace bmf::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_fast, m) {
  m.def(
      "mlp_fwd_cuda(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, bool save_pre, Tensor? "
      "residual, Tensor? seed, float dropout_p, int stream) -> (Tensor y, Tensor pre)");
  m.def(
      "mlp_bwd_cuda(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor pre, str activation, bool[] wants, int stream) "
      "-> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)");
  m.def(
      "gated_mlp_fwd_cuda(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, str activation, bool save, Tensor? "
      "residual, Tensor? seed, float dropout_p, int stream) -> (Tensor y, Tensor gate, Tensor up)");
  m.def(
      "gated_mlp_bwd_cuda(Tensor dy, Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor gate, Tensor up, str "
      "activation, bool[] wants, int stream) -> (Tensor dx, Tensor dw_gate, Tensor dw_up, Tensor dw_down)");
}
STABLE_TORCH_LIBRARY_IMPL(bigmodel_fast, CUDA, m) {
  m.impl("mlp_fwd_cuda", TORCH_BOX(&bmf::cuda::mlp_fwd));
  m.impl("mlp_bwd_cuda", TORCH_BOX(&bmf::cuda::mlp_bwd));
  m.impl("gated_mlp_fwd_cuda", TORCH_BOX(&bmf::cuda::gated_mlp_fwd));
  m.impl("gated_mlp_bwd_cuda", TORCH_BOX(&bmf::cuda::gated_mlp_bwd));
}
