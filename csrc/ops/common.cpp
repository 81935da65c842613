#include "ops/common.h"

#include <vector>

#include "core/scratch.h"

namespace bmf {

Activation parse_activation(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  if (name == "sigmoid") return Activation::sigmoid;
  if (name == "tanh") return Activation::tanh;
  if (name == "relu2") return Activation::relu2;
  STD_TORCH_CHECK(false, "unknown activation '", name, "'");
}

Finish finish_of(const std::optional<Tensor>& residual, const std::optional<Tensor>& seed, double p, const char* op) {
  Finish finish{static_cast<float>(p), 0, {nullptr, 0, Dtype::float32}};
  if (p > 0) {
    STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op,
                    ": dropout needs one int64 seed");
    finish.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  }
  if (residual) {
    STD_TORCH_CHECK(residual->dim() == 2 && (residual->size(1) < 2 || residual->stride(1) == 1), op,
                    ": residual must be [rows, width] with contiguous rows");
    finish.residual = {residual->data_ptr(), residual->stride(0), kernel_dtype(*residual, op, "residual")};
  }
  return finish;
}

InputGradient input_gradient(const Tensor& dx, bool wanted, const std::optional<Tensor>& residual, const char* op) {
  const Dtype dtype = kernel_dtype(dx, op, "dx");
  if (!wanted) return {nullptr, dtype, nullptr};
  if (residual) {
    STD_TORCH_CHECK(residual->scalar_type() == dx.scalar_type() && residual->dim() == 2 &&
                        residual->size(0) == dx.size(0) && residual->size(1) == dx.size(1) && residual->is_contiguous(),
                    op, ": dx_residual must be contiguous, of dx's shape and dtype");
  }
  return {dx.mutable_data_ptr(), dtype, residual ? residual->const_data_ptr() : nullptr};
}

RowTensor row_tensor(const Tensor& t, const char* op, const char* name) {
  const Dtype dtype = kernel_dtype(t, op, name);
  const int64_t last = t.dim() - 1, width = t.size(last);
  const int64_t count = width == 0 ? 0 : t.numel() / width;
  int64_t stride = width, next = 0;  // next: the stride that the dimension before must have to be folded
  bool foldable = width == 1 || t.stride(last) == 1;
  bool seen = false;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (!seen) stride = t.stride(d);
    foldable = foldable && (!seen || t.stride(d) == next);
    next = t.stride(d) * t.size(d);
    seen = true;
  }
  if (!foldable && t.numel() > 0) return row_tensor(torch::stable::contiguous(t), op, name);
  return {t, Rows{t.data_ptr(), stride, dtype}, count, width};
}

Tensor empty(Sizes sizes, ScalarType dtype, const Tensor& like) {
  constexpr size_t kPooled = size_t{64} << 10;  // smaller ones are as cheap from malloc
  size_t bytes = dtype == ScalarType::BFloat16 ? 2 : 4;
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  if (bytes < kPooled) return torch::stable::new_empty(like, sizes, dtype);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * sizes[d];
  const Scratch::Held held = Scratch(bytes).release();
  return torch::stable::from_blob(held.data, sizes, strides, like.device(), dtype,
                                  [held](void*) { Scratch::give_back(held); });
}

}  // namespace bmf

// The library and its namespace; every operator file adds its own schema as a fragment.
STABLE_TORCH_LIBRARY(bigmodel_fast, library) { (void)library; }
