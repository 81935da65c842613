// bigmodel_fast::adamw_, sgd_, grad_norm and grad_scale_: lists of tensors as the kernels take them.
#include "cpu/optim.h"

#include <vector>

#include "ops/common.h"

namespace bmf {
namespace {

using Tensors = std::vector<Tensor>;

void* data(const Tensors& tensors, size_t i, const char* op) {
  STD_TORCH_CHECK(tensors[i].is_contiguous(), op, ": tensors must be contiguous");
  return tensors[i].mutable_data_ptr();
}

// Parameters with their gradients and states; lists that are empty stand for nothing.
std::vector<Parameter> collect(const char* op, const Tensors& params, const Tensors& grads, const Tensors& m,
                               const Tensors& v, const std::vector<int64_t>& steps) {
  std::vector<Parameter> out(grads.size());
  auto fits = [&](const Tensors& t) { return t.empty() || t.size() == grads.size(); };
  STD_TORCH_CHECK(fits(params) && fits(m) && fits(v) && (steps.empty() || steps.size() == grads.size()), op,
                  ": lists differ in length");
  for (size_t i = 0; i < grads.size(); ++i) {
    Parameter& p = out[i];
    p = {nullptr,
         data(grads, i, op),
         nullptr,
         nullptr,
         grads[i].numel(),
         Dtype::float32,
         kernel_dtype(grads[i], op, "a gradient"),
         steps.empty() ? 0 : steps[i]};
    if (params.empty()) continue;
    p.p = data(params, i, op);
    p.dtype = kernel_dtype(params[i], op, "a parameter");
    if (!m.empty()) p.m = data(m, i, op);
    if (!v.empty()) p.v = data(v, i, op);
    for (const Tensors* t : {&params, &m, &v})
      STD_TORCH_CHECK(t->empty() || ((*t)[i].numel() == p.count && (*t)[i].scalar_type() == params[i].scalar_type()),
                      op, ": a parameter, its gradient and its state differ in shape or dtype");
  }
  return out;
}

void adamw_step(Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq, std::vector<int64_t> steps,
                double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
                double grad_scale, bool stochastic_rounding) {
  const auto all = collect("adamw_", params, grads, exp_avg, exp_avg_sq, steps);
  adamw({all.data(), static_cast<int64_t>(all.size()), lr, beta1, beta2, eps, weight_decay, maximize,
         static_cast<float>(grad_scale), stochastic_rounding},
        torch_threads());
}

void sgd_step(Tensors params, Tensors grads, Tensors momentum_buffers, std::vector<int64_t> steps, double lr,
              double momentum, double dampening, double weight_decay, bool nesterov, bool maximize) {
  const auto all = collect("sgd_", params, grads, momentum_buffers, {}, steps);
  sgd({all.data(), static_cast<int64_t>(all.size()), lr, momentum, dampening, weight_decay, nesterov, maximize},
      torch_threads());
}

double norm_of(Tensors grads) {
  const auto all = collect("grad_norm", {}, grads, {}, {}, {});
  double norm = 0;
  grad_norm({all.data(), static_cast<int64_t>(all.size()), &norm}, torch_threads());
  return norm;
}

void scale(Tensors grads, double factor) {
  const auto all = collect("grad_scale_", {}, grads, {}, {}, {});
  grad_scale({all.data(), static_cast<int64_t>(all.size()), static_cast<float>(factor)}, torch_threads());
}

}  // namespace
}  // namespace bmf

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_fast, m) {
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, int[] steps, "
      "float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize, float grad_scale, "
      "bool stochastic_rounding) -> ()");
  m.def(
      "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, int[] steps, float lr, "
      "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize) -> ()");
  m.def("grad_norm(Tensor[] grads) -> float");
  m.def("grad_scale_(Tensor(a!)[] grads, float factor) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(bigmodel_fast, CPU, m) {
  m.impl("adamw_", TORCH_BOX(&bmf::adamw_step));
  m.impl("sgd_", TORCH_BOX(&bmf::sgd_step));
  m.impl("grad_norm", TORCH_BOX(&bmf::norm_of));
  m.impl("grad_scale_", TORCH_BOX(&bmf::scale));
}
